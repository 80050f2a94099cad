"""A request router for Ray Serve deployments of LLM engines: docs/integrations/ray_serve.md."""

from kvrouter.integrations.ray_serve.request_router import KvRequestRouter

__all__ = ["KvRequestRouter"]
