"""NeMo-RL's worker interface over the simulated engine: real KV events, load and HTTP, no model and no vLLM."""

from __future__ import annotations

import asyncio

import numpy as np
import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from kvrouter.integrations.nemo_rl.worker import PublishingWorker
from kvrouter.ray.engine.base import EngineSpec, SampleRequest
from kvrouter.ray.engine.sim_engine import SimulatedEngine
from kvrouter.ray.ports import claim_ports
from kvrouter.vllm.ports import find_free_ports

SIM_WORKER = "nemo_sim_worker.RoutedSimWorker"
PLAIN_SIM_WORKER = "nemo_sim_worker.PlainSimWorker"


class SimWorkerImpl:
    """What NeMo-RL's VllmGeneration asks of a worker."""

    def __init__(self, config, bundle_indices=None, fraction_of_gpus=1.0, seed=None, defer_model_load=False):
        self.cfg = config
        self.base_url = None
        self.engine = None
        self._http_port = find_free_ports(1)

    @staticmethod
    def configure_worker(num_gpus, bundle_indices=None, num_gpus_per_node=None):
        return {"num_gpus": 0}, {}, {"bundle_indices": bundle_indices[1]}, {}

    def _ports(self):
        self._claim = claim_ports(25000, 32, prefer_base=False)
        return self._claim.ports

    async def load_model(self):
        self._http_port.release()
        options = {**self.cfg["sim_cfg"], "port": self._http_port.base}
        config = {**self.cfg, "router_cfg": {"block_size": 64}, "sim_cfg": options}
        self.engine = SimulatedEngine(EngineSpec(config, 0), self._ports())
        await self.engine.start()
        self.base_url = f"{self.engine._url}/v1"

    async def post_init_async(self):
        if self.engine is None:
            await self.load_model()

    async def report_device_id_async(self):
        return ["none"]

    async def report_dp_openai_server_base_url(self):
        return self.base_url if self.cfg["vllm_cfg"].get("expose_http_server") else None

    async def get_reserved_url(self):
        return f"http://127.0.0.1:{self._http_port.base}/v1"

    def _get_raw_spec_counters(self):
        return {}

    async def generate_async(self, data, greedy=False):
        length = int(data["input_lengths"][0])
        prompt = data["input_ids"][0][:length]
        result = await self.engine.generate(SampleRequest(prompt.numpy().astype(np.int64)))
        tokens = torch.cat([prompt, torch.from_numpy(result.tokens)])
        yield (
            0,
            BatchedDataDict(
                {
                    "output_ids": tokens.unsqueeze(0),
                    "logprobs": torch.zeros(1, len(tokens)),
                    "generation_lengths": torch.tensor([len(result.tokens)]),
                    "unpadded_sequence_lengths": torch.tensor([len(tokens)]),
                    "truncated": torch.tensor([result.truncated]),
                }
            ),
        )

    async def reset_prefix_cache_async(self):
        await self.reset_prefix_cache()

    async def reset_prefix_cache(self):
        return await self.engine.reset_prefix_cache(False)

    async def update_weights_from_collective_async(self):
        return True

    async def counters(self):
        return await self.engine.cache_counters()

    def shutdown(self):
        return True


class RoutedSimWorkerImpl(PublishingWorker, SimWorkerImpl):
    """With the mix-in's ports; its engine publishes there."""

    def _ports(self):
        return self._kvrouter_claim.ports

    async def reset_prefix_cache(self):
        self._kvrouter_emptied = await super().reset_prefix_cache()

    def kvrouter_block_size(self):
        return self.engine.block_size

    async def kvrouter_cache_counters(self):
        return await self.counters()


@ray.remote(num_cpus=0)
class RoutedSimWorker(RoutedSimWorkerImpl):
    pass


@ray.remote(num_cpus=0)
class PlainSimWorker(SimWorkerImpl):
    pass


def batch_of(tokens):
    """One prompt, as rollouts hand it over: padded to the right."""
    ids = torch.zeros(1, len(tokens) + 7, dtype=torch.int64)
    ids[0, : len(tokens)] = torch.as_tensor(tokens)
    return BatchedDataDict({"input_ids": ids, "input_lengths": torch.tensor([len(tokens)])})


async def generate_all(generation, prompts):
    """All prompts at once, as NeMo-RL's rollouts send them; the worker and the length of each answer."""

    async def one(tokens):
        async for _, result in generation.generate_async(batch_of(tokens)):
            return result["gen_leader_worker_idx"][0], int(result["generation_lengths"][0])

    return await asyncio.gather(*(one(tokens) for tokens in prompts))
