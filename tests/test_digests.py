"""Digests of downloaded files: taken in passing, recorded, compared with what is on the disk."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, git_sha1, noise
from model_folders import FLASH_COMMIT, OTHER_COMMIT, empty_home, make_gguf, make_model, snapshot
from safetensors.numpy import save_file

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.library import digests
from localv4.library.digests import (
    Digester,
    FileRecord,
    Record,
    damaged_ranges,
    digest_file,
    read_record,
    tensors_in,
)
from localv4.library.download import download, plan
from localv4.library.installed import resolve
from localv4.library.published import find_published
from localv4.library.verification import FileReport, check_files, expected_files, refuse_wrong

FLASH = "deepseek-ai/DeepSeek-V4-Flash"
ETAG = "ab" * 32


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(digests, "BLOCK_BYTES", 1000)
    return empty_home(monkeypatch, tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.use(monkeypatch)
        yield server


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def states(name: str, *, online: bool = False) -> dict[str, str]:
    reports = check_files(expected_files(resolve(name), online=online))
    return {report.name: report.state for report in reports}


# ---- digests in passing


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=5000), st.lists(st.integers(1, 3000), max_size=5), st.booleans())
def test_pieces_do_not_matter(data: bytes, cuts: list[int], is_large: bool) -> None:
    digester = Digester(sha256(data) if is_large else git_sha1(data), len(data))
    rest = data
    for cut in cuts:
        digester.update(rest[:cut])
        rest = rest[cut:]
    digester.update(rest)
    assert digester.matches()
    sums = [f"{zlib.crc32(data[at : at + 1000]):08x}" for at in range(0, len(data), 1000)]
    assert digester.blocks() == digester.entry().blocks == "".join(sums)


def test_other_bytes_do_not_match() -> None:
    for etag in (sha256(b"right"), git_sha1(b"right")):
        digester = Digester(etag, 5)
        digester.update(b"wrong")
        assert not digester.matches()


# ---- records


def test_records_last_and_belong_to_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    entry = FileRecord(bytes=5, etag=ETAG, blocks="0123abcd")
    Record(path, "org/name", FLASH_COMMIT).add("a.gguf", entry)
    record = Record(path, "org/name", FLASH_COMMIT)
    assert record.get("a.gguf") == entry
    assert record.get("b.gguf") is None
    assert Record(path, "org/name", OTHER_COMMIT).get("a.gguf") is None
    assert Record(path, "org/other", FLASH_COMMIT).get("a.gguf") is None
    assert [item.name for item in path.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"commit": "main"},
        {"files": {"a": {"bytes": -1, "etag": ETAG}}},
        {"files": {"a": {"bytes": 1, "etag": "x"}}},
        {"files": {"a": {"bytes": 1, "etag": ETAG, "blocks": "123"}}},
        {"files": []},
        {"more": 1},
    ],
)
def test_a_record_that_is_damaged_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    right = {"version": 1, "repo": "a/b", "commit": FLASH_COMMIT, "files": {}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(right))
    assert read_record(path) is not None
    path.write_text(json.dumps(right | change))
    assert read_record(path) is None
    path.write_text(json.dumps(right)[:-1])
    assert read_record(path) is None


# ---- where a file is damaged


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: np.arange(1000, dtype=np.float32) for name in "abc"}, path)
    digester = Digester(ETAG, 0)
    digest_file(path, digester)
    data = bytearray(path.read_bytes())
    data[-6000] ^= 1  # tensor b has the bytes from 8000 to 4000 before the end
    path.write_bytes(data)
    ranges = damaged_ranges(path, digester.blocks())
    assert [end - begin for begin, end in ranges] == [1000]
    assert ranges[0][0] <= len(data) - 6000 < ranges[0][1]
    assert tensors_in(path, ranges) == ["b"]
    assert tensors_in(path, [(len(data) - 8500, len(data))]) == ["a", "b", "c"]
    path.write_bytes(b"\xff" * len(data))
    assert tensors_in(path, ranges) == []


def test_tensors_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "deepseek4")
    for name in "ab":
        writer.add_tensor(name, np.zeros(320, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = path.stat().st_size
    assert tensors_in(path, [(size - 4, size)]) == ["b"]


# ---- models


def test_a_pulled_model(hub: LoopbackHub, home: Path) -> None:
    weights = {name: np.arange(1000, dtype=np.float32) for name in "abc"}
    save_file(weights, home / "shard.safetensors")
    config = b'{"model_type": "deepseek_v4"}'
    shard = home / "shard.safetensors"
    files: dict[str, bytes | Path] = {"config.json": config, "model.safetensors": shard}
    hub.add(FLASH, files, FLASH_COMMIT)
    folder = download(plan(find_published("v4-flash")))
    asked = len(hub.requests)
    right = {"config.json": "right", "model.safetensors": "right"}
    assert states("v4-flash") == right
    assert len(hub.requests) == asked
    assert states("v4-flash", online=True) == right
    shard = (folder / "model.safetensors").resolve()
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 1
    shard.write_bytes(data)
    reports = check_files(expected_files(resolve("v4-flash")))
    wrong = [report for report in reports if report.state != "right"]
    assert [report.tensors for report in wrong] == [("c",)]
    with pytest.raises(BadFileError, match=r"model\.safetensors: its SHA-256.*, tensor c") as error:
        refuse_wrong(resolve("v4-flash"), reports)
    assert str(shard) in str(error.value.hint)
    shard.unlink()  # what the hint says
    download(plan(find_published("v4-flash")))
    assert states("v4-flash") == right


def test_what_is_missing_is_told_from_the_record(hub: LoopbackHub) -> None:
    config = b'{"model_type": "deepseek_v4"}'
    hub.add(FLASH, {"config.json": config, "model.safetensors": noise(3000), "x.json": b"{}"})
    wanted = find_published("v4-flash", "main")
    folder = download(plan(wanted))
    (folder / "x.json").unlink()
    assert states("v4-flash")["x.json"] == "missing"
    assert states("v4-flash", online=True)["x.json"] == "missing"
    (folder / "config.json").resolve().write_bytes(config[:-1] + b" ")
    assert states("v4-flash")["config.json"] == "damaged"
    (folder / "config.json").resolve().write_bytes(config + b" ")
    [report] = [
        item
        for item in check_files(expected_files(resolve("v4-flash")))
        if item.nbytes == len(config)
    ]
    assert report.detail == f"has {len(config) + 1} bytes, not {len(config)}"


def test_files_in_the_cache_that_others_fetched(home: Path) -> None:
    folder = make_model(snapshot(home, FLASH, FLASH_COMMIT))
    with pytest.raises(NotFoundError, match="no digests of deepseek-v4-flash"):
        states("v4-flash")
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        data = file.read_bytes()
        blob = blobs / (sha256(data) if file.suffix == ".safetensors" else git_sha1(data))
        shutil.move(file, blob)
        file.symlink_to(blob)
    assert set(states("v4-flash").values()) == {"right"}
    (blobs / sha256(bytes(10))).write_bytes(b"0123456789")
    assert states("v4-flash")["model-00001-of-00002.safetensors"] == "damaged"


def test_one_form_of_several(hub: LoopbackHub) -> None:
    files = {f"V4-{label}.gguf": noise(3000, seed) for seed, label in enumerate(("Q4_0", "Q8_0"))}
    hub.add("org/DeepSeek-V4-GGUF", files)
    for label in ("Q4_0", "Q8_0"):
        download(plan(find_published(f"hf://org/DeepSeek-V4-GGUF:{label}")))
    assert states("hf://org/DeepSeek-V4-GGUF:Q8_0") == {"V4-Q8_0.gguf": "right"}
    assert states("hf://org/DeepSeek-V4-GGUF:Q4_0", online=True) == {"V4-Q4_0.gguf": "right"}


def test_a_folder_of_ones_own(hub: LoopbackHub, home: Path) -> None:
    files = {"config.json": b'{"model_type": "deepseek_v4"}', "model.safetensors": noise(3000)}
    hub.add("org/v4", files)
    folder = download(plan(find_published("hf://org/v4"), local_dir=home / "mine"))
    assert set(states(str(folder)).values()) == {"right"}
    assert set(states(str(folder), online=True).values()) == {"right"}
    (folder / "model.safetensors").write_bytes(noise(3000, 7))
    assert states(str(folder))["model.safetensors"] == "damaged"


def test_packed_folders_have_their_digests_in_the_manifest(home: Path) -> None:
    folder = home / "home" / "models" / "mine"
    folder.mkdir(parents=True)
    shards = {"layer-00000.safetensors": noise(3000), "config.json": b"{}"}
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    manifest = {
        "container": {"format": "localv4-packed", "version": 1},
        "source": "a test",
        "files": {
            name: {"bytes": len(data), "sha256": sha256(data)} for name, data in shards.items()
        },
        "matrices": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert set(states("mine").values()) == {"right"}
    (folder / "layer-00000.safetensors").write_bytes(noise(3000, 1))
    assert states("mine") == {"layer-00000.safetensors": "damaged", "config.json": "right"}
    with pytest.raises(LocalV4Error, match="was made here"):
        states("mine", online=True)


def test_files_that_nobody_knows(home: Path) -> None:
    make_gguf(home / "home" / "models" / "x.gguf")
    with pytest.raises(NotFoundError, match="no digests"):
        states("x")
    with pytest.raises(NotFoundError, match="which repository"):
        states("x", online=True)


def test_all_right_is_not_refused() -> None:
    report = FileReport("a", Path("a"), 1, ETAG, "right")
    refuse_wrong(resolve("tiny-v4"), [report])
