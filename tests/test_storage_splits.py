"""GGUF models in several files, and folders of GGUF files."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from crafted_files import (
    F32,
    STRING,
    U16,
    GgufFile,
    GgufTensor,
    alignment_key,
    gguf_key,
    gguf_string,
    refused,
    split_keys,
    u32,
    write,
)

import localv4.storage.gguf
from localv4.errors import NotFoundError, UsageError
from localv4.storage import gguf_split, open_checkpoint
from localv4.storage.gguf import open_gguf

TENSORS = (["a", "b"], ["c"], ["d"])


def part(names: list[str], number: int, count: int = 3, total: int = 4) -> GgufFile:
    """Return a file that says it is `number` (from 0) of a set of three with four tensors."""
    keys = split_keys(number, count, total)
    if number == 0:
        keys.append(gguf_key("general.architecture", STRING, *gguf_string("deepseek4")))
    return GgufFile(keys=keys, tensors=[GgufTensor(name, [4]) for name in names])


def name_of(number: int, count: int = 3) -> str:
    """Return the name of file `number` (from 1)."""
    return f"model-{number:05}-of-{count:05}.gguf"


def split_set(folder: Path) -> list[Path]:
    """Write a set of three files."""
    return [
        write(folder / name_of(number + 1), part(names, number).build())
        for number, names in enumerate(TENSORS)
    ]


def test_set_written_by_the_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek4", split_max_tensors=2)
    arrays = {f"t{number}": np.full((2, 3), number, np.float32) for number in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [name_of(number) for number in (1, 2, 3)]
    for named in (*paths, tmp_path):
        with open_checkpoint(named) as checkpoint:
            assert checkpoint.path == paths[0]
            assert checkpoint.files == tuple(paths)
            assert checkpoint.metadata["general.architecture"] == "deepseek4"
            assert [tensor.file for tensor in checkpoint.tensors.values()] == [0, 0, 1, 1, 2]
            for name, array in arrays.items():
                assert checkpoint.tensors[name].shape == (2, 3)
                assert checkpoint.bytes(name).tobytes() == array.tobytes()


def test_first_file_may_hold_no_tensors_and_each_its_own_alignment(tmp_path: Path) -> None:
    split_set(tmp_path)
    write(tmp_path / name_of(1), part([], 0, total=2).build())
    aligned = part(["c"], 1, total=2)
    aligned.keys.append(alignment_key(64))
    aligned.alignment = 64
    write(tmp_path / name_of(2), aligned.build())
    write(tmp_path / name_of(3), part(["d"], 2, total=2).build())
    with open_gguf(tmp_path / name_of(2)) as checkpoint:
        assert list(checkpoint.tensors) == ["c", "d"]
        assert checkpoint.tensors["c"].offset % 64 == 0


def test_missing_files_are_named(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    refused(paths[1], "2 of 3", paths[0].name, paths[2].name)
    refused(tmp_path, "2 of 3", paths[0].name, paths[2].name)
    with pytest.raises(NotFoundError):
        open_checkpoint(paths[0])


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ((2, 3, 4), "split.no: 2, but 1"),
        ((0, 3, 4), "split.no: 0, but 1"),
        ((1, 4, 4), "split.count: 4, but the name says 3"),
        ((1, 0, 4), "split.count: 0"),
        ((1, 3, 5), "split.tensors.count: 5, but the set has 4"),
        ((1, 3, -1), "split.tensors.count: -1"),
    ],
)
def test_file_that_is_not_what_its_name_says(
    tmp_path: Path, says: tuple[int, int, int], words: str
) -> None:
    paths = split_set(tmp_path)
    write(paths[1], part(TENSORS[1], *says).build())
    for path in paths:
        refused(path, words)


def test_split_keys_must_be_there_and_be_integers(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    keys = split_keys(1, 3, 4)
    for place, name in enumerate(("split.no", "split.count")):
        file = part(TENSORS[1], 1)
        del file.keys[place]
        write(paths[1], file.build())
        refused(paths[0], f"{name}: None")
        file.keys = [*keys[:place], gguf_key(name, F32, struct.pack("<f", 3)), *keys[place + 1 :]]
        write(paths[1], file.build())
        refused(paths[0], f"{name}: not an integer")
    file = part(TENSORS[1], 1)
    del file.keys[2]
    write(paths[1], file.build())
    open_checkpoint(paths[0]).close()


def test_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    write(paths[2], part(["a"], 2).build())
    refused(paths[0], "'a'", paths[0].name, paths[2].name)


def test_damaged_sibling_is_named(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    write(paths[2], paths[2].read_bytes()[:-30])
    refused(paths[0], str(paths[2]), "ends at byte")


def test_renamed_file_of_a_set_is_refused(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    assert "NAME-00001-of-00003" in str(refused(renamed, "split.count: 3").hint)


@pytest.mark.parametrize("name", [name_of(0), name_of(4), name_of(1, 0), name_of(1, 99_999)])
def test_impossible_number_is_refused(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path / name, part(TENSORS[0], 0).build()), "set of up to 512")


def test_largest_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_split, "MAX_SPLITS", 3)
    paths = split_set(tmp_path)
    open_checkpoint(paths[0]).close()
    monkeypatch.setattr(gguf_split, "MAX_SPLITS", 2)
    refused(paths[0], "set of up to 2")


def test_tensors_of_a_set_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = split_set(tmp_path)
    monkeypatch.setattr(localv4.storage.gguf, "MAX_TENSORS", 4)
    open_checkpoint(paths[0]).close()
    monkeypatch.setattr(localv4.storage.gguf, "MAX_TENSORS", 3)
    refused(paths[0], "4 tensors, but 3")


def test_set_of_one(tmp_path: Path) -> None:
    path = tmp_path / name_of(1, 1)
    tensors = [GgufTensor("w", [4])]
    for keys in ([], split_keys(0, 1, 1), [gguf_key("split.count", U16, b"\x01\x00")]):
        write(path, GgufFile(keys=keys, tensors=tensors).build())
        open_checkpoint(path).close()
    write(path, GgufFile(keys=split_keys(1, 1, 1), tensors=tensors).build())
    refused(path, "split.no: 1")
    write(path, GgufFile(keys=split_keys(0, 1, 2), tensors=tensors).build())
    refused(path, "split.tensors.count: 2")
    write(path, GgufFile(keys=[gguf_key("split.count", 4, u32(2))], tensors=tensors).build())
    refused(path, "split.count: 2")


def test_folder_of_one_model(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", GgufFile(tensors=[GgufTensor("w", [4])]).build())
    write(tmp_path / "._model.gguf", b"a note of macOS")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.files == (path,)


def test_folder_of_two_models_asks_which(tmp_path: Path) -> None:
    split_set(tmp_path)
    write(tmp_path / "other.gguf", GgufFile().build())
    with pytest.raises(
        UsageError, match=r"2 models in .*'model-00001-of-00003.gguf', 'other.gguf'"
    ):
        open_checkpoint(tmp_path)


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


@needs_links
def test_sibling_that_links_elsewhere_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    paths = split_set(inside)
    paths[1].rename(tmp_path / "outside")
    paths[1].symlink_to(tmp_path / "outside")
    refused(paths[0], paths[1].name, "leads out of the folder")


@needs_links
def test_links_to_files_of_one_folder_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    links = tmp_path / "links"
    real.mkdir()
    links.mkdir()
    for path in split_set(real):
        (links / path.name).symlink_to(path)
    with open_checkpoint(links / name_of(2)) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c", "d"]
    refused(links, "leads out of the folder")


@needs_links
def test_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "0123abcd" / "Q4"
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(split_set(folder)):
        path.rename(blobs / f"abc{number}")
        path.symlink_to(Path("..", "..", "..", "blobs", f"abc{number}"))
    for named in (folder, folder / name_of(3)):
        with open_checkpoint(named) as checkpoint:
            assert list(checkpoint.tensors) == ["a", "b", "c", "d"]
