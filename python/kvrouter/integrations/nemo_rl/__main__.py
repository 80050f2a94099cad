"""``python -m kvrouter.integrations.nemo_rl SCRIPT [arguments]``: one of NeMo-RL's scripts, with the router enabled."""

from __future__ import annotations

import os
import runpy
import sys

from kvrouter.integrations.nemo_rl import UnsupportedNemoRlError, enable


def main(arguments: list[str]) -> None:
    """Runs ``arguments[0]`` as ``python`` would, with the rest as its arguments.  Ends the process on bad usage."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m kvrouter.integrations.nemo_rl SCRIPT [arguments]\n  e.g. examples/run_grpo.py")
    script = arguments[0]
    if not os.path.isfile(script):
        sys.exit(f"{script}: no such file: give the path of a script of NeMo-RL, such as examples/run_grpo.py")
    # As python does: modules beside the script come before those installed.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        enable()
    except UnsupportedNemoRlError as error:
        sys.exit(str(error))
    sys.argv = arguments
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
