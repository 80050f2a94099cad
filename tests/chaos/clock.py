"""Steps of a process's wall clock: a preloaded library that adds an offset which this process sets while it runs."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock_shim.c")


class SteppedClock:
    """The wall clock of the processes that get ``environment``; their steady clock stays as it is."""

    def __init__(self, library: Path, file: Path) -> None:
        file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "KVROUTER_CHAOS_CLOCK": str(file)}
        with file.open("r+b") as opened:
            self._offset = mmap.mmap(opened.fileno(), 8)

    def step_to(self, seconds: int) -> None:
        """The clock is off by so many seconds from now on."""
        struct.pack_into("=q", self._offset, 0, seconds)


def build_shim(folder: Path) -> Path:
    """Compiles the library into ``folder``.  Raises RuntimeError, saying what to install, without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise RuntimeError("clock steps need a C compiler: install gcc or set CC")
    library = folder / "clock_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"], check=True)
    return library
