#!/usr/bin/env python3
"""Measure what a conversion costs: bytes of source for each second of processor time.

    make_synthetic_model.py SRC --format official --layers 1 --vocab 4096
    measure_repack.py SRC SCRATCH

Processor time of a process and its threads, user and system, depends little on what else the
machine does. A start (import, headers, forecast) takes the same whatever the size of the source, so
it is measured by `--dry-run` and told apart. SCRATCH is made and removed.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

MIB = 1 << 20


def main() -> None:
    """Convert as often as is asked for, and print the median."""
    options = _parser().parse_args()
    source = sum(file.stat().st_size for file in options.source.glob("*.safetensors"))
    command = [sys.executable, "-m", "localv4", "quantize", str(options.source)]
    command += ["--recipe", options.recipe, "--format", options.format]
    name = "model.gguf" if options.format == "gguf" else "model"
    target = ["-o", str(options.scratch / name)]
    _seconds([*command, "--dry-run"], options.scratch)  # compiles what is not in the cache
    runs = []
    for _ in range(options.runs):
        start, _ = _seconds([*command, "--dry-run"], options.scratch)
        total, elapsed = _seconds([*command, *target], options.scratch)
        runs.append((total - start, start, elapsed))
    work, start, elapsed = sorted(runs)[len(runs) // 2]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 // MIB
    sys.stdout.write(
        f"{source / 1e9:.2f} GB of source: {work:.2f} s of processor time, and {start:.2f} s to "
        f"start: {source / 1e9 / work:.2f} GB/s per core ({source / 1e9 / (work + start):.2f} with "
        f"the start); {elapsed:.1f} s passed; {peak} MiB at most\n"
    )


def _seconds(command: list[str], scratch: Path) -> tuple[float, float]:
    """Run a command; return its seconds of processor time and of the clock."""
    scratch.mkdir(parents=True)
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    finally:
        shutil.rmtree(scratch)
    elapsed, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, elapsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder of safetensors")
    parser.add_argument("scratch", type=Path, help="a folder that is not there yet")
    parser.add_argument("--recipe", default="lossless")
    parser.add_argument("--format", choices=["packed", "gguf"], default="packed")
    parser.add_argument("--runs", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
