"""Result files appear whole or not at all, under their own name only."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from localv4.errors import DoesNotFitError, LocalV4Error
from localv4.finished_file import finished_file


def write(path: Path, need_bytes: int = 0) -> None:
    with finished_file(path, need_bytes, "use another disk") as file:
        file.write(b"all of it")


def test_a_file_appears_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"before")
    write(path)
    assert path.read_bytes() == b"all of it" and list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), finished_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="GiB free") as caught:
        write(tmp_path / "result", need_bytes=1 << 62)
    assert caught.value.hint == "use another disk"
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LocalV4Error, match="cannot write"):
        write(tmp_path / "none" / "result")


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not synced there")
@pytest.mark.parametrize("code", [None, errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_the_new_name_is_synced(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        names = {path.name for path in tmp_path.iterdir()}
        order.append(f"{'folder' if is_folder else 'file'} {'result' in names}")
        if is_folder and code is not None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    if code == errno.EIO:
        with pytest.raises(LocalV4Error, match="cannot write"):
            write(tmp_path / "result")
    else:
        write(tmp_path / "result")
        assert (tmp_path / "result").read_bytes() == b"all of it"
    assert order == ["file False", "folder True"]
