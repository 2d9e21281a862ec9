"""Kill a conversion at each of its changes to the disk in turn, and let it go on after that.

    python crash_loop.py packed|gguf SOURCE SCRATCH STRIDE [MOMENTS]

STRIDE 1 takes every step; MOMENTS is a file of second moments. Prints how many steps there are and
how many were taken. Each run is a fork of this process, which has the compiled code in memory; it
has no other threads while it forks. As many steps are tried at a time as there are processors.
"""

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.storage import open_checkpoint
from localv4.storage.moments_file import open_moments
from quant import direct_writer
from quant.gguf_conversion import GgufConversion
from quant.moments import SecondMoments
from quant.packer import Packer
from quant.recipe import load_recipe
from quant.source import open_source
from quant.task import Task

STEPS = ("write", "fsync", "replace", "ftruncate", "posix_fallocate", "unlink")
SPLIT_BYTES = 300_000
BLOCK_BYTES = 1 << 13
"""Of writes past the page cache: a small model has as many of them as a large one has."""
TAIL = 6
"""Last steps, which finish the whole: always taken."""


def convert(form: str, source: Path, moments: Path | None, target: Path) -> None:
    """Convert by the recipe q2, with one thread."""
    with open_checkpoint(source) as opened, ExitStack() as stack:
        known = None
        if moments is not None:
            known = SecondMoments(stack.enter_context(open_moments(moments)))
        task = Task(open_source(opened), load_recipe("q2"), 1, moments=known)
        if form == "packed":
            Packer(task).run(target)
        else:
            target.mkdir(exist_ok=True)
            GgufConversion(task, SPLIT_BYTES, "m").run(target)


def killed_at(step: int, work: Callable[[], None]) -> None:
    """Run work in a fork that is killed before its step number `step`."""

    def stopped() -> None:
        left = step

        def before() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_steps(before)
        work()

    child = in_fork(stopped)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(f"step {step}: the run ended by itself")


def steps_of(work: Callable[[], None]) -> int:
    """Return how many steps a run has that nothing stops."""
    originals = {name: getattr(os, name) for name in STEPS}
    count = 0

    def before() -> None:
        nonlocal count
        count += 1

    watch_steps(before)
    work()
    for name, function in originals.items():
        setattr(os, name, function)
    return count


def watch_steps(before: Callable[[], None]) -> None:
    """Call `before` ahead of every change to the disk."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before()
            return function(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but the lock."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if not file.name.endswith(".lock")
    }


def main() -> None:
    """Loop over the steps, every STRIDE of them, the last ones always."""
    form, source, scratch, stride = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    moments = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    direct_writer.BLOCK_BYTES = BLOCK_BYTES
    work = partial(convert, form, source, moments)
    work(scratch / "whole")
    expected = contents(scratch / "whole")
    if any(name.startswith(".") for name in expected):
        sys.exit(f"left behind: {sorted(expected)}")
    steps = steps_of(lambda: work(scratch / "counted"))
    chosen = [n for n in range(1, steps + 1) if n % int(stride) == 0 or n > steps - TAIL]
    workers = min(os.cpu_count() or 1, len(chosen))
    children = [
        in_fork(partial(take_steps, chosen[n::workers], form, scratch, work, expected))
        for n in range(workers)
    ]
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(1)
    print(steps, len(chosen))


def in_fork(work: Callable[[], None]) -> int:
    """Start work in a fork and return its number; it ends with 0 if nothing was wrong."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def take_steps(
    chosen: list[int],
    form: str,
    scratch: Path,
    work: Callable[[Path], None],
    expected: dict[str, str],
) -> None:
    """Kill a run at each of the steps and let it go on; exit with a message if that is wrong."""
    for step in chosen:
        target = scratch / f"target{step}"
        killed_at(step, partial(work, target))
        check_unfinished(form, target, expected)
        if not is_finished(form, target, expected):
            work(target)
        found = {n: d for n, d in contents(target).items() if not n.startswith(".")}
        if found != expected:
            sys.exit(f"step {step}: other files than without a stop: {sorted(found)}")
        shutil.rmtree(target)


def is_finished(form: str, target: Path, expected: dict[str, str]) -> bool:
    """Tell whether all files were there when the process was killed."""
    return target.exists() and contents(target).keys() >= expected.keys()


def check_unfinished(form: str, target: Path, expected: dict[str, str]) -> None:
    """A name without a dot in front is a whole file, and the manifest comes last of all."""
    found = contents(target) if target.exists() else {}
    for name, digest in found.items():
        if not name.startswith(".") and digest != expected[name]:
            sys.exit(f"{name} is not whole")
    if "manifest.json" in found and not is_finished(form, target, expected):
        sys.exit("a manifest without all of its files")


if __name__ == "__main__":
    main()
