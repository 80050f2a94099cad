"""Contract tests against a checkout of NeMo-RL: ``make test-nemo-rl NEMO_RL_SRC=...``."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

SOURCE = os.environ.get("NEMO_RL_SRC", "")
REASON = "NEMO_RL_SRC is not set: make test-nemo-rl NEMO_RL_SRC=<a checkout of NeMo-RL> runs these"
collect_ignore_glob = [] if SOURCE else ["test_nemo_rl_contract.py", "test_nemo_rl_vllm.py", "test_nemo_rl_worker.py"]

if SOURCE:
    import nemo_absent

    nemo_absent.install()


def pytest_report_header(config):
    return f"NeMo-RL: {SOURCE}" if SOURCE else f"NeMo-RL: {REASON}"


def digest_of_source() -> str:
    """Of every Python file of NeMo-RL's package."""
    digest = hashlib.sha256()
    for path in sorted(Path(SOURCE, "nemo_rl").rglob("*.py")):
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session", autouse=bool(SOURCE))
def _source_unchanged():
    before = digest_of_source()
    yield
    assert digest_of_source() == before, "a file of NeMo-RL was changed"


@pytest.fixture
def enabled():
    """NeMo-RL with the integration, and without it afterwards."""
    from kvrouter.integrations import nemo_rl

    nemo_rl.enable()
    yield nemo_rl
    nemo_rl.disable()
    assert "kvrouter" not in str(sys.modules["nemo_rl.algorithms.grpo"].VllmGeneration)
