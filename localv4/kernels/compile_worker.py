"""A helper process that compiles the kernels it is told to, into the cache of `compiler`.

It reads names of units from its input, one a line, and answers each with DONE or FAILED. When its
input ends, for whatever reason, so does it, in the middle of a compilation too: it never outlives
the process that started it.
"""

import importlib
import os
import queue
import signal
import threading
from typing import TextIO

from localv4.kernels import compiler, device
from localv4.kernels.compile_pool import DONE, FAILED


def work() -> None:
    """Serve the process that started this one until it closes the input."""
    # On a terminal Ctrl-C reaches every process; whether to go on is for the other one to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # nobody here calls a part of a unit from Python
    device.OPTIONS.update(no_cpython_wrapper=True, no_cfunc_wrapper=True)
    names, answers = _private_streams()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    _answer(answers, compiler.CACHE_FOLDER.name)
    threading.Thread(target=_read, args=(names, waiting), daemon=True).start()
    while True:
        _answer(answers, DONE if _is_made(waiting.get()) else FAILED)


def _private_streams() -> tuple[TextIO, TextIO]:
    """Move input and output to streams that nobody else writes to, or waits for.

    A library that prints would break the conversation. And on Windows loading a library looks at
    the standard input, which hangs while a thread reads from it.
    """
    names, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return names, answers


def _read(names: TextIO, waiting: "queue.SimpleQueue[str]") -> None:
    for line in names:
        waiting.put(line.strip())
    os._exit(0)


def _answer(answers: TextIO, text: str) -> None:
    try:
        print(text, file=answers, flush=True)
    except OSError:
        os._exit(0)  # nobody listens any more


def _is_made(name: str) -> bool:
    """Compile the unit of that name into the cache; return False when that is not possible."""
    try:
        importlib.import_module(name.split(":")[0])
        compiler.find_unit(name).make(keep=True)
    except Exception:
        return False  # the other process will meet the same and knows whom to tell
    return True
