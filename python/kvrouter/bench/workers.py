"""The workers of a benchmark, as its settings describe them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from kvrouter.bench.settings import BenchSettings, EngineName
from kvrouter.vllm import WorkerFleet, launch_workers
from kvrouter.vllm.tiny_model import TinyModel, make_tiny_model


def start_workers(
    settings: BenchSettings, *, model: TinyModel | str | None = None, log_dir: Path | None = None
) -> WorkerFleet:
    """Starts them; raises as ``launch_workers``.

    model: in place of the settings' one.
    """
    return launch_workers(
        settings.num_workers,
        engine=settings.engine.value,
        model=settings.model if model is None else model,
        block_size=settings.block_size,
        base_kv_events_port=settings.base_kv_events_port,
        base_metrics_port=settings.base_metrics_port,
        num_gpu_blocks=settings.num_blocks,
        max_model_len=settings.max_model_len,
        # vLLM has no such thing: real workers take the time that they take.
        extra_args=[f"--time-scale={settings.time_scale}"] if settings.engine is EngineName.SIM else [],
        log_dir=log_dir,
        progress=False,
    )


def start_shallow_workers(settings: BenchSettings, stack: ExitStack) -> WorkerFleet:
    """The same, to be ended with ``stack``, for what depends on caches alone.

    Unless the settings name a model, vLLM gets a shallow one, which is quicker and caches as a deep one does.
    """
    model: TinyModel | None = None
    if settings.model is None and settings.engine is EngineName.VLLM:
        model = make_tiny_model(stack.enter_context(TemporaryDirectory(prefix="kvrouter-model-")), num_layers=2)
    return stack.enter_context(start_workers(settings, model=model))
