"""The C++ core of kvrouter."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy
from numpy.typing import NDArray


version: str = '0.1.0'

def compute_block_hashes(tokens: object, block_size: int = 64, *, lora_name: str | None = None, extra_keys: object | None = None) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
    """
    Hashes of the full blocks of a token sequence.

    tokens: list, or 1-D integer array or CPU tensor, (num_tokens,); ids from 0 to 2^32 - 1.
    block_size: tokens a block.
    lora_name: the adapter, if any.
    extra_keys: one entry a full block, each None or a tuple, as in vLLM's KV events (cache salt, multimodal
    items...).
    Returns uint64, (num_tokens // block_size,): XXH3-64 with seed 1337 over the little-endian 32-bit ids.
    Raises ValueError for an id out of range or a block size below 1, TypeError for another kind of sequence.
    """

def compute_block_hash_for_seq(tokens: object, kv_block_size: int, *, lora_name: str | None = None) -> list[int]:
    """
    The same as a list of integers, under the name and with the arguments that Dynamo's runtime gives it.
    """

def compute_block_hash_for_seq_py(tokens: object, kv_block_size: int, *, lora_name: str | None = None) -> list[int]:
    """compute_block_hash_for_seq under its older name."""

class KvEventDecoder:
    """Decodes the KV-event batches of one worker (MessagePack)."""

    def __init__(self, block_size: int = 64) -> None: ...

    def decode(self, payload: bytes) -> tuple[list[tuple[Any, ...]], str | None]:
        """
        Returns (events, error): the events read, each ('stored', parent, [(local, engine), ...]),
        ('removed', [engine, ...]) or ('cleared',); and None, or what made the batch unreadable from there on.
        """

    @property
    def counts(self) -> dict[str, int]: ...

    @property
    def mismatched_block_size(self) -> int: ...

class PrefixIndex:
    """Which worker holds which prefix: see include/kvrouter/prefix_index.h."""

    def __init__(self, num_workers: int) -> None: ...

    @property
    def num_workers(self) -> int: ...

    def store(self, worker: int, parent: int | None, local_hashes: object, engine_hashes: object) -> None:
        """
        `worker` holds this chain of blocks, which follows its block `parent` (None: starts a sequence).
        """

    def remove(self, worker: int, engine_hashes: object) -> None: ...

    def clear(self, worker: int) -> None: ...

    def worker_blocks(self, worker: int) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
        """
        The names (engine hashes) of the blocks that `worker` holds, ascending, orphans included: uint64, (n,).  For tests and debugging: it looks at the whole index.
        """

    def find_matches(self, local_hashes: object) -> Annotated[NDArray[numpy.uint32], dict(shape=(None,))]:
        """
        For each worker the number of leading blocks it holds: uint32, (num_workers,).
        """

class Decision:
    """The worker chosen for one request, and how every worker scored."""

    @property
    def worker(self) -> int:
        """The chosen worker."""

    @property
    def overlap_blocks(self) -> int:
        """Leading blocks of the request that the chosen worker holds."""

    @property
    def ticket(self) -> int:
        """
        For first_token() and complete(); 0 where the policy keeps no account of what is in flight.
        """

    @property
    def num_blocks(self) -> int:
        """Full blocks of the request."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def scores(self) -> Annotated[NDArray[numpy.float64], dict(shape=(None,))]:
        """float64, (num_workers,): the higher the better."""

    @property
    def overlaps(self) -> Annotated[NDArray[numpy.uint32], dict(shape=(None,))]:
        """uint32, (num_workers,): leading blocks held by each worker."""

    @property
    def kv_usages(self) -> Annotated[NDArray[numpy.float64], dict(shape=(None,))]:
        """float64, (num_workers,), 0 to 1."""

    @property
    def waitings(self) -> Annotated[NDArray[numpy.int64], dict(shape=(None,))]:
        """int64, (num_workers,): requests queued, as the policy saw them."""

    def __repr__(self) -> str: ...

def policy_names() -> list[str]:
    """The policies there are."""

class Router:
    """The router itself; kvrouter.KvRouter is its Python face."""

    def __init__(self, *, block_size: int, kv_events: Sequence[str], load: Sequence[str], http: Sequence[str], replay: Sequence[str] = [], policy: str = 'linear', seed: int = 0, startup_grace_s: float = 5.0, metrics_interval_s: float = 0.25, ca_file: str = '', index_memory_limit: int = 0, replica_bind: str = '', replica_peers: Sequence[str] = [], replica_timeout_s: float = 3.0) -> None: ...

    def start(self, kv_events: bool = True) -> None: ...

    def stop(self) -> None: ...

    @property
    def running(self) -> bool: ...

    @property
    def num_workers(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def policy(self) -> str: ...

    def choose(self, hashes: object, num_tokens: int) -> int: ...

    def choose_for_tokens(self, tokens: object, lora_name: str | None = None) -> int: ...

    def explain(self, hashes: object, num_tokens: int) -> Decision: ...

    def explain_for_tokens(self, tokens: object, lora_name: str | None = None) -> Decision: ...

    def explain_among(self, tokens: object, workers: Sequence[int], lora_name: str | None = None) -> Decision:
        """
        explain_for_tokens() where only these workers may be chosen.  ValueError when there is none.
        """

    def choose_batch(self, hashes: list[Any], num_tokens: object) -> tuple[Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))]]:
        """
        Decides for a batch at once.

        hashes: for each request the hashes of its full blocks, 1-D uint64 array or list.
        num_tokens: of each request, (B,).
        Returns (workers, overlap_blocks), uint32, (B,) each.  ValueError when the lengths differ.
        """

    def choose_batch_for_tokens(self, tokens: object, lengths: object | None = None, lora_name: str | None = None) -> tuple[Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))]]:
        """
        The same from token ids.

        tokens: 2-D integer array or CPU tensor, (B, S), or a list of B sequences.
        lengths: tokens of each request without its padding, (B,); None: all.
        """

    def dispatch_batch(self, hashes: list[Any], num_tokens: object) -> tuple[Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint64], dict(shape=(None,))]]:
        """
        choose_batch(), and uint64 tickets for first_token() and complete(), (B,).
        """

    def dispatch_batch_for_tokens(self, tokens: object, lengths: object | None = None, lora_name: str | None = None) -> tuple[Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint64], dict(shape=(None,))]]:
        """
        choose_batch_for_tokens(), and uint64 tickets for first_token() and complete(), (B,).
        """

    def first_token(self, ticket: int) -> bool:
        """
        The request has got its first token.  False for a ticket that is not known (any more).
        """

    def complete(self, ticket: int, output_tokens: int = -1, first_token_s: float = 0.0) -> bool:
        """
        The request is finished, or given up.  output_tokens -1 and first_token_s 0: not known.
        """

    def report_hit(self, worker: int, overlap_blocks: int, num_tokens: int, cached_tokens: int, hashes: object | None = None) -> None:
        """What the worker's hit on a request was, beside what was predicted."""

    def round_robin(self) -> int: ...

    def reset(self, worker: int | None = None, until_cleared: bool = False) -> None: ...

    def set_worker(self, worker: int, *, kv_events: str = '', load: str = '', http: str = '', replay: str = '') -> None:
        """
        Listens to these endpoints for the worker from now on, and forgets what was known of it.
        """

    def update_load(self, worker: int, kv_usage: float, waiting: int, running: int = 0) -> None: ...

    def snapshot(self) -> bytes:
        """
        What is known of the workers' caches, for warm_start(); see kvrouter/router.h.
        """

    def save_snapshot(self, path: str) -> int:
        """
        Writes snapshot() to a file, as a whole or not at all; its size.  OSError when it cannot be.
        """

    def warm_start(self, snapshot: bytes) -> int:
        """
        To be called before start(); the number of workers in it.  ValueError for what is none.
        """

    @property
    def index(self) -> PrefixIndex: ...

    def status_json(self) -> str:
        """What GET /workers of the router's HTTP API answers."""

    def next_notice(self, timeout_s: float) -> tuple[int, str] | None:
        """(level, text) with level 0 info, 1 warning, 2 error; or None."""

class RouterApiServer:
    """Serves a router over HTTP: see src/server/router_api.h."""

    def __init__(self, router: Router, host: str, port: int) -> None: ...

    @property
    def port(self) -> int: ...

    def stop(self) -> None: ...

class Service:
    """The service: see src/server/service.h.  Times in seconds."""

    def __init__(self, router: Router, *, host: str, port: int, workers: Sequence[tuple[str, str, str, str, int]], api_token: str = '', admin_token: str = '', loopback: bool = True, access_log: str = '', max_concurrency: int = 256, max_queue: int = 1024, queue_timeout_s: float = 30.0, health_interval_s: float = 1.0, first_byte_timeout_s: float = 600.0, stream_timeout_s: float = 300.0, max_body_bytes: int = 16777216, max_header_bytes: int = 16384, max_connections: int = 4096, breaker_failures: int = 3, breaker_open_s: float = 5.0, tls_cert: str = '', tls_key: str = '', upstream_ca: str = '', snapshot_file: str = '') -> None: ...

    @property
    def port(self) -> int: ...

    def stop(self) -> None: ...

class SimEngine:
    """
    The simulated worker's engine alone, in virtual time: nothing sleeps, each step() is one step.

    Raises ValueError for options that make no sense together.
    """

    def __init__(self, *, num_blocks: int = 448, block_size: int = 64, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048, max_model_len: int = 8192, vocab_size: int = 1024, seed: int = 0) -> None: ...

    def add(self, prompt: Sequence[int], max_tokens: int, seed: int = 0) -> int:
        """
        Queues a request and returns its number.  ValueError when it can never fit.
        """

    def cancel(self, number: int) -> None:
        """Takes a request out that is not finished."""

    def step(self) -> dict[str, Any]:
        """
        Computes one step.  Returns a dict: 'seconds' it would take with the default timing model, 'scheduled' (request number -> tokens computed), 'tokens' (request number -> token generated), 'cached_tokens' (of the same requests), 'events' (list of (type, block hashes, parent hash or None)).
        """

    def reset_prefix_cache(self, preempt_running: bool = False) -> bool:
        """Forgets all cached prefixes; False while requests hold blocks."""

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""

    @property
    def num_waiting(self) -> int:
        """Requests queued."""

    @property
    def num_running(self) -> int:
        """Requests in the batch."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""

    @property
    def num_preemptions(self) -> int:
        """Preemptions since the start."""

def sim_tokenize(text: str, vocab_size: int = 1024) -> list[int]:
    """
    The token ids that a simulated worker reads in a text: 'w123' is 123, any other word a hash.
    """

class SimWorker:
    """
    A simulated vLLM worker inside this process: an engine in real time behind HTTP and ZMQ.

    Raises ValueError for options that make no sense together and RuntimeError when an address is taken; the message begins with the option's name.
    """

    def __init__(self, *, host: str = '127.0.0.1', port: int = 0, kv_events_endpoint: str = '', replay_endpoint: str = '', load_endpoint: str = '', topic: str = 'kv', model: str = 'sim', block_size: int = 64, num_blocks: int = 448, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048, max_model_len: int = 8192, vocab_size: int = 1024, time_scale: float = 1.0, seed: int = 0, prefix_caching: bool = True, array_events: bool = False, byte_hashes: bool = False, replay_buffer: int = 10000, step_s: float = 0.004, prefill_token_s: float = 0.00018, attention_pair_s: float = 2.5e-08, decode_sequence_s: float = 0.0003, debug: bool = False) -> None: ...

    @property
    def port(self) -> int:
        """TCP port of the HTTP server."""

    @property
    def kv_events_endpoint(self) -> str:
        """Bound ZMQ endpoint, or '' when off."""

    @property
    def replay_endpoint(self) -> str:
        """Bound ZMQ endpoint, or '' when off."""

    @property
    def load_endpoint(self) -> str:
        """Bound ZMQ endpoint, or '' when off."""

    def stop(self) -> None:
        """Drops what is running and frees the ports.  May be called again."""

    def __enter__(self) -> object: ...

    def __exit__(self, type: object | None, value: object | None, traceback: object | None) -> None: ...

def simulate_fleet(*, arrival: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], follows: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], output_tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], expected_output: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], first_segment: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], segment_seed: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], segment_length: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], num_workers: int, policy: str, seed: int, users: int, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, vocab_size: int, step_s: float, weights_s: float, prefill_token_s: float, attention_pair_s: float, decode_sequence_s: float, decode_pair_s: float, event_delay_s: float, load_delay_s: float, load_interval_s: float, load_loss: float, network_delay_s: float, feedback: bool, batches: bool, slowdown: Sequence[float]) -> dict[str, float]:
    """
    Runs a fleet of simulated workers in virtual time; see sim/fleet.h.  ValueError for input that cannot be run.
    """
