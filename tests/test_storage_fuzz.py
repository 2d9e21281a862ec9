"""Thousands of damaged files: each one is read as a valid model or refused with a BadFileError."""

import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from crafted_files import (
    SAFETENSORS_SAMPLE,
    GgufFile,
    GgufTensor,
    TensorList,
    indexed_folder,
    safetensors_file,
    safetensors_model,
    sample_gguf,
    split_keys,
    write,
)
from safetensors import safe_open

from localv4.errors import BadFileError
from localv4.storage import Checkpoint, open_checkpoint
from localv4.storage.dtypes import SAFETENSORS_DTYPES
from localv4.storage.safetensors import INDEX_NAME

CASES = 300
"""Damaged files for each seed; there are 10 seeds for each format."""
LIMIT_S = 2.0


def check_in_bounds(checkpoint: Checkpoint) -> None:
    """Check that every tensor of an accepted model can be read, and that none overlap."""
    ends = {file: 0 for file in range(len(checkpoint.files))}
    for tensor in sorted(checkpoint.tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        assert tensor.nbytes == tensor.dtype.nbytes(math.prod(tensor.shape))
        assert checkpoint.bytes(tensor.name).size == tensor.nbytes
        assert tensor.offset >= ends[tensor.file]
        ends[tensor.file] = tensor.offset + tensor.nbytes
    for file, end in ends.items():
        assert end <= checkpoint.files[file].stat().st_size


def outcome(path: Path, accepted: Callable[[Checkpoint], None] = check_in_bounds) -> bool:
    """Open a damaged model; return whether it was accepted. Any other end fails the test."""
    begun = time.monotonic()
    try:
        with open_checkpoint(path) as checkpoint:
            accepted(checkpoint)
        good = True
    except BadFileError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        assert "library" not in str(error)  # our own check is at least as strict
        good = False
    assert time.monotonic() - begun < LIMIT_S
    return good


def run_cases(
    path: Path,
    make: Callable[[random.Random], bytes],
    seed: int,
    **checks: Callable[[Checkpoint], None],
) -> int:
    """Open CASES damaged versions of the file and return how many were accepted."""
    good = 0
    for case in range(CASES):
        data = make(random.Random(f"{seed}/{case}"))
        write(path, data)
        try:
            good += outcome(path, **checks)
        except BaseException:
            print(f"seed {seed}, case {case}: {data!r}")
            raise
    return good


def check_with_library(checkpoint: Checkpoint) -> None:
    """Check that the safetensors library agrees about every tensor of an accepted file."""
    check_in_bounds(checkpoint)
    with safe_open(checkpoint.files[0], framework="numpy") as library:
        assert set(library.keys()) == checkpoint.tensors.keys()
        for name, tensor in checkpoint.tensors.items():
            slice_ = library.get_slice(name)
            assert tuple(slice_.get_shape()) == tensor.shape
            assert slice_.get_dtype() == tensor.dtype.name


@pytest.mark.parametrize("seed", range(10))
def test_damaged_safetensors(tmp_path: Path, seed: int) -> None:
    data = safetensors_model(SAFETENSORS_SAMPLE)
    good = run_cases(
        tmp_path / "model.safetensors",
        lambda rng: mutated_safetensors(data, rng),
        seed,
        accepted=check_with_library,
    )
    assert 0 < good < CASES / 2


@pytest.mark.parametrize("seed", range(10))
def test_damaged_gguf(tmp_path: Path, seed: int) -> None:
    segments = sample_gguf().segments()
    good = run_cases(tmp_path / "model.gguf", lambda rng: mutated(segments, rng), seed)
    assert 0 < good < CASES / 2


@pytest.mark.parametrize("seed", range(2))
def test_damaged_index(tmp_path: Path, seed: int) -> None:
    shards: dict[str, TensorList] = {
        "model-00001-of-00002.safetensors": {"a": ("F32", (2,)), "b": ("BF16", (2, 2))},
        "model-00002-of-00002.safetensors": {"c": ("I8", (3,))},
    }
    folder = indexed_folder(tmp_path, shards)
    index = (folder / INDEX_NAME).read_bytes()

    def make(rng: random.Random) -> bytes:
        return mutated_json(index, rng) if rng.random() < 0.8 else _mutate_bytes(index, rng)

    good = run_cases(folder / INDEX_NAME, make, seed)
    assert 0 < good < CASES / 2


@pytest.mark.parametrize("seed", range(2))
def test_damaged_split_file(tmp_path: Path, seed: int) -> None:
    names = [f"model-{number:05}-of-00002.gguf" for number in (1, 2)]
    parts = [
        GgufFile(keys=split_keys(number, 2, 3), tensors=[GgufTensor(name, [4]) for name in tensors])
        for number, tensors in enumerate((["a", "b"], ["c"]))
    ]
    write(tmp_path / names[0], parts[0].build())
    segments = parts[1].segments()
    good = run_cases(tmp_path / names[1], lambda rng: mutated(segments, rng), seed)
    assert 0 < good < CASES / 2


def test_a_mutation_can_be_anything() -> None:
    """Guard the fuzzers themselves: the files differ, and so do their lengths."""
    data = safetensors_model(SAFETENSORS_SAMPLE)
    segments = sample_gguf().segments()
    rngs = list(map(random.Random, range(500)))
    for made in (
        [mutated_safetensors(data, rng) for rng in rngs],
        [mutated(segments, rng) for rng in rngs],
    ):
        assert len(set(made)) > 400
        assert len({len(file) for file in made}) > 50


# --- mutations

_EDGES = (0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 4096, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1)


def mutated(segments: Sequence[bytes], rng: random.Random) -> bytes:
    """Return the file of `segments` with one to three faults in it."""
    pieces = list(segments)
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 2)):
            _mutate_segment(pieces, rng)
        if rng.random() < 0.7:
            return b"".join(pieces)
    return _mutate_bytes(b"".join(pieces), rng)


def _mutate_segment(pieces: list[bytes], rng: random.Random) -> None:
    """Change one field: another number, gone, doubled, or exchanged with another field."""
    if not pieces:
        return
    place = rng.randrange(len(pieces))
    piece = pieces[place]
    kind = rng.randrange(8)
    if kind < 4 and len(piece) in (2, 4, 8):
        number = int.from_bytes(piece, "little")
        edge = rng.choice((*_EDGES, number + 1, number - 1, number * 2, number + 32, number // 2))
        pieces[place] = (edge % (1 << 8 * len(piece))).to_bytes(len(piece), "little")
    elif kind == 4:
        del pieces[place]
    elif kind == 5:
        pieces.insert(rng.randrange(len(pieces) + 1), piece)
    elif kind == 6:
        other = rng.randrange(len(pieces))
        pieces[place], pieces[other] = pieces[other], piece
    else:
        pieces[place] = rng.choice(pieces)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, repeat or overwrite a run of bytes."""
    kind = rng.randrange(6)
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((1, 1, 2, 8, 40)))
    if kind == 0:
        return data[:begin]
    if kind == 1:
        return data[:begin] + rng.randbytes(end - begin) + data[end:]
    if kind == 2:
        return data[:begin] + data[end:]
    if kind == 3:
        return data[:end] + data[begin:]
    if kind == 4:
        return data + rng.randbytes(rng.randint(1, 40))
    flipped = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 3)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


_JSON_VALUES = (
    b"0", b"1", b"-1", b"-0", b"4", b"4.0", b"1e999", b"1e2", b"NaN", b"Infinity", b"null",
    b"true", b"[]", b"{}", b'""', b'"F32"', b'"F4"', b'"f32"', b"9223372036854775807",
    b"18446744073709551616", b'"\\ud800"', b'"a\\u0000b"', b'"\\x"', b"[[[[", b"[0,4]",
    b'"../a.safetensors"', b'"/etc/passwd"', b"1" * 5000, b"[" * 3000, b"\xff", b"\xef\xbb\xbf",
    b"\x00", b"  ", b"'a'", b"//",
)  # fmt: skip


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """Return JSON text with one or two tokens changed."""
    tokens = json_tokens(text)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(tokens))
        kind = rng.randrange(6)
        if kind < 2:
            tokens[place] = rng.choice(_JSON_VALUES)
        elif kind == 2 and tokens[place].isdigit():
            number = int(tokens[place])
            shifted = rng.choice((number + 1, number - 1, number * 2, number + 4, number // 2))
            tokens[place] = str(shifted).encode()
        elif kind == 3:
            del tokens[place : place + rng.choice((1, 1, 2, 5))]
        elif kind == 4:
            other = rng.randrange(len(tokens))
            tokens[other:other] = tokens[place : place + rng.choice((1, 2, 5, 20))]
        else:
            other = rng.randrange(len(tokens))
            tokens[place], tokens[other] = tokens[other], tokens[place]
        tokens = tokens or [b"{}"]
    return b"".join(tokens)


def mutated_entries(header: bytes, rng: random.Random) -> bytes:
    """Return a header that is good JSON, with one to three values that may be wrong."""
    entries = json.loads(header)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(entries.keys() - {"__metadata__"}))
        entry = entries[name]
        kind = rng.randrange(7)
        if kind == 0:
            entry["dtype"] = rng.choice((*SAFETENSORS_DTYPES, "F64", "U8", "BOOL", "F4", ""))
        elif kind == 1:
            entry["shape"].insert(rng.randrange(3), rng.choice((1, 0, 2, -1, 2**63, 2**62, True)))
        elif kind == 2:
            rng.shuffle(entry["shape"])
            entry["shape"] = entry["shape"][rng.randrange(2) :]
        elif kind == 3:
            entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -4, -1, 1, 4, 8, 2**63))
        elif kind == 4:
            shift = rng.choice((-4, -1, 1, 4, 2**62))
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
        elif kind == 5:
            other = entries[rng.choice(sorted(entries.keys() - {"__metadata__"}))]
            field = rng.choice(("dtype", "shape", "data_offsets"))
            entry[field], other[field] = other[field], entry[field]
        elif len(entries) > 2:
            entries[rng.choice(("w", "", "\u00e9", "x" * 300))] = entries.pop(name)
    return json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode()


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with faults, most of them in the header."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutated([data[:8], header, body], rng)
    header = mutated_entries(header, rng) if kind < 5 else mutated_json(header, rng)
    if kind == 1:
        body = mutated([body], rng)
    return safetensors_file(header, body, length if kind == 7 else None)


def json_tokens(text: bytes) -> list[bytes]:
    """Cut JSON text into its tokens; joined they are the text again."""
    return re.findall(rb'"(?:[^"\\]|\\.)*"|[-+.0-9eE]+|[a-zA-Z]+|\s+|.', text)
