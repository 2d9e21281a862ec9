"""`localv4 tune`: the table, the sentence, the JSON document, the picture, and wrong usage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from terminal import Ended, needs_jit, run_here

from localv4.cli import tune
from localv4.paging.trace import Trace, TraceHead, TraceWriter

pytestmark = needs_jit

GIB = 1 << 30
HEAD = TraceHead("ab" * 32, "little", layers=3, experts=32, k=4, record_bytes=(GIB, 0, GIB))


def recorded(path: Path, tokens: int = 150) -> Path:
    rng = np.random.default_rng(0)
    likely = np.log(rng.random((3, 32)) ** 3)
    with TraceWriter(path, HEAD) as writer:
        for token in range(tokens):
            keys = likely - np.log(rng.exponential(size=(3, 32)))
            writer.append(np.argsort(-keys, axis=1)[:, :4], is_prompt=token < 20)
    return path


def run(*arguments: str, home: Path) -> Ended:
    return run_here("tune", *arguments, home=home)


def test_json_has_every_outcome(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "t")
    ended = run(str(trace), "--ram", "20GiB", "--ram", "30GiB", "--json", home=tmp_path)
    document = json.loads(ended.stdout)
    assert ended.code == 0
    assert (document["model"], document["tokens"], document["scored_tokens"]) == (
        "little",
        150,
        100,
    )
    assert (document["uses_per_token"], document["all_experts_bytes"]) == (8, 64 * GIB)
    assert {o["policy"] for o in document["outcomes"]} == {"lru", "lfu", "decay", "optimal"}
    at = {(o["policy"], o["capacity_bytes"]): o for o in document["outcomes"]}
    for capacity in (20, 30, 36, 46, 64):
        best, ours = at["optimal", capacity * GIB], at["decay", capacity * GIB]
        assert best["misses"] <= ours["misses"] <= 8
        assert ours["hits"] == pytest.approx(1 - ours["misses"] / 8)
        assert ours["bytes_read"] == pytest.approx(ours["misses"] * GIB)
        assert len(ours["hits_by_layer"]) == 2
    first = document["more_memory"][0]
    assert first["more_bytes"] == 16 * GIB
    assert first["bytes_read"] == at["decay", 20 * GIB]["bytes_read"]
    assert (
        first["bytes_read_with_more"] == at["decay", 36 * GIB]["bytes_read"] < first["bytes_read"]
    )


def test_text_says_what_more_memory_saves(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "t")
    ended = run(str(trace), "--ram", "20GiB", "--assume-disk", "7GB/s", "--no-color", home=tmp_path)
    lines = ended.stdout.splitlines()
    assert lines[0] == "little: 100 generated tokens counted"
    assert lines[2].split() == [
        *("MEMORY", "OF", "ALL", "LRU", "LFU", "DECAY", "OPTIMAL"),
        *("READS", "PER", "TOKEN", "DISK", "ALLOWS"),
    ]
    assert any(line.strip().startswith("*20.0 GiB") for line in lines)
    assert " ".join(ended.stdout.split()).count("With 20.0 GiB for experts a token reads") == 1
    assert "16.0 GiB more would make it" in " ".join(ended.stdout.split())
    assert "% less, and the disk would allow" in " ".join(ended.stdout.split())


def test_size_of_experts_scales_memory(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "t")
    ended = run(str(trace), "--expert-bytes", "1MiB", "--json", home=tmp_path)
    document = json.loads(ended.stdout)
    assert document["all_experts_bytes"] == 64 << 20
    (more,) = document["more_memory"]  # a third of all, when nothing is asked for
    assert more["capacity_bytes"] == (64 << 20) // 3
    assert more["more_bytes"] == (64 << 20) - (64 << 20) // 3


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    trace, picture = recorded(tmp_path / "t"), tmp_path / f"picture{suffix}"
    ended = run(str(trace), "--plot", str(picture), home=tmp_path)
    assert ended.code == 0
    start = picture.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
    assert not list(tmp_path.glob(".*.part"))


def test_the_picture_shows_all_policies() -> None:
    from localv4.cli.tune_plot import CURVES, make_figure

    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((90, 3, 32)), axis=2)[:, :, :4].astype(np.int16)
    report = tune.make_report(Trace(HEAD, chosen, np.zeros(90, bool)), [20 * GIB], None)
    hits, reads = make_figure(report).axes
    for axes in (hits, reads):
        assert {line.get_label() for line in axes.get_lines()} >= {c[-1] for c in CURVES.values()}
    assert [text.get_text().split(":")[0] for text in reads.texts if text.get_text()] == [
        "16 GiB more"
    ]
    assert hits.get_xlabel().startswith("GiB") and reads.get_ylabel().startswith("GB")


def test_the_picture_of_a_toy_has_smaller_units() -> None:
    from localv4.cli.tune_plot import make_figure

    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((90, 3, 32)), axis=2)[:, :, :4].astype(np.int16)
    head = replace(HEAD, record_bytes=(2**20, 0, 2**20))
    report = tune.make_report(Trace(head, chosen, np.zeros(90, bool)), [20 * 2**20], None)
    hits, reads = make_figure(report).axes
    assert hits.get_xlabel().startswith("MiB") and reads.get_ylabel().startswith("MB")
    assert hits.get_xlim() == (0, 64)
    assert [text.get_text().split(":")[0] for text in reads.texts if text.get_text()] == [
        "44 MiB more"
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give a trace or --synthetic"),
        (("TRACE", "--synthetic", "diverse"), 2, "give a trace or --synthetic, not both"),
        (("none",), 1, "no trace none"),
        (("TRACE", "--ram", "11GiB"), 2, "less than one token and a half needs"),
        (("TRACE", "--ram", "much"), 2, "--ram is 'much'"),
        (("TRACE", "--expert-bytes", "0"), 2, "--expert-bytes"),
        (("--synthetic", "real"), 2, "real"),
        (("TRACE", "--plot", "picture.gif"), 2, ".png or .svg"),
        (("TEXT",), 5, "is no trace of routes"),
        (("PROMPT",), 2, "too few generated tokens"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "text").write_text("Once upon a time")
    places = {
        "TRACE": str(recorded(tmp_path / "t")),
        "TEXT": str(tmp_path / "text"),
        "PROMPT": str(recorded(tmp_path / "p", tokens=20)),
    }
    ended = run(*(places.get(argument, argument) for argument in arguments), home=tmp_path)
    assert (ended.code, ended.stdout) == (code, "")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_synthetic_routes_need_no_trace(tmp_path: Path) -> None:
    ended = run(
        *("--synthetic", "calibrated", "--tokens", "100", "--ram", "48GiB", "--json"), home=tmp_path
    )
    document = json.loads(ended.stdout)
    assert (document["model"], document["tokens"]) == ("synthetic", 100)
    assert document["uses_per_token"] == 43 * 6
