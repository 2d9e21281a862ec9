"""A last word when a mapped file becomes shorter while it is read.

Reading such a page raises SIGBUS, which no exception can stand for and which ends the process
without a word. The handler here is machine code that only writes one line and leaves, so it may run
on any thread, in the middle of a kernel.
"""

import ctypes
import signal
import sys

import numpy as np
from numba import cfunc, types

from localv4.errors import BadFileError

LINE = b"\nerror: bad file (a file of the model became shorter while it was being read)\n"

_write = types.ExternalFunction("write", types.int64(types.int32, types.voidptr, types.uint64))
_exit = types.ExternalFunction("_exit", types.void(types.int32))
_line = np.frombuffer(LINE, dtype=np.uint8)
_code = BadFileError.exit_code


def _last_word(number):  # type: ignore[no-untyped-def]  # the signature below types it
    _write(np.int32(2), _line.ctypes, np.uint64(_line.size))
    _exit(np.int32(_code))


def end_with_a_line() -> None:
    """Let a read beyond the end of a mapped file end the process with one line and exit code 5."""
    if sys.platform == "win32":
        return  # there, a mapped file cannot become shorter
    global _handler
    if _handler is None:
        _handler = cfunc(types.void(types.int32))(_last_word)
    install = ctypes.CDLL(None).signal
    install.argtypes = [ctypes.c_int, ctypes.c_void_p]
    install.restype = ctypes.c_void_p
    install(signal.SIGBUS, _handler.address)


_handler = None  # kept, because its machine code must outlive the call that installs it
