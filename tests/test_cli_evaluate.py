"""`localv4 eval logits`: the file it writes, and how it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from terminal import needs_jit, run_here, run_localv4

from localv4.cli import evaluate_logits
from localv4.engine.logits_file import encode, header
from localv4.engine.windows import cut
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


TEXT = Path(__file__).parent / "golden" / "heldout.txt"
ON_TEXT = ("-f", str(TEXT), "-w", "2", "--floor-windows", "1", "-q")


@needs_jit
def test_perplexity_as_table_and_as_json(tmp_path: Path) -> None:
    shown = run_here("eval", "ppl", *ON_TEXT, "-c", "64,200", home=tmp_path)
    assert shown.code == 0, shown.stderr
    done = run_here("eval", "ppl", *ON_TEXT, "-c", "64,200", "--json", home=tmp_path)
    found = json.loads(done.stdout)
    assert (found["model"], found["numerics"], found["bos"]) == ("tiny-v4", "fast", True)
    assert [result["context"] for result in found["results"]] == [64, 200]
    for result in found["results"]:
        assert result["tokens"] == 2 * (result["context"] // 2 - 1)
        assert result["rounding_floor"]["windows"] == 1
        value = result["perplexity"]["value"]
        assert 10 < value < 1000
        assert f" {value:.0f}" in shown.stdout
        counted = [bucket["tokens"] for bucket in result["curve"]]
        assert sum(counted) == 2 * (result["context"] - 1)


@needs_jit
def test_strides_and_no_bos_change_the_figure(tmp_path: Path) -> None:
    values = []
    for more in ((), ("--stride", "16"), ("--no-bos",), ("--numerics", "exact")):
        done = run_here("eval", "ppl", *ON_TEXT, "-c", "64", "--json", *more, home=tmp_path)
        result = json.loads(done.stdout)["results"][0]
        values.append(result["perplexity"]["value"])
        assert result["tokens"] == (32 if "--stride" in more else 62)
    assert len(set(values)) == 4


@needs_jit
def test_divergence_of_ways_to_store_the_context(tmp_path: Path) -> None:
    where = ("--base-model", "tiny-v4", "-f", str(TEXT), "-w", "1", "-c", "256", "-q", "--json")

    def divergence(kv: str, base: str) -> float:
        options = ("--kv", kv, "--base-kv", base, "--floor-windows", "0")
        done = run_here("eval", "kld", *where, *options, home=tmp_path)
        assert done.code == 0, done.stderr
        value: float = json.loads(done.stdout)["divergence"]["mean"]["value"]
        return value

    assert divergence("f32", "f32") == 0
    assert 0 < divergence("bf16", "f32") < 0.01
    assert 0 < divergence("compact", "f32") < 0.01


@needs_jit
def test_divergence_from_a_file_and_from_a_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    where = ("-f", str(TEXT), "-w", "2", "-c", "64", "-q")
    exact = ("--numerics", "exact")
    made = run_here("eval", "logits", "--save-base", str(base), *where, *exact, home=tmp_path)
    assert made.code == 0, made.stderr
    files = run_here("eval", "kld", "--base", str(base), "-q", "--json", home=tmp_path)
    other = ("--base-model", "tiny-v4", "--base-numerics", "exact")
    models = run_here("eval", "kld", *other, *where, "--json", home=tmp_path)
    by_file, by_model = json.loads(files.stdout), json.loads(models.stdout)
    assert by_file["base"] == {"file": "base"}
    assert by_model["base"]["numerics"] == "exact"
    for found in (by_file, by_model):
        assert (found["context"], found["windows"], found["bos"]) == (64, 2, True)
        assert found["divergence"]["tokens"] == 62
        assert found["floor"]["rounding"]["tokens"] == 62
    mean = by_model["divergence"]["mean"]["value"]
    assert mean == pytest.approx(by_file["divergence"]["mean"]["value"], abs=1e-5)
    assert 0 < mean < 0.05
    assert by_model["floor"]["storage"] is None
    assert abs(by_file["floor"]["storage"]["mean"]["value"]) < 1e-5
    table = run_here("eval", "kld", "--base", str(base), "-q", home=tmp_path)
    assert "storage" in table.stdout and f"{mean:.2g}"[:3] in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("ppl", "-c", "2"), 2, "windows of 3 tokens or more"),
        (("ppl", "-c", "5000"), 4, "context of 4096"),
        (("ppl", "-c", "64", "--stride", "64"), 2, "--stride is 64"),
        (("ppl", "-f", "missing.txt"), 1, "no such file"),
        (("kld",), 2, "--base FILE or --base-model"),
        (("kld", "--base", "a", "--base-model", "b"), 2, "--base FILE or --base-model"),
        (("kld", "--base", "a", "-c", "64"), 2, "--base-kv out"),
        (("kld", "--base", "missing"), 1, "no such file"),
        (("logits",), 2, "--tokens and --out, or --save-base"),
        (("logits", "--save-base", "a", "--out", "b"), 2, "--save-base is of a text"),
        (("logits", "--tokens", "a", "--out", "b", "-w", "1"), 2, "belong to --save-base"),
        (("logits", "--tokens", "a", "--out", "no/b.npy"), 1, "there is no folder no"),
        (("logits", "--save-base", "no/b", "-m", "unknown"), 1, "there is no folder no"),
        (("imatrix", "-o", "a.txt"), 2, "ending in .gguf"),
        (("imatrix", "-o", "a.gguf", "--second-moments", "b"), 2, "ending in .safetensors"),
        (("imatrix", "-o", "no/a.GGUF"), 1, "there is no folder no"),
        (("imatrix", "-o", "a.gguf", "--second-moments", "no/b.SafeTensors"), 1, "folder no"),
    ],
)
def test_calls_without_sense(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = run_here("eval", *arguments, "-q", home=tmp_path)
    assert done.code == code
    assert said in done.stderr
    assert done.stdout == ""


@needs_jit
def test_a_base_of_another_vocabulary(tmp_path: Path) -> None:
    base = tmp_path / "base"
    windows = cut([1, 2, 3, 4], 4, bos=None)
    base.write_bytes(header(windows, 5) + encode(np.zeros(5, np.float32)).tobytes())
    done = run_here("eval", "kld", "--base", str(base), "-q", home=tmp_path)
    assert done.code == 5
    assert "vocabulary of 5 tokens, the model has 8192" in done.stderr
