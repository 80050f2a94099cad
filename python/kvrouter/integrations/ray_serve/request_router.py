"""The request router: Ray Serve's interface over the router."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from kvrouter.integrations.fleet import Choice, Endpoints, RoutedFleet
from kvrouter.integrations.ray_serve.prompts import prompt_tokens

logger = logging.getLogger("kvrouter")
_MOST_IN_FLIGHT = 100_000
KV_EVENT_METADATA = "kv_event_metadata"
"""Key of a replica's routing stats: {"endpoint", "replay_endpoint", "block_size"}, as in Ray Serve LLM."""


class KvRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc, unused-ignore]
    """Sends each request to the replica where prefix locality and load score best.

    What replicas cache is learnt from their KV events, whose endpoint a replica tells in its routing stats
    (``record_routing_stats``) under ``kv_event_metadata``; a replica that tells none counts by what was sent there.
    Requests without token ids (see ``prompts``), and all when the router fails, are routed as Serve does by default
    (power of two choices).  A replica that is full is passed over for the next best.
    """

    def initialize_state(
        self,
        block_size: int = 16,
        policy: str = "adaptive",
        max_replicas: int = 64,
        index_memory_limit: int = 0,
        lora_name: str | None = None,
    ) -> None:
        """Takes ``request_router_kwargs``.

        block_size: tokens a KV block; the replicas' own (vLLM: 16).
        policy: one of ``kvrouter.policy_names()``.
        max_replicas: most replicas at a time.
        index_memory_limit: bytes that the prefix index may take; 0: no limit.
        lora_name: the adapter that all requests ask for, if any.
        Raises ValueError, naming the setting, for values out of range.
        """
        self._fleet = RoutedFleet(
            block_size, policy=policy, max_servers=max_replicas, index_memory_limit=index_memory_limit
        )
        self._lora_name = lora_name
        self._told: dict[str, Endpoints] = {}
        self._in_flight: OrderedDict[str, Choice] = OrderedDict()  # by internal request id
        self._failed = False

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that there are now, and what they say of themselves."""
        try:
            self._follow(replicas)
        except Exception as error:
            self._say_once(error)
        super().update_replicas(replicas)

    def _follow(self, replicas: list[RunningReplica]) -> None:
        here = {replica.replica_id.unique_id: replica for replica in replicas}
        for gone in set(self._told) - set(here):
            self._fleet.remove(gone)
            del self._told[gone]
        for name, replica in here.items():
            endpoints = self._endpoints(name, replica.routing_stats.get(KV_EVENT_METADATA))
            if self._told.get(name) != endpoints:
                self._fleet.add(name, endpoints)
                self._told[name] = endpoints

    def _endpoints(self, name: str, metadata: dict[str, Any] | None) -> Endpoints:
        if not metadata:
            return self._told.get(name, Endpoints())
        if metadata.get("block_size") not in (None, self._fleet.block_size):
            logger.warning(
                "replica %s has blocks of %s tokens, the router %d: set block_size in request_router_kwargs",
                name,
                metadata["block_size"],
                self._fleet.block_size,
            )
            return Endpoints()
        return Endpoints(kv_events=metadata["endpoint"], replay=metadata.get("replay_endpoint") or "")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica first, then those that Serve would choose."""
        by_default: list[list[RunningReplica]] = await PowerOfTwoChoicesRequestRouter.choose_replicas(
            self, candidate_replicas, pending_request
        )
        if pending_request is None or pending_request.metadata.multiplexed_model_id:
            return by_default
        try:
            best = self._best(candidate_replicas, pending_request)
        except Exception as error:
            self._say_once(error)
            best = None
        return by_default if best is None else [[best], *by_default]

    def _best(self, candidates: list[RunningReplica], request: PendingRequest) -> RunningReplica | None:
        tokens = prompt_tokens(request.args, request.kwargs)
        available = {replica.replica_id.unique_id: replica for replica in self.select_available_replicas(candidates)}
        if tokens is None or not available:
            return None
        request_id = request.metadata.internal_request_id
        self._end(request_id)  # of an earlier attempt, where the replica was full
        choice = self._fleet.choose(tokens, available, lora_name=self._lora_name)
        self._in_flight[request_id] = choice
        if len(self._in_flight) > _MOST_IN_FLIGHT:
            self._end(next(iter(self._in_flight)))
        return available[choice.server]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica took the request: if not the one that was chosen, the choice counts no longer."""
        choice = self._in_flight.get(pending_request.metadata.internal_request_id)
        if choice is not None and choice.server != replica_id.unique_id:
            self._end(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request is finished, or has failed."""
        self._end(internal_request_id)

    def _end(self, request_id: str) -> None:
        choice = self._in_flight.pop(request_id, None)
        if choice is not None:
            self._fleet.complete(choice)

    def _say_once(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("requests are routed as Ray Serve does by default: %s", error)
