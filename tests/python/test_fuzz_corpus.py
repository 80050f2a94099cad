"""The Python fuzz targets, over their corpora and over random input, without a fuzzer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FUZZ / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = load("python_targets").TARGETS
INPUTS = [(name, path.name) for name in TARGETS for path in sorted((FUZZ / "corpus" / name).iterdir())]


@pytest.mark.parametrize(("target", "name"), INPUTS)
def test_corpus(target, name, tmp_path):
    TARGETS[target]((FUZZ / "corpus" / target / name).read_bytes(), tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_corpus(target, tmp_path):
    seeds = [path.read_bytes() for path in sorted((FUZZ / "corpus" / target).iterdir())]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def run(data):
        seed = data.draw(st.sampled_from(seeds))
        at = data.draw(st.integers(0, len(seed)))
        until = data.draw(st.integers(at, min(len(seed), at + 16)))
        TARGETS[target](seed[:at] + data.draw(st.binary(max_size=16)) + seed[until:], tmp_path)

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_depth_bomb(target, tmp_path):
    for bomb in (b"[" * 200_000, b"0" + b"[" * 200_000, b'{"a":' * 200_000):
        if target != "grpo_config":  # YAML's parser takes minutes over it
            TARGETS[target](bomb, tmp_path)


def test_every_fuzz_target_is_run():
    run = load("run")
    assert set(run.PYTHON) == set(TARGETS)
    assert set(run.CPP) == {
        path.stem for path in FUZZ.glob("*.cc") if path.stem not in ("replay_main", "libfuzzer_main")
    }
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == {*run.CPP, *run.PYTHON}
