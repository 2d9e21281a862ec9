"""Packed folders: what the official library reads, and every fault named in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import damaged_files
from safetensors import safe_open

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.model.packed_source import (
    PackedReader,
    load_packed_weights,
    packed_config,
    packed_names,
)
from localv4.storage import manifest as reader
from localv4.storage.packed_folder import (
    LINE,
    METADATA_NAME,
    PACKED_BYTES,
    PAGE,
    open_packed_folder,
)
from quant import packed_writer, packer
from quant.packed_writer import (
    MANIFEST_NAME,
    MatrixEntry,
    ShardTensor,
    packed_bytes_tensor,
    records_tensor,
    stored_array,
    write_manifest,
    write_shard,
)

sys.path.append(str(Path(__file__).parents[1] / "tools"))

import synthetic_packed
from synthetic_network import Network

NETWORK = Network(
    hidden=128,
    heads=2,
    q_rank=128,
    groups=2,
    experts=4,
    inner=128,
    index_top_k=16,
    routed_scaling=1.5,
    ratios=(4, 128),
    hashed=1,
    vocab=512,
    head_dim=128,
    rope_dim=64,
    o_rank=64,
    used=2,
    index_heads=2,
    index_dim=64,
)
SHARD = "layer-00001.safetensors"
WQ_A = "layers.1.attn.wq_a.weight"
RECORDS = "layers.1.ffn.experts"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished model."""
    folder = tmp_path_factory.mktemp("packed")
    types = synthetic_packed.DEFAULT_TYPES
    synthetic_packed.write_packed(NETWORK, types, folder, 1, 1, lambda name, nbytes: None)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def load(folder: Path) -> None:
    with open_packed_folder(folder) as packed:
        load_packed_weights(packed, packed_config(packed))


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


# --- good folders


def test_writer_and_reader_mean_the_same() -> None:
    assert (packed_writer.FORMAT, packed_writer.VERSION) == (reader.FORMAT, reader.VERSION)
    assert packed_writer.MANIFEST_NAME == reader.MANIFEST_NAME
    assert (packed_writer.PAGE, packed_writer.LINE) == (PAGE, LINE)
    assert packed_writer.PACKED_BYTES == PACKED_BYTES
    assert packer.METADATA_NAME == METADATA_NAME


def test_the_official_library_reads_the_shards(whole: Path) -> None:
    with open_packed_folder(whole) as packed:
        for number, path in enumerate(packed.files):
            names = {n for n, tensor in packed.tensors.items() if tensor.file == number}
            with safe_open(path, framework="numpy") as file:
                assert set(file.keys()) == names
                if RECORDS in names:
                    records = file.get_tensor(RECORDS)
                    assert records.shape[0] == NETWORK.experts
                    assert records.tobytes() == packed.bytes(RECORDS).tobytes()


def test_everything_starts_where_it_should(whole: Path) -> None:
    with open_packed_folder(whole) as packed:
        starts: dict[int, int] = {}
        for tensor in packed.tensors.values():
            starts[tensor.file] = min(starts.get(tensor.file, tensor.offset), tensor.offset)
            size = tensor.nbytes
            unit = PAGE if size % PAGE == 0 else LINE if size % LINE == 0 else 4
            assert tensor.offset % unit == 0, tensor.name
        assert all(start % PAGE == 0 for start in starts.values())
        entry = packed.manifest.matrices[RECORDS]
        assert packed.tensors[RECORDS].offset % PAGE == entry.record_bytes % PAGE == 0


def test_all_names_of_the_network_are_there(whole: Path) -> None:
    with open_packed_folder(whole) as packed:
        table = packed_names(packed)
        config = packed_config(packed)
        assert table["layers.0.ffn.experts.3.w2.weight"].shape == (128, 128)
        assert "layers.0.ffn.experts.4.w2.weight" not in table
        assert table["head.weight"].shape == (512, 128)
        assert packed.tensors["head.weight"].dtype.name == "B16"
        weights = load_packed_weights(packed, config)
        assert weights.layers[0].router.table is not None
        assert len(weights.layers[1].experts) == 4


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages"
)
def test_what_is_read_as_a_whole_gets_large_pages(whole: Path) -> None:
    def wants_large_pages(address: int) -> bool:
        there = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line[:1] in "0123456789abcdef":
                first, end = (int(part, 16) for part in line.split()[0].split("-"))
                there = first <= address < end
            elif there and line.startswith("VmFlags:"):
                return "hg" in line.split()
        return False

    with open_packed_folder(whole) as packed:
        for name in (RECORDS, WQ_A):
            assert wants_large_pages(packed.bytes(name).ctypes.data)
        assert not wants_large_pages(packed.bytes("embed.weight").ctypes.data)


def test_digests_are_verified(copy: Path) -> None:
    assert damaged_files(copy) == []
    data = bytearray((copy / SHARD).read_bytes())
    data[-5] ^= 4
    (copy / SHARD).write_bytes(data)
    load(copy)  # opening is quick: it reads no weights
    assert damaged_files(copy) == [SHARD]


def test_telling_packed_folders_from_others(whole: Path, tmp_path: Path) -> None:
    assert reader.is_packed_folder(whole)
    assert not reader.is_packed_folder(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text('{"name": "a web page"}')
    assert not reader.is_packed_folder(tmp_path)
    assert not reader.is_packed_folder(tmp_path / MANIFEST_NAME)


# --- damaged folders


def test_missing_and_cut_files(copy: Path) -> None:
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-4096])
    with pytest.raises(BadFileError, match=rf"{SHARD}: has \d+ bytes, but the manifest says"):
        open_packed_folder(copy)
    (copy / SHARD).unlink()
    with pytest.raises(BadFileError, match=rf"1 of 5 files are missing: '{SHARD}'"):
        open_packed_folder(copy)
    (copy / MANIFEST_NAME).unlink()
    with pytest.raises(NotFoundError):
        open_packed_folder(copy)


def entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Change fields of a matrix in the manifest."""
    return lambda document: document["matrices"][name].update(values)


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Remove a key of the manifest or of an object in it."""

    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def first_file(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["files"]["config.json"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["container"].update(version=3), "made by a newer version: format version 3"),
        (lambda d: d["container"].update(version=0), "version is not a number"),
        (lambda d: d["container"].update(version=True), "version is not a number"),
        (lambda d: d["container"].update(format="zip"), "is not the manifest of a packed model"),
        (lambda d: d.update(color="red"), "the key 'color' is not known"),
        (without("container"), "is not the manifest of a packed model"),
        (without("source"), "source is missing"),
        (without("files"), "files is missing"),
        (without("matrices"), "matrices is missing"),
        (lambda d: d.update(source=3), "a string"),
        (without("files", SHARD), "no shard holds it"),
        (first_file(sha256="0" * 63), "sha256 is not 64 hexadecimal digits"),
        (first_file(sha256=64), "sha256 is not 64 hexadecimal digits"),
        (first_file(bytes=-1), "bytes is not a number"),
        (first_file(bytes=12.0), "bytes is not a number"),
        (first_file(color="red"), "expected the fields bytes, sha256"),
        (lambda d: d["files"].update({"../x": d["files"]["config.json"]}), "not a plain name"),
        (lambda d: d.update(files={}), "names 0 shards"),
        (entry(WQ_A, format="Q99"), "in the packed format Q99, which is not known"),
        (entry(WQ_A, format="a b"), "format is not the name of a format"),
        (entry(WQ_A, layout="heap"), "layout is not one of packed, rows, records"),
        (entry(WQ_A, layout=["packed"]), "layout is not one of"),
        (entry(WQ_A, color="red"), "expected the fields cols, format, layout, rows"),
        (entry(WQ_A, rows=256), r"has shape \(256, 128\), expected \(128, 128\)"),
        (entry(WQ_A, rows="128"), "rows is not a number"),
        (entry(WQ_A, cols=0), "cols is not a number"),
        (entry(WQ_A, format="Q8"), "has 16384 bytes, Q8 needs 17408"),
        (entry(WQ_A, layout="rows", format="Q8_0"), r"has 16384 bytes, but Q8_0 \(128, 128\)"),
        (entry(WQ_A, layout="rows", format="Q4_K"), "Q4_K is no type of rows of 128 columns"),
        (entry(WQ_A, cols=127), "has no packed form F8"),
        (entry("layers.1.attn.kv_norm.weight"), ""),
        (entry(RECORDS, records=5), r"expected \(5, 28672\)"),
        (entry(RECORDS, record_bytes=4096), r"expected \(4, 4096\)"),
        (entry(RECORDS, rows=64), "has no packed form MX4"),
        (entry(RECORDS, rows=256, cols=256), "has records of 28672 bytes, 104448 are needed"),
        (entry(RECORDS, format="F8"), "has records of F8 and MX4"),
        (entry(RECORDS, down_format="B16"), "has records of MX4 and B16"),
        (entry(RECORDS, down_format="Q99"), "Q99, which is not known"),
        (without("matrices", RECORDS, "down_format"), "expected the fields"),
        (entry(RECORDS, experts=[0, 1, 2]), "experts is not a list of its records' numbers"),
        (entry(RECORDS, experts=[0, 2, 1, 3]), "experts is not a list of its records' numbers"),
        (entry(RECORDS, experts=[0, 1, 2, True]), "experts is not a list of its records' numbers"),
        (entry(RECORDS, experts="0123"), "experts is not a list of its records' numbers"),
        (entry(RECORDS, experts=[0, 1, 2, 1 << 20]), "experts is not a list of its records"),
        (entry(RECORDS, experts=[0, 1, 2, 4]), "holds 4 experts, expert 3 is not there"),
        (entry(WQ_A, experts=[0]), "expected the fields cols, format, layout, rows"),
    ],
)
def test_a_wrong_manifest(
    change: Callable[[dict[str, Any]], None], message: str, copy: Path
) -> None:
    if not message:  # a tensor that is no packed bytes

        def change(document: dict[str, Any]) -> None:
            document["matrices"]["layers.1.attn.kv_norm.weight"] = document["matrices"][WQ_A]

        message = "has type F32, expected packed bytes"
    changed(copy, change)
    with pytest.raises(BadFileError, match=message) as caught:
        load(copy)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_routed_experts", 5, r"gate\.weight' has shape"),
        ("n_routed_experts", 3, "names an expert outside"),
        ("moe_intermediate_size", 256, r"w1\.weight' has shape"),
        ("q_lora_rank", 256, r"wq_b\.weight' has shape"),
        ("num_hidden_layers", 3, "compress_ratios|is missing"),
        ("vocab_size", 600, r"tid2eid' is I64 \(512, 2\), expected integers \(600, 2\)"),
    ],
)
def test_a_configuration_of_another_network(key: str, value: int, message: str, copy: Path) -> None:
    path = copy / "config.json"
    document = json.loads(path.read_text("utf-8")) | {key: value}
    path.write_text(json.dumps(document), "utf-8")
    changed(copy, first_file(bytes=path.stat().st_size))
    with pytest.raises(BadFileError, match=message):
        load(copy)


def test_records_of_another_network(whole: Path) -> None:
    with open_packed_folder(whole) as packed:
        layer = load_packed_weights(packed, packed_config(packed)).layers[1]
        read = PackedReader(packed)
        part = "layers.1.ffn.experts.4.w2.weight"
        with pytest.raises(BadFileError, match="holds 4 experts, expert 4 is not there"):
            read.matrix(part, 128, 128)
        with pytest.raises(BadFileError, match=r"experts of \(128, 128\), expected \(128, 256\)"):
            read.matrix(part.replace("4", "0"), 128, 256)
        with pytest.raises(BadFileError, match="holds 4 experts, expected 3"):
            read.with_records(replace(layer, experts=layer.experts[:3]), 1)


def test_records_of_several_tensors(copy: Path) -> None:
    def divide(document: dict[str, Any]) -> None:
        entries = document["matrices"]
        entries[f"{RECORDS}.MX4"] = entries.pop(RECORDS) | {"experts": [0, 1, 2, 3]}

    changed(copy, divide)
    raw = (copy / SHARD).read_bytes()
    name = f'"{RECORDS}"'.encode()
    longer = raw.replace(name, f'"{RECORDS}.MX4"'.encode()).replace(b"}}    ", b"}}", 1)
    (copy / SHARD).write_bytes(longer)
    load(copy)

    def double(document: dict[str, Any]) -> None:
        entries = document["matrices"]
        entries["layers.0.ffn.experts"]["experts"] = [0, 1, 2, 3]
        entries["layers.0.ffn.experts.MX4"] = dict(entries["layers.0.ffn.experts"])

    changed(copy, double)
    first = copy / "layer-00000.safetensors"
    (copy / "twice.safetensors").write_bytes(
        first.read_bytes()
        .replace(b'"layers.0.', b'"layers.8.')
        .replace(b'"layers.8.ffn.experts"', b'"layers.0.ffn.experts.MX4"', 1)
        .replace(b"}}    ", b"}}", 1)
    )
    size = (copy / "twice.safetensors").stat().st_size
    sha256 = "0" * 64
    changed(
        copy, lambda d: d["files"].update({"twice.safetensors": {"bytes": size, "sha256": sha256}})
    )
    with pytest.raises(BadFileError, match=r"holds expert 0, as 'layers\.0\.ffn\.experts' does"):
        load(copy)


# --- crafted shards


def bytes_of(count: int) -> Callable[[], list[bytes]]:
    return lambda: [bytes(count)]


def written(folder: Path, entries: dict[str, MatrixEntry], *shards: list[ShardTensor]) -> Path:
    """Write a folder of these shards."""
    files = {}
    for number, tensors in enumerate(shards):
        name = f"part{number}.safetensors"
        files[name] = write_shard(folder / name, tensors)
    write_manifest(folder, "crafted", files, entries)
    return folder


def test_records_must_be_whole_pages(tmp_path: Path) -> None:
    tensors = [records_tensor("r", 2, 6144, bytes_of(12288))]
    matrix = MatrixEntry("records", "MX4", 128, 128, "MX4", 2, 6144)
    with pytest.raises(BadFileError, match="do not start on pages"):
        open_packed_folder(written(tmp_path, {"r": matrix}, tensors))


def test_packed_matrices_must_start_on_lines(tmp_path: Path) -> None:
    tensors = [
        stored_array("a", "F32", np.zeros(1, np.float32)),
        packed_bytes_tensor("m", 100, bytes_of(100)),
    ]
    with pytest.raises(BadFileError, match="does not start on a line"):
        open_packed_folder(written(tmp_path, {"m": MatrixEntry("packed", "F8", 16, 1)}, tensors))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = [stored_array("a", "F32", np.zeros(1, np.float32))]
    with pytest.raises(BadFileError, match="'a' is in two shards"):
        open_packed_folder(written(tmp_path, {}, tensors, tensors))


def test_the_scales_of_f8_must_be_there(copy: Path) -> None:
    raw = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(raw.replace(b"wq_a.scale", b"wq_a.stale"))
    with pytest.raises(BadFileError, match=r"wq_a\.scale is missing"):
        load(copy)


def test_a_part_of_the_wrong_size_is_no_shard(tmp_path: Path) -> None:
    tensor = packed_bytes_tensor("m", 64, bytes_of(60))
    with pytest.raises(ValueError, match="m has 60 bytes, not 64"):
        write_shard(tmp_path / "x.safetensors", [tensor])
    assert not (tmp_path / "x.safetensors").exists()


def test_the_same_tensors_in_any_order_are_the_same_file(tmp_path: Path) -> None:
    numbers = [
        stored_array("b", "F32", np.arange(3, dtype=np.float32)),
        stored_array("a", "I64", np.arange(5)),
        packed_bytes_tensor("c", 64, bytes_of(64)),
        records_tensor("d", 1, 4096, bytes_of(4096)),
    ]
    first = write_shard(tmp_path / "1", numbers)
    assert write_shard(tmp_path / "2", numbers[::-1]) == first
    with safe_open(tmp_path / "1", framework="numpy") as file:
        assert file.get_tensor("b").tolist() == [0, 1, 2]
        assert file.get_tensor("a").tolist() == [0, 1, 2, 3, 4]


# --- hostile manifests


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_manifests_are_read_or_refused(data: st.DataObject, copy: Path) -> None:
    path = copy / MANIFEST_NAME
    raw = bytearray(path.read_bytes())
    original = bytes(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        load(copy)
    except LocalV4Error as error:
        assert "\n" not in error.message
    finally:
        path.write_bytes(original)


def test_nothing_is_left_open_after_a_refusal(copy: Path) -> None:
    changed(copy, entry(WQ_A, format="Q99"))
    for _ in range(3):
        with pytest.raises(BadFileError):
            load(copy)


def test_entries_of_other_layouts_have_no_fields_of_records() -> None:
    matrix = MatrixEntry("packed", "F8", 16, 128)
    assert set(matrix.as_json()) == {"layout", "format", "rows", "cols"}
    assert set(replace(matrix, layout="records").as_json()) > {"down_format", "records"}
