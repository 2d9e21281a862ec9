"""`localv4 eval logits`: the file it writes, and how it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from terminal import needs_jit, run_here, run_localv4

from localv4.cli import evaluate_logits
from localv4.errors import BadFileError, DoesNotFitError, LocalV4Error

# A prompt, its greedy first answer token, and the beginning of the logits: eval/generations.json.
CAPITAL = [0, 8179, 1202, 315, 265, 848, 295, 4502, 33, 8180, 8191]


@needs_jit
def test_logits(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(CAPITAL))
    results = []
    for chunk in ([], ["--chunk", "1"]):
        out = tmp_path / "logits.npy"
        done = run_localv4(
            "eval", "logits", "--tokens", str(tokens), "--out", str(out), *chunk, home=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == b""
        results.append(np.load(out, allow_pickle=False))
    first = results[0]
    assert first.shape == (len(CAPITAL), 8192)
    assert first.dtype == np.float32
    assert first[-1].argmax() == 505  # "The"
    by_token = results[1]
    assert np.abs(first - by_token).max() < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "logits.npy",
        "tokens.json",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1, 2.0]", "[true]", "[-1]", '["1"]', "[1, null]", "[[1]]", "[1e3]", "[NaN]"],
)
def test_bad_token_lists(text: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(text)
    with pytest.raises(BadFileError, match=r"tokens\.json"):
        evaluate_logits.read_tokens(tokens)


@needs_jit
@pytest.mark.parametrize(
    ("ids", "more", "code", "said"),
    [
        ([0, 8192], [], 2, "token id 8192 is outside the vocabulary of 8192"),
        ([0] * 4097, [], 4, "4097 tokens do not fit"),
        ([0], ["--chunk", "0"], 2, "--chunk"),
    ],
)
def test_refusals(ids: list[int], more: list[str], code: int, said: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(ids))
    out = tmp_path / "out.npy"
    arguments = ["eval", "logits", "--tokens", str(tokens), "--out", str(out), *more]
    done = run_here(*arguments, home=tmp_path)
    assert done.code == code
    assert said in done.stderr
    assert not out.exists()


def test_npy_is_written_row_by_row(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).random((7, 5), dtype=np.float32)
    out = tmp_path / "a.npy"
    evaluate_logits.write_npy(out, (rows[start : start + 3] for start in range(0, 7, 3)), (7, 5))
    np.testing.assert_array_equal(np.load(out, allow_pickle=False), rows)


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "a.npy"
    out.write_bytes(b"old")

    def parts() -> Iterator[NDArray[np.float32]]:
        yield np.zeros((1, 5), np.float32)
        raise LocalV4Error("stopped")

    with pytest.raises(LocalV4Error, match="stopped"):
        evaluate_logits.write_npy(out, parts(), (2, 5))
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_disk_too_small(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="GiB free"):
        evaluate_logits.write_npy(tmp_path / "a.npy", [], (2**40, 2**17))


@pytest.mark.parametrize("name", ["missing/a.npy", "."])
def test_impossible_place(name: str, tmp_path: Path) -> None:
    rows = [np.zeros((1, 5), np.float32)]
    with pytest.raises(LocalV4Error, match="cannot write"):
        evaluate_logits.write_npy(tmp_path / name, rows, (1, 5))
    assert list(tmp_path.iterdir()) == []
