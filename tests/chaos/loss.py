"""``python -m chaos.loss``: what losing 10% of the event messages costs in cache hits, on simulated workers.

The same requests, once without loss and once with it.  The first half of each is for warming up and for recovery; the
hit rate is that of the second.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path

from chaos.clock import build_shim
from chaos.fleet import SimFleet, make_places
from chaos.load import Load, send_all
from chaos.proxies import MessageFaults
from chaos.routers import GatewayRouter
from chaos.workload import ChaosRequest, ExpectedOutput, Workload

_LARGEST_DIFFERENCE = 1.0  # points of hit rate


def draw(seed: int, count: int, block_size: int, families: int) -> list[ChaosRequest]:
    """``count`` requests, in which conversations go on from the answers that there will be."""
    workload, expected = Workload(seed, block_size, families), ExpectedOutput()
    requests = []
    for _ in range(count):
        request = workload.next()
        workload.answered(request, expected.of(request))
        requests.append(request)
    return requests


async def measure(
    requests: list[ChaosRequest], lost: float, workers: int, users: int, folder: Path
) -> tuple[float, int]:
    """The hit rate of the second half, 0 to 1, and how many event messages were lost."""
    rng = random.Random(0)
    shim = build_shim(folder)
    fleet = SimFleet(make_places(workers, rng), folder, shim)
    endpoints = [place.proxied for place in fleet.places]
    gateway = GatewayRouter(endpoints, fleet.block_size, folder, shim)
    try:
        await asyncio.gather(*(fleet.start(place.number) for place in fleet.places))
        for place in fleet.places:
            await place.listen()
            place.links["kv_events"].faults = MessageFaults(lost=lost)
        await gateway.start()
        workload = Workload(0, fleet.block_size, 1)
        load = Load(workload, gateway, None, endpoints, fleet.model, ExpectedOutput(), 0)
        half = len(requests) // 2
        await send_all(load, requests[:half], users)
        before = load.ledger.prompt_tokens, load.ledger.cached_tokens
        await send_all(load, requests[half:], users)
        if load.ledger.reasons:
            raise RuntimeError(f"not all requests were answered: {dict(load.ledger.reasons)}")
        prompt, cached = load.ledger.prompt_tokens - before[0], load.ledger.cached_tokens - before[1]
        return cached / prompt, sum(place.links["kv_events"].messages_lost for place in fleet.places)
    finally:
        await asyncio.gather(fleet.close(), gateway.kill())
        for place in fleet.places:
            place.cut()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 when the hit rates are more than a point apart."""
    parser = argparse.ArgumentParser(
        prog="python -m chaos.loss", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--lost", type=float, default=0.1, help="share of the event messages")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    requests = draw(given.seed, given.requests, block_size=16, families=8 * given.workers)
    rates, losses = [], 0
    for lost in (0.0, given.lost):
        with tempfile.TemporaryDirectory() as folder:
            rate, losses = asyncio.run(measure(requests, lost, given.workers, given.users, Path(folder)))
        rates.append(100 * rate)
        print(f"{lost:.0%} of the event messages lost ({losses}): hit rate {100 * rate:.2f}%", file=sys.stderr)
    difference = rates[0] - rates[1]
    print(
        json.dumps(
            {
                "requests": given.requests,
                "messages_lost": losses,
                "hit_rate_percent": round(rates[0], 2),
                "hit_rate_with_loss_percent": round(rates[1], 2),
                "difference_points": round(difference, 2),
            }
        )
    )
    return 0 if difference <= _LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
