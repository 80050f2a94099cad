"""Rollouts through verl's own client over simulated servers, by verl's load balancer and by kvrouter's.

::

    python -m kvrouter.integrations.verl.bench

Each server is a Ray actor with a simulated engine inside, which answers ``generate`` as verl's vLLM server does.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from kvrouter.integrations.verl.seams import check_version

BLOCK_SIZE = 16
_ROUTER_YAML = Path(__file__).with_name("router.yaml")


class SimServer:
    """A rollout server over the simulated engine: the part of verl's ``vLLMHttpServer`` that a rollout uses."""

    def __init__(self, options: dict[str, Any]) -> None:
        import aiohttp
        from verl.workers.rollout.replica import TokenOutput

        from kvrouter.sim import SimWorker

        self._worker = SimWorker(
            kv_events_endpoint="tcp://127.0.0.1:0",
            replay_endpoint="tcp://127.0.0.1:0",
            block_size=BLOCK_SIZE,
            **options,
        )
        self._aiohttp, self._output = aiohttp, TokenOutput
        self._session: Any = None
        source = SimpleNamespace(endpoint=self._worker.kv_events_endpoint, replay_endpoint=self._worker.replay_endpoint)
        # What kvrouter asks of AsyncLLM.
        self.engine = SimpleNamespace(
            get_kv_event_sources=lambda: {0: source},
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK_SIZE)),
            log_stats=True,
        )
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def address(self) -> str:
        """``host:port``, the server's name in verl."""
        return f"127.0.0.1:{self._worker.port}"

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **ignored: Any
    ) -> Any:
        """One sample.  Returns verl's ``TokenOutput``."""
        if self._session is None:
            self._session = self._aiohttp.ClientSession(connector=self._aiohttp.TCPConnector(limit=0))
        body = {
            "model": "sim",
            "prompt": prompt_ids,
            "max_tokens": sampling_params["max_tokens"],
            "seed": sampling_params["seed"],
            "ignore_eos": True,
            "return_token_ids": True,
        }
        async with self._session.post(f"http://{self.address()}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            result = await answer.json()
        cached = (result["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.prompt_tokens += len(prompt_ids)
        self.cached_tokens += cached
        tokens = result["choices"][0]["token_ids"]
        self.generated_tokens += len(tokens)
        return self._output(token_ids=tokens, extra_fields={"num_cached_tokens": cached, "global_steps": 0})

    def counters(self) -> tuple[int, int, int]:
        """(tokens of prompts, of these from the cache, tokens generated) since the start."""
        return self.prompt_tokens, self.cached_tokens, self.generated_tokens


def client_over(servers: dict[str, Any], kv_aware: bool) -> Any:
    """verl's ``LLMServerClient`` over the balancer that verl makes of this config."""
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.router import get_router_handle

    balancer: Any = get_router_handle(servers, router_config_path=str(_ROUTER_YAML) if kv_aware else None)
    ray.get(balancer.get_status.remote())  # it has started
    config = SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm", full_determinism=False))
    )
    return LLMServerClient(config, load_balancer_handle=balancer)


async def rollout(client: Any, settings: argparse.Namespace, seed: int) -> None:
    """Groups of samples, each a conversation of some turns, so many at a time."""
    random = np.random.default_rng(seed)
    system = random.integers(3, 1000, settings.system_tokens).tolist()
    groups = [system + random.integers(3, 1000, settings.prompt_tokens).tolist() for _ in range(settings.groups)]
    turns = [random.integers(3, 1000, settings.turn_tokens).tolist() for _ in range(settings.turns)]
    free = asyncio.Semaphore(settings.concurrency)

    async def sample(group: int, number: int) -> None:
        tokens = list(groups[group])
        for turn in range(settings.turns):
            async with free:
                output = await client.generate(
                    f"{seed}-{group}-{number}",
                    prompt_ids=tokens,
                    sampling_params={"max_tokens": settings.output_tokens, "seed": 1000 * group + 10 * number + turn},
                )
            tokens = tokens + list(output.token_ids) + turns[turn]

    await asyncio.gather(*(sample(group, n) for group in range(settings.groups) for n in range(settings.samples)))


@contextmanager
def sim_servers(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Servers with empty caches, by name."""
    options = {"num_blocks": settings.num_blocks, "time_scale": settings.time_scale}
    actor = ray.remote(num_cpus=0.1, max_concurrency=1000)(SimServer)
    handles = [actor.remote(options) for _ in range(settings.servers)]
    try:
        yield dict(zip(ray.get([handle.address.remote() for handle in handles]), handles, strict=True))
    finally:
        for handle in handles:
            ray.kill(handle)


def measure(settings: argparse.Namespace, kv_aware: bool, seed: int) -> dict[str, float]:
    """One rollout on fresh servers: hit rate, imbalance, seconds.

    hit rate: share of the prompts' tokens that came from a cache, by the servers' own count.
    imbalance: tokens that the busiest server computed (of prompts, not cached, and generated), over the mean.
    """
    with sim_servers(settings) as servers:
        client = client_over(servers, kv_aware)
        begin = time.monotonic()
        asyncio.run(rollout(client, settings, seed))
        seconds = time.monotonic() - begin
        counters = ray.get([handle.counters.remote() for handle in servers.values()])
    computed = [prompt - cached + generated for prompt, cached, generated in counters]
    prompts = sum(prompt for prompt, _, _ in counters)
    return {
        "hit_rate": sum(cached for _, cached, _ in counters) / prompts,
        "imbalance": max(computed) * len(computed) / sum(computed),
        "computed_tokens": float(sum(computed)),
        "seconds": seconds,
    }


def main() -> None:
    """Runs both balancers in turn and prints the medians."""
    check_version()
    from kvrouter.ray.local_cluster import local_ray

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--servers", type=int, default=2)
    add("--groups", type=int, default=12, help="prompts")
    add("--samples", type=int, default=8, help="samples a prompt")
    add("--turns", type=int, default=3, help="turns a sample")
    add("--concurrency", type=int, default=24, help="requests at a time")
    add("--system-tokens", type=int, default=256, help="shared by all prompts")
    add("--prompt-tokens", type=int, default=1024)
    add("--turn-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=32)
    add("--num-blocks", type=int, default=2048, help=f"of {BLOCK_SIZE} tokens, a server")
    add("--time-scale", type=float, default=1.0)
    add("--repeats", type=int, default=3)
    settings = parser.parse_args()
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with local_ray(cpus_per_node=16):
        for seed in range(settings.repeats):
            for kv_aware in (False, True):
                results[kv_aware].append(measure(settings, kv_aware, seed))
    print(f"{'balancer':<10} {'hit rate':>16} {'imbalance':>16} {'computed tokens':>16} {'seconds':>16}")
    for kv_aware, name in ((False, "verl's"), (True, "kvrouter's")):
        cells = []
        for key in ("hit_rate", "imbalance", "computed_tokens", "seconds"):
            values = [run[key] for run in results[kv_aware]]
            digits = 0 if key == "computed_tokens" else 3
            cells.append(f"{statistics.median(values):>16.{digits}f}")
        print(f"{name:<10} {' '.join(cells)}")


if __name__ == "__main__":
    main()
