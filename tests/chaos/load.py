"""A steady load of closed-loop users, through the gateway and through a router in the client's own process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence

import aiohttp

from chaos.answers import Answer, CutOffError, UnreadableError, read_answer
from chaos.fleet import Endpoints
from chaos.ledger import Fate, Ledger
from chaos.routers import GatewayRouter, LocalRouter
from chaos.workload import ChaosRequest, ExpectedOutput, Workload

_CONNECTION_ERRORS = (aiohttp.ClientError, OSError, CutOffError)
_REQUEST_TIMEOUT_S = 90.0  # longer than any fault, and than the gateway waits: silence for so long is a loss
_LOCAL_ATTEMPTS = 6
_RESEND_AFTER_S = 0.1


class Load:
    """Users that send one request after the other until ``stop``; each request has its fate in ``ledger``."""

    def __init__(
        self,
        workload: Workload,
        gateway: GatewayRouter,
        local: LocalRouter | None,
        endpoints: Sequence[Endpoints],
        model: str,
        expected: ExpectedOutput | None,
        seed: int,
    ) -> None:
        self.ledger = Ledger()
        self.sent = 0
        self._workload = workload
        self._gateway = gateway
        self._local = local
        self._endpoints = endpoints
        self._model = model
        self._expected = expected
        self._rng = random.Random(seed)
        self._stopping = False
        self._users: list[asyncio.Task[None]] = []

    def start(self, users: int, think_s: float, local_share: float = 0.3) -> None:
        """``users`` users, who wait ``think_s`` seconds on average between an answer and the next request.

        local_share: share of the requests that go by way of the local router.
        """
        self._users = [asyncio.ensure_future(self._user(think_s, local_share)) for _ in range(users)]

    async def stop(self) -> None:
        """No more requests; returns when those under way have their fates."""
        self._stopping = True
        await asyncio.gather(*self._users)

    async def _user(self, think_s: float, local_share: float) -> None:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not self._stopping:
                await self.send(session, self._workload.next(), self._rng.random() < local_share)
                await asyncio.sleep(self._rng.expovariate(1 / think_s) if think_s else 0)

    async def send(self, session: aiohttp.ClientSession, request: ChaosRequest, local: bool) -> None:
        """Sends a request and enters its fate."""
        self.sent += 1
        send = self._through_local if local and self._local else self._through_gateway
        try:
            answer = await send(session, request)
            self._check(request, answer)
        except UnreadableError as error:
            self.ledger.enter(request.number, error.fate, error.reason)
        except asyncio.TimeoutError:
            self.ledger.enter(request.number, Fate.LOST, f"no answer within {_REQUEST_TIMEOUT_S:g} s")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.ledger.enter(request.number, Fate.LOST, f"an answer that is none: {error!r}")

    def _check(self, request: ChaosRequest, answer: Answer) -> None:
        wanted = self._expected.of(request) if self._expected else None
        if len(answer.tokens) > request.max_tokens:
            raise UnreadableError(Fate.DUPLICATED, "more tokens than were asked for")
        if len(answer.tokens) < request.max_tokens or (wanted is not None and answer.tokens != wanted):
            raise UnreadableError(Fate.LOST, "not the answer to this request")
        self.ledger.prompt_tokens += len(request.tokens)
        self.ledger.cached_tokens += answer.cached_tokens
        self._workload.answered(request, answer.tokens)
        self.ledger.enter(request.number, Fate.ANSWERED)

    async def _through_gateway(self, session: aiohttp.ClientSession, request: ChaosRequest) -> Answer:
        """A request whose router is killed is sent again, as any client does; what a living one drops is lost."""
        while True:
            kills = self._gateway.kills
            try:
                return await self._post(session, self._gateway.url, request)
            except _CONNECTION_ERRORS as error:
                if not self._gateway.down and self._gateway.kills == kills:
                    raise UnreadableError(Fate.LOST, f"the gateway dropped it: {error!r}") from None
            self.ledger.resent += 1
            await asyncio.sleep(_RESEND_AFTER_S)

    async def _through_local(self, session: aiohttp.ClientSession, request: ChaosRequest) -> Answer:
        """To the local router's choice; from a worker that fails before its first token, to another."""
        assert self._local is not None
        router = self._local.router
        decision = router.route(request.tokens)
        worker = decision.worker
        for _ in range(_LOCAL_ATTEMPTS):
            try:
                answer = await self._post(session, self._endpoints[worker].url, request)
            except _CONNECTION_ERRORS:
                worker = self._rng.randrange(len(self._endpoints))
                continue
            router.complete(decision.ticket, len(answer.tokens))
            return answer
        router.complete(decision.ticket)
        raise UnreadableError(Fate.REFUSED, f"{_LOCAL_ATTEMPTS} workers failed (client's own retries)")

    async def _post(self, session: aiohttp.ClientSession, url: str, request: ChaosRequest) -> Answer:
        async with session.post(f"{url}/v1/completions", json=request.body(self._model)) as response:
            return await read_answer(response, request.stream)


async def send_all(load: Load, requests: Iterable[ChaosRequest], users: int) -> None:
    """These requests, in their order, by ``users`` users, all through the gateway."""
    queue = iter(requests)

    async def user() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)) as session:
            for request in queue:
                await load.send(session, request, local=False)

    await asyncio.gather(*(user() for _ in range(users)))
