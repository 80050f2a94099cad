"""One run: a fleet, two routers, a load, faults, and what was found at the end."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path

from chaos.checker import Checker, SimTruth, Truth
from chaos.clock import build_shim
from chaos.faults import Fleet, Scene
from chaos.fleet import SimFleet, make_places
from chaos.load import Load
from chaos.report import Report
from chaos.routers import GatewayRouter, LocalRouter
from chaos.schedule import Schedule
from chaos.workload import ExpectedOutput, Workload

_GIVE_UP_AFTER_S = 30.0


@dataclass
class Options:
    """Of a run.

    Attributes:
        workers, faults, at_once: how many workers, faults, and faults at a time.
        kinds: names of the faults to draw from; empty: all.
        users, think_s: clients with one request at a time, and their mean pause, seconds.
        seed: of faults and requests.
        folder: for logs.
    """

    workers: int
    faults: int
    at_once: int
    kinds: frozenset[str]
    users: int
    think_s: float
    seed: int
    folder: Path


async def run_sim(options: Options) -> Report:
    """Faults on simulated workers."""
    rng = random.Random(options.seed)
    shim = build_shim(options.folder)
    fleet = SimFleet(make_places(options.workers, rng), options.folder, shim)
    try:
        await asyncio.gather(*(fleet.start(place.number) for place in fleet.places))
        return await _run(options, fleet, SimTruth(), ExpectedOutput(), rng, shim)
    finally:
        await fleet.close()


async def run_vllm(options: Options) -> Report:
    """Faults on real vLLM workers."""
    from chaos.real import EventTruth, VllmFleet

    rng = random.Random(options.seed)
    shim = build_shim(options.folder)
    fleet = await asyncio.to_thread(VllmFleet, options.workers, options.folder, rng)
    truth = EventTruth(fleet.places)
    fleet.on_kill = truth.forget
    try:
        return await _run(options, fleet, truth, None, rng, shim)
    finally:
        truth.close()
        await fleet.close()


async def _run(
    options: Options, fleet: Fleet, truth: Truth, expected: ExpectedOutput | None, rng: random.Random, shim: Path
) -> Report:
    places = fleet.places
    endpoints = [place.proxied for place in places]
    gateway = GatewayRouter(endpoints, fleet.block_size, options.folder, shim)
    local = LocalRouter(endpoints, fleet.block_size)
    try:
        await asyncio.gather(*(place.listen() for place in places))
        await asyncio.gather(gateway.start(), local.start())
        workload = Workload(options.seed, fleet.block_size, families=2 * options.workers)
        load = Load(workload, gateway, local, endpoints, fleet.model, expected, options.seed)
        load.start(options.users, options.think_s)
        schedule = Schedule(
            Scene(fleet, gateway, local, rng), options.faults, options.at_once, options.seed, options.kinds
        )
        await schedule.run()
        healed = time.monotonic()
        await load.stop()
        checker = Checker(places, truth, [gateway, local])
        consistency, seconds = await checker.wait_consistent(healed, _GIVE_UP_AFTER_S)
        return Report(options.seed, schedule.inflicted, load.sent, load.ledger, consistency, seconds)
    finally:
        await asyncio.gather(gateway.kill(), local.kill())
        for place in places:
            place.cut()
