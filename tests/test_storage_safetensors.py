"""safetensors models: what is read equals what the library reads, and what is refused says why."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crafted_files import (
    SAFETENSORS_SAMPLE,
    TensorList,
    one_tensor,
    refused,
    safetensors_entry,
    safetensors_file,
    safetensors_model,
    write,
)
from safetensors import SafetensorError, deserialize

from localv4.storage import open_checkpoint, safetensors_header
from localv4.storage.dtypes import SAFETENSORS_DTYPES
from localv4.storage.safetensors import open_safetensors


def two_tensors(first: list[int], second: list[int], data: bytes) -> bytes:
    """Return a file of two U8-like tensors with these data_offsets."""
    header = {
        name: {"dtype": "I8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return safetensors_file(header, data)


# --- good files


def test_reads_what_the_library_reads(tmp_path: Path) -> None:
    data = safetensors_model(SAFETENSORS_SAMPLE)
    path = write(tmp_path / "model.safetensors", data)
    with open_checkpoint(path) as checkpoint:
        expected = dict(deserialize(data))  # type: ignore[no-untyped-call]
        assert checkpoint.kind == "safetensors"
        assert checkpoint.path == path
        assert checkpoint.files == (path,)
        assert checkpoint.metadata == {}
        assert checkpoint.tensors.keys() == expected.keys() == SAFETENSORS_SAMPLE.keys()
        for name, tensor in checkpoint.tensors.items():
            assert tensor.name == name
            assert tensor.dtype.name == expected[name]["dtype"]
            assert list(tensor.shape) == expected[name]["shape"]
            assert checkpoint.bytes(name).tobytes() == expected[name]["data"]
            assert data[tensor.offset : tensor.offset + tensor.nbytes] == expected[name]["data"]


def test_every_supported_type_is_read(tmp_path: Path) -> None:
    tensors: TensorList = {name: (name, (2, 2)) for name in SAFETENSORS_DTYPES}
    path = write(tmp_path / "model.safetensors", safetensors_model(tensors))
    with open_safetensors(path) as checkpoint:
        assert {name: tensor.dtype.name for name, tensor in checkpoint.tensors.items()} == {
            name: name for name in SAFETENSORS_DTYPES
        }


def test_views_are_flat_read_only_bytes_without_a_copy(tmp_path: Path) -> None:
    with open_safetensors(
        write(tmp_path / "model.safetensors", safetensors_model(SAFETENSORS_SAMPLE))
    ) as checkpoint:
        view = checkpoint.bytes("embed.weight")
        assert (view.dtype, view.ndim, view.size) == (np.dtype(np.uint8), 1, 24)
        assert not view.flags.writeable
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"{}   \n\t",
        b' { "w" : {"shape": [ 1 ],\n"data_offsets":[0 ,4],"dtype":"F32"} } ',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"a":"{}","b":"\\""}}',
        '{"ä\\n\\u00e9😀":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}'.encode(),
        b'{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{}}',
    ],
)
def test_unusual_but_valid_headers_are_read(tmp_path: Path, header: bytes) -> None:
    data = safetensors_file(header, b"" if header.startswith(b"{}") else b"abcd")
    with open_checkpoint(write(tmp_path / "model.safetensors", data)) as checkpoint:
        expected = dict(deserialize(data))  # type: ignore[no-untyped-call]
        assert {name: checkpoint.bytes(name).tobytes() for name in checkpoint.tensors} == {
            name: tensor["data"] for name, tensor in expected.items()
        }


def test_order_of_the_header_need_not_be_that_of_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", two_tensors([2, 6], [0, 2], b"bbaaaa"))
    with open_safetensors(path) as checkpoint:
        assert checkpoint.bytes("a").tobytes() == b"aaaa"
        assert checkpoint.bytes("b").tobytes() == b"bb"


# --- damaged files


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = safetensors_model(SAFETENSORS_SAMPLE)
    path = tmp_path / "model.safetensors"
    for length in range(len(data)):
        write(path, data[:length])
        refused(path, str(path))


def test_cut_file_says_have_and_need(tmp_path: Path) -> None:
    data = safetensors_model(SAFETENSORS_SAMPLE)
    path = write(tmp_path / "model.safetensors", data[:-1])
    refused(path, "cut", f"needs {len(data)} bytes", f"has {len(data) - 1}")


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (2**63, "limit"),
        (2**64 - 1, "limit"),
        (100_000_001, "limit"),
        (100_000_000, "needs 100000000 bytes"),
        (1_000, "needs 1000 bytes"),
        (0, "byte 0"),
        (7, "byte"),
        (60, "byte"),
    ],
)
def test_wrong_header_length_is_refused(tmp_path: Path, length: int, words: str) -> None:
    data = one_tensor()
    path = write(tmp_path / "model.safetensors", struct.pack("<Q", length) + data[8:])
    refused(path, words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F99"}, "'F99' is not supported"),
        ({"dtype": "f32"}, "not supported"),
        ({"dtype": 4}, "not a string"),
        ({"dtype": None}, "not a string"),
        ({"dtype": ["F32"]}, "not a string"),
        ({"dtype": "\x1b[2J" * 200}, "not supported"),
        ({"shape": [2]}, "needs 8 bytes"),
        ({"shape": [0]}, "needs 0 bytes"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [-1, -1]}, "shape"),
        ({"shape": [1.0]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": ["1"]}, "shape"),
        ({"shape": [None]}, "shape"),
        ({"shape": [[1]]}, "shape"),
        ({"shape": 1}, "shape: not a list"),
        ({"shape": None}, "shape: not a list"),
        ({"shape": [1] * 9}, "9 dimensions"),
        ({"shape": [1] * 65}, "65 dimensions"),
        ({"shape": [2**63]}, "shape"),
        ({"shape": [2**32, 2**32]}, "needs"),
        ({"shape": [2**62, 4]}, "needs"),
        ({"shape": [2**63 - 1] * 8}, "needs"),
        ({"data_offsets": [0, 3]}, "hold 3"),
        ({"data_offsets": [4, 0]}, "data_offsets"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [0, 4, 4]}, "data_offsets"),
        ({"data_offsets": []}, "data_offsets"),
        ({"data_offsets": {"0": 4}}, "without objects inside"),
        ({"data_offsets": [0, 4.0]}, "data_offsets"),
        ({"data_offsets": [False, 4]}, "data_offsets"),
        ({"data_offsets": [-4, 0]}, "data_offsets"),
        ({"data_offsets": [2**64, 2**64 + 4]}, "data_offsets"),
        ({"data_offsets": [2**62, 2**62 + 4]}, "hole"),
        ({"data_offsets": [4, 8]}, "hole"),
        ({"extra": 1}, "fields"),
    ],
)
def test_wrong_entry_is_refused_by_name(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "model.safetensors", one_tensor(entry))
    message = str(refused(path, words))
    assert "'w'" in message or "byte" in message
    assert "\x1b" not in message
    assert len(message) < 500 + len(str(path))


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_missing_field_is_refused(tmp_path: Path, field: str) -> None:
    entry = safetensors_entry("F32", [1], 0)
    del entry[field]
    refused(write(tmp_path / "model.safetensors", safetensors_file({"w": entry}, b"abcd")), "'w'")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (two_tensors([0, 4], [2, 6], b"abcdef"), "overlaps"),
        (two_tensors([0, 4], [0, 4], b"abcd"), "overlaps"),
        (two_tensors([0, 6], [2, 4], b"abcdef"), "overlaps"),
        (two_tensors([0, 2], [3, 6], b"abcdef"), "hole"),
        (two_tensors([1, 2], [2, 6], b"abcdef"), "hole"),
        (two_tensors([0, 2], [2, 6], b"abcdefg"), "after its last tensor"),
        (two_tensors([0, 2], [2, 6], b"abcde"), "cut"),
        (safetensors_file({}, b"a"), "after its last tensor"),
    ],
)
def test_tensors_must_fill_the_file(tmp_path: Path, data: bytes, words: str) -> None:
    refused(write(tmp_path / "model.safetensors", data), words)


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"w"',
        b"{",
        b'{"w"',
        b'{"w":',
        b'{"w":' + ENTRY,
        b'{"w":' + ENTRY + b",}",
        b'{"w":' + ENTRY + b"}}",
        b'{"w":' + ENTRY + b"} x",
        b'{"w":' + ENTRY + b"}\x00",
        b'{,"w":' + ENTRY + b"}",
        b"{w:" + ENTRY + b"}",
        b"{'w':" + ENTRY + b"}",
        b'{"w" ' + ENTRY + b"}",
        b'{"w":' + ENTRY + b' "v":' + ENTRY + b"}",
        b'{"w":null}',
        b'{"w":[0,4]}',
        b'{"w":{}}',
        b'{"w":NaN}',
        b'{"\xff":' + ENTRY + b"}",
        b'{"\\ud800":' + ENTRY + b"}",
        b'{"\\x":' + ENTRY + b"}",
        b'{"\n":' + ENTRY + b"}",
        b"\xef\xbb\xbf" + b'{"w":' + ENTRY + b"}",
        ('{"w":' + ENTRY.decode() + "}").encode("utf-16"),
        b'{"w":' + ENTRY + b',"w":' + ENTRY + b"}",
        b'{"w":' + ENTRY + b',"\\u0077":' + ENTRY + b"}",
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 4900 + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":' + b"[" * 3000 + b',"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":' + b"[" * 2000 + b"]" * 2000 + b',"data_offsets":[0,4]}}',
        b'{"w":' * 100_000,
        b'{"w":' + b"[" * 100_000,
        b'{"__metadata__":null,"w":' + ENTRY + b"}",
        b'{"__metadata__":{"a":1},"w":' + ENTRY + b"}",
        b'{"__metadata__":{"a":{"b":"c"}},"w":' + ENTRY + b"}",
        b'{"__metadata__":{"a":"b","a":"c"},"w":' + ENTRY + b"}",
        b'{"__metadata__":{},"__metadata__":{},"w":' + ENTRY + b"}",
    ],
)
def test_header_that_is_no_plain_json_is_refused(
    tmp_path: Path, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_header, "_ask_library", lambda file: None)
    path = write(tmp_path / "model.safetensors", safetensors_file(header, b"abcd"))
    refused(path, str(path))


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":[' + b"[]," * 10_000_000,
        b'{"w":{"x":[' + b"[]," * 10_000_000 + b"]}}",
        b'{"__metadata__":{"a":"' + b"\\n" * 15_000_000 + b'"}}',
        b'{"' + b"a" * 30_000_000 + b'":' + ENTRY + b"}",
        b"{" + b'"w":' + ENTRY + b"," * 30_000_000,
    ],
    ids=["list", "entry", "metadata", "name", "commas"],
)
def test_large_hostile_header_takes_little_memory(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path / "model.safetensors", safetensors_file(header, b"abcd"))
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(header) + 100e6


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", safetensors_model(SAFETENSORS_SAMPLE))
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", len(SAFETENSORS_SAMPLE))
    refused(path, "more than")
    monkeypatch.setattr(
        safetensors_header, "MAX_TENSORS", len(SAFETENSORS_SAMPLE) + 1
    )  # and the metadata
    open_safetensors(path).close()


def test_the_library_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise SafetensorError("no,\nnever")

    path = write(tmp_path / "model.safetensors", one_tensor())
    monkeypatch.setattr(safetensors_header, "safe_open", refuse)
    refused(path, "library refuses it: no, never")
