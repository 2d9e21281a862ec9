"""Reads of Windows, with a kernel32 that does what its documentation says."""

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localv4.paging.raw_file import WindowsFile, memory

PENDING, END_OF_FILE, NOT_READY = 997, 38, 21
HANDLE, EVENT = 1 << 40, 55
INVALID = (1 << 64) - 1


class Call:
    """A function with the attributes that ctypes gives it."""

    restype: object = None
    argtypes: object = None

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Kernel32:
    """One file of bytes; `answer` is what the system says at first, `outcome` in the end."""

    def __init__(self, data: bytes, answer: int = PENDING, outcome: int = 0) -> None:
        self.data, self.answer, self.outcome = data, answer, outcome
        self.opened: tuple[Any, ...] = ()
        self.last_error = self.events = self.done = 0
        for name in ("CreateFileW", "CreateEventW", "ReadFile", "GetOverlappedResult"):
            setattr(self, name, Call(getattr(self, f"_{name}")))
        self.CloseHandle = Call(self._close)

    def _CreateFileW(self, *arguments: Any) -> int:
        self.opened = arguments
        return HANDLE

    def _CreateEventW(self, *arguments: Any) -> int:
        self.events += 1
        return EVENT

    def _close(self, handle: int) -> int:
        assert handle == EVENT
        self.events -= 1
        return 1

    def _ReadFile(self, handle: int, address: int, nbytes: int, _: None, where: Any) -> int:
        assert handle == HANDLE and where._obj.event == EVENT
        offset = where._obj.offset_low + (where._obj.offset_high << 32)
        found = self.data[offset : offset + nbytes]
        self.last_error, self.done = self.answer, len(found)
        if self.answer == PENDING:
            memory(address, max(1, len(found)))[: len(found)] = found
        return 0

    def _GetOverlappedResult(self, handle: int, where: Any, done: Any, wait: bool) -> int:
        assert handle == HANDLE and wait
        done._obj.value, self.last_error = self.done, self.outcome
        return int(self.outcome == 0)


def opened(monkeypatch: pytest.MonkeyPatch, system: Kernel32, io: Any) -> WindowsFile:
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: system, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: system.last_error, raising=False)
    monkeypatch.setattr(ctypes, "FormatError", lambda code: f"failed {code} ", raising=False)
    runtime = types.SimpleNamespace(open_osfhandle=lambda handle, flags: 3)
    monkeypatch.setitem(sys.modules, "msvcrt", runtime)
    return WindowsFile(Path("records"), io)


def test_a_read_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 64
    system = Kernel32(data)
    file = opened(monkeypatch, system, "direct")
    target = np.zeros(8192, np.uint8)
    assert file.read_some(target.ctypes.data, 4096, 8192) == 8192
    assert target.tobytes() == data[4096:12288]
    assert file.read_some(target.ctypes.data, 12288, 8192) == 4096
    assert system.events == 0


@pytest.mark.parametrize(("io", "flag"), [("direct", 0x20000000), ("buffered", 0x10000000)])
def test_how_a_file_is_opened(monkeypatch: pytest.MonkeyPatch, io: Any, flag: int) -> None:
    system = Kernel32(b"")
    opened(monkeypatch, system, io)
    name, access, sharing, _, creation, flags, _ = system.opened
    assert (name, access, sharing, creation) == ("records", 0x80000000, 7, 3)
    assert flags == flag | 0x40000000  # reads that do not wait for one another


@pytest.mark.parametrize(
    ("answer", "outcome"), [(END_OF_FILE, 0), (PENDING, END_OF_FILE)], ids=["at once", "later"]
)
def test_the_end_of_the_file_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: int, outcome: int
) -> None:
    system = Kernel32(b"", answer, outcome)
    file = opened(monkeypatch, system, "direct")
    assert file.read_some(np.zeros(1, np.uint8).ctypes.data, 4096, 4096) == 0
    assert system.events == 0


@pytest.mark.parametrize(
    ("answer", "outcome"), [(NOT_READY, 0), (PENDING, NOT_READY)], ids=["at once", "later"]
)
def test_errors_are_raised(monkeypatch: pytest.MonkeyPatch, answer: int, outcome: int) -> None:
    system = Kernel32(b"", answer, outcome)
    file = opened(monkeypatch, system, "direct")
    with pytest.raises(OSError, match="failed 21"):
        file.read_some(np.zeros(1, np.uint8).ctypes.data, 0, 4096)
    assert system.events == 0


def test_a_file_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    system = Kernel32(b"")
    system.CreateFileW = Call(lambda *_: INVALID)  # type: ignore[attr-defined]
    system.last_error = 5
    with pytest.raises(OSError, match="failed 5"):
        opened(monkeypatch, system, "direct")
