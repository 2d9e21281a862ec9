"""Builders of small model files, right ones and wrong ones, byte by byte.

A file is a list of segments (a length, a name, a type, ...), so that a test can change one field
and a fuzzer can change any.
"""

import json
import math
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from localv4.errors import BadFileError
from localv4.storage import open_checkpoint
from localv4.storage.dtypes import GGML_DTYPES, SAFETENSORS_DTYPES
from localv4.storage.safetensors import INDEX_NAME

# GGUF value types.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def write(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


def refused(path: Path, *words: str) -> BadFileError:
    """Check that opening fails quickly with one line that holds the words."""
    begun = time.monotonic()
    with pytest.raises(BadFileError) as caught:
        open_checkpoint(path)
    assert time.monotonic() - begun < 2
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return caught.value


def pattern(count: int, seed: int = 1) -> bytes:
    """Return bytes that differ from place to place."""
    return random.Random(seed).randbytes(count)


# --- safetensors

TensorList = dict[str, tuple[str, tuple[int, ...]]]

SAFETENSORS_SAMPLE: TensorList = {
    "embed.weight": ("BF16", (4, 3)),
    "hc_head_scale": ("F32", (1,)),
    "layers.0.attn.wkv.weight": ("F8_E4M3", (2, 8)),
    "layers.0.attn.wkv.scale": ("F8_E8M0", (1, 1)),
    "layers.0.ffn.experts.0.w1.weight": ("I8", (2, 2, 2)),
    "layers.0.ffn.gate.tid2eid": ("I64", (3, 2)),
    "half": ("F16", (5,)),
    "ids": ("I32", (2,)),
    "scalar": ("F32", ()),
    "nothing": ("F32", (0, 4)),
}
"""One tensor of each kind: dtype and shape."""


def safetensors_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Return a file; a header of bytes is taken as it is, `length` may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors_entry(dtype: str, shape: Sequence[int], begin: int) -> dict[str, Any]:
    """Return the header entry of a tensor whose data begins at `begin`."""
    nbytes = SAFETENSORS_DTYPES[dtype].nbytes(math.prod(shape))
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}


def safetensors_model(tensors: TensorList, seed: int = 1) -> bytes:
    """Return a valid file with these tensors (dtype, shape) and arbitrary contents."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        header[name] = safetensors_entry(dtype, shape, end)
        end = header[name]["data_offsets"][1]
    return safetensors_file(header, pattern(end, seed))


def one_tensor(entry: dict[str, Any] | None = None, data: bytes = b"abcd") -> bytes:
    """Return a file of one F32 tensor "w" of shape [1] with some fields of its entry changed."""
    return safetensors_file({"w": {**safetensors_entry("F32", [1], 0), **(entry or {})}}, data)


def indexed_folder(folder: Path, shards: dict[str, TensorList], **changes: Any) -> Path:
    """Write a folder of shards with an index; `changes` replace top-level values of the index."""
    weight_map = {}
    total = 0
    for number, (shard, tensors) in enumerate(shards.items()):
        write(folder / shard, safetensors_model(tensors, number))
        for name, (dtype, shape) in tensors.items():
            weight_map[name] = shard
            total += safetensors_entry(dtype, shape, 0)["data_offsets"][1]
    index = {"metadata": {"total_size": total}, "weight_map": weight_map, **changes}
    write(folder / INDEX_NAME, json.dumps(index).encode())
    return folder


# --- GGUF


def u32(value: int) -> bytes:
    """Return a 32-bit number; -1 is the largest."""
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    """Return a 64-bit number; -1 is the largest."""
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def gguf_string(text: str | bytes) -> list[bytes]:
    """Return the length and the bytes of a string."""
    raw = text.encode() if isinstance(text, str) else text
    return [u64(len(raw)), raw]


def gguf_key(key: str | bytes, type_id: int, *payload: bytes) -> list[bytes]:
    """Return the segments of a key/value pair."""
    return [*gguf_string(key), u32(type_id), *payload]


def gguf_array(key: str, type_id: int, count: int, *payload: bytes) -> list[bytes]:
    """Return the segments of a key with an array value."""
    return gguf_key(key, ARRAY, u32(type_id), u64(count), *payload)


def gguf_strings(key: str, items: Sequence[str]) -> list[bytes]:
    """Return the segments of a key with an array of strings."""
    payload = [segment for item in items for segment in gguf_string(item)]
    return gguf_array(key, STRING, len(items), *payload)


@dataclass
class GgufTensor:
    """One tensor info; `offset` and `rank` are those of a valid file unless given."""

    name: str | bytes
    dims: Sequence[int]
    type_id: int = 0
    offset: int | None = None
    rank: int | None = None
    nbytes: int | None = None

    def data_bytes(self) -> int:
        """Return the bytes of the tensor; none for a type that is unknown here."""
        if self.nbytes is not None:
            return self.nbytes
        dtype = GGML_DTYPES.get(self.type_id)
        return 0 if dtype is None else dtype.nbytes(math.prod(self.dims))


@dataclass
class GgufFile:
    """A GGUF file whose fields may each be wrong."""

    keys: list[list[bytes]] = field(default_factory=list)
    tensors: list[GgufTensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    missing_bytes: int = 0

    def segments(self) -> list[bytes]:
        """Return the file in pieces: one for each field."""
        infos: list[bytes] = []
        data_bytes = 0
        for tensor in self.tensors:
            offset = data_bytes if tensor.offset is None else tensor.offset
            rank = len(tensor.dims) if tensor.rank is None else tensor.rank
            infos += [*gguf_string(tensor.name), u32(rank), *map(u64, tensor.dims)]
            infos += [u32(tensor.type_id), u64(offset)]
            data_bytes += -(-tensor.data_bytes() // self.alignment) * self.alignment
        head = [
            self.magic,
            u32(self.version),
            u64(len(self.tensors) if self.tensor_count is None else self.tensor_count),
            u64(len(self.keys) if self.key_count is None else self.key_count),
            *(segment for key in self.keys for segment in key),
            *infos,
        ]
        padding = -sum(map(len, head)) % self.alignment if self.tensors else 0
        return [*head, bytes(padding), pattern(max(0, data_bytes - self.missing_bytes))]

    def build(self) -> bytes:
        """Return the file."""
        return b"".join(self.segments())


def alignment_key(alignment: int, type_id: int = U32) -> list[bytes]:
    """Return the key that sets the alignment of the tensor data."""
    return gguf_key("general.alignment", type_id, u32(alignment))


def split_keys(number: int, count: int, tensors: int) -> list[list[bytes]]:
    """Return the keys of a file of a split set."""
    return [
        gguf_key("split.no", U16, struct.pack("<H", number)),
        gguf_key("split.count", U16, struct.pack("<H", count)),
        gguf_key("split.tensors.count", I32, u32(tensors)),
    ]


def sample_gguf() -> GgufFile:
    """Return a valid file with most kinds of values and some types of tensors."""
    return GgufFile(
        keys=[
            gguf_key("general.architecture", STRING, *gguf_string("deepseek4")),
            alignment_key(32),
            gguf_key("deepseek4.block_count", U32, u32(2)),
            gguf_key("deepseek4.rope.freq_base", F32, struct.pack("<f", 10000.0)),
            gguf_key("deepseek4.expert_weights_norm", BOOL, b"\x01"),
            gguf_array(
                "deepseek4.attention.compress_ratios", I32, 3, struct.pack("<3i", 0, 4, 128)
            ),
            gguf_strings("tokenizer.ggml.tokens", ["a", "b", "Ġc", ""]),
            gguf_array("flags", BOOL, 2, b"\x00\x01"),
            gguf_key("seed", U64, u64(-1)),
            gguf_key("tiny", F64, struct.pack("<d", 1e-300)),
        ],
        tensors=[
            GgufTensor("token_embd.weight", [8, 4], 1),
            GgufTensor("blk.0.attn_q_a.weight", [64, 3], 8),
            GgufTensor("blk.0.ffn_gate_exps.weight", [32, 2, 2], 39),
            GgufTensor("output_norm.weight", [8], 0),
        ],
    )
