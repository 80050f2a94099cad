"""A program that uses the router as a library: decides, resets, stops and starts it, until its input ends.

``python tests/soak/library_router.py BLOCK_SIZE KV_EVENTS_PORT...``: of workers whose load port lies LOAD_PORT_OFFSET
above.  Every second it prints a line of JSON.
"""

from __future__ import annotations

import json
import select
import sys
import time

from traffic import LOAD_PORT_OFFSET, Conversation

from kvrouter import KvRouter


def lifetime(ports: list[int], block_size: int, seconds: float, seed: int) -> tuple[int, list[float]]:
    """One router from start to close.  Returns the number of decisions and their times in microseconds."""
    times: list[float] = []
    decisions = 0
    base = {"base_kv_events_port": 1000, "base_metrics_port": 1000 + LOAD_PORT_OFFSET}
    with KvRouter(
        block_size,
        len(ports),
        worker_addresses=["127.0.0.1"] * len(ports),
        worker_ports=ports,
        policy="adaptive",
        **base,
    ) as router:
        conversation = Conversation(seed)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            prompt = conversation.prompt()
            began = time.perf_counter()
            decision = router.route(prompt)
            times.append((time.perf_counter() - began) * 1e6)
            router.first_token(decision.ticket)
            router.complete(decision.ticket, output_tokens=8)
            router.route_batch([prompt] * 8)
            decisions += 9
            conversation.answered([1] * 8)
            if len(times) % 50 == 0:
                router.reset(len(times) // 50 % len(ports), until_cleared=True)
                router.reset()
                router.status()
            time.sleep(0.005)
    return decisions, times


def main() -> None:
    """Runs until standard input ends."""
    block_size, *ports = map(int, sys.argv[1:])
    seed = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        decisions, times = lifetime(ports, block_size, 1.0, seed % 40)
        seed += 1
        print(json.dumps({"decisions": decisions, "p50_us": sorted(times)[len(times) // 2]}), flush=True)


if __name__ == "__main__":
    main()
