"""One run of the fleet simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from kvrouter import _core
from kvrouter.simulate.profiles import PROFILES, Profile
from kvrouter.simulate.workloads import RequestList


@dataclass(frozen=True)
class FleetResult:
    """What a run came to.

    Times in seconds of the simulation, but for ``decision_p50_us``, which is real; ``seconds`` until the last request
    was done; ``tokens_per_s`` of prompts and outputs; ``hit_rate`` of the workers' prefix caches, in tokens;
    ``imbalance``: tokens served by the busiest worker, relative to the mean.
    """

    seconds: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    latency_p99_s: float
    hit_rate: float
    imbalance: float
    preemptions: int
    steps: int
    requests: int
    decision_p50_us: float


def simulate(
    requests: RequestList,
    num_workers: int,
    policy: str = "linear",
    *,
    seed: int = 0,
    profile: Profile = PROFILES["h100-8b"],
    event_delay_s: float = 0.005,
    load_delay_s: float = 0.005,
    load_interval_s: float = 0.0,
    load_loss: float = 0.0,
    network_delay_s: float = 0.001,
    feedback: bool = True,
    batches: bool | None = None,
    slowdown: Sequence[float] = (),
) -> FleetResult:
    """Serves the requests with a fleet under a policy, in virtual time.

    event_delay_s, load_delay_s: until KV events and load messages reach the router.
    load_interval_s: between two load messages of a worker; 0: one after each step.
    load_loss: share of the load messages that are lost.
    feedback: the router is told of first tokens and completions, as its users do through tickets.
    batches: requests that arrive at one moment are decided in one call; False: one after the other, as policies of
    the field are used; None: in one call for ``adaptive`` alone.
    slowdown: a factor on each worker's times; empty: all alike.
    Raises ValueError, naming the setting or the request, for what cannot be run.
    """
    engine = profile.with_blocks(requests.num_blocks)
    times = {field.name: getattr(engine, field.name) for field in fields(engine) if field.name != "name"}
    result = _core.simulate_fleet(
        **requests.columns(),
        **times,
        num_workers=num_workers,
        policy=policy,
        seed=seed,
        users=requests.users,
        event_delay_s=event_delay_s,
        load_delay_s=load_delay_s,
        load_interval_s=load_interval_s,
        load_loss=load_loss,
        network_delay_s=network_delay_s,
        feedback=feedback,
        batches=policy == "adaptive" if batches is None else batches,
        slowdown=list(slowdown),
    )
    return FleetResult(**{field.name: result[field.name] for field in fields(FleetResult)})  # type: ignore[arg-type]
