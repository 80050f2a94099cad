"""VllmGeneration: rollouts on a fleet of vLLM engines, routed by what their KV caches hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.ray import background
from kvrouter.ray.batched_data_dict import BatchedDataDict, like
from kvrouter.ray.config import GenerationConfig, check_generation_config, model_parallel_size
from kvrouter.ray.dispatch import Answer
from kvrouter.ray.engine.base import SampleRequest
from kvrouter.ray.routed_worker_group import RoutedVllmWorkerGroup
from kvrouter.ray.router_handle import RouterHandle
from kvrouter.ray.samples import batch_of_results, requests_of_batch
from kvrouter.ray.virtual_cluster import RayVirtualCluster
from kvrouter.ray.worker_group import RayWorkerBuilder

logger = logging.getLogger("kvrouter.ray")


class VllmGeneration:
    """A fleet of engines in Ray actors; with ``config["router_cfg"]``, every sample goes where its prefix is cached.

    Names and shapes are NeMo-RL's.  The constructor returns when the engines can generate and the router listens.
    Methods may be called from sync code or from a running loop, from any thread, and in any process that this object
    was pickled to: a copy asks the same workers and the same router, and ends neither.

    cluster: where the engines go.
    config: see ``GenerationConfig``.
    name_prefix: of the actors' names.
    workers_per_node: how many of each node's bundles are used; default all.

    A router that cannot start is no error: it is said once (``Failed to initialize router: <reason>``), and requests go
    round robin.  Raises ValueError for a config that does not fit, RuntimeError when an engine does not start.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        config: GenerationConfig | Mapping[str, Any],
        name_prefix: str = "vllm_policy",
        workers_per_node: int | Sequence[int] | None = None,
    ) -> None:
        check_generation_config(config)
        self.cfg: dict[str, Any] = dict(config)
        self.worker_group = RoutedVllmWorkerGroup(
            cluster,
            RayWorkerBuilder(config=self.cfg),
            workers_per_node=workers_per_node,
            name_prefix=name_prefix,
        )
        self._refit_info: dict[str, tuple[tuple[int, ...], str]] = {}
        self._asleep = False
        if self.router_enabled:
            self._start_router_or_say_why(True)

    # --- what it is made of ---

    @property
    def dp_size(self) -> int:
        """Number of engines."""
        return self.worker_group.dp_size

    @property
    def router_enabled(self) -> bool:
        """Whether the config asks for a router."""
        return self.worker_group.router_enabled

    @property
    def router(self) -> RouterHandle | None:
        """The way to the router; None while there is none."""
        return self.worker_group.router

    @property
    def router_mode(self) -> str | None:
        """``"best_worker"`` or ``"round_robin"``; None without a router."""
        config: RouterConfig | None = self.worker_group.router_config
        return None if config is None or not self.router_enabled else config.get("mode", "best_worker")

    def worker_addresses(self) -> list[WorkerAddress]:
        """Where the engines publish KV events and load, for a ``KvRouter`` of one's own."""
        return self.worker_group.worker_addresses()

    # --- the router ---

    async def start_router(self, enable_kv_indexer: bool = True) -> bool:
        """Starts the router if it does not run; False, with the reason logged, when it cannot."""
        return await asyncio.to_thread(self._start_router_or_say_why, enable_kv_indexer)

    async def stop_router(self) -> bool:
        """Ends the router; requests go round robin.  A second call does nothing."""
        await self.worker_group.stop_router()
        return True

    def _start_router_or_say_why(self, enable_kv_indexer: bool) -> bool:
        try:
            self.worker_group.start_router_now(enable_kv_indexer)
        except Exception as error:  # whatever it is, training goes on
            logger.warning("Failed to initialize router: %s", error)
            logger.warning("Continuing without router: requests go round robin")
            return False
        return True

    def router_metrics(self, clear: bool = False) -> dict[str, Any]:
        """Decisions, hit rates, latencies and loads; see ``kvrouter.ray.router_metrics``.  ``clear``: start anew."""
        return self.worker_group.router_metrics(clear)

    def get_step_metrics(self) -> dict[str, float]:
        """``router/...`` figures since the last call of this, as plain numbers for a training log."""
        figures = self.router_metrics(clear=True)
        return {f"router/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}

    # --- generation ---

    def generate(self, data: Mapping[str, Any], greedy: bool = False) -> BatchedDataDict:
        """Generates a response to each prompt; returns when all are done, in the prompts' order.

        data: ``input_ids`` [B, S] int64, right-padded, and ``input_lengths`` [B], tensors or arrays; optionally
            ``stop_strings`` (a list or None a row), ``max_new_tokens`` [B], ``seeds`` [B].
        greedy: the most likely tokens, whatever the config's temperature.

        Returns columns of the same kind (T the longest response, as far as it exceeds the padding):

        - ``output_ids`` [B, S+T] int64: prompt and response, right-padded with ``_pad_token_id``;
        - ``logprobs`` [B, S+T] float32: of the response's tokens, where these stand; 0 elsewhere;
        - ``generation_lengths``, ``unpadded_sequence_lengths`` [B] int64: of the response, and of prompt and response;
        - ``truncated`` [B] bool: ended by its length;
        - ``num_cached_tokens`` [B] int64: prompt tokens that the engine found in its cache;
        - ``weight_version`` [B] int64: of the weights the response was begun with;
        - ``transit_s``, ``ttft_s``, ``generation_s`` [B] float64: seconds from the decision to the worker, and from
          there to the first and the last token; ``router_s`` [B]: what the decision took;
        - ``gen_leader_worker_idx``: the worker of each sample, a list; ``overlap_blocks``: the leading blocks that the
          router believed it to hold, a list (None: not the router's choice).

        Every sample is routed by its own tokens.  Samples of a worker that dies are generated by others.
        Raises ValueError, naming the column, for input that does not fit.
        """
        return background.run(self.generate_batch(data, greedy))

    async def generate_batch(self, data: Mapping[str, Any], greedy: bool = False) -> BatchedDataDict:
        """``generate`` for callers in a loop."""
        requests = requests_of_batch(data, greedy)
        answers: list[Answer | None] = [None] * len(requests)
        async for answer in self.worker_group.generate_samples(requests):
            answers[answer.index] = answer
        done = [answer for answer in answers if answer is not None]
        return self._batch(data, done)

    def _batch(self, data: Mapping[str, Any], answers: Sequence[Answer]) -> BatchedDataDict:
        result = batch_of_results(data, [answer.result for answer in answers], self._pad_token_id)
        result["router_s"] = like(np.asarray([answer.note.wait_s for answer in answers]), data["input_ids"])
        result["gen_leader_worker_idx"] = [self._leader_idx(answer.worker) for answer in answers]
        result["overlap_blocks"] = [answer.note.overlap_blocks for answer in answers]
        return result

    async def generate_async(
        self, data: Mapping[str, Any], greedy: bool = False, *, worker_id: int | None = None
    ) -> AsyncIterator[tuple[int, BatchedDataDict]]:
        """``generate``, but yields ``(index, result)`` of each sample as it is done; ``result`` has one row.

        worker_id: the worker (data-parallel shard) to use instead of the router's choice; if it dies, others serve.
        Stopping the iteration cancels what is under way.
        """
        requests = requests_of_batch(data, greedy)
        rows = list(BatchedDataDict({name: data[name] for name in ("input_ids", "input_lengths")}).rows())
        answers = self.worker_group.generate_samples(requests, worker_id=worker_id)
        try:
            async for answer in answers:
                yield answer.index, self._batch(rows[answer.index], [answer])
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    def generate_text(self, data: Mapping[str, Any], greedy: bool = False) -> BatchedDataDict:
        """``generate`` for texts: ``prompts``, a list of B strings, to ``texts``, a list of B responses."""
        return background.run(self._generate_text(data, greedy))

    async def _generate_text(self, data: Mapping[str, Any], greedy: bool) -> BatchedDataDict:
        requests = await self._text_requests(data, greedy)
        texts = [""] * len(requests)
        workers = [0] * len(requests)
        async for answer in self.worker_group.generate_samples(requests):
            texts[answer.index] = answer.result.text or ""
            workers[answer.index] = self._leader_idx(answer.worker)
        return BatchedDataDict({"texts": texts, "gen_leader_worker_idx": workers})

    async def generate_text_async(
        self, data: Mapping[str, Any], greedy: bool = False, *, worker_id: int | None = None
    ) -> AsyncIterator[tuple[int, BatchedDataDict]]:
        """``generate_text``, but yields ``(index, result)`` of each sample as it is done."""
        requests = await self._text_requests(data, greedy)
        answers = self.worker_group.generate_samples(requests, worker_id=worker_id)
        try:
            async for answer in answers:
                leader = self._leader_idx(answer.worker)
                yield (
                    answer.index,
                    BatchedDataDict({"texts": [answer.result.text or ""], "gen_leader_worker_idx": [leader]}),
                )
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    async def _text_requests(self, data: Mapping[str, Any], greedy: bool) -> list[SampleRequest]:
        if "prompts" not in data:
            raise ValueError("the batch lacks prompts")
        tokens = await self.worker_group.tokenize(data["prompts"])
        for row, of_prompt in enumerate(tokens):
            if not of_prompt:
                raise ValueError(f"prompts[{row}] has no tokens")
        return [SampleRequest(np.asarray(of_prompt, dtype=np.int64), greedy, want_text=True) for of_prompt in tokens]

    @property
    def _pad_token_id(self) -> int:
        return int(self.cfg.get("_pad_token_id", 0))

    def _leader_idx(self, worker: int) -> int:
        return self.worker_group.get_dp_leader_worker_idx(worker)

    # --- between rollouts ---

    def prepare_for_generation(self, *args: Any, **kwargs: Any) -> bool:
        """Makes the fleet ready: wakes engines that sleep (colocated), and starts the router if it does not run."""
        if self._asleep:
            self._on_all("wake_up", kwargs.get("tags"))
            self._asleep = kwargs.get("tags") is not None and "kv_cache" not in kwargs["tags"]
        if self.router_enabled and self.router is None and self.worker_group.is_owner:
            self._start_router_or_say_why(True)
        return True

    def finish_generation(self, *args: Any, **kwargs: Any) -> bool:
        """Ends a rollout: empties the prefix caches, whose contents the next weights will not have made.

        Colocated engines also give their GPU memory back.  The router knows at once.
        """
        emptied = self.invalidate_kv_cache()
        if self.cfg.get("colocated", {}).get("enabled", False) and not self._asleep:
            self._on_all("sleep", 1)
            self._asleep = True
        return emptied

    def invalidate_kv_cache(self) -> bool:
        """Empties every engine's prefix cache, and the router's index with them.

        Requests under way lose the blocks that they hold, and compute them anew.  False when a worker did not do it.
        """
        return bool(background.run(self.worker_group.reset_prefix_caches(preempt_running=True)))

    # --- weights ---

    def update_weights(
        self,
        state_dict: Mapping[str, Any] | None = None,
        *,
        path: str | None = None,
        keep_kv_cache: bool = False,
    ) -> bool:
        """Loads new weights into every engine.

        state_dict: name to tensor, as the model's checkpoint names them; or
        path: a checkpoint (``*.safetensors``, or a folder of them) that every node can read.
        keep_kv_cache: False empties the prefix caches and the router's index, as new weights require; True keeps both,
            for trainers that accept stale KV.
        A worker that is restarted later gets the newest weights.  Samples under way go on with the new ones.
        Returns False when a worker did not take part; it gets them when it is back.
        """
        if (state_dict is None) == (path is None):
            raise ValueError("give either state_dict or path")
        return bool(background.run(self.worker_group.update_weights(state_dict, path, keep_kv_cache)))

    @property
    def weight_version(self) -> int:
        """How many updates there have been."""
        return self.worker_group.weight_version

    def init_collective(
        self, ip: str, port: int, world_size: int, *, train_world_size: int = 1
    ) -> list[ray.ObjectRef[None]]:
        """Has every engine join the group in which weights are broadcast; see ``kvrouter.ray.collective.WeightGroup``.

        ip, port: where the trainer's rank 0 listens.
        world_size: ``train_world_size`` + ranks of all engines.
        Returns an ObjectRef a worker, which are done when the trainer has joined, too.
        """
        size = model_parallel_size(self.cfg)
        if world_size != train_world_size + size * self.dp_size:
            raise ValueError(
                f"world_size must be train_world_size + {size * self.dp_size} ranks of the engines, not {world_size}"
            )
        return [
            leader.init_collective.remote(ip, port, train_world_size + size * rank, world_size)
            for rank, leader in enumerate(self.worker_group.leaders())
        ]

    def prepare_refit_info(self, state_dict_info: Mapping[str, Any]) -> None:
        """Names, shapes and types of the weights to be broadcast, in order: name to (shape, dtype) or to a tensor."""
        self._refit_info = {
            name: (tuple(info.shape), str(info.dtype)) if hasattr(info, "shape") else (tuple(info[0]), str(info[1]))
            for name, info in state_dict_info.items()
        }

    def update_weights_from_collective(self) -> list[ray.ObjectRef[int]]:
        """Has every engine receive the weights that the trainer broadcasts; returns an ObjectRef a worker.

        Caches are left as they are: call ``invalidate_kv_cache`` unless stale KV is to be kept.  A worker that is
        restarted afterwards cannot be given these weights; it stays out until the next update.
        """
        if not self._refit_info:
            raise RuntimeError("call prepare_refit_info first")
        return self.worker_group.receive_weights(self._refit_info)

    def _on_all(self, method: str, *args: Any) -> None:
        ray.get([getattr(leader, method).remote(*args) for leader in self.worker_group.leaders()])

    # --- the end ---

    def shutdown(self) -> bool:
        """Ends router and engines; a second call does nothing, and neither does one on a copy."""
        return self.worker_group.shutdown()

    def __enter__(self) -> VllmGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
