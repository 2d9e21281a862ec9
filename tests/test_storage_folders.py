"""Models of several files: indexes, missing shards, names and links that lead elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from crafted_files import (
    TensorList,
    indexed_folder,
    one_tensor,
    pattern,
    refused,
    safetensors_model,
    write,
)

import localv4.storage.safetensors
from localv4.errors import LocalV4Error
from localv4.storage import open_checkpoint
from localv4.storage.safetensors import INDEX_NAME

SHARDS: dict[str, TensorList] = {
    "model-00001-of-00002.safetensors": {"a": ("F32", (2,)), "b": ("BF16", (2, 2))},
    "model-00002-of-00002.safetensors": {"c": ("I8", (3,))},
}


# --- folders


def test_folder_with_an_index(tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, SHARDS)
    write(folder / "other.safetensors", b"not named by the index")
    for path in (folder, folder / INDEX_NAME):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == folder
            assert [file.name for file in checkpoint.files] == sorted(SHARDS)
            assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {
                "a": 0,
                "b": 0,
                "c": 1,
            }
            assert checkpoint.bytes("c").tobytes() == pattern(3, 1)
            assert checkpoint.bytes("b").tobytes() == pattern(16, 0)[8:]


@pytest.mark.parametrize("metadata", [{}, {"total_size": 19.0}, {"total_size": 19, "more": "x"}])
def test_index_metadata_may_vary(tmp_path: Path, metadata: dict[str, Any]) -> None:
    open_checkpoint(indexed_folder(tmp_path, SHARDS, metadata=metadata)).close()


def test_folder_without_an_index(tmp_path: Path) -> None:
    for shard, tensors in SHARDS.items():
        write(tmp_path / shard, safetensors_model(tensors))
    write(tmp_path / "._model-00001-of-00002.safetensors", b"a note of macOS")
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("manifest", ["", "{", '{"name": "a web page"}', '["container"]' * 50])
def test_folder_with_a_manifest_of_something_else(tmp_path: Path, manifest: str) -> None:
    for shard, tensors in SHARDS.items():
        write(tmp_path / shard, safetensors_model(tensors))
    (tmp_path / "manifest.json").write_text(manifest)
    if "container" in manifest:
        refused(tmp_path, "manifest.json")
        return
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b", "c"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, SHARDS)
    gone = folder / "model-00002-of-00002.safetensors"
    gone.unlink()
    refused(folder, "1 of 2 shards", gone.name)
    (folder / INDEX_NAME).unlink()
    refused(folder, "1 of 2 shards", gone.name)


def test_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", one_tensor())
    refused(tmp_path, "'w'", "one.safetensors", "two.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": None}, "byte"),
        ({"weight_map": [1]}, "byte"),
        ({"weight_map": {"a": 1}}, "byte"),
        ({"metadata": {"total_size": 18}}, "total_size is 18"),
        ({"metadata": {"total_size": -1}}, "total_size"),
        ({"metadata": {"total_size": True}}, "total_size"),
        ({"metadata": {"total_size": "19"}}, "total_size"),
        ({"metadata": {"total_size": 19.5}}, "total_size"),
        ({"metadata": [19]}, "byte"),
        ({"metadata": {"total_size": {"a": 1}}}, "byte"),
        ({"weights": {}}, "keys"),
    ],
)
def test_wrong_index_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(indexed_folder(tmp_path, SHARDS, **changes), INDEX_NAME, words)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"metadata":{"total_size":NaN},"weight_map":{"w":"model.safetensors"}}',
        b'{"metadata":{"other":NaN},"weight_map":{"w":"model.safetensors"}}',
        b'{"metadata":{"other":-Infinity},"weight_map":{"w":"model.safetensors"}}',
        b'{"metadata":{"a":1,"a":1},"weight_map":{"w":"model.safetensors"}}',
        b'{"metadata":{"other":"' + b"x" * 65_536 + b'"},"weight_map":{"w":"model.safetensors"}}',
        b'{"weight_map":{"w":"model.safetensors","w":"model.safetensors"}}',
        b'{"weight_map":{"w":"model.safetensors"},"weight_map":{"w":"model.safetensors"}}',
        b'{"weight_map":{"w":"model.safetensors"},"extra":{}}',
        b'{"weight_map":{"w":"model.safetensors"}} {}',
        b'{"weight_map":' * 5000,
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, text: bytes) -> None:
    write(tmp_path / "model.safetensors", one_tensor())
    write(tmp_path / INDEX_NAME, text)
    refused(tmp_path, INDEX_NAME)


def test_index_and_headers_must_agree(tmp_path: Path) -> None:
    first, second = SHARDS
    right = {"a": first, "b": first, "c": second}
    indexed_folder(tmp_path, SHARDS, weight_map={**right, "d": second})
    refused(tmp_path, second, "lacks 'd'")
    indexed_folder(tmp_path, SHARDS, weight_map={**right, "a": second})
    refused(tmp_path, second, "lacks 'a'")
    indexed_folder(tmp_path, SHARDS, weight_map={"a": first, "c": second})
    refused(tmp_path, first, "holds 'b'")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "model\0.safetensors",
        "model\n.safetensors",
        "m" * 300,
    ],
)
def test_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    write(tmp_path / "model.safetensors", one_tensor())
    indexed_folder(inside, {}, weight_map={"w": name}, metadata={})
    refused(inside, "not a plain name")


@pytest.mark.parametrize(
    ("with_index", "limit", "right", "wrong", "words"),
    [
        (True, "MAX_SHARDS", 2, 1, "2 shards"),
        (True, "MAX_TENSORS", 3, 2, "more than 2 keys"),
        (True, "MAX_INDEX_BYTES", 1000, 100, "but 100 are the limit"),
        (False, "MAX_SHARDS", 2, 1, "2 shards"),
        (False, "MAX_TENSORS", 3, 2, "3 tensors"),
    ],
)
def test_size_of_a_model_is_limited(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_index: bool,
    limit: str,
    right: int,
    wrong: int,
    words: str,
) -> None:
    indexed_folder(tmp_path, SHARDS)
    if not with_index:
        (tmp_path / INDEX_NAME).unlink()
    monkeypatch.setattr(localv4.storage.safetensors, limit, right)
    open_checkpoint(tmp_path).close()
    monkeypatch.setattr(localv4.storage.safetensors, limit, wrong)
    refused(tmp_path, words)


# --- links

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


@needs_links
@pytest.mark.parametrize("with_index", [True, False])
def test_link_out_of_the_folder_is_refused(tmp_path: Path, with_index: bool) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    target = write(tmp_path / "secret", one_tensor())
    (inside / "model.safetensors").symlink_to(target)
    if with_index:
        weight_map = {"w": "model.safetensors"}
        write(inside / INDEX_NAME, json.dumps({"weight_map": weight_map}).encode())
    refused(inside, "leads out of the folder")


@needs_links
def test_link_inside_the_folder_and_link_named_by_the_user_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "data", one_tensor())
    (tmp_path / "model.safetensors").symlink_to("data")
    open_checkpoint(tmp_path).close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link.safetensors").symlink_to(tmp_path / "data")
    open_checkpoint(elsewhere / "link.safetensors").close()
    (elsewhere / "folder").symlink_to(tmp_path)
    open_checkpoint(elsewhere / "folder").close()


@needs_links
def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(LocalV4Error):
        open_checkpoint(tmp_path)


def hub_snapshot(cache: Path) -> Path:
    """Return the folder of a snapshot in a new hub cache."""
    snapshot = cache / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "models--org--name" / "blobs").mkdir()
    (cache / "blobs" / "ab").mkdir(parents=True)
    return snapshot


@needs_links
def test_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    indexed_folder(snapshot, SHARDS)
    blobs = tmp_path / "models--org--name" / "blobs"
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"abc{number}"
        if number == 0:  # one blob is in the store shared by all repositories
            file.rename(tmp_path / "blobs" / "ab" / "abc0")
            blob.symlink_to(Path("..", "..", "blobs", "ab", "abc0"))
        else:
            file.rename(blob)
        file.symlink_to(Path("..", "..", "blobs", blob.name))
    with open_checkpoint(snapshot) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    with open_checkpoint(blobs / "abc1") as checkpoint:  # no suffix: told by its first bytes
        assert checkpoint.kind == "safetensors"


@needs_links
def test_folder_that_only_resembles_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "other" / "snapshots" / "0123abcd"
    blobs = tmp_path / "other" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "model.safetensors").symlink_to(write(blobs / "abc", one_tensor()))
    refused(snapshot, "leads out of the folder")


@needs_links
def test_hub_cache_is_not_a_way_out(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    target = write(tmp_path / "models--org--name" / "outside", one_tensor())
    (snapshot / "model.safetensors").symlink_to(target)
    refused(snapshot, "leads out of the folder")
