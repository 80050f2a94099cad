from __future__ import annotations

import asyncio

from kvrouter.ray.health import FleetHealth


def test_turns_leave_out_workers_that_are_down():
    health = FleetHealth(3)
    assert [health.next_in_turn() for _ in range(4)] == [0, 1, 2, 0]
    assert health.mark_down(1)
    assert not health.mark_down(1)
    assert [health.next_in_turn() for _ in range(4)] == [2, 0, 2, 0]
    health.mark_up(1)
    assert health.next_in_turn() == 1


def test_somebody_gets_a_turn_even_when_all_are_down():
    health = FleetHealth(2)
    health.mark_down(0)
    health.mark_down(1)
    assert health.next_in_turn() in (0, 1)
    assert health.least_loaded() is None


def test_least_loaded_of_those_that_are_up():
    health = FleetHealth(3)
    health.began(0)
    assert health.least_loaded() == 1
    assert health.least_loaded(but_not=[1]) == 2
    health.mark_down(2)
    assert health.least_loaded(but_not=[1]) == 0
    health.ended(0)
    assert health.least_loaded() == 0


async def test_waiting_for_a_worker():
    health = FleetHealth(1)
    health.mark_down(0)
    assert not await health.wait_for_any(0.01)
    waiting = asyncio.ensure_future(health.wait_for_any(30))
    await asyncio.sleep(0)
    health.mark_up(0)
    assert await waiting
