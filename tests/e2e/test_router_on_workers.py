"""The router in front of workers: what it predicts is what they serve from cache, and it lives through their faults.

Each test runs on simulated workers and, marked ``vllm``, on real ones.
"""

from __future__ import annotations

import json
import logging
import random
import time
import urllib.error
import urllib.request

import pytest

from kvrouter import KvRouter, compute_block_hashes
from kvrouter.vllm.launcher import WorkerFleet, launch_workers

BLOCK = 64
ENGINES = ["sim", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(params=ENGINES)
def fleet(request):
    return request.getfixturevalue(f"{request.param}_fleet")


def router_for(fleet: WorkerFleet, **options) -> KvRouter:
    return KvRouter(
        block_size=fleet.block_size,
        num_workers=len(fleet.workers),
        base_kv_events_port=fleet.base_kv_events_port,
        base_metrics_port=fleet.base_metrics_port,
        **options,
    )


def eventually(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come to hold"
        time.sleep(0.01)


def all_up(router: KvRouter) -> bool:
    return all(worker["state"] == "up" for worker in router.status()["workers"])


def complete(fleet: WorkerFleet, worker: int, tokens: list[int], max_tokens: int = 4, **fields) -> int:
    """Sends one request; returns the tokens that the worker says it took from its cache."""
    body = {"model": fleet.model, "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= fields
    request = urllib.request.Request(
        fleet.workers[worker].url + "/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        usage = json.load(answer)["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


def wait_for_quiet(router: KvRouter) -> None:
    """Until no worker has published a batch for a moment."""
    batches = None
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.15:
        now = [worker["events"] for worker in router.status()["workers"]]
        if now != batches:
            batches, quiet_since = now, time.monotonic()
        time.sleep(0.01)


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "kvrouter" and r.levelno >= logging.WARNING]


def mixed_prompts(count: int, seed: int) -> list[list[int]]:
    """Repeats, shared prefixes, unshared prompts, lengths at and off the block's multiples."""
    rng = random.Random(seed)

    def draw(n):
        return [rng.randrange(3, 1000) for _ in range(n)]

    prefixes = [draw(BLOCK * rng.randint(1, 8)) for _ in range(4)]
    prompts: list[list[int]] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.2 and prompts:
            prompts.append(rng.choice(prompts))
        elif kind < 0.8:
            prompts.append(rng.choice(prefixes) + draw(rng.choice([1, 10, 63, 64, 65, 128])))
        else:
            prompts.append(draw(rng.randint(1, 300)))
    return prompts


def test_predicted_overlap_is_what_the_worker_serves(fleet):
    fleet.reset_prefix_caches()
    prompts = mixed_prompts(120, seed=7)
    agreed = 0
    with router_for(fleet) as router:
        eventually(lambda: all_up(router))
        # A reset is told with the next batch, so that each worker is given one first.
        for worker in range(len(fleet.workers)):
            complete(fleet, worker, [5 + worker] * (BLOCK + 1))
        wait_for_quiet(router)
        for prompt in prompts:
            decision = router.route(prompt)
            cached = complete(fleet, decision.worker, prompt)
            # A worker computes at least the last token itself, so it never takes a whole prompt from its cache.
            usable = min(decision.overlap_blocks, (len(prompt) - 1) // BLOCK)
            agreed += cached == usable * BLOCK
            wait_for_quiet(router)
        status = router.status()
    assert agreed >= 0.99 * len(prompts), f"{agreed} of {len(prompts)}"
    assert all(
        worker["gaps"] == worker["malformed_batches"] == worker["skipped_events"] == 0 for worker in status["workers"]
    )
    assert all(worker["load_source"] == "messages" for worker in status["workers"])


def test_killed_worker_is_told_once_left_out_and_taken_back(fleet, caplog):
    prompt = mixed_prompts(1, seed=11)[0]
    with caplog.at_level(logging.INFO, "kvrouter"), router_for(fleet) as router:
        eventually(lambda: all_up(router))
        fleet.kill(1)
        answered = 0
        for _ in range(20):  # from before the router can know of it
            worker = router.best_worker(tokens=prompt)
            try:
                complete(fleet, worker, prompt)
            except (urllib.error.URLError, ConnectionError):
                worker = 0 if worker == 1 else 1
                complete(fleet, worker, prompt)
            answered += 1
        assert answered == 20
        eventually(lambda: router.status()["workers"][1]["state"] == "down")
        assert {router.best_worker(tokens=prompt) for _ in range(10)} == {0}
        time.sleep(4)  # long enough for a second warning, were there one
        assert len(warnings_of(caplog)) == 1, warnings_of(caplog)
        assert "worker 1 is gone" in warnings_of(caplog)[0]
        fleet.restart(1)
        eventually(lambda: all_up(router))
        fresh = iter(mixed_prompts(1000, seed=13))

        def learnt():  # a worker may publish before the router's subscription is back; it goes on publishing
            complete(fleet, 1, next(fresh))
            return router.status()["workers"][1]["cached_blocks"] > 0

        eventually(learnt)
        eventually(lambda: any("worker 1 is back" in r.getMessage() for r in caplog.records))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("missing", "warning"),
    [("load_publisher", "publishes no load"), ("kv_events", "publishes no KV events")],
)
def test_missing_publisher_is_told_once_and_requests_still_get_a_worker(engine, missing, warning, request, caplog):
    model = request.getfixturevalue("tiny_model") if engine == "vllm" else None
    caplog.set_level(logging.INFO, "kvrouter")
    with launch_workers(1, engine=engine, model=model, progress=False, **{missing: False}) as fleet:
        urls = [worker.url for worker in fleet.workers]
        with router_for(fleet, worker_urls=urls, startup_grace_s=1.0) as router:
            eventually(lambda: all_up(router))
            eventually(lambda: len(warnings_of(caplog)) >= 1)
            for _ in range(5):
                complete(fleet, router.best_worker(tokens=[9] * 200), [9] * 200)
            if missing == "load_publisher":
                # The queue that the router has filled itself is corrected by the worker's page.
                eventually(lambda: router.status()["workers"][0]["load_source"] == "metrics")
                eventually(lambda: router.status()["workers"][0]["waiting"] == 0)
                assert router.status()["workers"][0]["cached_blocks"] > 0
            else:
                assert router.status()["workers"][0]["cached_blocks"] == 0
                assert router.status()["workers"][0]["load_source"] == "messages"
            time.sleep(2)
            assert len(warnings_of(caplog)) == 1, warnings_of(caplog)
            assert warning in warnings_of(caplog)[0]


@pytest.mark.vllm
def test_cache_salt_that_the_router_was_not_told_is_named(vllm_fleet, caplog):
    rng = random.Random(91)
    prompt = [rng.randrange(3, 1000) for _ in range(4 * BLOCK + 1)]
    hashes = compute_block_hashes(prompt, BLOCK)
    with caplog.at_level(logging.WARNING), router_for(vllm_fleet) as router:
        eventually(lambda: all_up(router))
        for _ in range(64):
            overlap = int(router._core.index.find_matches(hashes)[0])
            cached = complete(vllm_fleet, 0, prompt, max_tokens=1, cache_salt="tenant-7")
            router.report_hit(0, overlap, len(prompt), cached, hashes=hashes)
        assert router.status()["workers"][0]["hits"]["cause"] == "other_namespace"
        eventually(lambda: any("cache_salt" in text for text in warnings_of(caplog)))
