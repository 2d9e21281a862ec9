"""Long files past the page cache: the same bytes whatever the disk can do, and every error told."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quant import direct_writer
from quant.direct_writer import DirectWriter

BLOCK = 1 << 13


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_writer, "BLOCK_BYTES", BLOCK)


def write(path: Path, data: NDArray[np.uint8], pieces: int) -> bytes:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with DirectWriter(descriptor) as writer:
            for piece in np.array_split(data, pieces):
                writer.write(piece)
    finally:
        os.close(descriptor)
    return path.read_bytes()


def drawn(nbytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 777, 6 * BLOCK])
@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_every_byte_in_its_place(nbytes: int, pieces: int, tmp_path: Path) -> None:
    data = drawn(nbytes)
    assert write(tmp_path / "file", data, pieces) == data.tobytes()


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_disk_without_direct_writes(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has none anyway")
    set_flags, system_write, refusals = fcntl.fcntl, os.write, []

    def refuse() -> None:
        refusals.append(refused)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def control(descriptor: int, command: int, flags: int = 0) -> int:
        if refused == "flag" and command == fcntl.F_SETFL and flags & os.O_DIRECT:
            refuse()
        return int(set_flags(descriptor, command, flags))

    def careful(descriptor: int, data: Any) -> int:
        if refused == "write" and set_flags(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refuse()
        return system_write(descriptor, data[:1000])  # a write may also be cut short

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "write", careful)
    data = drawn(3 * BLOCK + 5)
    assert write(tmp_path / "file", data, 2) == data.tobytes()
    assert refusals == [refused]


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_error_of_a_write_on_its_way_is_raised(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", drawn(blocks * BLOCK), 3)


def test_nothing_more_is_written_after_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(KeyError), DirectWriter(descriptor) as writer:
            writer.write(drawn(100))
            raise KeyError
    finally:
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b""
