"""A KV-cache-aware router for vLLM workers.

``KvRouter`` listens to what each worker's KV cache holds and how loaded it is, and chooses a worker for each request::

    from kvrouter import KvRouter

    with KvRouter(num_workers=2) as router:
        worker = router.best_worker(tokens=[...])

``kvrouter.vllm`` is the worker side (KV events, load publishing, starting workers), ``kvrouter.bench`` the benchmark,
``kvrouter.sim`` a worker that behaves like vLLM without a model.
"""

from kvrouter._core import (
    Decision,
    compute_block_hash_for_seq,
    compute_block_hash_for_seq_py,
    compute_block_hashes,
    policy_names,
)
from kvrouter._core import version as __version__
from kvrouter.config import RouterConfig
from kvrouter.router import KvRouter

__all__ = [
    "Decision",
    "KvRouter",
    "RouterConfig",
    "__version__",
    "compute_block_hash_for_seq",
    "compute_block_hash_for_seq_py",
    "compute_block_hashes",
    "policy_names",
]
