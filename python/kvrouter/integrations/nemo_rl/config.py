"""The router's settings in NeMo-RL's configs, under either of their names."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, cast

from kvrouter.config import RouterConfig
from kvrouter.ray.config import router_config_from

logger = logging.getLogger("kvrouter.nemo_rl")

#: Beside the keys of ``RouterConfig``: False leaves NeMo-Gym the workers' own URLs.
HTTP_GATEWAY = "http_gateway"


def hand_on_router_config(master_config: Any) -> None:
    """Merges ``grpo.router`` into ``policy.generation.router_cfg``, which the generation reads; its keys win.

    master_config: NeMo-RL's ``MasterConfig``.  Changed only where ``grpo.router`` is given.
    """
    of_grpo = getattr(master_config.grpo, "router", None)
    generation = master_config.policy["generation"]
    if not of_grpo or generation is None:
        return
    merged = router_config_from({"policy": {"generation": generation}, "grpo": {"router": dict(of_grpo)}})
    if merged and merged["enabled"] and generation["backend"] != "vllm":
        logger.warning("Router is only supported with vLLM backend. Skipping router setup.")
        return
    generation["router_cfg"] = merged


def router_settings(config: Mapping[str, Any]) -> RouterConfig | None:
    """The router's settings of a generation config, defaults filled in; None when it asks for no router.

    Raises ValueError, naming the key, for settings that cannot be.
    """
    given = config.get("router_cfg")
    if not given or not given.get("enabled", False):
        return None
    known = [*RouterConfig.__annotations__, HTTP_GATEWAY]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(
                f"policy.generation.router_cfg.{key} is unknown"
                + (f": did you mean {near[0]}?" if near else f": it takes {', '.join(known)}")
            )
    for key in ("worker_addresses", "worker_ports"):
        if given.get(key) is not None:
            raise ValueError(f"policy.generation.router_cfg.{key} must be unset: the workers say where they are")
    if not config["vllm_cfg"]["async_engine"]:
        raise ValueError(
            "Router can only be used with async_engine=true. Please enable async_engine in your vLLM config."
        )
    settings = router_config_from({"policy": {"generation": {"router_cfg": {"replay": True, **given}}}})
    return cast(RouterConfig, settings)
