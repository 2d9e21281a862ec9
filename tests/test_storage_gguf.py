"""GGUF models: what is read equals what the gguf package reads, and what is refused says why.

The crafted files follow the list in llama.cpp's `tests/test-gguf.cpp`. The reader of the gguf
package never sees them: it hangs on some.
"""

import math
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from crafted_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U32,
    U64,
    GgufFile,
    GgufTensor,
    alignment_key,
    gguf_array,
    gguf_key,
    gguf_string,
    gguf_strings,
    pattern,
    refused,
    sample_gguf,
    u32,
    u64,
    write,
)

import localv4.storage.gguf
from localv4.storage import gguf_values, open_checkpoint
from localv4.storage.dtypes import GGML_DTYPES
from localv4.storage.gguf import open_gguf

TENSOR = GgufTensor("w", [4])


def with_keys(*keys: list[bytes], **changes: Any) -> GgufFile:
    """Return a file with these keys and one tensor."""
    return GgufFile(keys=list(keys), tensors=[TENSOR], **changes)


def with_tensors(*tensors: GgufTensor, **changes: Any) -> GgufFile:
    """Return a file with these tensors and no keys."""
    return GgufFile(tensors=list(tensors), **changes)


def gguf_path(folder: Path, file: GgufFile) -> Path:
    """Write a crafted file."""
    return write(folder / "model.gguf", file.build())


# --- good files


def write_with_package(path: Path, **split: Any) -> None:
    """Write a model with every supported tensor type and kind of value through the gguf package."""
    writer = gguf.GGUFWriter(path, "deepseek4", **split)
    for name, value in (("u8", 255), ("u16", 65535), ("u32", 2**32 - 1), ("u64", 2**64 - 1)):
        getattr(writer, f"add_uint{name[1:]}")(name, value)
        getattr(writer, f"add_int{name[1:]}")(f"i{name[1:]}", -(value // 2) - 1)
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "ein Gruß\n<｜end▁of▁sentence｜>")
    writer.add_string("empty", "")
    writer.add_array("ratios", [0, 4, 128])
    writer.add_array("clamps", [10.0, 0.5])
    writer.add_array("flags", [True, False])
    writer.add_array("tokens", ["a", "Ġb", ""])
    writer.add_array("long", list(range(5000)))
    for type_id, dtype in GGML_DTYPES.items():
        shape = (3, 2, 256)
        raw = np.frombuffer(pattern(dtype.nbytes(math.prod(shape)), type_id), np.uint8)
        rows = raw.reshape(3, 2, -1)
        writer.add_tensor(f"t.{dtype.name}", rows, raw_dtype=gguf.GGMLQuantizationType(type_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reads_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with_package(path)
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.kind, checkpoint.path, checkpoint.files) == ("gguf", path, (path,))
        assert list(checkpoint.tensors) == [tensor.name for tensor in reader.tensors]
        assert len(checkpoint.tensors) == len(GGML_DTYPES)
        for expected in reader.tensors:
            tensor = checkpoint.tensors[expected.name]
            assert tensor.dtype.name == expected.tensor_type.name
            assert tensor.shape == tuple(reversed(expected.shape.tolist())) == (3, 2, 256)
            assert tensor.offset == expected.data_offset
            assert tensor.nbytes == expected.n_bytes
            assert checkpoint.bytes(tensor.name).tobytes() == expected.data.tobytes()
        fields = {key: field for key, field in reader.fields.items() if "GGUF." not in key}
        assert checkpoint.metadata.keys() == fields.keys()
        for key, field in fields.items():
            value = checkpoint.metadata[key]
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            assert plain == field.contents(), key


def test_values_are_plain_python_except_long_arrays(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with_package(path)
    with open_gguf(path) as checkpoint:
        metadata = checkpoint.metadata
    assert metadata["u64"] == 2**64 - 1
    assert metadata["i64"] == -(2**63)
    assert metadata["f64"] == 0.1
    assert metadata["yes"] is True and metadata["no"] is False
    assert metadata["text"] == "ein Gruß\n<｜end▁of▁sentence｜>"
    assert metadata["ratios"] == [0, 4, 128]
    assert metadata["flags"] == [True, False]
    assert metadata["tokens"] == ["a", "Ġb", ""]
    for key in ("ratios", "clamps", "flags"):
        assert isinstance(metadata[key], list)
    long = metadata["long"]
    assert isinstance(long, np.ndarray)
    assert (long.dtype, long.flags.writeable) == (np.dtype(np.int32), False)


def test_sizes_of_types_are_those_of_the_package() -> None:
    for type_id, dtype in GGML_DTYPES.items():
        known = gguf.GGMLQuantizationType(type_id)
        assert known.name == dtype.name
        assert gguf.GGML_QUANT_SIZES[known] == (dtype.block, dtype.block_bytes)


def test_sample_of_the_fuzzer_is_valid(tmp_path: Path) -> None:
    with open_gguf(gguf_path(tmp_path, sample_gguf())) as checkpoint:
        assert checkpoint.tensors["blk.0.ffn_gate_exps.weight"].shape == (2, 2, 32)
        assert checkpoint.metadata["flags"] == [False, True]


@pytest.mark.parametrize(
    "file",
    [
        GgufFile(),
        GgufFile(version=2),
        GgufFile(keys=[gguf_strings("empty", [])]),
        with_keys(gguf_array("empty", U32, 0)),
        with_keys(alignment_key(1), alignment=1),
        with_keys(alignment_key(8), alignment=8),
        with_keys(alignment_key(4096), alignment=4096),
        with_tensors(TENSOR, missing_bytes=16),  # the padding after the last tensor is not needed
        with_tensors(GgufTensor("n" * 63, [1, 1, 1, 1])),
        with_tensors(GgufTensor("b", [4], offset=32), GgufTensor("a", [4], offset=0)),
        with_tensors(GgufTensor("a", [4], nbytes=64), GgufTensor("b", [4])),  # a gap
        with_tensors(GgufTensor("", [1])),
    ],
)
def test_unusual_but_valid_files_are_read(tmp_path: Path, file: GgufFile) -> None:
    with open_checkpoint(gguf_path(tmp_path, file)) as checkpoint:
        assert len(checkpoint.tensors) == len(file.tensors)
        assert len(checkpoint.metadata) == len(file.keys)
        for tensor in checkpoint.tensors.values():
            assert checkpoint.bytes(tensor.name).size == tensor.nbytes


def test_file_without_a_suffix_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "abc123", sample_gguf().build())) as checkpoint:
        assert checkpoint.kind == "gguf"


def test_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"token{number}é" for number in range(129_280)]
    path = gguf_path(tmp_path, with_keys(gguf_strings("tokenizer.ggml.tokens", tokens)))
    begun = time.monotonic()
    with open_gguf(path) as checkpoint:
        assert time.monotonic() - begun < 5
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == tokens


# --- damaged files


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = sample_gguf().build()
    path = tmp_path / "model.gguf"
    for length in range(len(data)):
        write(path, data[:length])
        refused(path, str(path))


MAX = 2**64 - 1

HEADERS: list[tuple[GgufFile, str]] = [
    (GgufFile(magic=b"FUGG"), "magic"),
    (GgufFile(magic=b"gguf"), "magic"),
    (GgufFile(version=0), "version: 0 "),
    (GgufFile(version=1), "version: 1 "),
    (GgufFile(version=4), "version: 4 "),
    (GgufFile(version=-1), "version: 4294967295 "),
    (GgufFile(version=0x03000000), "big-endian"),
    (GgufFile(version=0x02000000), "big-endian"),
    (GgufFile(tensor_count=-1), f"tensor count: {MAX}"),
    (GgufFile(tensor_count=2**63), "tensor count"),
    (GgufFile(tensor_count=1), "tensor count"),
    (with_tensors(TENSOR, tensor_count=2), "tensor"),
    (GgufFile(key_count=-1), f"key count: {MAX}"),
    (GgufFile(key_count=2**63), "key count"),
    (GgufFile(key_count=1), "key count"),
    (with_keys(gguf_key("k", U32, u32(1)), key_count=2), "tensor"),
    (with_keys(gguf_key("k", U32, u32(1)), key_count=0), "tensor 'k': "),
]

KEYS: list[tuple[list[list[bytes]], str]] = [
    ([[u64(-1), b"key", u32(U32), u32(1)]], f"key 0: a string of {MAX} bytes"),
    ([[u64(2**63), b"key", u32(U32), u32(1)]], "key 0: a string of"),
    ([[u64(65_536), b"key", u32(U32), u32(1)]], "limit"),
    ([[u64(60_000), b"key", u32(U32), u32(1)]], "needs 60000 bytes"),
    ([gguf_key("", U32, u32(1))], "key 0: is empty"),
    ([gguf_key(b"\xff\xfe", U32, u32(1))], "UTF-8"),
    ([gguf_key("k", 13, u32(1))], "unknown value type 13"),
    ([gguf_key("k", -1, u32(1))], "unknown value type"),
    ([gguf_key("k", U32, u32(1)), gguf_key("k", U32, u32(1))], "'k': occurs twice"),
    ([gguf_key("k", STRING, u64(-1), b"abc")], "limit"),
    ([gguf_key("k", STRING, u64(2**20 + 1), bytes(2**20 + 1))], "limit"),
    ([gguf_key("k", STRING, u64(2**20), b"abc")], "needs 1048576 bytes"),
    ([gguf_key("k", STRING, *gguf_string(b"\xed\xa0\x80"))], "UTF-8"),
    ([gguf_key("k", STRING, *gguf_string(b"\xc0\x80"))], "UTF-8"),
    ([gguf_key("k", BOOL, b"\x02")], "neither 0 nor 1"),
    ([gguf_array("k", BOOL, 3, b"\x00\x01\xff")], "neither 0 nor 1"),
    ([gguf_array("k", 13, 1, u32(1))], "unknown value type 13"),
    ([gguf_array("k", U32, 2**63)], "limit"),
    ([gguf_array("k", U32, -1)], "limit"),
    ([gguf_array("k", U8, 10**9)], "limit"),
    ([gguf_array("k", U8, 2**24 + 1)], "limit"),
    ([gguf_array("k", U8, 2**24)], "needs 16777216 bytes"),
    ([gguf_array("k", U64, 2**24)], "needs 134217728 bytes"),
    ([gguf_array("k", STRING, 2**63)], "strings do not fit"),
    ([gguf_array("k", STRING, 10**9)], "strings do not fit"),
    ([gguf_array("k", STRING, 2, *gguf_string("a"), u64(-1))], "limit"),
    ([gguf_array("k", ARRAY, 1, u32(U32), u64(1), u32(1))], "array of arrays"),
    ([gguf_key("k", ARRAY, *[u32(ARRAY) + u64(1)] * 3000)], "array of arrays"),
    ([alignment_key(0)], "alignment': 0 is not a power"),
    ([alignment_key(13)], "alignment': 13 is not a power"),
    ([alignment_key(8192)], "alignment': 8192 is not a power"),
    ([alignment_key(2**31)], "is not a power"),
    ([alignment_key(32, I32)], "uint32"),
    ([alignment_key(32, F32)], "uint32"),
    ([gguf_key("general.alignment", U64, u64(32))], "uint32"),
    ([gguf_key("general.alignment", BOOL, b"\x01")], "uint32"),
    ([gguf_key("general.alignment", STRING, *gguf_string("32"))], "uint32"),
    ([gguf_array("general.alignment", U32, 1, u32(32))], "uint32"),
]

BIG = 4 * (2**31 - 1)

TENSORS: list[tuple[list[GgufTensor], str]] = [
    ([GgufTensor("n" * 64, [4])], "limit"),
    ([GgufTensor(b"\xff", [4])], "UTF-8"),
    ([replace(TENSOR, rank=0)], "0 dimensions"),
    ([replace(TENSOR, rank=5)], "5 dimensions"),
    ([replace(TENSOR, rank=2**31)], "2147483648 dimensions"),
    ([GgufTensor("w", [1] * 5)], "5 dimensions"),
    ([GgufTensor("w", [-1], nbytes=32)], "ends at byte"),
    ([GgufTensor("w", [2**63], nbytes=32)], "ends at byte"),
    ([GgufTensor("w", [0])], "is 0"),
    ([GgufTensor("w", [4, 0])], "is 0"),
    ([GgufTensor("w", [BIG, BIG], nbytes=32)], "ends at byte"),
    ([GgufTensor("w", [2**32, 2**32], nbytes=32)], "ends at byte"),
    ([GgufTensor("w", [2**62, 4], nbytes=32)], "ends at byte"),
    ([GgufTensor("w", [2**63 - 64] * 4, nbytes=32)], "ends at byte"),
    ([GgufTensor(name, [2**63 - 64], nbytes=32) for name in "wv"], "'w'"),
    ([GgufTensor("w", [32], 200)], "the unknown id 200"),
    ([GgufTensor("w", [32], -1)], "the unknown id 4294967295"),
    ([GgufTensor("w", [32], 4)], "the unknown id 4 "),
    ([GgufTensor("w", [32], 3)], "Q4_1"),
    ([GgufTensor("w", [32], 6)], "Q5_0"),
    ([GgufTensor("w", [256], 17)], "IQ2_XS"),
    ([GgufTensor("w", [256], 29)], "IQ1_M"),
    ([GgufTensor("w", [64], 40)], "NVFP4"),
    ([GgufTensor("w", [32], 24)], "I8"),
    ([GgufTensor("w", [33], 8, nbytes=64)], "blocks of 32"),
    ([GgufTensor("w", [16, 2], 8, nbytes=64)], "blocks of 32"),
    ([GgufTensor("w", [128, 2], 12, nbytes=256)], "blocks of 256"),
    ([replace(TENSOR, offset=-1)], "no multiple"),
    ([replace(TENSOR, offset=16)], "no multiple"),
    ([replace(TENSOR, offset=32)], "ends at byte"),
    ([replace(TENSOR, offset=2**63)], "ends at byte"),
    ([replace(TENSOR, offset=2**64 - 32)], "ends at byte"),
    ([TENSOR, TENSOR], "'w' occurs twice"),
    ([GgufTensor("a", [4]), GgufTensor("b", [4], offset=0)], "overlaps"),
    ([GgufTensor("a", [9]), GgufTensor("b", [4], offset=32)], "overlaps"),
    ([GgufTensor("a", [40]), GgufTensor("b", [4], offset=64)], "overlaps"),
    ([GgufTensor("\x1b[2J", [4], 200)], "'\\x1b[2J'"),
]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        *HEADERS,
        *((with_keys(*keys), words) for keys, words in KEYS),
        *((with_tensors(*tensors), words) for tensors, words in TENSORS),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, file: GgufFile, words: str) -> None:
    path = gguf_path(tmp_path, file)
    tracemalloc.start()
    try:
        refused(path, words)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_data_must_be_whole(tmp_path: Path) -> None:
    path = gguf_path(tmp_path, with_tensors(GgufTensor("w", [8]), missing_bytes=1))
    end = path.stat().st_size + 1
    refused(path, "'w'", f"ends at byte {end}", f"has {end - 1}")


def test_data_of_another_alignment_is_refused(tmp_path: Path) -> None:
    tensors = [GgufTensor("a", [5]), GgufTensor("b", [5])]
    refused(gguf_path(tmp_path, with_tensors(*tensors, alignment=4)), "no multiple of 32")
    file = GgufFile(keys=[alignment_key(64)], tensors=tensors, alignment=32)
    refused(gguf_path(tmp_path, file), "no multiple of 64")


def test_all_arrays_together_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_keys(
        gguf_array("numbers", I32, 3, struct.pack("<3i", 1, 2, 3)),
        gguf_strings("a", ["x", "y"]),
        gguf_array("more", I32, 3, struct.pack("<3i", 1, 2, 3)),
        gguf_strings("b", ["z"]),
    )
    path = gguf_path(tmp_path, file)
    monkeypatch.setattr(gguf_values, "MAX_OBJECTS", 6)
    with open_gguf(path) as checkpoint:
        assert isinstance(checkpoint.metadata["numbers"], list)
        assert isinstance(checkpoint.metadata["more"], np.ndarray)  # numbers need no objects
    monkeypatch.setattr(gguf_values, "MAX_OBJECTS", 5)
    refused(path, "'b'", "limit of 5")


@pytest.mark.parametrize("limit", ["MAX_KEYS", "MAX_TENSORS"])
def test_counts_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    keys = [gguf_key("a", U8, b"1"), gguf_key("b", U8, b"2")]
    tensors = [GgufTensor("a", [4]), GgufTensor("b", [4])]
    path = gguf_path(tmp_path, GgufFile(keys=keys, tensors=tensors))
    monkeypatch.setattr(localv4.storage.gguf, limit, 2)
    open_gguf(path).close()
    monkeypatch.setattr(localv4.storage.gguf, limit, 1)
    refused(path, "count: 2, but 1 are the limit")


def test_length_of_the_header_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sample_gguf()
    path = gguf_path(tmp_path, file)
    header_bytes = sum(map(len, file.segments()[:-2]))
    monkeypatch.setattr(gguf_values, "MAX_HEADER_BYTES", header_bytes)
    open_gguf(path).close()
    monkeypatch.setattr(gguf_values, "MAX_HEADER_BYTES", header_bytes - 1)
    refused(path, "header is over the limit")
