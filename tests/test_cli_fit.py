"""`localv4 fit`: plans for machines described by options, for known and installed models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback_hub import LoopbackHub
from terminal import LAPTOP, Ended, needs_jit, run_here

from localv4.cli.fit import Answer
from localv4.library.installed import embedded_model_path
from localv4.planning.plan import GIB

pytestmark = [needs_jit, pytest.mark.usefixtures("own_folders")]


def fit(*arguments: str, home: Path, code: int = 0) -> Ended:
    done = run_here("fit", *arguments, home=home)
    assert done.code == code, done.stderr
    return done


def document(*arguments: str, home: Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fit(*arguments, "--json", home=home, code=code).stdout)
    return found


def test_a_plan_in_plain_text(tmp_path: Path) -> None:
    text = fit("v4-flash", *LAPTOP, home=tmp_path).stdout
    assert text.startswith("deepseek-v4-flash:q4  pages ")
    sections = [line for line in text.splitlines()[1:] if line and not line.startswith(" ")]
    assert sections == ["Machine", "Speed", "Memory", "Disk", "Faster with"]
    assert "\x1b" not in text
    assert "148.6 GiB, 3.5 h at 100 Mbit/s" in text
    assert "90.0 GB/s (assumed)" in text


@pytest.mark.parametrize(
    ("ram", "quant", "verdict"),
    [
        ("32GiB", "q4", "pages"),
        ("96GiB", "q4", "pages"),
        ("256GiB", "q4", "fits"),
        ("128GiB", "q2", "fits"),
        ("96GiB", "lossless", "pages"),
    ],
)
def test_flash_on_machines_of_all_sizes(tmp_path: Path, ram: str, quant: str, verdict: str) -> None:
    found = document(f"v4-flash:{quant}", "--assume-ram", ram, *LAPTOP[2:], home=tmp_path)
    chosen = found["chosen"]
    assert (chosen["quant"], chosen["verdict"]) == (quant, verdict)
    assert found["machine"]["assumed"] == ["bandwidth", "cores", "disk", "ram"]
    plan, forecast = chosen["plan"], chosen["forecast"]
    assert sum(plan["bytes"].values()) == plan["total_bytes"] <= plan["usable_bytes"]
    speed = forecast["decode_tok_s"]
    assert 0.5 < speed["low"] <= speed["likely"] <= speed["high"] < forecast["roofline_tok_s"]
    assert (plan["paged_bytes"] == 0) == (verdict == "fits")


def test_the_rows_of_the_context_are_planned(tmp_path: Path) -> None:
    def state(*options: str) -> int:
        found = document("v4-flash:q4", *LAPTOP, "-c", "1048576", *options, home=tmp_path)
        nbytes: int = found["chosen"]["plan"]["bytes"]["decoder state"]
        return nbytes

    per_token = {"f32": 13_760, "compact": 3_514.2}
    compact, wide = (state("--kv", name) for name in ("compact", "f32"))
    assert wide - compact == pytest.approx((per_token["f32"] - per_token["compact"]) * 2**20, 1e-4)
    assert state() == compact


def test_a_disk_without_room_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SimpleNamespace(facts=SimpleNamespace(file_bytes=100))

    def lacks(source: str, free: int | None, assumed: tuple[str, ...] = ()) -> bool:
        subject = SimpleNamespace(source=source)
        machine = SimpleNamespace(disk_free=free, assumed=assumed)
        answer = Answer(subject, machine, None, chosen, [], 1.0, None)  # type: ignore[arg-type]
        return answer.lacks_disk

    assert lacks("registry", 99) and not lacks("registry", 100)
    assert not lacks("installed", 99)
    assert not lacks("registry", None) and not lacks("registry", 99, ("disk",))


def test_where_nothing_fits_the_smallest_form_is_told(tmp_path: Path) -> None:
    done = fit("v4-flash", "--assume-ram", "2GiB", *LAPTOP[2:], home=tmp_path, code=4)
    assert done.stdout.startswith("deepseek-v4-flash:q2  does not fit")


def test_all_forms_are_compared(tmp_path: Path) -> None:
    rows = fit("v4-flash", *LAPTOP, "--all-quants", home=tmp_path).stdout.splitlines()
    table = [line.split() for line in rows[rows.index("") + 1 :]]
    assert [row[0] for row in table] == ["QUANT", "lossless", "q8", "q4", "q3", "q2"]
    assert [row[0] for row in table if row[-1] == "chosen"] == ["q4"]


def test_a_published_file_is_estimated_from_its_size(tmp_path: Path) -> None:
    found = document("ds4-flash:q2", *LAPTOP, home=tmp_path)["chosen"]
    assert found["sizes_are_exact"] is False
    assert found["file_bytes"] == found["download_bytes"] == 86_720_111_488
    experts = found["plan"]["bytes"]["experts"] + found["plan"]["paged_bytes"]
    assert experts < 0.95 * found["file_bytes"]


def test_what_does_not_fit_is_reported_with_exit_code_4(tmp_path: Path) -> None:
    done = fit("v4-flash:lossless", "--assume-ram", "8GiB", *LAPTOP[2:], home=tmp_path, code=4)
    assert done.stdout.startswith("deepseek-v4-flash:lossless  does not fit")
    assert "needs at least" in done.stderr and "hint: free" in done.stderr
    found = document("v4-flash", *LAPTOP, "--ram", "6GiB", home=tmp_path, code=4)
    assert found["chosen"]["verdict"] == "does not fit"
    assert found["chosen"]["refusal"]["hint"].startswith("use --ram ")


def test_memory_and_context_can_be_chosen(tmp_path: Path) -> None:
    found = document(
        "v4-flash:q4", *LAPTOP, "--ram", "40GiB", "--ctx-size", "100000", "--io", "buffered",
        home=tmp_path,
    )["chosen"]["plan"]  # fmt: skip
    assert found["total_bytes"] == found["usable_bytes"] == 40 * GIB
    assert (found["ctx_size"], found["io"], found["mode"]) == (100_000, "buffered", "arena")
    kept = document("v4-flash:q4", *LAPTOP, "--reserve", "20GiB", home=tmp_path)["chosen"]["plan"]
    assert kept["reserve_bytes"] == 20 * GIB


def test_an_installed_model_is_read_from_its_headers(tmp_path: Path) -> None:
    found = document("tiny-v4", *LAPTOP, home=tmp_path)
    assert (found["source"], found["chosen"]["verdict"]) == ("installed", "fits")
    assert found["chosen"]["download_bytes"] is None
    weights = sum(file.stat().st_size for file in embedded_model_path().glob("*.safetensors"))
    assert 0.9 * weights < found["chosen"]["file_bytes"] < weights


def test_a_recipe_for_an_installed_model(tmp_path: Path) -> None:
    whole = document("tiny-v4", *LAPTOP, home=tmp_path)["chosen"]["bytes_per_token"]
    small = document("tiny-v4:q2", *LAPTOP, home=tmp_path)["chosen"]["bytes_per_token"]
    assert small < whole


def test_headers_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded_model_path()
    with LoopbackHub() as hub:
        hub.use(monkeypatch)
        hub.add("org/v4-thing", {file.name: file for file in folder.iterdir()})
        found = document("hf://org/v4-thing", *LAPTOP, home=tmp_path)
        assert hub.bytes_sent < 2_000_000
    assert found["source"] == "hub"
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found["chosen"]["download_bytes"] == weights


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("v4-flash:q5",), 2, "has no form q5"),
        (("v4-flush",), 1, "no model is called"),
        (("v4-flash", "--ram", "much"), 2, "--ram is"),
        (("v4-flash", "--assume-disk", "fast"), 2, "--assume-disk is"),
        (("v4-flash", "--rate", "0Mbit/s"), 2, "--rate is"),
        (("v4-flash", "-m", "v4-pro"), 2, "given twice"),
        (("v4-flash", "--ctx-size", "0"), 2, "--ctx-size is 0"),
        (("v4-flash", "--ctx-size", "99999999"), 4, "the model allows 1048576 tokens"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = fit(*arguments, *LAPTOP[:4], *([] if "--assume-disk" in arguments else LAPTOP[4:]),
               home=tmp_path, code=code)  # fmt: skip
    assert words in done.stderr and done.stdout == ""
    assert done.stderr.count("error:") == 1
