"""An opened checkpoint while it is used, and paths that are no model."""

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crafted_files import TensorList, indexed_folder, one_tensor, refused, safetensors_model, write

from localv4.engine.machine import resident_file_bytes
from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.storage import open_checkpoint
from localv4.storage.safetensors import open_safetensors

SHARDS: dict[str, TensorList] = {
    "model-00001-of-00002.safetensors": {"a": ("F32", (2,)), "b": ("BF16", (2, 2))},
    "model-00002-of-00002.safetensors": {"c": ("I8", (3,))},
}


# --- the file while it is used


@pytest.fixture
def opened_file(tmp_path: Path) -> Path:
    """Return the path of a valid file."""
    return write(tmp_path / "model.safetensors", one_tensor())


def cut(path: Path) -> None:
    os.truncate(path, 10)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to change a mapped file")
@pytest.mark.parametrize(
    ("change", "words"), [(cut, "bytes, now 10"), (grow, "bytes, now"), (touch, "was written to")]
)
def test_changed_file_is_noticed(
    opened_file: Path, change: Callable[[Path], None], words: str
) -> None:
    with open_safetensors(opened_file) as checkpoint:
        checkpoint.check_unchanged()
        change(opened_file)
        with pytest.raises(BadFileError, match=f"changed while in use.*{words}"):
            checkpoint.check_unchanged()


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to replace or delete a mapped file")
def test_replaced_and_deleted_file_stays_readable(opened_file: Path) -> None:
    with open_safetensors(opened_file) as checkpoint:
        other = write(opened_file.with_name("new"), one_tensor(data=b"wxyz"))
        other.replace(opened_file)
        checkpoint.check_unchanged()
        assert checkpoint.bytes("w").tobytes() == b"abcd"
        opened_file.unlink()
        checkpoint.check_unchanged()
        assert checkpoint.bytes("w").tobytes() == b"abcd"


def test_closing_gives_the_file_back_but_not_the_views(opened_file: Path) -> None:
    with open_safetensors(opened_file) as checkpoint:
        view = checkpoint.bytes("w")
    assert view.tobytes() == b"abcd"
    with pytest.raises(ValueError, match="not mapped"):
        checkpoint.bytes("w")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.check_unchanged()
    checkpoint.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux does")
def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, SHARDS)
    bad = write(tmp_path / "bad.safetensors", one_tensor({"shape": [2]}))
    mismatch = tmp_path / "mismatch"
    mismatch.mkdir()
    indexed_folder(mismatch, SHARDS, metadata={"total_size": 1})
    empty = write(tmp_path / "empty.gguf", b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    open_checkpoint(folder)  # not closed: given back when it is collected
    open_checkpoint(folder).close()
    held = [refused(path) for path in (bad, mismatch, empty)]  # errors keep their frames alive
    assert len(held) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in the process")
def test_pages_of_a_tensor_are_dropped(tmp_path: Path) -> None:
    tensors: TensorList = {"a": ("I8", (1 << 21,)), "b": ("I8", (1 << 21,))}
    path = write(tmp_path / "model.safetensors", safetensors_model(tensors, 1))
    with open_safetensors(path) as checkpoint:
        sums = [int(checkpoint.bytes(name).sum()) for name in tensors]
        before = resident_file_bytes([path]) or 0
        checkpoint.drop_pages_of(checkpoint.bytes("b"))
        dropped = before - (resident_file_bytes([path]) or 0)
        # but for the pages that it shares with its neighbours
        assert (1 << 21) - 2 * mmap.PAGESIZE <= dropped <= 1 << 21
        assert [int(checkpoint.bytes(name).sum()) for name in tensors] == sums


def test_missing_tensor_is_named(opened_file: Path) -> None:
    with open_safetensors(opened_file) as checkpoint:
        with pytest.raises(BadFileError, match="'v' is missing"):
            checkpoint.bytes("v")
        with pytest.raises(TypeError):
            checkpoint.tensors["v"] = checkpoint.tensors["w"]  # type: ignore[index]


# --- paths that are no model


@pytest.mark.parametrize("name", ["none.safetensors", "none", "none.gguf", "no/such", "a\0b"])
def test_missing_path_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(tmp_path / name)
    assert "\0" not in str(caught.value)


def test_path_through_a_file_is_not_found(opened_file: Path) -> None:
    with pytest.raises(NotFoundError):
        open_checkpoint(opened_file / "model.safetensors")


def test_empty_folder_is_not_found(tmp_path: Path) -> None:
    for open_it in (open_checkpoint, open_safetensors):
        with pytest.raises(NotFoundError) as caught:
            open_it(tmp_path)
        assert caught.value.hint


def test_empty_file_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "model.safetensors", b""), "empty")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "pytorch_model.bin", b"PK\x03\x04" + bytes(100)), "neither")
    refused(write(tmp_path / "short", b"ab"), "neither")


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(LocalV4Error, match="it is a folder"):
        open_checkpoint(tmp_path)


def test_unreadable_file_is_one_clear_line(
    opened_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("localv4.storage.mapped_file.os.open", deny)
    with pytest.raises(LocalV4Error, match=r"cannot read .*Permission denied") as caught:
        open_checkpoint(opened_file)
    assert caught.value.hint is not None and "permissions" in caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(LocalV4Error, match="not a regular file"):
            open_checkpoint(path)
