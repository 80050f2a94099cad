"""The embedded worker's engine, step by step against vLLM's own scheduler: many requests at once, scarce blocks.

vLLM's ``Scheduler`` runs here without a model: it is given the tokens that the embedded engine generates.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvrouter._core import SimEngine

pytestmark = pytest.mark.vllm

BLOCK = 32


class RealScheduler:
    """vLLM's scheduler with a recording event publisher."""

    def __init__(self, model, num_blocks: int, max_num_seqs: int, budget: int, max_model_len: int) -> None:
        import torch
        from vllm.config.kv_events import KVEventsConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = EngineArgs(
            model=str(model.path),
            tokenizer=str(model.tokenizer),
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=True,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
        self.scheduler = Scheduler(
            config,
            KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.batches: list = []
        self.scheduler.kv_event_publisher = SimpleNamespace(publish=lambda batch: self.batches.append(batch.events))
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)

    def add(self, number: int, prompt: list[int], max_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add_request(Request(str(number), prompt, params, None, block_hasher=self.hasher))

    def cancel(self, number: int) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(str(number), RequestStatus.FINISHED_ABORTED)

    def step(self, tokens: dict[int, int]) -> tuple[dict[int, int], list]:
        """Schedules a step whose requests get the given tokens; what each computes, and the events."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        scheduled = {int(name): count for name, count in output.num_scheduled_tokens.items()}
        names = list(output.num_scheduled_tokens)
        sampled = [[tokens[int(name)]] if int(name) in tokens else [] for name in names]
        result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled_token_ids=sampled)
        self.scheduler.update_from_output(output, result)
        events = [event for batch in self.batches for event in batch]
        self.batches.clear()
        return scheduled, events


class SameNames:
    """Holds the engines' block hashes together: each of one is one of the other, always the same."""

    def __init__(self) -> None:
        self.sim_of: dict[int, int] = {}
        self.real_of: dict[int, int] = {}

    def check(self, real: int | None, sim: int | None) -> None:
        assert (real is None) == (sim is None)
        if real is not None and sim is not None:
            assert self.sim_of.setdefault(real, sim) == sim
            assert self.real_of.setdefault(sim, real) == real

    def check_events(self, real: list, sim: list) -> None:
        assert [type(event).__name__ for event in real] == [kind for kind, _, _ in sim]
        for event, (kind, hashes, parent) in zip(real, sim, strict=True):
            if kind == "AllBlocksCleared":
                continue
            assert len(event.block_hashes) == len(hashes)
            for pair in zip(event.block_hashes, hashes, strict=True):
                self.check(*pair)
            if kind == "BlockStored":
                self.check(event.parent_block_hash, parent)


@pytest.mark.parametrize("seed", range(8))
def test_same_steps_same_events_same_load(tiny_model, seed):
    rng = random.Random(seed)
    num_blocks = rng.choice([20, 30, 60])
    max_num_seqs, budget = rng.choice([2, 5, 16]), rng.choice([64, 200, 512])
    max_model_len = (num_blocks - 1) * BLOCK
    real = RealScheduler(tiny_model, num_blocks, max_num_seqs, budget, max_model_len)
    sim = SimEngine(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        seed=seed,
    )
    names = SameNames()
    families = [[rng.randrange(3, 1024) for _ in range(rng.randrange(1, 8) * BLOCK)] for _ in range(4)]
    alive: set[int] = set()
    left, resets, hits, steps = 150, 0, 0, 0
    while left or sim.has_work:
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 6]) if left else 0):
            family = rng.choice(families)
            prompt = family[: rng.choice([len(family), rng.randrange(1, len(family) + 1)])]
            prompt = prompt + [rng.randrange(3, 1024) for _ in range(rng.choice([0, 0, 1, 40]))]
            max_tokens = rng.choice([1, 2, 20, 100])
            number = sim.add(prompt, max_tokens)
            real.add(number, prompt, max_tokens)
            alive.add(number)
            left = max(left - 1, 0)
        if alive and rng.random() < 0.02:
            number = rng.choice(sorted(alive))
            sim.cancel(number)
            real.cancel(number)
            alive.discard(number)
        if rng.random() < 0.01:
            done = sim.reset_prefix_cache()
            assert done == real.scheduler.reset_prefix_cache()
            resets += done
        if not sim.has_work:
            assert not real.scheduler.has_unfinished_requests()
            continue
        mine = sim.step()
        scheduled, events = real.step(mine["tokens"])
        where = f"step {steps}"
        assert mine["scheduled"] == scheduled, where
        names.check_events(events, mine["events"])
        assert (sim.num_running, sim.num_waiting) == real.scheduler.get_request_counts(), where
        assert sim.kv_usage == pytest.approx(real.scheduler.kv_cache_manager.usage), where
        hits += sum(cached > 0 for cached in mine["cached_tokens"].values())
        alive = {number for number in alive if str(number) in real.scheduler.requests}
        steps += 1
    assert steps > 100 and hits > 50, "the run has not been what it is for"
    if num_blocks == 20 and max_num_seqs > 2:
        assert sim.num_preemptions > 0
