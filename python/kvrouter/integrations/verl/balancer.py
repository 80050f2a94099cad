"""The load balancer: verl's interface over the router."""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvrouter.integrations.fleet import Choice, RoutedFleet
from kvrouter.integrations.sessions import Sessions, Stickiness
from kvrouter.integrations.verl.endpoints import ServerEngine, describe_servers
from kvrouter.integrations.verl.seams import check_version

logger = logging.getLogger("kvrouter")
_VLLM_BLOCK_SIZE = 16
_MOST_REMEMBERED = 100_000  # requests in flight


@dataclass(frozen=True)
class Settings:
    """What the YAML file may say, besides ``router_class``.

    block_size: tokens a KV block; None: what the servers say (vLLM's 16 where they say nothing).
    policy: one of ``kvrouter.policy_names()``.
    kv_events: listen to the servers' KV events; false: only what is routed is known.
    lora_name: the adapter's name in the servers, when one is trained (verl: "123").
    max_servers: most servers at a time.
    index_memory_limit: bytes that the prefix index may take, 0: no limit.
    overload_ratio, overload_slack, sessions: see ``kvrouter.integrations.sessions.Stickiness``.
    """

    block_size: int | None = None
    policy: str = "adaptive"
    kv_events: bool = True
    lora_name: str | None = None
    max_servers: int = 64
    index_memory_limit: int = 0
    overload_ratio: float = Stickiness.overload_ratio
    overload_slack: int = Stickiness.overload_slack
    sessions: int = Stickiness.sessions

    @classmethod
    def read(cls, router_kwargs: Mapping[str, Any] | None) -> Settings:
        """From the YAML file's contents.  Raises ValueError for keys that there are not."""
        given = {key: value for key, value in (router_kwargs or {}).items() if key != "router_class"}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"router config: unknown keys {unknown}; there are {sorted(known)}")
        return cls(**given)


class KvBalancer:
    """Chooses a server for each request by prefix locality and load in one score; conversations stay where they are.

    A conversation (``request_id``) goes on at its server while that is not overloaded (``Stickiness``); otherwise, and
    at first, the router's policy decides over the prompt's token ids.  A request without token ids goes where least is
    in flight.  Methods and errors are those of verl's ``RequestLoadBalancer``.

    servers: name (``host:port``) to actor handle.
    router_kwargs: see ``Settings``.
    """

    def __init__(self, servers: Mapping[str, Any], router_kwargs: Mapping[str, Any] | None = None) -> None:
        self._settings = settings = Settings.read(router_kwargs)
        self._sessions = Sessions(Stickiness(settings.overload_ratio, settings.overload_slack, settings.sessions))
        self._servers: dict[str, Any] = {}
        self._in_flight: dict[str, int] = {}
        self._choices: defaultdict[tuple[str, str], deque[Choice]] = defaultdict(deque)
        self._hits = {"prompt_tokens": 0, "expected_cached_tokens": 0}
        self._fleet: RoutedFleet | None = None
        self.add_servers(servers)

    # --- requests ---

    def require_acquire_fields(self) -> list[str]:
        """Of each request its token ids."""
        return ["prompt_ids"]

    def require_release_fields(self) -> list[str]:
        """Which request it was."""
        return ["request_id"]

    def acquire_server(self, request_id: str, prompt_ids: Sequence[int] | None = None) -> tuple[str, Any]:
        """The server for a request: (name, actor handle).  Raises RuntimeError when there is none."""
        if not self._servers:
            raise RuntimeError("No available servers in load balancer")
        home = self._sessions.home(request_id, self._in_flight)
        server = self._choose(request_id, prompt_ids, home)
        self._sessions.set(request_id, server)
        self._in_flight[server] += 1
        return server, self._servers[server]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """The request has ended.  What is not known is ignored, as servers may have been removed."""
        if self._in_flight.get(server_id, 0) > 0:
            self._in_flight[server_id] -= 1
        choices = self._choices.get((server_id, request_id or ""))
        if choices and self._fleet is not None:
            self._fleet.complete(choices.popleft())
            if not choices:
                del self._choices[server_id, request_id or ""]

    def _choose(self, request_id: str, prompt_ids: Sequence[int] | None, home: str | None) -> str:
        if self._fleet is not None and prompt_ids is not None and len(prompt_ids) > 0:
            try:
                among = None if home is None else [home]
                choice = self._fleet.choose(prompt_ids, among, lora_name=self._settings.lora_name)
            except (LookupError, TypeError, ValueError) as error:
                logger.warning("request %s is routed by load alone: %s", request_id, error)
            else:
                if len(self._choices) < _MOST_REMEMBERED:
                    self._choices[choice.server, request_id].append(choice)
                self._hits["prompt_tokens"] += len(prompt_ids)
                self._hits["expected_cached_tokens"] += choice.overlap_tokens
                return choice.server
        if home is not None:
            return home
        least = min(self._in_flight.values())
        return random.choice([name for name, count in self._in_flight.items() if count == least])

    # --- servers ---

    def add_servers(self, servers: Mapping[str, Any]) -> None:
        """Servers that requests may go to from now on.  One that was there starts anew."""
        engines = describe_servers(servers) if self._settings.kv_events else {name: ServerEngine() for name in servers}
        for name, handle in servers.items():
            self._register(name, engines[name])
            self._servers[name] = handle
            self._in_flight[name] = 0

    def _register(self, name: str, engine: ServerEngine) -> None:
        settings = self._settings
        if self._fleet is None:
            self._fleet = RoutedFleet(
                settings.block_size or engine.block_size or _VLLM_BLOCK_SIZE,
                policy=settings.policy,
                max_servers=settings.max_servers,
                index_memory_limit=settings.index_memory_limit,
            )
        if engine.block_size not in (None, self._fleet.block_size):
            logger.warning(
                "server %s has blocks of %d tokens, the router %d: its KV events are not used (block_size)",
                name,
                engine.block_size,
                self._fleet.block_size,
            )
            engine = ServerEngine()
        self._fleet.remove(name)
        self._fleet.add(name, engine.endpoints)

    def remove_servers(self, server_ids: Sequence[str]) -> None:
        """Nothing goes to these servers any more; conversations there move."""
        for name in server_ids:
            self._servers.pop(name, None)
            self._in_flight.pop(name, None)
            if self._fleet is not None:
                self._fleet.remove(name)

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Conversations are placed anew; what the servers cache stays known."""
        return {"cleared_entries": self._sessions.clear(), "server_loads": dict(self._in_flight)}

    # --- state ---

    def get_all_servers(self) -> list[str]:
        """Names of the servers."""
        return list(self._servers)

    def get_inflight_count(self, server_id: str) -> int:
        """Requests in flight at a server; 0 for one that is not there."""
        return self._in_flight.get(server_id, 0)

    def get_total_inflight(self) -> int:
        """Requests in flight at all servers."""
        return sum(self._in_flight.values())

    def get_status(self) -> dict[str, Any]:
        """As verl's own, and what the router knows: blocks cached at each server, tokens routed and expected to hit."""
        return {
            "servers": dict(self._in_flight),
            "total_inflight": self.get_total_inflight(),
            "active_servers": len(self._servers),
            "registered_handles": list(self._servers),
            "cached_blocks": self._fleet.cached_blocks() if self._fleet is not None else {},
            **self._hits,
        }


class KvRequestLoadBalancer(KvBalancer):
    """What ``router_class`` names: ``KvBalancer`` for a verl that it was tried with.

    Raises UnsupportedVerlError, before anything is done, for another version.
    """

    def __init__(self, servers: Mapping[str, Any], router_kwargs: Mapping[str, Any] | None = None) -> None:
        check_version()
        super().__init__(servers, router_kwargs)
