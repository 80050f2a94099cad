"""NeMo-RL's asynchronous vLLM worker, with the integration's mix-in, on a real vLLM engine without a GPU.

NeMo-RL's own ``generate_async``, ``_create_engine`` and ``reset_prefix_cache_async`` run; left out is what needs CUDA
(sleep mode, binding to the GPU's NUMA node, the extension that receives weights) and its patches of vLLM's files,
which are for the vLLM that it pins.
"""

from __future__ import annotations

import os

import nemo_absent

nemo_absent.install()

import ray
from nemo_rl.models.generation.vllm import vllm_worker

from kvrouter.integrations.nemo_rl.worker import RoutedVllmAsyncGenerationWorkerImpl

CPU_WORKER = "nemo_cpu_worker.CpuWorker"
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class CpuWorkerImpl(RoutedVllmAsyncGenerationWorkerImpl):
    def __init__(self, config, bundle_indices=None, **options):
        os.environ.update(_ENVIRONMENT)
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(os.environ["RANK"]) % len(cores)])
        vllm_worker._apply_vllm_patches = lambda *args, **kwargs: None
        vllm_worker.ray.get_gpu_ids = lambda: [0]
        super().__init__(config, bundle_indices, **options)

    @staticmethod
    def configure_worker(num_gpus, bundle_indices=None, num_gpus_per_node=None):
        return {"num_gpus": 0}, {}, {"bundle_indices": bundle_indices[1], "seed": bundle_indices[1][0]}, {}

    def _load_model(self, bundle_indices, seed):
        import vllm

        self.SamplingParams = vllm.SamplingParams
        self._mtp_load_from_disk = False
        vllm_cfg = self.cfg["vllm_cfg"]
        self._create_engine(
            {
                "model": self.model_name,
                "served_model_name": self.model_name,
                "dtype": vllm_cfg["precision"],
                "seed": seed,
                "load_format": vllm_cfg["load_format"],
                "enforce_eager": vllm_cfg["enforce_eager"],
                "max_model_len": vllm_cfg["max_model_len"],
                "disable_log_stats": False,
                **self.cfg["vllm_kwargs"],
            }
        )

    async def post_init_async(self):
        self.vllm_device_ids = None

    async def report_device_id_async(self):
        return ["cpu"]


@ray.remote(num_cpus=0)
class CpuWorker(CpuWorkerImpl):
    pass
