"""Keep a thread on one processor. Linux and Windows can do that; elsewhere nothing happens."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from localv4.kernels.cores import Cpu

Release = Callable[[], None]


def bind(cpu: Cpu) -> Release:
    """Keep the calling thread on one processor; return what ends that, for the same thread.

    Threads that it starts meanwhile are bound, too. Where the system cannot or will not do it (as
    macOS), nothing changes.
    """
    with suppress(OSError):
        if sys.platform.startswith("linux"):
            return _bind_linux(cpu)
        if sys.platform == "win32":
            return _bind_windows(cpu)
    return _nothing


def bind_nowhere() -> Release:
    """Return what ends the binding of a thread that is not bound: nothing."""
    return _nothing


def _nothing() -> None:
    pass


def _bind_linux(cpu: Cpu) -> Release:
    before = os.sched_getaffinity(0)  # 0 is the calling thread
    os.sched_setaffinity(0, {cpu.number})

    def release() -> None:
        with suppress(OSError):  # the system took those processors from the process meanwhile
            os.sched_setaffinity(0, before)

    return release


class _GroupAffinity(ctypes.Structure):
    """GROUP_AFFINITY: processors within a group of 64."""

    _fields_ = (
        ("mask", ctypes.c_size_t),
        ("group", ctypes.c_ushort),
        ("reserved", ctypes.c_ushort * 3),
    )


def _bind_windows(cpu: Cpu) -> Release:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.GetCurrentThread.restype = ctypes.c_void_p
    thread = ctypes.c_void_p(kernel32.GetCurrentThread())
    wanted, before = _GroupAffinity(1 << cpu.number, cpu.group), _GroupAffinity()
    if not kernel32.SetThreadGroupAffinity(thread, ctypes.byref(wanted), ctypes.byref(before)):
        return _nothing

    def release() -> None:
        kernel32.SetThreadGroupAffinity(thread, ctypes.byref(before), None)

    return release
