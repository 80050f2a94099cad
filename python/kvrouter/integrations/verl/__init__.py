"""A load balancer for verl's rollout servers: docs/integrations/verl.md.

``actor_rollout_ref.rollout.router_config_path=$(python -m kvrouter.integrations.verl)`` turns it on.
"""

from kvrouter.integrations.verl.balancer import KvBalancer, KvRequestLoadBalancer, Settings
from kvrouter.integrations.verl.seams import SUPPORTED_VERSIONS, UnsupportedVerlError, check_version

__all__ = [
    "SUPPORTED_VERSIONS",
    "KvBalancer",
    "KvRequestLoadBalancer",
    "Settings",
    "UnsupportedVerlError",
    "check_version",
]
