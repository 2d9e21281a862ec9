"""Traces of routes: what is written is read, a crash loses at most a row, damage is refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localv4.errors import BadFileError, LocalV4Error, NotFoundError
from localv4.paging.trace import MAGIC, TraceHead, TraceWriter, read_trace

HEAD = TraceHead("ab" * 32, "tiny", layers=3, experts=16, k=4, record_bytes=(10, 0, 30))


def routes(head: TraceHead, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (tokens, head.layers, head.experts)
    return np.argsort(rng.random(shape), axis=2)[:, :, : head.k].astype(np.int16)


def write(path: Path, head: TraceHead = HEAD, tokens: int = 5) -> np.ndarray:
    """Write a prompt of some tokens at once, then the same as generated ones."""
    chosen = routes(head, 2 * tokens)
    with TraceWriter(path, head) as writer:
        writer.append(chosen[:tokens], is_prompt=True)
        for token in chosen[tokens:]:
            writer.append(token, is_prompt=False)
    return chosen


@pytest.mark.parametrize("experts", [16, 256, 257, 1024])
def test_what_is_written_is_read(tmp_path: Path, experts: int) -> None:
    head = replace(HEAD, experts=experts)
    chosen = write(tmp_path / "t", head)
    trace = read_trace(tmp_path / "t")
    assert trace.head == head
    np.testing.assert_array_equal(trace.chosen, chosen)
    assert trace.is_prompt.tolist() == [True] * 5 + [False] * 5


def test_a_token_of_flash_takes_259_bytes(tmp_path: Path) -> None:
    assert TraceHead("", "", 43, 256, 6, (1,) * 43).dtype.itemsize == 259


def test_rows_are_in_the_file_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEAD)
    chosen = routes(HEAD, 2)
    for token in chosen:
        writer.append(token, is_prompt=False)
    np.testing.assert_array_equal(read_trace(tmp_path / "t").chosen, chosen)
    writer.close()


def test_a_row_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "t"
    chosen = write(path)
    path.write_bytes(path.read_bytes()[:-3])
    np.testing.assert_array_equal(read_trace(path).chosen, chosen[:-1])


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_trace(tmp_path / "none")
    with pytest.raises(NotFoundError):
        read_trace(tmp_path)
    with pytest.raises(LocalV4Error, match="cannot write"):
        TraceWriter(tmp_path / "none" / "t", HEAD)


def damage(path: Path, **changes: object) -> None:
    """Change fields of the head."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    fields = json.loads(data[16 : 16 + length]) | changes
    text = json.dumps(fields).encode()
    path.write_bytes(data[:12] + struct.pack("<I", len(text)) + text + data[16 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"layers": 10**6}, "layers is 1000000"),
        ({"layers": True}, "layers is True"),
        ({"experts": "many"}, "experts is 'many'"),
        ({"experts": 4096}, "experts is 4096"),
        ({"k": 17}, "k is 17"),
        ({"record_bytes": [1, 2]}, "record_bytes is not a list of 3"),
        ({"record_bytes": [0, 0, 0]}, "record_bytes is not a list of 3"),
        ({"record_bytes": [1, 2, -1]}, "something else than sizes"),
        ({"record_bytes": [1, 2, 1.5]}, "something else than sizes"),
        ({"model": 7}, "does not name the model"),
        ({"experts": 8}, "is damaged: the experts of layer"),
    ],
)
def test_a_wrong_head_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write(tmp_path / "t")
    damage(tmp_path / "t", **changes)
    with pytest.raises(BadFileError, match=message):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no trace"),
        (b"GGUF" + bytes(60), "no trace"),
        (MAGIC + struct.pack("<II", 2, 2) + b"{}", "version 2"),
        (MAGIC + struct.pack("<II", 1, 1 << 30) + b"{}", "its head has"),
        (MAGIC + struct.pack("<II", 1, 2) + b"{]", "head is damaged"),
        (MAGIC + struct.pack("<II", 1, 2) + b"\xff\xfe", "head is damaged"),
        (MAGIC + struct.pack("<II", 1, 2) + b"[]", "head is no object"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(BadFileError, match=message):
        read_trace(tmp_path / "t")


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(path)
    whole = path.read_bytes()
    row = 1 + HEAD.layers * HEAD.k
    path.write_bytes(whole[: -2 * row] + b"\x02" + whole[-2 * row + 1 :])
    with pytest.raises(BadFileError, match="row 8 is damaged"):
        read_trace(path)
    path.write_bytes(whole[:-row] + b"\x00" + bytes(row - 1))  # one expert four times
    with pytest.raises(BadFileError, match="row 9 is damaged: the experts of layer 0"):
        read_trace(path)
    path.write_bytes(whole[: -10 * row])
    with pytest.raises(BadFileError, match="holds no token"):
        read_trace(path)
