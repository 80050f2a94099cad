"""The router as a process of its own, asked over HTTP.

``python -m kvrouter.api --port 7000 --num-workers 2`` serves, as JSON:

- ``POST /find_best_worker`` and ``POST /find_worker_round_robin``:
  ``{"local_hashes": [...], "num_tokens": n}`` -> ``{"worker_id": n, "overlap_blocks": k}``
- ``POST /find_best_workers``: ``{"requests": [the same, ...]}``, decided together -> ``{"worker_ids": [...],
  "overlap_blocks": [...]}``
- ``POST /reset``: forgets what the workers cache (``worker_id``, ``until_cleared``: see ``KvRouter.reset``)
- ``GET /workers``: what is known of each worker; ``GET /health``

Bad input is answered with status 400 and ``{"detail": reason}``.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from typing import Any

from kvrouter import _core
from kvrouter.config import DEFAULT_BLOCK_SIZE, DEFAULT_KV_EVENTS_PORT, DEFAULT_METRICS_PORT, check_port
from kvrouter.router import KvRouter

DEFAULT_API_PORT = 7000


class RouterAPI:
    """A ``KvRouter`` behind an HTTP server (C++ from socket to socket).

    port: 0 takes any free one; ``self.port`` says which.
    host: loopback unless told otherwise, as there is no authentication.
    router_options: those of ``KvRouter``.
    """

    def __init__(
        self,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_workers: int = 4,
        base_kv_events_port: int = DEFAULT_KV_EVENTS_PORT,
        base_metrics_port: int = DEFAULT_METRICS_PORT,
        port: int = DEFAULT_API_PORT,
        *,
        host: str = "127.0.0.1",
        **router_options: Any,
    ) -> None:
        if port != 0:
            check_port(port, "port")
        self.host = host
        self.port = port
        self.router = KvRouter(block_size, num_workers, base_kv_events_port, base_metrics_port, **router_options)
        self._server: _core.RouterApiServer | None = None

    def serve(self) -> None:
        """Starts the router and the server, in threads of their own.  A second call does nothing.

        Raises OSError, naming the port and the setting, when the address cannot be bound.
        """
        if self._server is not None:
            return
        try:
            self._server = _core.RouterApiServer(self.router._core, self.host, self.port)
        except OSError as error:
            raise OSError(
                f"router API: cannot listen on {self.host} port {self.port}: {error}. Choose another port (--port)"
            ) from None
        self.port = self._server.port
        self.router.start()

    def close(self) -> None:
        """Stops both.  A second call does nothing."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        self.router.close()

    async def start(self) -> None:
        """serve(), for async callers."""
        self.serve()

    async def stop(self) -> None:
        """close(), for async callers."""
        self.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvrouter.api", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: loopback; there is no authentication)")
    add("--port", type=int, default=DEFAULT_API_PORT, help="port to listen on; 0: any free one (default: %(default)s)")
    add("--block-size", type=int, default=DEFAULT_BLOCK_SIZE, help="tokens a KV block, as the workers have it")
    add("--num-workers", type=int, default=2, help="how many workers there are (default: %(default)s)")
    add("--base-kv-events-port", type=int, default=DEFAULT_KV_EVENTS_PORT, help="worker N publishes on this + N")
    add("--base-metrics-port", type=int, default=DEFAULT_METRICS_PORT, help="worker N publishes load on this + N")
    add("--worker-addresses", type=_names, help="comma-separated hosts of the workers (default: localhost)")
    add("--worker-ports", type=_ports, help="comma-separated KV-event ports of the workers, instead of base + N")
    add("--worker-urls", type=_names, help="comma-separated http://host:port of the workers, for /metrics")
    add("--policy", default="linear", help=f"one of {', '.join(_core.policy_names())} (default: %(default)s)")
    add("--seed", type=int, help="of the random choice between equals")
    add("--log-level", default="INFO", help="DEBUG logs every worker's score for each decision")
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


def _ports(text: str) -> list[int]:
    return [int(port) for port in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)  # before any thread starts: all inherit it
    try:
        api = RouterAPI(
            args.block_size,
            args.num_workers,
            args.base_kv_events_port,
            args.base_metrics_port,
            args.port,
            host=args.host,
            worker_addresses=args.worker_addresses,
            worker_ports=args.worker_ports,
            worker_urls=args.worker_urls,
            policy=args.policy,
            seed=args.seed,
        )
        api.serve()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"kvrouter: listening on http://{api.host}:{api.port}", flush=True)
    signal.sigwait(stop_signals)
    api.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
