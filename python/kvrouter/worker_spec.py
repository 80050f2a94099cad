"""Which workers there are, as ``--worker`` and a workers file say it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

_ENDPOINT_KEYS = ("kv_events", "replay", "load")
_MOST_RANKS = 1024
_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\[\]:]+):\d{1,5}/?")
_DNS = re.compile(r"(dns|dnss)://([^/\[\]:]+):(\d{1,5})/?")


@dataclass(frozen=True)
class WorkerSpec:
    """A server of the fleet: the base URL of its HTTP server and, optionally, its ZMQ endpoints.

    data_parallel_size: engines behind the URL, each a worker of its own, whose endpoints have these ports plus its
        rank; 0: one engine, which is not asked for by rank.
    """

    url: str
    kv_events: str = ""
    replay: str = ""
    load: str = ""
    data_parallel_size: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``http(s)://host:port,kv_events=tcp://...,replay=tcp://...,load=tcp://...,data_parallel_size=N``.

        Raises ValueError, saying what is wrong.
        """
        url, *pairs = (part.strip() for part in text.split(","))
        if not _URL.fullmatch(url):
            raise ValueError(f"--worker {text}: it must begin with http://host:port or https://host:port")
        return cls(url.rstrip("/"), **_fields(text, pairs))

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """From an entry of a workers file: ``{"url": ..., "kv_events": ..., "data_parallel_size": ...}``."""
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise ValueError(f'{entry!r} is no worker: {{"url": "http://host:port"}} at least')
        keys = (*_ENDPOINT_KEYS, "data_parallel_size")
        unknown = set(entry) - {"url", *keys}
        if unknown:
            raise ValueError(f"worker {entry['url']}: unknown keys {sorted(unknown)}")
        return cls.parse(",".join([entry["url"], *(f"{key}={entry[key]}" for key in keys if entry.get(key))]))

    def to_dict(self) -> dict[str, Any]:
        """As ``POST /workers`` and a workers file have it."""
        return asdict(self)

    def ranks(self) -> list[Self]:
        """Its engines, each with its own endpoints."""
        if not self.data_parallel_size:
            return [self]
        return [
            replace(
                self,
                data_parallel_size=0,
                **{key: endpoint_of_rank(getattr(self, key), rank) for key in _ENDPOINT_KEYS},
            )
            for rank in range(self.data_parallel_size)
        ]


@dataclass(frozen=True)
class DnsSpec:
    """A name with many addresses, each a worker: ``dns://name:port,kv_events=tcp://*:5557,...``.

    The ``*`` of an endpoint stands for the address.  ``dnss://`` means https, and then the certificate has to be for
    the address.
    """

    scheme: str
    host: str
    port: int
    options: WorkerSpec

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, saying what is wrong."""
        url, *pairs = (part.strip() for part in text.split(","))
        match = _DNS.fullmatch(url)
        if not match:
            raise ValueError(f"--worker {text}: it must begin with dns://name:port")
        fields = _fields(text, pairs)
        for key in _ENDPOINT_KEYS:
            if fields.get(key) and not re.match(r"tcp://\*:\d+$", fields[key]):
                raise ValueError(f"--worker {text}: {key} must be tcp://*:port, the * standing for each address")
        scheme = {"dns": "http", "dnss": "https"}[match[1]]
        return cls(scheme, match[2], int(match[3]), WorkerSpec("", **fields))

    def at(self, address: str) -> WorkerSpec:
        """The worker at one of the name's addresses."""
        host = f"[{address}]" if ":" in address else address
        endpoints = {key: getattr(self.options, key).replace("*", host) for key in _ENDPOINT_KEYS}
        return replace(self.options, url=f"{self.scheme}://{host}:{self.port}", **endpoints)


def parse_workers(texts: list[str]) -> tuple[list[WorkerSpec], list[DnsSpec]]:
    """What the ``--worker`` options name: servers, and names with many addresses.  Raises ValueError."""
    is_name = [text.startswith(("dns://", "dnss://")) for text in texts]
    return (
        [WorkerSpec.parse(text) for text, name in zip(texts, is_name, strict=True) if not name],
        [DnsSpec.parse(text) for text, name in zip(texts, is_name, strict=True) if name],
    )


def endpoint_of_rank(endpoint: str, rank: int) -> str:
    """Where the engine of this rank publishes when that of rank 0 does at ``endpoint``: at its port plus the rank."""
    if not endpoint or not rank:
        return endpoint
    base, _, port = endpoint.rpartition(":")
    if not port.isdigit():
        raise ValueError(f"{endpoint} has no port that a rank can be added to")
    return f"{base}:{int(port) + rank}"


def read_workers_file(path: Path) -> list[WorkerSpec]:
    """The workers of a JSON file: a list of objects, as ``WorkerSpec.from_dict`` takes them.

    Raises ValueError, naming the file, when it is not that; OSError when it cannot be read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("it must hold a list of workers")
        return [WorkerSpec.from_dict(entry) for entry in entries]
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deep to be a list of workers") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fields(text: str, pairs: list[str]) -> dict[str, Any]:
    """The ``key=value`` parts of a ``--worker``."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in fields:
            raise ValueError(f"--worker {text}: {key} is given twice")
        if key == "data_parallel_size":
            if not value.isdecimal() or not 1 <= int(value) <= _MOST_RANKS:
                raise ValueError(f"--worker {text}: {key} must be a number from 1 to {_MOST_RANKS}")
            fields[key] = int(value)
            continue
        if key not in _ENDPOINT_KEYS or not value:
            raise ValueError(f"--worker {text}: '{pair}' is none of kv_events=, replay=, load=, data_parallel_size=")
        if not re.match(r"(tcp|ipc|inproc)://.", value):
            raise ValueError(f"--worker {text}: {key} must be a ZMQ endpoint such as tcp://host:5557")
        fields[key] = value
    return fields
