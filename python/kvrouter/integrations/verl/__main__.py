"""Prints the path of a router config for verl, for its ``rollout.router_config_path``."""

from __future__ import annotations

import sys
from pathlib import Path

from kvrouter.integrations.verl.seams import UnsupportedVerlError, check_version


def main() -> int:
    """Returns the exit status: 1 when the installed verl is not supported."""
    try:
        check_version()
    except UnsupportedVerlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Path(__file__).with_name("router.yaml"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
