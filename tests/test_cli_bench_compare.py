"""`localv4 bench --compare` and `--plot`: the ratio, its faults, and the picture."""

import csv
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import use_fake_llama
from gguf_writer import GgufOptions, write_gguf
from golden_files import random_model
from terminal import Ended, needs_jit
from test_cli_bench import _small_probe as _small_probe
from test_cli_bench import bench
from test_sources import SUPERBLOCKS

from localv4.cli import bench_peer
from localv4.cli.bench_report import Report
from localv4.cuda import offload
from localv4.cuda.options import GpuOptions
from localv4.engine import benchmark
from localv4.engine.engine import Engine
from localv4.engine.measurement import Case
from localv4.engine.setup import Setup
from localv4.errors import Cancelled

pytestmark = needs_jit

GIB = 1 << 30


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model; the stand-in for llama.cpp does not read it."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(random_model(SUPERBLOCKS), path, GgufOptions())[0]


def compare(*arguments: str, home: Path, model: Path) -> Ended:
    """Compare with llama.cpp at two depths."""
    return bench("-d", "0,5", "--compare", "llama.cpp", *arguments, home=home, model=str(model))


def test_markdown(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    ended = compare(home=tmp_path, model=gguf)
    assert ended.code == 0, ended.stderr
    blocks = ended.stdout.strip().split("\n\n")
    rows = blocks[2].splitlines()
    assert len({len(row) for row in rows}) == 1
    assert "ratio" in rows[0] and len(rows) == 6
    assert re.search(r"\| +\d+\.\d\dx \|", rows[2])
    facts = blocks[3].splitlines()
    assert facts[0] == "llama-cpp-python 0.0.1: CPU : FAKE = 1 | REAL = 0"
    assert facts[1] == (
        "Set for llama.cpp: 1 threads, n_batch 2048, n_ubatch 512, flash attention auto (enabled), "
        "weights repacked, no GPU"
    )
    assert "in turns" in facts[2]


def test_json(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    options = ("--peer-ubatch", "64", "--peer-flash-attn", "off", "--no-peer-repack")
    found = json.loads(compare("-o", "json", *options, home=tmp_path, model=gguf).stdout)
    assert found["complete"] is True
    peer = found["peer"]
    assert (peer["name"], peer["package"], peer["ggml"]) == ("llama.cpp", "0.0.1", None)
    assert (peer["n_batch"], peer["n_ubatch"], peer["repack"]) == (2048, 64, False)
    assert (peer["flash_attention"], peer["in_memory_together"]) == ("off", True)
    assert peer["system"] and peer["python"]
    assert len(found["tests"]) == 4
    for test in found["tests"]:
        theirs = test["peer"]
        assert len(theirs["samples"]) == 2
        assert test["median_tok_s"] / theirs["median_tok_s"] == pytest.approx(theirs["ratio"])
        assert theirs["problem"] is None
        assert -1 <= theirs["logits_correlation"] <= 1
        assert theirs["context"]["flash_attention"] == "off"
        assert set(theirs) >= {"clean_ratio", "clean_median_tok_s", "peak_rss_bytes", "stdev_tok_s"}


def test_csv(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    ended = compare("-o", "csv", home=tmp_path, model=gguf)
    rows = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert len(rows) == 4
    for row in rows:
        expected = float(row["median_tok_s"]) / float(row["peer_median_tok_s"])
        assert float(row["ratio"]) == pytest.approx(expected)
        assert row["peer_problem"] == ""


@pytest.mark.parametrize(
    ("trouble", "failed"), [("crash", 4), ("crash in the fourth", 3), ("bad file", 4), ("nan", 4)]
)
def test_a_fault_of_llama_cpp_leaves_our_figures(
    trouble: str, failed: int, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_llama(monkeypatch, trouble)
    ended = compare("-o", "csv", home=tmp_path, model=gguf)
    assert ended.code == 0 and "Traceback" not in ended.stderr, ended.stderr
    rows = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert len(rows) == 4
    problems = [row["peer_problem"] for row in rows if row["ratio"] == ""]
    assert len(problems) == failed
    assert all(problem.startswith("llama.cpp") for problem in problems)
    assert all(float(row["median_tok_s"]) > 0 for row in rows)


def test_a_fault_is_told_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch, "bad file")
    ended = compare(home=tmp_path, model=gguf)
    blocks = ended.stdout.strip().split("\n\n")
    assert len(blocks[0].splitlines()) == 6
    assert blocks[2].count(" failed |") == 4
    assert ended.stdout.count("No figure: llama.cpp: it cannot load the model: no such tensor") == 1


def test_one_after_the_other(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    monkeypatch.setattr(bench_peer, "available_bytes", lambda: 3 * GIB)
    loads = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def note(cls: type[Engine], /, *arguments: object, **options: object) -> Engine:
        loads.append(arguments)
        engine: Engine = load(cls, *arguments, **options)
        return engine

    monkeypatch.setattr(Engine, "load", classmethod(note))
    ended = compare("-o", "json", home=tmp_path, model=gguf)
    assert ended.code == 0, ended.stderr
    assert "memory does not hold both engines at once" in ended.stderr
    found = json.loads(ended.stdout)
    assert found["peer"]["in_memory_together"] is False
    assert all(test["peer"]["ratio"] for test in found["tests"])
    assert len(loads) == 3  # at first, and after the tests of llama.cpp in between


def test_no_room(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_llama(monkeypatch)
    monkeypatch.setattr(bench_peer, "available_bytes", lambda: GIB)
    ended = compare(home=tmp_path, model=gguf)
    assert (ended.code, ended.stdout) == (4, "")
    assert "needs about 2.0 GiB of memory for one engine alone, 1.0 GiB are free" in ended.stderr


def test_refusals(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = bench("--compare", "llama.cpp", home=tmp_path)
    assert (ended.code, ended.stdout) == (2, "")
    assert "tiny-v4 is no GGUF model, and llama.cpp reads nothing else" in ended.stderr
    ended = compare("--peer-python", str(tmp_path / "none"), home=tmp_path, model=gguf)
    assert ended.code == 1 and "cannot start" in ended.stderr
    use_fake_llama(monkeypatch)
    monkeypatch.delenv("PYTHONPATH")
    if sys.platform != "win32":
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
        ended = compare("--peer-python", str(python), home=tmp_path, model=gguf)
        assert ended.code == 1 and "has no llama-cpp-python" in ended.stderr
        assert "pip install 'localv4[compare]'" in ended.stderr
    assert bench("--compare", "vllm", home=tmp_path).code == 2


def test_an_interrupt_keeps_what_is_finished(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_llama(monkeypatch)
    take = benchmark.Benchmark._take_samples

    def cut(self: benchmark.Benchmark, case: Case, stint: object) -> None:
        if case.kind == "tg":
            raise Cancelled("stopped")
        take(self, case, stint)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark.Benchmark, "_take_samples", cut)
    ended = compare("-q", home=tmp_path, model=gguf)
    assert (ended.code, ended.stderr) == (130, "")
    assert "| pp3 " in ended.stdout and "| tg2 " not in ended.stdout


def test_plot(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="comes with the plot extra")
    use_fake_llama(monkeypatch)
    target = tmp_path / "speed $1$.PNG"  # dollar signs are no formula
    ended = compare("--plot", str(target), home=tmp_path, model=gguf)
    assert ended.code == 0, ended.stderr
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert [path for path in tmp_path.iterdir() if "speed" in path.name] == [target]


def test_plot_is_checked_before_anything_is_measured(tmp_path: Path) -> None:
    ended = bench("-d", "0", "--plot", "x.txt", home=tmp_path)
    assert (ended.code, ended.stdout) == (2, "")


@pytest.mark.parametrize(
    ("device", "there", "told", "used"),
    [("auto", True, 1, "cpu"), ("auto", False, 0, "cpu"), ("cuda", True, 0, "cuda")],
)
def test_llama_cpp_is_compared_without_our_gpu_unless_that_is_named(
    device: str,
    there: bool,
    told: int,
    used: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "has_gpu", lambda: there)
    setup = Setup(threads=3, gpu=GpuOptions.parse(device))
    compared = bench_peer.on_equal_terms(setup, quiet=False)
    assert compared == replace(setup, gpu=GpuOptions(used))
    assert capsys.readouterr().err.count("llama.cpp gets no GPU") == told
    bench_peer.on_equal_terms(setup, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_gpu_that_only_we_have_is_disclosed(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_llama(monkeypatch)
    plain = compare(home=tmp_path, model=gguf)
    monkeypatch.setattr(Report, "_gpus", lambda _: "Some GPU")
    ended = compare(home=tmp_path, model=gguf)
    line = "Not like with like: localv4 computed with Some GPU, llama.cpp without a GPU"
    assert line in ended.stdout.splitlines() and "Not like" not in plain.stdout
