"""A DNS name with many addresses, each a worker, looked up again while the service runs."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

from kvrouter.bench.local_http import HttpError
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import DnsSpec, WorkerSpec

logger = logging.getLogger("kvrouter")

Resolver = Callable[[str], list[str]]


def resolve(name: str) -> list[str]:
    """The IP addresses of a name, IPv4 first, none twice; raises OSError when it has none."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return list(dict.fromkeys(addresses))


class DnsWorkers:
    """Brings the service's workers in line with the addresses of a name.

    Only workers that this object added are ever removed.  A name that cannot be looked up changes nothing, as a name
    server that is down is no reason to give up workers that serve; it is said once until it can be again.

    spec: the name, and what is said of the worker at each of its addresses.
    service: the service to tell.
    interval_s: seconds between two look-ups.
    resolver: from a name to its addresses; ``OSError`` when it has none.
    """

    def __init__(
        self, spec: DnsSpec, service: ServiceClient, interval_s: float = 5.0, resolver: Resolver = resolve
    ) -> None:
        self._spec = spec
        self._service = service
        self._interval_s = interval_s
        self._resolver = resolver
        self._due = 0.0
        self._added: set[str] = set()
        self._failed = False

    def follow(self) -> None:
        """Looks the name up if it is time to, and acts if its addresses have changed."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval_s
        try:
            wanted = {worker.url: worker for worker in map(self._spec.at, self._resolver(self._spec.host))}
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be looked up, its workers stay as they are: %s", self._spec.host, error)
            self._failed = True
            return
        self._failed = False
        try:
            self._change(wanted)
        except HttpError as error:
            logger.warning("The workers of %s stay as they are: %s", self._spec.host, error)

    def _change(self, wanted: dict[str, WorkerSpec]) -> None:
        for url, added in self._service.change_workers(wanted, self._added):
            if added:
                self._added.add(url)
                logger.info("Worker %s added: %s has its address", url, self._spec.host)
            else:
                logger.info("Worker %s removed: %s no longer has its address", url, self._spec.host)
        self._added &= wanted.keys()
