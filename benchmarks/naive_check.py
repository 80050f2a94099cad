#!/usr/bin/env python3
"""What every prefix index must answer to an op stream, worked out in the plainest code there is.

A worker's overlap with a request is the number of leading blocks of the request that it holds.  Printed are two
checksums over all finds: ``interleaved_checksum``, each answered where it stands in the stream, and ``checksum``, all
answered at the end.  The format of op streams is told by make_ops.py.

usage: naive_check.py FILE.ops
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from make_ops import CLEAR, FIND, MAGIC, REMOVE, STORE

_MASK = 2**64 - 1


class Op(NamedTuple):
    """An op as the file has it; of a store, ``hashes`` are local and engine hashes by turns."""

    kind: int
    worker: int
    parent: int | None
    hashes: Sequence[int]


def read_ops(path: Path) -> Iterator[Op]:
    """Raises ValueError for a file that is no op stream."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:8] != MAGIC:
            raise ValueError(f"{path} is no op stream (make one with make_ops.py)")
        _, _, count = struct.unpack_from("<IIQ", data, 8)
        at = 24
        for _ in range(count):
            kind, worker, n = struct.unpack_from("<BII", data, at)
            at += 9
            parent = None
            if kind == STORE:
                has_parent, engine = struct.unpack_from("<BQ", data, at)
                parent = engine if has_parent else None
                at += 9
                n *= 2
            elif kind == CLEAR:
                n = 0
            elif kind not in (REMOVE, FIND):
                raise ValueError(f"{path} has an op of unknown kind {kind}")
            yield Op(kind, worker, parent, struct.unpack_from(f"<{n}Q", data, at))
            at += 8 * n


class NaiveIndex:
    """Three dictionaries.  Engine hashes are the same for all workers, as op streams have them."""

    def __init__(self) -> None:
        self.next_block: dict[tuple[int | None, int], int] = {}  # (block before it, local hash) -> block
        self.holders: dict[int, set[int]] = {}  # block -> workers
        self.held: dict[int, set[int]] = {}  # worker -> blocks

    def apply(self, op: Op) -> None:
        """Applies an event."""
        if op.kind == STORE:
            before = op.parent
            for local, block in zip(op.hashes[::2], op.hashes[1::2], strict=True):
                self.next_block[before, local] = block
                self.holders.setdefault(block, set()).add(op.worker)
                self.held.setdefault(op.worker, set()).add(block)
                before = block
        else:
            held = self.held.get(op.worker, set())
            for block in list(held) if op.kind == CLEAR else op.hashes:
                self.holders.get(block, set()).discard(op.worker)
                held.discard(block)

    def find(self, locals_: Iterable[int]) -> dict[int, int]:
        """The overlap of each worker that has any, in blocks."""
        overlap: dict[int, int] = {}
        alive: set[int] = set()
        block: int | None = None
        for depth, local in enumerate(locals_, 1):
            block = self.next_block.get((block, local))
            if block is None:
                break
            holders = self.holders[block]
            alive = holders if depth == 1 else alive & holders
            if not alive:
                break
            for worker in alive:
                overlap[worker] = depth
        return overlap


def add_to_checksum(total: int, overlap: dict[int, int]) -> int:
    """FNV-1a over (worker, overlap) by ascending worker, xored to the total rotated left by one bit."""
    digest = 0xCBF29CE484222325
    for pair in sorted(overlap.items()):
        for number in pair:
            digest = (digest ^ number) * 0x100000001B3 & _MASK
    return ((total << 1 | total >> 63) & _MASK) ^ digest


def checksums(path: Path) -> dict[str, str]:
    """Both checksums of the stream at `path`, as 16 hexadecimal digits."""
    index = NaiveIndex()
    finds: list[Sequence[int]] = []
    interleaved = final = 0
    for op in read_ops(path):
        if op.kind == FIND:
            finds.append(op.hashes)
            interleaved = add_to_checksum(interleaved, index.find(op.hashes))
        else:
            index.apply(op)
    for find in finds:
        final = add_to_checksum(final, index.find(find))
    return {"checksum": f"{final:016x}", "interleaved_checksum": f"{interleaved:016x}"}


def main() -> int:
    """The command line; returns the exit status."""
    if len(sys.argv) != 2:
        print("usage: naive_check.py FILE.ops", file=sys.stderr)
        return 2
    try:
        print(json.dumps(checksums(Path(sys.argv[1]))))
    except (OSError, ValueError, struct.error) as error:
        print(f"naive_check: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
