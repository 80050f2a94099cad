"""The fleet simulator: W simulated vLLM workers behind the product's own router, in virtual time.

from kvrouter.simulate import simulate, workloads

requests = workloads.make("grpo", num_workers=32, seed=0)
result = simulate(requests, num_workers=32, policy="adaptive")
"""

from __future__ import annotations

from kvrouter.simulate.fleet import FleetResult, simulate
from kvrouter.simulate.profiles import PROFILES, Profile
from kvrouter.simulate.workloads import WORKLOADS, RequestList

__all__ = ["PROFILES", "WORKLOADS", "FleetResult", "Profile", "RequestList", "simulate"]
