"""The checked-in stub of the extension is what its generator makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).parents[2] / "python" / "kvrouter" / "_core.pyi"


def test_stub_is_current(tmp_path):
    pytest.importorskip("nanobind", reason="nanobind, which generates the stub, is not installed")
    made = tmp_path / "_core.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "kvrouter._core", "-o", str(made)]
    subprocess.run(command, check=True)
    assert made.read_text() == STUB.read_text(), "run: python -m nanobind.stubgen -m kvrouter._core -o " + STUB.name
