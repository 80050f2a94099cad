"""KvRouter: the router in a Python process."""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from kvrouter import _core, decision_log
from kvrouter.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_KV_EVENTS_PORT,
    DEFAULT_METRICS_PORT,
    RouterConfig,
    WorkerAddress,
    routing_policy,
    worker_addresses,
)

logger = logging.getLogger("kvrouter")
_LEVELS = (logging.INFO, logging.WARNING, logging.ERROR)


class KvRouter:
    """Chooses the worker for each request by what the workers' KV caches hold and how loaded they are.

    Worker N publishes KV events on ``base_kv_events_port`` + N and load on ``base_metrics_port`` + N.  With the default
    policy the worker with the highest score wins, ties at random::

        score = 2 * overlap - kv_usage - waiting / max_waiting

    where ``overlap`` is the share of the request's tokens in leading blocks that the worker holds.

    The router listens in threads of its own (C++), which are tied to no asyncio loop and never take the interpreter's
    lock; a decision takes microseconds.  It can be asked from any thread, also before it is started (then it knows
    nothing, and the queues it has filled itself decide).

    block_size: tokens a KV block; the workers' own.
    num_workers: at least 1.
    worker_addresses: a host for each worker; default localhost.
    worker_ports: the KV-event port of each worker; its load port lies as far from it as the two base ports do.
    worker_urls: ``http://host:port`` of each worker (or None); /metrics is read of those that publish no load.
    replay: what gets lost of a worker's KV events, or was published before the router started, is asked for again.
        True: at its KV-events port + ``kvrouter.config.REPLAY_PORT_OFFSET``, where
        ``kvrouter.vllm.kv_events_config`` puts it; a list: the ZMQ endpoint of each worker (None: it has none).
    policy: one of ``kvrouter.policy_names()``.
    seed: of the random choice between equals.
    startup_grace_s: how many seconds a worker may be silent after start() before a warning says so.
    index_memory_limit: bytes that the prefix index may take, at least 1 MiB; 0: no limit.  Beyond it the prefixes that
        were longest neither asked for nor stored are given up.
    replica_bind: ``tcp://address:port`` at which other routers hear what this one sends where; "": nowhere.
    replica_peers: where the others are heard.  What they have in flight counts here as this router's own does.
    replica_timeout_s: seconds of silence, at least 0.5, after which what another router has in flight counts no more.

    Raises ValueError, naming the setting, for values out of range.
    """

    def __init__(
        self,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_workers: int = 4,
        base_kv_events_port: int = DEFAULT_KV_EVENTS_PORT,
        base_metrics_port: int = DEFAULT_METRICS_PORT,
        worker_addresses: Sequence[str] | None = None,
        worker_ports: Sequence[int] | None = None,
        *,
        worker_urls: Sequence[str | None] | None = None,
        replay: bool | Sequence[str | None] = False,
        policy: str = "linear",
        seed: int | None = None,
        startup_grace_s: float = 5.0,
        index_memory_limit: int = 0,
        replica_bind: str = "",
        replica_peers: Sequence[str] = (),
        replica_timeout_s: float = 3.0,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.workers: list[WorkerAddress] = _addresses(
            num_workers, base_kv_events_port, base_metrics_port, worker_addresses, worker_ports
        )
        urls = [None] * num_workers if worker_urls is None else list(worker_urls)
        if len(urls) != num_workers:
            raise ValueError(f"Number of worker_urls ({len(urls)}) must match number of workers ({num_workers})")
        replay_endpoints = _replay_endpoints(self.workers, replay)
        self.block_size = block_size
        self.num_workers = num_workers
        self._core = _core.Router(
            block_size=block_size,
            kv_events=[worker.kv_events_endpoint for worker in self.workers],
            load=[worker.load_endpoint for worker in self.workers],
            http=[url or "" for url in urls],
            replay=replay_endpoints,
            policy=policy,
            seed=_random_seed() if seed is None else seed,
            startup_grace_s=startup_grace_s,
            index_memory_limit=index_memory_limit,
            replica_bind=replica_bind,
            replica_peers=list(replica_peers),
            replica_timeout_s=replica_timeout_s,
        )
        self._listening = Listening(self._core)
        # Also at interpreter exit: no thread of the router outlives the interpreter.
        weakref.finalize(self, self._listening.stop)

    @classmethod
    def from_config(cls, config: RouterConfig, num_workers: int, **options: Any) -> Self:
        """The router that a ``RouterConfig`` describes; ``mode: round_robin`` goes before ``policy``."""
        return cls(
            block_size=config.get("block_size", DEFAULT_BLOCK_SIZE),
            num_workers=num_workers,
            base_kv_events_port=config.get("base_kv_events_port", DEFAULT_KV_EVENTS_PORT),
            base_metrics_port=config.get("base_metrics_port", DEFAULT_METRICS_PORT),
            worker_addresses=config.get("worker_addresses"),
            worker_ports=config.get("worker_ports"),
            replay=config.get("replay", False),
            policy=routing_policy(config),
            index_memory_limit=config.get("index_memory_limit", 0),
            **options,
        )

    # --- life ---

    def start(self, enable_kv_indexer: bool = True) -> None:
        """Connects to the workers and listens.  A second call does nothing.

        enable_kv_indexer: False to listen to load only.
        Raises RuntimeError when the system refuses sockets or an address is none.
        """
        if self._listening.start(enable_kv_indexer):
            logger.info(
                "Router started: %d workers, block_size=%d, policy=%s", self.num_workers, self.block_size, self.policy
            )

    def wait_until_connected(self, timeout_s: float = 5.0, worker: int | None = None) -> bool:
        """Waits until a worker (None: every worker) is reached: what it publishes before that is lost.

        False when ``timeout_s`` seconds are over first.
        """
        deadline = time.monotonic() + timeout_s
        chosen = range(self.num_workers) if worker is None else (worker,)
        while not all(self.status()["workers"][number]["state"] == "up" for number in chosen):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Stops listening.  A second call does nothing; decisions go on with what is known."""
        self._listening.stop()

    async def start_background_tasks(self, enable_kv_indexer: bool = True) -> None:
        """start(), for async callers; the router keeps running when the caller's loop ends."""
        self.start(enable_kv_indexer)

    async def shutdown(self) -> None:
        """close(), for async callers."""
        self.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- decisions ---

    def best_worker(
        self, hashes: Any | None = None, num_tokens: int | None = None, *, tokens: Any | None = None
    ) -> int:
        """The worker for a request, given its block hashes and length or its token ids.

        hashes: list or 1-D uint64 array of the hashes of the full blocks (``compute_block_hashes``); may be empty.
        num_tokens: length of the request in tokens, with ``hashes``.
        tokens: instead of the two; list, or 1-D integer array or CPU tensor, which is not copied.
        Raises ValueError if ``num_tokens`` is not positive or a value is out of range.
        """
        if tokens is not None:
            if hashes is not None or num_tokens is not None:
                raise ValueError("give either tokens, or hashes and num_tokens")
            if decision_log.debug_enabled():
                return self.route(tokens).worker
            return self._core.choose_for_tokens(tokens)
        if hashes is None or num_tokens is None:
            raise ValueError("give either tokens, or hashes and num_tokens")
        if decision_log.debug_enabled():
            decision = self._core.explain(hashes, num_tokens)
            decision_log.log_decision(decision, self.block_size)
            return decision.worker
        return self._core.choose(hashes, num_tokens)

    def route(self, tokens: Any, *, lora_name: str | None = None) -> _core.Decision:
        """The decision for a request of these token ids: worker, overlap in blocks, every worker's score.

        tokens: list, or 1-D integer array or CPU tensor, (num_tokens,), which is not copied.
        lora_name: the adapter that the request asks for, if any: its KV blocks are shared with nobody else's.
        Raises ValueError if it is empty or an id is out of range.
        """
        decision = self._core.explain_for_tokens(tokens, lora_name)
        if decision_log.debug_enabled():
            decision_log.log_decision(decision, self.block_size)
        return decision

    def route_batch(
        self,
        tokens: Any | None = None,
        lengths: Any | None = None,
        *,
        hashes: Sequence[Any] | None = None,
        num_tokens: Any | None = None,
        lora_name: str | None = None,
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Workers for the B requests of a batch, decided together in one call.

        The decisions know of each other: a prefix that one of them sends to a worker counts as held there for the
        rest, so that the samples of a prompt that nobody has cached yet stay together, and a group is split before a
        worker has 1.5 times the mean of tokens.

        tokens: (B, S) integer array or CPU tensor, padded at the end, or a list of B sequences of token ids.
        lengths: with ``tokens``, (B,): tokens of each request without its padding; None: all.
        hashes, num_tokens: instead of the two, as for best_worker(), one entry each a request.
        lora_name: the adapter that the requests ask for, with ``tokens``.
        Returns (workers, overlap_blocks), uint32, (B,) each, in the order of the requests.
        Raises ValueError when numbers of entries differ, a request has no tokens or a value is out of range.
        """
        _check_batch(tokens, lengths, hashes, num_tokens, lora_name)
        if hashes is None:
            chosen = self._core.choose_batch_for_tokens(tokens, lengths, lora_name)
        else:
            chosen = self._core.choose_batch(list(hashes), num_tokens)
        logger.debug("Batch of %d requests: workers %s", len(chosen[0]), chosen[0])
        return chosen

    def dispatch_batch(
        self,
        tokens: Any | None = None,
        lengths: Any | None = None,
        *,
        hashes: Sequence[Any] | None = None,
        num_tokens: Any | None = None,
        lora_name: str | None = None,
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint64]]:
        """route_batch(), and a ticket for each request, uint64, (B,), for first_token() and complete()."""
        _check_batch(tokens, lengths, hashes, num_tokens, lora_name)
        if hashes is None:
            return self._core.dispatch_batch_for_tokens(tokens, lengths, lora_name)
        return self._core.dispatch_batch(list(hashes), num_tokens)

    # --- feedback ---

    def first_token(self, ticket: int) -> bool:
        """The request with this ticket (``Decision.ticket``, dispatch_batch()) has got its first token.

        Feedback is optional: without it the router corrects its account of what is in flight by load messages.
        Returns False for a ticket that is not known (any more), and with policies that keep no account.
        """
        return self._core.first_token(int(ticket))

    def complete(self, ticket: int, output_tokens: int | None = None, first_token_s: float | None = None) -> bool:
        """The request with this ticket is finished, or given up.

        output_tokens: that it got; the router learns what the prompt's next samples will need.
        first_token_s: seconds from the decision to the first token, if first_token() was not called at that moment.
        Returns as first_token().
        """
        tokens = -1 if output_tokens is None else output_tokens
        return self._core.complete(int(ticket), tokens, first_token_s or 0.0)

    def report_hit(
        self, worker: int, overlap_blocks: int, num_tokens: int, cached_tokens: int, *, hashes: Any | None = None
    ) -> None:
        """What a worker's hit on a request was: the router notices by it that its belief is not true, and says why.

        Optional.  After 64 requests of a worker that were found otherwise than predicted a warning names the likely
        cause and the setting that mends it; ``status()["workers"][n]["hits"]`` has the figures.

        overlap_blocks: as decided (``Decision.overlap_blocks``).
        num_tokens: of the prompt.
        cached_tokens: of these, taken from the cache, as the worker says (vLLM: ``num_cached_tokens``, or
            ``usage.prompt_tokens_details.cached_tokens`` with ``--enable-prompt-tokens-details``).
        hashes: the request's block hashes as for best_worker(); with them, prefixes that were only on their way when
            the request was decided are told from blocks that the router does not know of.
        Raises ValueError for a number out of range.
        """
        self._core.report_hit(worker, overlap_blocks, num_tokens, cached_tokens, hashes)

    def worker_round_robin(self) -> int:
        """The next worker in turn; workers that are down are left out."""
        worker = self._core.round_robin()
        logger.debug("Round robin selected worker_id: %d", worker)
        return worker

    async def get_best_worker(self, hashes: Any, num_tokens: int) -> int:
        """best_worker(hashes, num_tokens), for async callers."""
        return self.best_worker(hashes, num_tokens)

    async def get_best_worker_ids_batch(
        self, batch_hashes: Sequence[Any], batch_num_tokens: Sequence[int] | None = None
    ) -> list[int]:
        """Workers for a batch of requests, decided together (see route_batch()), in the order of the requests.

        batch_hashes: for each request its block hashes, or its token ids: an entry as long as its number of tokens
        is token ids (with blocks of more than one token it cannot be hashes).
        batch_num_tokens: tokens of each request; None: all entries are token ids.
        Raises ValueError when the two differ in length or mix hashes with token ids.
        """
        if batch_num_tokens is None:
            return self._to_list(self.route_batch(list(batch_hashes)))
        if len(batch_hashes) != len(batch_num_tokens):
            raise ValueError(
                f"batch_hashes has {len(batch_hashes)} entries, batch_num_tokens has {len(batch_num_tokens)}: "
                "one each a request"
            )
        are_tokens = [
            self.block_size > 1 and len(entry) == count
            for entry, count in zip(batch_hashes, batch_num_tokens, strict=True)
        ]
        if are_tokens and all(are_tokens):
            return self._to_list(self.route_batch(list(batch_hashes)))
        if any(are_tokens):
            raise ValueError("batch_hashes mixes block hashes with token ids")
        return self._to_list(self.route_batch(hashes=batch_hashes, num_tokens=batch_num_tokens))

    @staticmethod
    def _to_list(chosen: tuple[NDArray[np.uint32], NDArray[np.uint32]]) -> list[int]:
        workers: list[int] = chosen[0].tolist()
        return workers

    async def get_worker_round_robin(self, hashes: Any, num_tokens: int) -> int:
        """worker_round_robin(), for async callers; the arguments do not matter."""
        return self.worker_round_robin()

    # --- state ---

    def reset(self, worker: int | None = None, until_cleared: bool = False) -> None:
        """Forgets what a worker (None: every worker) caches: for use around a weight update, when caches are emptied.

        until_cleared: what the worker stores counts again once it has said that its cache is cleared.  Call it so
            before the worker is told to clear its cache, and no event of the old cache that is still on its way is
            believed.  If it does not clear its cache after all, call it once more without.
        """
        self._core.reset(worker, until_cleared)

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self._core.policy

    @property
    def running(self) -> bool:
        """Between start() and close()."""
        return self._core.running

    def worker_blocks(self, worker: int) -> NDArray[np.uint64]:
        """The blocks that a worker holds as far as is known, for debugging: it looks at the whole index.

        Returns the worker's own names (engine hashes) of them, ascending, uint64, (n,), those whose place in a
        sequence is not known included.  Raises IndexError for a worker that there is not.
        """
        blocks: NDArray[np.uint64] = self._core.index.worker_blocks(worker)
        return blocks

    def status(self) -> dict[str, Any]:
        """What is known of each worker, and how decisions went; the keys are those of the HTTP API's /workers."""
        status: dict[str, Any] = json.loads(self._core.status_json())
        return status


# The constructor's parameter of the same name hides the function.
_addresses = worker_addresses


def _replay_endpoints(workers: Sequence[WorkerAddress], replay: bool | Sequence[str | None]) -> list[str]:
    if isinstance(replay, bool):
        return [worker.replay_endpoint if replay else "" for worker in workers]
    if len(replay) != len(workers):
        raise ValueError(f"Number of replay endpoints ({len(replay)}) must match number of workers ({len(workers)})")
    return [endpoint or "" for endpoint in replay]


def _check_batch(tokens: Any, lengths: Any, hashes: Any, num_tokens: Any, lora_name: str | None) -> None:
    if (tokens is None) == (hashes is None) or (hashes is None) != (num_tokens is None):
        raise ValueError("give either tokens, or hashes and num_tokens")
    if hashes is not None and (lengths is not None or lora_name is not None):
        raise ValueError("lengths and lora_name go with tokens, not with hashes")


def _random_seed() -> int:
    import secrets

    return secrets.randbits(64)


class Listening:
    """The threads between start() and close(): the core's, and the one that logs what the core has to tell."""

    def __init__(self, core: _core.Router) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._log_thread: threading.Thread | None = None

    def start(self, kv_events: bool) -> bool:
        """False if it was running already."""
        with self._lock:
            if self._core.running:
                return False
            self._core.start(kv_events=kv_events)
            self._log_thread = threading.Thread(
                target=_forward_notices, args=(self._core,), name="kvrouter-log", daemon=True
            )
            self._log_thread.start()
            return True

    def stop(self) -> None:
        """Stops them.  A second call does nothing."""
        with self._lock:
            self._core.stop()
            if self._log_thread is not None:
                self._log_thread.join(timeout=5)
                self._log_thread = None


def _forward_notices(core: _core.Router) -> None:
    """Logs what the core has to tell, until it is stopped and all is told."""
    while True:
        notice = core.next_notice(1.0)
        if notice is not None:
            level, text = notice
            logger.log(_LEVELS[level], text)
        elif not core.running:
            return
