"""Which NeMo-RL this integration knows."""

from __future__ import annotations

#: Version as ``nemo_rl.package_info`` has it -> the commit with which the contract tests passed.
SUPPORTED = {"0.6.0": "7ea279abfbeb698b092856d0dab61e7cf39bc909 (main, 2026-08-22)"}


class UnsupportedNemoRlError(RuntimeError):
    """The NeMo-RL installed here is none that this integration knows; nothing of it was changed."""


def check() -> None:
    """Raises UnsupportedNemoRlError for a version that is not in ``SUPPORTED``.

    NeMo-RL's main branch carries one version for months: that the code is as it is known is for ``seams.check``.
    """
    from nemo_rl.package_info import __shortversion__ as version

    if version not in SUPPORTED:
        raise unsupported([f"its version is {version}"])


def unsupported(differences: list[str]) -> UnsupportedNemoRlError:
    """The error that names what is different, and what would do."""
    known = "; ".join(f"{version} as of {commit}" for version, commit in SUPPORTED.items())
    return UnsupportedNemoRlError(
        "kvrouter does not know this NeMo-RL, and leaves it as it is:\n"
        + "".join(f"  - {difference}\n" for difference in differences)
        + f"Known: {known}. Use that one, a newer kvrouter, or run without kvrouter.integrations.nemo_rl."
    )
