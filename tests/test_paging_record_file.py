"""Reads of any offset and length reach any address, by whatever way the system has."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.paging import record_file
from localv4.paging.raw_file import ALIGNMENT, Io, PosixFile, RawFile, memory, overlapped
from localv4.paging.record_file import RecordFile

Bytes = NDArray[np.uint8]
SIZE = 3 * (1 << 20) + 1234
ROOM = SIZE + 2 * ALIGNMENT
BOTH: list[Io] = ["direct", "buffered"]


@pytest.fixture(scope="module")
def data() -> Bytes:
    return np.random.default_rng(3).integers(0, 256, SIZE, np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, data: Bytes) -> Path:
    """A file that no test changes."""
    file = tmp_path_factory.mktemp("files") / "records"
    file.write_bytes(data.tobytes())
    return file


@pytest.fixture
def target() -> Iterator[int]:
    """The address of ROOM bytes on a page."""
    buffer = np.zeros(ROOM + ALIGNMENT, np.uint8)
    yield buffer.ctypes.data + -buffer.ctypes.data % ALIGNMENT
    del buffer


def check_read(file: RecordFile, data: Bytes, address: int, offset: int, nbytes: int) -> None:
    """Read; the bytes are those of the file, those around them stay as they were."""
    memory(address - 1, nbytes + 2)[:] = b"\xee" * (nbytes + 2)
    file.read(address, offset, nbytes)
    got = bytes(memory(address - 1, nbytes + 2))
    assert got == b"\xee" + data[offset : offset + nbytes].tobytes() + b"\xee"


@pytest.mark.parametrize("io", BOTH)
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 4096),
        (8192, 1 << 20),
        (4096, 5000),  # the end is not aligned
        (100, 50),  # within a block
        (4000, 200),  # across a border
        (4095, 1 << 20),
        (1, SIZE - 1),
        (SIZE - 1, 1),
        (SIZE // 4096 * 4096, SIZE % 4096),  # the last block is not whole
    ],
)
@pytest.mark.parametrize("shift", [0, 1, 4000])
def test_any_range_to_any_address(
    path: Path, data: Bytes, target: int, io: Io, offset: int, nbytes: int, shift: int
) -> None:
    file = RecordFile.open(path, io)
    check_read(file, data, target + ALIGNMENT + shift % (ALIGNMENT - 1), offset, nbytes)
    congruent = target + ALIGNMENT + offset % ALIGNMENT
    if congruent + nbytes < target + ROOM:
        check_read(file, data, congruent, offset, nbytes)
    file.close()


class Counted:
    """A raw file that notes what was asked for, and gives no more than `most` bytes at a time."""

    def __init__(self, raw: RawFile, most: int = 1 << 40) -> None:
        self._raw, self._most = raw, most
        self.io, self.alignment = raw.io, raw.alignment
        self.asked: list[tuple[int, int]] = []

    def read_some(self, address: int, offset: int, nbytes: int) -> int:
        self.asked.append((offset, nbytes))
        assert address % self.alignment == offset % self.alignment == nbytes % self.alignment == 0
        return self._raw.read_some(address, offset, min(nbytes, self._most))

    def stat(self) -> os.stat_result:
        return self._raw.stat()

    def close(self) -> None:
        self._raw.close()


@pytest.fixture
def counted(path: Path) -> Iterator[Counted]:
    opened = RecordFile.open(path, "direct")
    if opened.io != "direct":
        pytest.skip(str(opened.refusal))
    yield Counted(opened.raw)
    opened.close()


def test_what_is_aligned_is_one_read(
    path: Path, data: Bytes, target: int, counted: Counted
) -> None:
    check_read(RecordFile(path, counted), data, target + ALIGNMENT, 4096, 1 << 20)
    assert counted.asked == [(4096, 1 << 20)]


def test_only_the_ends_are_copied_when_places_agree(
    path: Path, data: Bytes, target: int, counted: Counted
) -> None:
    check_read(RecordFile(path, counted), data, target + ALIGNMENT + 100, 100, 1 << 20)
    assert counted.asked == [(0, 4096), (4096, (1 << 20) - 4096), (1 << 20, 4096)]


@pytest.mark.parametrize("most", [4096, 100_000 // 4096 * 4096, 5000])
def test_short_reads_are_continued(
    path: Path, data: Bytes, target: int, counted: Counted, most: int
) -> None:
    """Also where a system gives no whole blocks."""
    short = Counted(counted._raw, most // counted.alignment * counted.alignment)
    file = RecordFile(path, short)
    check_read(file, data, target + ALIGNMENT, 8192, 300_000)
    check_read(file, data, target + 1, 77, 300_000)
    assert len(short.asked) > 6


@pytest.mark.parametrize("io", BOTH)
def test_the_end_of_the_file_is_an_error(path: Path, target: int, io: Io) -> None:
    file = RecordFile.open(path, io)
    for offset, nbytes in ((SIZE - 10, 11), (0, SIZE + 1), (SIZE + 9000, 1), (1 << 23, 4096)):
        with pytest.raises(EOFError, match="too early"):
            file.read(target, offset, nbytes)
    file.close()


@pytest.mark.skipif(sys.platform == "win32", reason="refuses in the way of other systems")
def test_a_refusal_of_direct_reads_is_told(
    path: Path, data: Bytes, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(PosixFile):
        def read_some(self, address: int, offset: int, nbytes: int) -> int:
            if self.io == "direct":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().read_some(address, offset, nbytes)

    monkeypatch.setattr(record_file, "open_raw", Refusing)
    file = RecordFile.open(path, "direct")
    assert (file.io, file.alignment) == ("buffered", 1)
    assert file.refusal == f"{path} cannot be read past the page cache: Invalid argument"
    check_read(file, data, target + 1, 5, 70_000)
    file.close()


def test_an_error_of_the_disk_is_no_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, io: Io) -> RawFile:
        if io == "direct":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PosixFile(path, io)

    monkeypatch.setattr(record_file, "open_raw", broken)
    with pytest.raises(LocalV4Error, match=f"cannot read {path}: Input/output error"):
        RecordFile.open(path, "direct")


@pytest.mark.parametrize("io", BOTH)
def test_what_is_no_file_is_refused(tmp_path: Path, io: Io) -> None:
    with pytest.raises(NotFoundError, match="no absent in"):
        RecordFile.open(tmp_path / "absent", io)
    with pytest.raises(BadFileError, match="not a regular file"):
        RecordFile.open(tmp_path, io)
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadFileError, match="not a regular file"):
            RecordFile.open(tmp_path / "pipe", io)


@pytest.mark.parametrize("io", BOTH)
def test_changes_are_seen(tmp_path: Path, io: Io) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(SIZE))
    file = RecordFile.open(path, io)
    file.check_unchanged()
    path.rename(path.with_name("elsewhere"))
    path.write_bytes(b"another file")
    file.check_unchanged()
    os.utime(path.with_name("elsewhere"), ns=(1, 1))
    with pytest.raises(BadFileError, match="written to"):
        file.check_unchanged()
    with path.with_name("elsewhere").open("ab") as other:
        other.write(b"more")
    with pytest.raises(BadFileError, match=f"had {SIZE} bytes, now {SIZE + 4}"):
        file.check_unchanged()
    file.close()


def test_reads_past_the_page_cache_leave_it_as_it_was(path: Path, target: int) -> None:
    """`mincore` tells which pages of a file are in the cache."""
    if not sys.platform.startswith("linux"):
        pytest.skip("asks the Linux kernel")
    for io in BOTH:
        drop(path)
        if cached_pages(path):
            pytest.skip("this file system keeps its files in memory")
        file = RecordFile.open(path, io)
        file.read(target, 0, 1 << 20)
        file.close()
        assert cached_pages(path) <= 64  # of 256: what the kernel reads ahead on its own


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> int:
    mapped = np.memmap(path, np.uint8, "r")
    pages = (ctypes.c_ubyte * -(-SIZE // 4096))()
    address = ctypes.c_void_p(mapped.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(SIZE), pages) == 0
    return sum(page & 1 for page in pages)


def test_the_structure_that_windows_reads_by() -> None:
    where = overlapped((7 << 32) + 9, 5)
    assert (where.offset_low, where.offset_high, where.event) == (9, 7, 5)
    pointer = ctypes.sizeof(ctypes.c_void_p)
    assert ctypes.sizeof(where) == 3 * pointer + 8
    assert type(where).event.offset == 2 * pointer + 8
