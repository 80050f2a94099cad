"""What the router is told when workers empty their caches, and when."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.ray.engine_fleet import EngineFleet


class Fleet(EngineFleet):
    """Three workers, of which only the answers exist."""

    dp_size = 3

    def __init__(self, answers):
        self.told = []
        self.answers = answers
        self._router = self

    async def reset(self, worker=None, until_cleared=False):
        self.told.append(("fence" if until_cleared else "reset", worker))

    async def _each(self, method, *args):
        self.told.append(method)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def test_the_fence_goes_up_first_and_comes_down_for_those_that_failed():
    fleet = Fleet([True, False, RuntimeError("lost")])
    assert not asyncio.run(fleet.reset_prefix_caches())
    assert fleet.told == [("fence", None), "reset_prefix_cache", ("reset", 1), ("reset", 2)]
    fleet = Fleet([True] * 3)
    assert asyncio.run(fleet.reset_prefix_caches())
    assert fleet.told == [("fence", None), "reset_prefix_cache"]


def test_an_error_leaves_no_fence_up():
    fleet = Fleet(OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        asyncio.run(fleet.reset_prefix_caches())
    assert fleet.told[2:] == [("reset", 0), ("reset", 1), ("reset", 2)]
