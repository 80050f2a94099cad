"""Everything of verl that this integration relies on.

- ``rollout.router_config_path`` names a YAML file; ``verl.workers.rollout.router.get_router_handle`` makes a Ray actor
  of its ``router_class``, called with the servers and the file's contents.
- The actor answers ``verl.workers.rollout.router.RequestLoadBalancer``'s methods; with ``require_acquire_fields`` it
  gets each request's ``prompt_ids``, with ``require_release_fields`` the ``request_id`` when it ends.
- A server's name is ``host:port`` of its HTTP server; a vLLM server's actor has its ``AsyncLLM`` as ``engine``.
"""

from __future__ import annotations

from importlib import metadata

SUPPORTED_VERSIONS = ("0.9.1",)
PLUGIN_METHODS = (
    "acquire_server",
    "require_acquire_fields",
    "require_release_fields",
    "release_server",
    "add_servers",
    "remove_servers",
    "get_all_servers",
    "get_status",
    "clear_sticky_cache",
    "get_total_inflight",
)


class UnsupportedVerlError(RuntimeError):
    """verl is of a version that this integration was not tried with."""


def check_version() -> str:
    """The installed verl's version.  Raises UnsupportedVerlError if it is none of SUPPORTED_VERSIONS."""
    supported = ", ".join(SUPPORTED_VERSIONS)
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        raise UnsupportedVerlError(f"verl is not installed; this integration is for verl {supported}") from None
    if version not in SUPPORTED_VERSIONS:
        raise UnsupportedVerlError(
            f"verl {version} is not a version that kvrouter.integrations.verl knows ({supported}): install one of "
            "these, or unset actor_rollout_ref.rollout.router_config_path for verl's own load balancer"
        )
    return version
