"""The Python environment that routed workers run in: the one of NeMo-RL's own vLLM workers."""

from __future__ import annotations

import subprocess
import sys


def register_worker(routed: str, original: str) -> None:
    """Has NeMo-RL run actors of class ``routed`` where it runs those of class ``original``.

    NeMo-RL names an environment after the class that runs in it; a new name would have it build another one.
    Raises RuntimeError when kvrouter is not installed there, with the command that installs it.
    """
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, get_actor_python_env
    from nemo_rl.utils.venvs import create_local_venv_on_each_node

    python = get_actor_python_env(original)
    if python.startswith("uv"):
        python = create_local_venv_on_each_node(py_executable=python, venv_name=original)
    if python != sys.executable:
        _check_installed(python)
    ACTOR_ENVIRONMENT_REGISTRY[routed] = python


def _check_installed(python: str) -> None:
    done = subprocess.run([python, "-c", "import kvrouter"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(
            f"the vLLM workers' environment ({python}) cannot import kvrouter ({reason[0]}): install it there, "
            f"e.g. uv pip install --python {python} kvrouter"
        )
