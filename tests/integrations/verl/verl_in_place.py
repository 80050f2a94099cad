"""A pytest plugin for verl's own tests: kvrouter's load balancer in place of verl's."""

from __future__ import annotations

import verl.workers.rollout.router as verl_router

from kvrouter.integrations.verl import KvRequestLoadBalancer

verl_router.GlobalRequestLoadBalancer = KvRequestLoadBalancer
