"""A short run of tests/chaos on simulated workers: every kind of fault, and nothing lost or believed wrongly after it.

``make chaos`` is the long one, on real vLLM too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.faults import ROUTER_FAULTS, WORKER_FAULTS

TESTS = Path(__file__).parents[1]


@pytest.mark.timeout(300)
def test_every_request_is_answered_once_or_refused_and_indexes_come_to_equal_the_caches(tmp_path):
    faults = 4 * len(WORKER_FAULTS + ROUTER_FAULTS)
    command = [sys.executable, "-m", "chaos", "--workers", "6", "--faults", str(faults), "--at-once", "4"]
    command += ["--users", "8", "--seed", "20", "--logs", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=280, check=False
    )
    said = f"{done.stdout}\n{done.stderr}"
    result = json.loads(done.stdout.splitlines()[-1]) if done.stdout else pytest.fail(said)
    assert result["faults"] == faults, said
    assert result["requests"] > 100, said
    assert result["requests"] == result["answered"] + result["refused"], said
    assert result["lost"] == result["duplicated"] == result["index_mismatched_blocks"] == 0, said
    # How soon is the long run's business: on a machine that others use, no time can be promised.
    assert result["seconds_to_consistent"] >= 0, said
