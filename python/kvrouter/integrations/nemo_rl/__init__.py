"""The router in an unmodified NeMo-RL: ``policy.generation.router_cfg`` and ``grpo.router`` work as the guide has them.

From a script of one's own, before it imports ``nemo_rl.algorithms.grpo``'s names::

    import kvrouter.integrations.nemo_rl

    kvrouter.integrations.nemo_rl.enable()

or, for NeMo-RL's scripts as they are::

    python -m kvrouter.integrations.nemo_rl examples/run_grpo.py --config ... [overrides]

No file of NeMo-RL is changed; ``disable()`` puts back every object that ``enable()`` replaced.  What is replaced, and
what is relied on, is in ``seams``, and which versions are known in ``versions``.  The guide:
docs/integrations/nemo_rl.md.
"""

from kvrouter.integrations.nemo_rl.versions import UnsupportedNemoRlError


def enable() -> None:
    """Makes NeMo-RL in this process use the router where its config asks for one.  A second call does nothing.

    Raises UnsupportedNemoRlError, with nothing changed, for a NeMo-RL that this package does not know; ImportError when
    NeMo-RL is not installed.
    """
    from kvrouter.integrations.nemo_rl import import_paths, seams, versions

    versions.check()
    seams.check()
    seams.apply()
    import_paths.install()


def disable() -> None:
    """Undoes ``enable()``: NeMo-RL's attributes are the objects that they were before.  A second call does nothing.

    Generation objects made meanwhile keep their router until they are shut down.
    """
    from kvrouter.integrations.nemo_rl import import_paths, seams

    import_paths.remove()
    seams.undo()


def is_enabled() -> bool:
    """Whether ``enable()`` is in force in this process."""
    from kvrouter.integrations.nemo_rl import seams

    return seams.applied()


__all__ = ["UnsupportedNemoRlError", "disable", "enable", "is_enabled"]
