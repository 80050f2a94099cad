"""The embedded worker caches, evicts and tells as real vLLM does: same requests, same hits, same blocks held."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass

import msgpack
import pytest
import zmq

from kvrouter.vllm.launcher import WorkerFleet, launch_workers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BLOCK = 64
NUM_BLOCKS = 40  # 39 usable: eight of the prompts below fill them, so most of the list runs on evicted ground
MAX_MODEL_LEN = 1536
CHUNK = 512  # longer prompts are computed in several steps
SETTLED_S = 0.25


@dataclass
class Step:
    """One request: a fixed prompt, or the whole of an earlier request (its output included) and more."""

    prompt: list[int]
    max_tokens: int
    after: int | None = None


def steps() -> list[Step]:
    """Every way in which a request can meet the cache, then a long random mix over few blocks."""
    rng = random.Random(20)
    words = lambda count: [rng.randrange(3, 1024) for _ in range(count)]  # noqa: E731
    base, other = words(5 * BLOCK), words(8 * BLOCK + 17)
    result = [
        Step(base, 2),  # cold
        Step(base, 2),  # whole blocks, all cached: the last one is computed and told again
        Step(base, 2),
        Step(base[:-1], 2),  # one token short of a whole block
        Step(base + words(1), 2),
        Step(base + words(40), 80),  # generation crosses block boundaries
        Step(words(3), 5, after=5),  # goes on from what was generated
        Step(base[: 2 * BLOCK] + words(70), 3),  # branches off inside a cached prefix
        Step(words(10), 1),  # shorter than a block
        Step(words(BLOCK - 1), 3),  # the block fills with generated tokens
        Step(words(1), 2, after=9),
        Step(words(BLOCK), 1),
        Step(other, 4),
        Step(other, 4),
        Step(words(20 * BLOCK), 2),  # several chunks; evicts
        Step(base, 2),
        Step(other, 2),
        Step(words(22 * BLOCK + 5), 60),
        Step(base, 1),
        Step(other, 1),
    ]
    families = [words(rng.randrange(1, 9) * BLOCK + rng.choice([0, 0, 1, 30, 63])) for _ in range(9)]
    for _ in range(45):
        if rng.random() < 0.2:
            result.append(Step(words(rng.randrange(1, 30)), rng.choice([1, 2, 70]), after=rng.randrange(len(result))))
            continue
        family = rng.choice(families)
        cut = rng.choice([len(family), len(family), rng.randrange(1, len(family) + 1)])
        tail = words(rng.choice([0, 0, 1, 20, BLOCK, 150]))
        result.append(Step(family[:cut] + tail, rng.choice([1, 2, 5, 66])))
    return result


class HeldBlocks:
    """The blocks that a worker's KV events say it holds."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.socket = context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(endpoint)
        self.held: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.next_sequence = 0

    def settle(self) -> None:
        """Reads until nothing has come for a while."""
        while self.socket.poll(int(SETTLED_S * 1000)):
            _, sequence, payload = self.socket.recv_multipart()
            assert int.from_bytes(sequence, "big") == self.next_sequence, "a batch was missed"
            self.next_sequence += 1
            for event in msgpack.unpackb(payload)[1]:
                self.counts[event["type"]] += 1
                if event["type"] == "BlockStored":
                    assert len(event["token_ids"]) == BLOCK * len(event["block_hashes"])
                    self.held |= set(event["block_hashes"])
                elif event["type"] == "BlockRemoved":
                    self.held -= set(event["block_hashes"])
                else:
                    self.held.clear()


class Driver:
    """Runs the list on one worker, going on from that worker's own outputs."""

    def __init__(self, fleet: WorkerFleet, context: zmq.Context) -> None:
        self.fleet = fleet
        self.url = fleet.workers[0].url
        self.blocks = HeldBlocks(context, fleet.workers[0].kv_events_endpoint)
        self.whole: list[list[int]] = []

    def run(self, step: Step) -> tuple[int, int]:
        """Prompt tokens and cached tokens of the request, as the worker reports them."""
        prompt = step.prompt if step.after is None else self.whole[step.after] + step.prompt
        prompt = prompt[-(MAX_MODEL_LEN - step.max_tokens) :]
        body = {
            "model": self.fleet.model,
            "prompt": prompt,
            "max_tokens": step.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self.post("/v1/completions", body)
        output = answer["choices"][0]["token_ids"]
        usage = answer["usage"]
        assert len(output) == step.max_tokens == usage["completion_tokens"]
        self.whole.append(prompt + output)
        self.blocks.settle()
        return usage["prompt_tokens"], (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    def post(self, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def counter(self, name: str) -> float:
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@pytest.fixture(scope="module")
def drivers(tiny_model, tmp_path_factory):
    settings = {
        "num_gpu_blocks": NUM_BLOCKS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": CHUNK,
        "block_size": BLOCK,
        "load_publisher": False,
        "progress": False,
    }
    context = zmq.Context()
    logs = tmp_path_factory.mktemp("logs")
    with (
        launch_workers(1, engine="vllm", model=tiny_model, log_dir=logs / "vllm", **settings) as real,
        launch_workers(
            1, engine="sim", log_dir=logs / "sim", extra_args=("--time-scale", "0.05", "--seed", "7"), **settings
        ) as sim,
    ):
        pair = Driver(real, context), Driver(sim, context)
        time.sleep(0.5)  # subscriptions reach the publishers
        yield pair
    context.destroy(linger=0)


def test_same_requests_same_hits_and_same_blocks_held(drivers):
    real, sim = drivers
    hits = evicted_early = 0
    for number, step in enumerate(steps()):
        expected, got = real.run(step), sim.run(step)
        assert got == expected, f"request {number}: (prompt, cached) tokens are {got}, real vLLM's are {expected}"
        assert len(sim.blocks.held) == len(real.blocks.held), f"blocks held after request {number}"
        assert sim.blocks.counts == real.blocks.counts, f"events up to request {number}"
        hits += expected[1] > 0
        evicted_early = evicted_early or (real.blocks.counts["BlockRemoved"] > 0 and number)
    # The list has to have done what it is for.
    assert hits > 20 and real.blocks.counts["BlockRemoved"] > 100 and 0 < evicted_early < 30
    for name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_total"):
        assert sim.counter(name) == real.counter(name) > 0, name


def test_reset_is_told_with_the_next_batch(drivers):
    real, sim = drivers
    step = Step([5] * (3 * BLOCK), 2)
    for driver in (real, sim):
        driver.run(step)
        driver.blocks.settle()
        before = set(driver.blocks.held)
        assert driver.post("/reset_prefix_cache") == {"success": True}
        driver.blocks.settle()
        assert driver.blocks.held == before
        assert driver.run(step)[1] == 0
        assert len(driver.blocks.held) == 3
        assert driver.blocks.counts["AllBlocksCleared"] == 1
