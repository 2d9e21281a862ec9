"""`localv4 bench`: its options, its three formats, and what is left after Ctrl-C."""

import csv
import io
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Ended, needs_jit, run_here, start_localv4

from localv4.cli.bench import parse_sizes
from localv4.engine import benchmark
from localv4.engine.measurement import Measurement
from localv4.errors import Cancelled, UsageError
from localv4.planning import roofs

pytestmark = needs_jit


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    # a GiB would only cost time: nobody looks at the speed
    probe = roofs.RoofProbe
    monkeypatch.setattr(benchmark, "RoofProbe", lambda threads, _nbytes: probe(threads, 1 << 20))


def bench(*arguments: str, home: Path, model: str = "tiny-v4") -> Ended:
    """Run the command, on the built-in model if no other is given, with tests that are short."""
    sizes = ("-p", "3", "-n", "2", "-r", "2", "-t", "1")
    return run_here("bench", "-m", model, *sizes, *arguments, home=home)


def test_json(tmp_path: Path) -> None:
    ended = bench("-d", "0,5", "-o", "json", home=tmp_path)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["complete"] is True
    assert (found["numerics"], found["threads"]) == ("fast", 1)
    assert [test["test"] for test in found["tests"]] == ["pp3", "tg2", "pp3 @ d5", "tg2 @ d5"]
    weights = sum(found["bytes_per_token"].values())
    for test in found["tests"]:
        assert len(test["samples"]) == 2
        rates = [sample["tok_s"] for sample in test["samples"]]
        assert test["mean_tok_s"] == pytest.approx(sum(rates) / 2)
        assert rates[0] * test["samples"][0]["seconds"] == pytest.approx(test["tokens"])
        assert test["token_bytes"] == weights + test["state_bytes"]
        assert (test["read_roof_share"] is None) == (test["kind"] == "pp")
        assert (test["int8_peak_share"] is None) == (test["kind"] == "tg")
    assert found["machine"]["isa"]
    assert str(tmp_path) not in ended.stdout
    assert_holds_what_the_tables_show(found)


def assert_holds_what_the_tables_show(found: dict[str, Any]) -> None:
    assert found["peer"] is None
    for test in found["tests"]:
        assert test["peer"] is None
        parts = test["memory_bytes"]
        assert {"state", "rest"} <= set(parts) and parts["state"] > 0
        assert test["peak_rss_bytes"] > 50e6
        assert test["clean_repeats"] <= test["repeats"]
        assert test["stdev_tok_s"] >= 0
        assert all(roof["int8_ops_s"] > 0 for roof in test["roofs"])
    machine_facts, model = found["machine"], found["model"]
    assert machine_facts["ram_bytes"] > 0
    assert model["bytes"] > 0 and model["parameters"] > 0 and model["layers"] > 0


def test_csv(tmp_path: Path) -> None:
    ended = bench("-d", "0", "-o", "csv", "--numerics", "fast", home=tmp_path)
    assert ended.code == 0, ended.stderr
    rows = list(csv.DictReader(io.StringIO(ended.stdout)))
    assert [(row["test"], row["numerics"]) for row in rows] == [("pp3", "fast"), ("tg2", "fast")]
    assert rows[0]["read_roof_share"] == ""
    assert float(rows[1]["read_roof_share"]) > 0


def test_markdown(tmp_path: Path) -> None:
    ended = bench("-d", "0", home=tmp_path)
    assert ended.code == 0, ended.stderr
    tables = [block.splitlines() for block in ended.stdout.strip().split("\n\n")]
    for table in (tables[0], tables[2], tables[3]):
        assert len({len(line) for line in table}) == 1
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) <= set("|-:")
    assert re.search(r"\| tg2 +\| +\d+\.\d\d ± \d+\.\d\d \|", tables[0][3])
    assert "Roofs with 1 threads" in tables[1][0]
    assert any("routed experts" in line for line in tables[2])
    assert any("state in tg2" in line for line in tables[2])
    assert tables[3][0].startswith("| memory after ")
    assert {"mapped weights", "state", "rest", "together", "peak RSS"} <= cells(tables[3][0])


def cells(row: str) -> set[str]:
    """Return the texts of a row of a table."""
    return {text.strip() for text in row.strip("|").split("|")}


def test_several_sizes_threads_and_repeats(tmp_path: Path) -> None:
    sizes = ("-p", "3,5", "-n", "1", "-d", "2,0", "-r", "3", "-t", "2")
    ended = run_here("bench", "-m", "tiny-v4", *sizes, "-o", "json", home=tmp_path)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    names = ["pp3", "pp5", "tg1"]
    assert [test["test"] for test in found["tests"]] == [*(f"{n} @ d2" for n in names), *names]
    assert found["threads"] == 2
    assert all(len(test["samples"]) == test["repeats"] == 3 for test in found["tests"])


def test_what_does_not_fit_is_skipped_and_named(tmp_path: Path) -> None:
    ended = bench("-d", "0,4095", "-o", "csv", home=tmp_path)
    assert ended.code == 0
    assert "the context holds 4096 tokens, skipped: pp3 @ d4095, tg2 @ d4095" in ended.stderr
    assert "tg2" in ended.stdout and "d4095" not in ended.stdout
    assert bench("-d", "0,4095", "-q", home=tmp_path).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-d", "5000"], 4, "the smallest test takes 5002 tokens, the context holds 4096"),
        (["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["-d", "1,x"], 2, "--depth is '1,x'"),
        (["-p", "99999999"], 2, "--prompt-tokens is 99999999"),
        (["-r", "0"], 2, "--repeat"),
        (["-o", "xml"], 2, "xml"),
        (["other"], 2, "given twice"),
    ],
)
def test_refusals(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    ended = bench(*arguments, home=tmp_path)
    assert ended.code == code
    assert said in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-1", "1.5", "1e3", "²", "9" * 30, "1," * 64 + "1"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--depth is"):
        parse_sizes(text, "--depth")


def test_sizes() -> None:
    assert parse_sizes("0, 4096 ,7", "--depth") == [0, 4096, 7]


@pytest.mark.parametrize("output", ["md", "csv", "json"])
def test_what_is_finished_survives_an_interrupt(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = benchmark.Benchmark.run

    def cut(self: benchmark.Benchmark, cases: Any) -> Iterator[Measurement]:
        yield from run(self, cases[:1])
        raise Cancelled("stopped")

    monkeypatch.setattr(benchmark.Benchmark, "run", cut)
    ended = bench("-d", "0", "-o", output, home=tmp_path)
    assert (ended.code, ended.stderr) == (130, "")
    assert "pp3" in ended.stdout and "tg2" not in ended.stdout
    if output == "json":
        assert json.loads(ended.stdout)["complete"] is False


@pytest.mark.parametrize("output", ["md", "csv"])
def test_an_interrupt_before_the_first_result(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: benchmark.Benchmark, cases: Any) -> Iterator[Measurement]:
        raise Cancelled("stopped")
        yield

    monkeypatch.setattr(benchmark.Benchmark, "run", stop)
    ended = bench("-d", "0", "-o", output, home=tmp_path)
    assert (ended.code, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process on Windows")
def test_ctrl_c(tmp_path: Path) -> None:
    sizes = ("-p", "257", "-n", "0", "-d", "0,1500", "-r", "1000")
    sizes += ("--numerics", "exact")  # slow enough for progress to be seen
    with start_localv4("bench", "-m", "tiny-v4", *sizes, home=tmp_path) as process:
        assert process.stderr is not None and process.stdout is not None
        seen = b""
        while b"pp257" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        written = process.stdout.read().decode()
        assert process.wait() == 130
        assert time.monotonic() - start < 10
    assert "d1500" not in written
