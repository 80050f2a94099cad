"""What the soak calls a leak."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak"
_spec = importlib.util.spec_from_file_location("soak_leaks", SOAK / "leaks.py")
leaks = sys.modules["soak_leaks"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(leaks)


def samples(memory, descriptors, seconds=120):
    return [leaks.Sample(t, memory(t), descriptors(t)) for t in range(seconds)]


def judge(taken, warm_up_s=20):
    return leaks.verdict("it", leaks.growth(taken, warm_up_s), 8.0, 8)


def test_flat_but_noisy_is_no_leak():
    assert judge(samples(lambda t: 100 + (t * 7919) % 13, lambda t: 40 + (t * 31) % 50)) == []


def test_growth_before_the_warm_up_does_not_count():
    assert judge(samples(lambda t: min(t, 20) * 10, lambda t: min(t, 20))) == []


def test_memory_that_grows_is_a_leak():
    grown = leaks.growth(samples(lambda t: 100 + t * 0.2, lambda t: 40), 20)
    assert grown.memory_slope_kib_per_min == pytest.approx(0.2 * 60 * 1024, rel=0.01)
    assert len(leaks.verdict("it", grown, 8.0, 8)) == 1


def test_descriptors_that_grow_are_a_leak_even_among_many_that_come_and_go():
    assert "descriptors" in judge(samples(lambda t: 100, lambda t: 40 + t // 5 + (t * 31) % 50))[0]


def test_too_short_a_run_is_said():
    with pytest.raises(ValueError, match="run longer"):
        leaks.growth(samples(lambda t: 1, lambda t: 1, seconds=22), 20)


def test_this_process_can_be_looked_at():
    watched = leaks.Watched("this", os.getpid())
    watched.look()
    files = watched.kinds()["file"]
    with open(os.devnull) as _:
        watched.look()
        assert watched.kinds()["file"] == files + 1
    first, second = watched.samples
    assert second.descriptors == first.descriptors + 1
    assert first.memory_mib > 1


def test_a_process_that_has_ended_is_said():
    with pytest.raises(RuntimeError, match="it has ended"):
        leaks.Watched("it", 2**22 + 1).look()
