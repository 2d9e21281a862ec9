"""Helper processes that compile CUDA kernels at the same time: NVRTC does one at a time in each.

A helper reads tasks from its input, a line of JSON each, and answers with a line when the machine
code is in the cache, or cannot be made. It ends when its input does.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from localv4.cuda.compiler import compiled, is_kept, length
from localv4.cuda.gpu import OnCompile
from localv4.errors import LocalV4Error
from localv4.kernels.threads import usable_processors

MOST_HELPERS = 8
"""Each needs memory of its own for a compiler."""

# The helper must find the same modules as this process, whatever that did to its path.
_CODE = """
import sys
sys.path[:] = sys.argv[1:]
from localv4.cuda.compile_helpers import serve
serve()
"""


def compile_all(
    sources: Sequence[str],
    arch: str,
    on_compile: OnCompile | None = None,
    folder: Path | None = None,
) -> None:
    """Compile files or texts of kernels that are not in the cache, several at a time.

    `on_compile` is only called when there are any. What cannot be compiled here is tried again,
    and its error told, by whoever wants it. Raises GpuError when NVRTC is missing.
    """
    missing = [source for source in dict.fromkeys(sources) if not is_kept(source, arch, folder)]
    count = min(len(missing), MOST_HELPERS, usable_processors())
    if count < 2:
        _compile_here(missing, arch, on_compile, folder)
        return
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for source in sorted(missing, key=length, reverse=True):  # those that take longest come first
        waiting.put(source)
    helpers = [helper for helper in (_start() for _ in range(count)) if helper is not None]
    threads = [
        threading.Thread(target=_employ, args=(helper, waiting, answers, arch, folder), daemon=True)
        for helper in helpers
    ]
    done, idle = 0, 0
    try:
        for thread in threads:
            thread.start()
        _tell(on_compile, done, len(missing))
        while idle < len(threads):
            if answers.get() is None:
                idle += 1
            else:
                done += 1
                _tell(on_compile, done, len(missing))
    finally:
        for helper in helpers:
            helper.kill()
        for thread in threads:
            thread.join()
        for helper in helpers:
            with suppress(OSError), helper:
                pass  # closes its pipes and waits for its end


def _compile_here(
    sources: Sequence[str], arch: str, on_compile: OnCompile | None, folder: Path | None
) -> None:
    for done, source in enumerate(sources):
        _tell(on_compile, done, len(sources))
        compiled(source, arch, folder)
        _tell(on_compile, done + 1, len(sources))


def _tell(on_compile: OnCompile | None, done: int, total: int) -> None:
    if on_compile is not None:
        on_compile(done, total)


def _employ(
    helper: "subprocess.Popen[str]",
    waiting: "queue.SimpleQueue[str]",
    answers: "queue.SimpleQueue[str | None]",
    arch: str,
    folder: Path | None,
) -> None:
    """Give a helper work until there is none left or it does not answer."""
    assert helper.stdin is not None and helper.stdout is not None
    try:
        while True:
            source = waiting.get_nowait()
            task = [source, arch, None if folder is None else str(folder)]
            print(json.dumps(task), file=helper.stdin, flush=True)
            if not helper.stdout.readline():
                return  # it died
            answers.put(source)
    except (queue.Empty, OSError, ValueError):
        pass
    finally:
        answers.put(None)


def _start() -> "subprocess.Popen[str] | None":
    """Start a helper; return None where Python cannot be started a second time."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    command = [sys.executable, "-c", _CODE, *(p for p in sys.path if isinstance(p, str))]
    try:
        return subprocess.Popen(  # noqa: S603 - this very Python
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
    except OSError:
        return None


def serve() -> None:
    """Compile what is asked for until the input ends."""
    tasks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints would break the conversation
    for line in tasks:
        source, arch, folder = json.loads(line)
        with suppress(LocalV4Error):  # the other process will meet the same and tell whom it knows
            compiled(source, arch, None if folder is None else Path(folder))
        print("done", file=answers, flush=True)
