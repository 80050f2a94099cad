"""One real vLLM server with two data-parallel ranks: each rank is a worker, whose events, hits and load are its own."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator

import pytest

from kvrouter import _core
from kvrouter.prediction import expected_cached_tokens
from kvrouter.serve import KvService, ServeOptions
from kvrouter.service_client import ServiceClient
from kvrouter.vllm.launcher import Worker, launch_workers
from kvrouter.vllm.ports import find_free_ports
from kvrouter.vllm.tiny_model import TinyModel
from kvrouter.worker_spec import WorkerSpec

pytestmark = pytest.mark.vllm
RANKS = 2
BLOCK = 64


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    # The ports of rank 1 are those of rank 0 plus 1, also the replay ports 200 above: all of them have to be free.
    ports = find_free_ports(8)
    base = ports.base
    ports.release()
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(RANKS))
    with launch_workers(
        1,
        model=tiny_model,
        base_kv_events_port=base,
        base_metrics_port=base + 4,
        extra_args=("--data-parallel-size", str(RANKS)),
        env={"VLLM_CPU_OMP_THREADS_BIND": bind},
        log_dir=tmp_path_factory.mktemp("logs"),
    ) as fleet:
        yield fleet.workers[0]


def spec_of(server: Worker) -> WorkerSpec:
    return WorkerSpec(
        server.url, server.kv_events_endpoint, server.replay_endpoint, server.load_endpoint, data_parallel_size=RANKS
    )


@pytest.fixture(scope="module")
def gateway(server: Worker) -> Iterator[KvService]:
    with KvService(ServeOptions(workers=[spec_of(server)], port=0, block_size=BLOCK, max_workers=RANKS)) as service:
        wait_for(lambda: [worker["state"] for worker in status(service)] == ["up"] * RANKS, "both ranks to be up")
        yield service


def status(service: KvService) -> list[dict]:
    return ServiceClient(service.url).workers()["workers"]


def wait_for(condition, what, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def complete(url, prompt, rank=None):
    """(cached prompt tokens, headers) of a completion of one token."""
    body = {"model": "kvrouter-tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if rank is not None:
        headers["X-data-parallel-rank"] = str(rank)
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        details = json.load(answer)["usage"].get("prompt_tokens_details") or {}
        return details.get("cached_tokens") or 0, answer.headers


def prompt(seed, blocks=6):
    return [3 + (seed * 7919 + n * 31) % 500 for n in range(blocks * BLOCK + 10)]


def queries_of_ranks(server: Worker) -> list[int]:
    """Prompt tokens that each rank has looked up in its prefix cache, by vLLM's own counters."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counts = [0] * RANKS
    for line in lines:
        if line.startswith("vllm:prefix_cache_queries_total{"):
            rank = int(line.partition('engine="')[2].partition('"')[0])
            counts[rank] += int(float(line.rpartition(" ")[2]))
    return counts


def test_the_rank_that_is_asked_for_is_the_one_that_answers(server: Worker):
    for rank in range(RANKS):
        before = queries_of_ranks(server)
        complete(server.url, prompt(100 + rank), rank)
        wait_for(lambda before=before: queries_of_ranks(server) != before, "vLLM's counters")
        changed = [n for n in range(RANKS) if queries_of_ranks(server)[n] != before[n]]
        assert changed == [rank]
        # The other rank shares nothing with it.
        assert complete(server.url, prompt(100 + rank), 1 - rank)[0] == 0
        assert complete(server.url, prompt(100 + rank), rank)[0] == 6 * BLOCK


def test_events_of_each_rank_come_from_its_own_port(server: Worker):
    ranks = spec_of(server).ranks()
    router = _core.Router(
        block_size=BLOCK,
        kv_events=[rank.kv_events for rank in ranks],
        load=[rank.load for rank in ranks],
        http=[""] * RANKS,
    )
    router.start()
    try:
        for rank in range(RANKS):
            tokens = prompt(200 + rank)
            hashes = _core.compute_block_hashes(tokens, BLOCK)
            deadline = time.monotonic() + 90
            # What is published before the subscription is there is lost: new blocks until the first are seen.
            while router.index.find_matches(hashes)[rank] == 0:
                assert time.monotonic() < deadline, f"no KV events of rank {rank}"
                tokens = [3 + tokens[0] % 500, *tokens]
                hashes = _core.compute_block_hashes(tokens, BLOCK)
                complete(server.url, tokens, rank)
                time.sleep(0.2)
            wait_for(
                lambda hashes=hashes, rank=rank: router.index.find_matches(hashes)[rank] == len(hashes), "all blocks"
            )
            assert router.index.find_matches(hashes)[1 - rank] == 0
        workers = json.loads(router.status_json())["workers"]
        assert [worker["state"] for worker in workers] == ["up"] * RANKS
        wait_for(
            lambda: all(worker["load_messages"] > 0 for worker in json.loads(router.status_json())["workers"]),
            "load messages of both ranks",
        )
    finally:
        router.stop()


def test_hits_are_those_that_the_gateway_predicted(gateway: KvService, server: Worker):
    prompts = [prompt(300 + n) for n in range(6)]
    for tokens in prompts:
        complete(gateway.url, tokens)
    wait_for(lambda: sum(worker["cached_blocks"] for worker in status(gateway)) >= 6 * len(prompts), "the events")
    served = set()
    for tokens in prompts:
        cached, headers = complete(gateway.url, tokens)
        predicted = expected_cached_tokens(int(headers["x-kvrouter-overlap-blocks"]), len(tokens), BLOCK)
        assert cached == predicted == 6 * BLOCK
        served.add(headers["x-kvrouter-worker-id"])
    assert len(served) == RANKS
