"""verl's load-balancer tests with kvrouter's in place: those of the installed package, or of a checkout ($VERL_SRC)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path("tests/experimental/agent_loop/test_basic_agent_loop.py")
NUM_TESTS = 15  # of verl 0.9.1


def verl_root() -> Path:
    """The folder that has verl's packages ``verl`` and ``tests``."""
    if os.environ.get("VERL_SRC"):
        return Path(os.environ["VERL_SRC"])
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed: make test-verl, or set VERL_SRC to a checkout")
    return Path(spec.origin).parents[1]


def test_verls_own_load_balancer_tests_pass_with_ours_in_place():
    root = verl_root()
    if not (root / TESTS).is_file():
        pytest.skip(f"{root} has no {TESTS}: set VERL_SRC to a checkout of verl")
    for module in ("datasets", "hydra", "peft", "tensordict", "torchdata"):
        if find_spec(module) is None:
            pytest.skip(f"verl's tests need {module}: make test-verl")
    path = os.pathsep.join([str(Path(__file__).parent), str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "verl_in_place", "-c", os.devnull]
    command += ["--rootdir", str(root), "-q", "-k", "LoadBalancer", str(root / TESTS)]
    env = {**os.environ, "PYTHONPATH": path, "ROLLOUT_NAME": "vllm", "RAY_ADDRESS": "local"}
    ran = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=540, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= NUM_TESTS, ran.stdout[-2000:]
