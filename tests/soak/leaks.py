"""What a process holds, sampled while it works, and whether that grows."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sample:
    """One look at a process."""

    seconds: float
    memory_mib: float
    descriptors: int


@dataclass
class Watched:
    """A process, and what was seen of it."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Takes a sample.  Raises RuntimeError when the process is gone."""
        proc = Path("/proc") / str(self.pid)
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
            descriptors = sum(1 for _ in (proc / "fd").iterdir())
            anonymous = int(status["RssAnon"].split()[0]) / 1024  # without the pages of files, which come and go
        except (OSError, KeyError):
            raise RuntimeError(f"{self.name} has ended") from None
        self.samples.append(Sample(time.monotonic() - self.started, anonymous, descriptors))

    def kinds(self) -> dict[str, int]:
        """How many open descriptors of each kind it has now: sockets, eventfds, files."""
        found: Counter[str] = Counter()
        for descriptor in (Path("/proc") / str(self.pid) / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(descriptor)
                found[
                    "file" if target.startswith("/") else target.removeprefix("anon_inode:").split(":")[0].strip("[]")
                ] += 1
        return dict(sorted(found.items()))


@dataclass
class Growth:
    """From the first third of the samples after the warm-up to the last third."""

    memory_mib: float
    """At the end: the median of the last third."""
    memory_growth_mib: float
    memory_slope_kib_per_min: float
    """Least squares over all samples after the warm-up."""
    descriptors: int
    """At the end: the least of the last third, when most connections were closed."""
    descriptor_growth: int


def growth(samples: list[Sample], warm_up_s: float) -> Growth:
    """How what a process holds grew after the warm-up.  Raises ValueError for fewer than six samples after it."""
    steady = [sample for sample in samples if sample.seconds >= warm_up_s]
    third = len(steady) // 3
    if third < 2:
        raise ValueError(f"{len(steady)} samples after the warm-up of {warm_up_s:g} s are too few: run longer")
    first, last = steady[:third], steady[-third:]
    memory = [statistics.median(sample.memory_mib for sample in part) for part in (first, last)]
    descriptors = [min(sample.descriptors for sample in part) for part in (first, last)]
    slope = statistics.linear_regression(
        [sample.seconds for sample in steady], [sample.memory_mib for sample in steady]
    ).slope
    return Growth(
        round(memory[1], 1),
        round(memory[1] - memory[0], 2),
        round(slope * 60 * 1024, 1),
        descriptors[1],
        descriptors[1] - descriptors[0],
    )


def verdict(name: str, grown: Growth, max_memory_mib: float, max_descriptors: int) -> list[str]:
    """What is to be called a leak, in words; empty where nothing is."""
    found = []
    if grown.memory_growth_mib > max_memory_mib:
        found.append(f"{name}: memory grew by {grown.memory_growth_mib} MiB (limit {max_memory_mib})")
    if grown.descriptor_growth > max_descriptors:
        found.append(f"{name}: open descriptors grew by {grown.descriptor_growth} (limit {max_descriptors})")
    return found
