#!/usr/bin/env python3
"""Compare ways to read random records from a disk: GB/s and processor seconds for each GB.

Examples:
  measure_reads.py FOLDER                      makes 8 GiB of random records there, and removes them
  measure_reads.py FOLDER/layer-00000.safetensors --record 12.75 --seconds 10
  measure_reads.py FOLDER --readers 4,8 --at-once 1 --ways direct

Ways: direct (past the page cache), buffered (through it, dropped behind each read), mmap (page
faults of a mapped file, as the kernels would cause them). Each with whole records and, but for
mmap, with records cut into parts for idle readers. Before each run the file is dropped from the
page cache. Rounds are interleaved; the table has medians.
"""

import argparse
import mmap
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.paging.file_reads import FileReads, Piece
from localv4.paging.probe import forget, random_records, read_for, scratch_file, write_random
from localv4.paging.raw_file import Io
from localv4.paging.read_statistics import ReadStatistics
from localv4.paging.readers import Key

Table = Mapping[Key, Sequence[Piece]]
Way = tuple[str, int, bool]
PAGE = 4096


def main() -> None:
    """Read the command line, measure, print a table."""
    options = _parser().parse_args()
    record = int(options.record * (1 << 20))
    ways = [
        (way, int(readers), parts)
        for way in options.ways.split(",")
        for readers in options.readers.split(",")
        for parts in ((False,) if way == "mmap" else (False, True))
    ]
    found: dict[Way, list[ReadStatistics]] = {way: [] for way in ways}
    with _file(options.place, int(options.size * (1 << 30))) as path:
        for turn in range(options.rounds):
            for way in ways:
                table = random_records(path, record, turn)
                found[way].append(_measure(way, path, table, record, options))
    _print(found, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path, help="a large file, or a folder for a scratch file")
    parser.add_argument("--size", type=float, default=8.0, help="GiB of a scratch file")
    parser.add_argument("--record", type=float, default=12.75, help="MiB of a record")
    parser.add_argument("--ways", default="direct,buffered,mmap")
    parser.add_argument("--readers", default="1,2,4,8", help="numbers of threads")
    parser.add_argument("--at-once", type=int, default=0, help="records asked for together")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run, at most")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


@contextmanager
def _file(place: Path, nbytes: int) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    with scratch_file(place) as path:
        sys.stderr.write(f"writing {nbytes >> 20} MiB\n")
        write_random(path, nbytes, nbytes, 0.0)
        yield path


def _measure(
    way: Way, path: Path, table: Table, record: int, options: argparse.Namespace
) -> ReadStatistics:
    kind, readers, parts = way
    forget(path)
    limits = (list(table), record, readers, options.seconds, options.at_once)
    if kind == "mmap":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            touch = _touching(pages, table)
            try:
                return read_for(touch, None, *limits)
            finally:
                del touch
    io: Io = "direct" if kind == "direct" else "buffered"
    reads = FileReads(table, io)
    if reads.refusal:
        sys.stderr.write(f"note: {reads.refusal}\n")
    try:
        return read_for(reads.load, reads.split if parts else None, *limits)
    finally:
        reads.close()


def _touching(pages: mmap.mmap, table: Table) -> Callable[[Key, int], int]:
    """Return a load that reads a byte of each page of a record and copies nothing."""
    view = np.frombuffer(pages, np.uint8)

    def touch(key: Key, address: int) -> int:
        (piece,) = table[key]
        view[piece.offset : piece.offset + piece.nbytes : PAGE].max()
        return piece.nbytes

    return touch


def _print(found: Mapping[Way, Sequence[ReadStatistics]], options: argparse.Namespace) -> None:
    depth = options.at_once or "twice the readers"
    lines = [
        f"records of {options.record:g} MiB, {depth} at once, medians of {options.rounds}",
        "",
        "| way | readers | read as | GB/s | core-s per GB | p50 ms | p99 ms |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for (way, readers, parts), runs in found.items():
        speed = statistics.median(run.bytes_s for run in runs) / 1e9
        cores = statistics.median(run.core_s_per_gb for run in runs)
        p50 = statistics.median(run.p50_s for run in runs) * 1e3
        p99 = statistics.median(run.p99_s for run in runs) * 1e3
        figures = f"{speed:.2f} | {cores:.3f} | {p50:.1f} | {p99:.1f}"
        lines.append(f"| {way} | {readers} | {'parts' if parts else 'whole'} | {figures} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
