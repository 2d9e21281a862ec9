"""`localv4 pull` as a user meets it: plan, progress, interruptions, refusals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub, noise
from model_folders import FLASH_COMMIT
from terminal import COMMAND, ROOT, Ended, Terminal, environment, needs_pty, run_here

from localv4.cli.transfer import Transfer, format_seconds

REPO = "deepseek-ai/DeepSeek-V4-Flash"
SHARDS = {f"model-{part:05d}-of-00002.safetensors": noise(900_000, part) for part in (1, 2)}
FILES: dict[str, bytes] = {"config.json": b'{"model_type": "deepseek_v4"}', **SHARDS}
TOTAL = sum(map(len, FILES.values()))
TOKEN = "hf_secretsecret"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.add(REPO, FILES, FLASH_COMMIT)
        yield server


@pytest.fixture
def home(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make commands in this process use the hub and an empty cache."""
    hub.use(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("localv4.library.hub.FIRST_WAIT_S", 0.001)
    return tmp_path


def pull(home: Path, *arguments: str, changes: dict[str, str] | None = None) -> Ended:
    return run_here("pull", *arguments, home=home, changes={"HF_TOKEN": TOKEN, **(changes or {})})


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(hub: LoopbackHub, tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a pull in a process of its own, which ends with the test."""
    with ExitStack() as processes:

        def begin(*arguments: str, **changes: str) -> "subprocess.Popen[bytes]":
            process = subprocess.Popen(
                [*COMMAND, "pull", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env=environment(tmp_path, {**hub.environment(), **changes}),
            )
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield begin


def wait_for_bytes(hub: LoopbackHub, nbytes: int) -> None:
    deadline = time.monotonic() + 60
    while hub.bytes_sent < nbytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what it says


def test_plan_result_and_next_step(home: Path) -> None:
    done = pull(home, "v4-flash")
    assert done.code == 0
    folder = Path(done.stdout.strip())
    assert finished(folder) == FILES
    assert f"v4-flash: {REPO} at {FLASH_COMMIT[:12]}" in done.stderr
    assert "files   3, 1.7 MiB, 1.7 MiB to fetch" in done.stderr
    assert "try it: localv4 run -m v4-flash" in done.stderr
    again = pull(home, "v4-flash")
    assert "files   3, 1.7 MiB, 1.7 MiB is here\n" in again.stderr
    assert pull(home, "v4-flash", "-q").stderr == ""
    assert "deepseek-v4-flash" in run_here("list", home=home).stdout


def test_a_dry_run_fetches_nothing(hub: LoopbackHub, home: Path) -> None:
    done = pull(home, "v4-flash", "--dry-run")
    assert (done.code, done.stdout) == (0, "")
    assert "1.7 MiB to fetch" in done.stderr
    document = json.loads(pull(home, "v4-flash", "--dry-run", "--json").stdout)
    assert (document["bytes_to_fetch"], document["done"]) == (TOTAL, False)
    assert [file["was_here"] for file in document["files"]] == [False, False, False]
    assert hub.bytes_sent == 0
    assert not (home / "hf").exists()


def test_json_is_one_document(home: Path) -> None:
    document = json.loads(pull(home, "v4-flash", "--json").stdout)
    assert document["done"] is True
    assert document["revision"] == FLASH_COMMIT
    assert finished(Path(document["path"])) == FILES


def test_a_folder_of_ones_own(home: Path) -> None:
    done = pull(home, "v4-flash", "--local-dir", str(home / "mine"))
    assert done.stdout == f"{home / 'mine'}\n"
    assert f"localv4 run -m {home / 'mine'}" in done.stderr
    (home / "file").write_text("x")
    refused = pull(home, "v4-flash", "--local-dir", str(home / "file"))
    assert (refused.code, "is a file" in refused.stderr) == (2, True)


def test_what_does_not_fit_ends_with_4(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localv4.library.download.free_bytes", lambda _folder: 1000)
    for arguments in (("v4-flash",), ("v4-flash", "--dry-run")):
        done = pull(home, *arguments)
        assert done.code == 4
        assert "is too small: 0.06 GiB are needed, 0.00 GiB are free" in done.stderr
    assert not (home / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nobody"], 1, "no model is called"),
        (["org/name"], 2, "localv4 pull hf://org/name"),
        (["hf://org/absent"], 1, "no repository org/absent"),
        (["v4-flash", "--revision", "../x"], 2, "is no revision"),
        (["v4-flash", "--revision", "v9"], 1, "no such revision"),
        (["ds4-flash"], 2, "choose one: ds4-flash:q2"),
        (["v4-flash", "--offline"], 1, "is not installed"),
        (["v4-flash", "--offline", "--force"], 2, "offline"),
        (["v4-flash", "--jobs", "0"], 2, "jobs"),
        ([], 2, "MODEL"),
    ],
)
def test_refusals(home: Path, arguments: list[str], code: int, said: str) -> None:
    done = pull(home, *arguments)
    assert done.code == code
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {}, "does not accept your token"),
        (403, {"X-Error-Code": "GatedRepo"}, "its terms must be accepted"),
        (403, {}, "refuses access"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no repository"),
        (429, {"Retry-After": "900"}, "try again in 900 s"),
    ],
)
def test_answers_of_the_hub_are_one_line_without_the_token(
    hub: LoopbackHub, home: Path, status: int, headers: dict[str, str], said: str
) -> None:
    for changes in ({}, {"LOCALV4_DEBUG": "1"}):
        hub.faults.statuses = [(status, headers)]
        done = pull(home, "v4-flash", changes=changes)
        assert done.code == 1
        assert said in done.stderr
        assert TOKEN not in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_hostile_name_ends_with_5(hub: LoopbackHub, home: Path) -> None:
    hub.faults.listed_names = {"config.json": "../../.bashrc\x1b[31m"}
    done = pull(home, "v4-flash")
    assert done.code == 5
    assert "\x1b" not in done.stderr
    assert not (home / "hf").exists()


def test_offline_opens_no_connection(hub: LoopbackHub, home: Path) -> None:
    folder = pull(home, "v4-flash").stdout
    asked = len(hub.requests)
    assert pull(home, "v4-flash", "--offline").stdout == folder
    document = json.loads(pull(home, "v4-flash", "--offline", "--json").stdout)
    assert document["bytes"] == TOTAL - len(FILES["config.json"])
    next(Path(folder.strip()).glob("*00002*")).unlink()
    done = pull(home, "v4-flash", "--offline")
    assert (done.code, "1 of 2 weight files are missing" in done.stderr) == (1, True)
    assert len(hub.requests) == asked


# ---- in processes of its own


def test_hf_variables_are_obeyed(start: Start, hub: LoopbackHub, tmp_path: Path) -> None:
    changes = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    process = start("v4-flash", **changes)
    assert b"is not installed" in process.communicate()[1]
    assert hub.requests == []
    changes = {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_ENABLE_HF_TRANSFER": "1"}
    process = start("v4-flash", **changes)
    out, err = process.communicate()
    assert process.returncode == 0
    assert Path(out.decode().strip()).is_relative_to(tmp_path / "elsewhere")
    assert err.startswith(b"note: HF_HUB_ENABLE_HF_TRANSFER has no effect")
    assert b"Warning" not in err


def test_killed_in_the_middle_and_run_again(start: Start, hub: LoopbackHub, tmp_path: Path) -> None:
    files = {**FILES, "model-00002-of-00002.safetensors": noise(12_000_000)}
    hub.add(REPO, files, FLASH_COMMIT)
    hub.faults.bytes_per_s = 8e6
    for nbytes in (2_000_000, 6_000_000):
        process = start("v4-flash", "-q")
        wait_for_bytes(hub, nbytes)
        process.kill()
        process.communicate()
    hub.faults.bytes_per_s = None
    process = start("v4-flash")
    out, err = process.communicate()
    assert process.returncode == 0
    assert b" is here, " in err
    assert finished(Path(out.decode().strip())) == files
    assert hub.bytes_sent < 1.1 * sum(map(len, files.values()))
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_two_at_once(start: Start, hub: LoopbackHub) -> None:
    hub.faults.bytes_per_s = 3e4  # the first one needs half a minute, until the second one waits
    first = start("v4-flash")
    wait_for_bytes(hub, 1000)
    second = start("v4-flash")
    assert second.stderr is not None
    assert any(b"another process is fetching" in line for line in second.stderr)  # waits for it
    hub.faults.bytes_per_s = None
    ended = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert ended[0][0] == ended[1][0]
    assert finished(Path(ended[0][0].decode().strip())) == FILES
    assert hub.bytes_sent < 1.1 * TOTAL


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(start: Start, hub: LoopbackHub, number: signal.Signals, code: int) -> None:
    hub.faults.bytes_per_s = 1e5
    process = start("v4-flash")
    wait_for_bytes(hub, 100_000)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert out == b""
    assert b"stopped; to go on: localv4 pull v4-flash" in err
    assert b"Traceback" not in err


@needs_pty
def test_a_bar_on_a_terminal(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.bytes_per_s = 7e5
    with Terminal(
        "pull", "v4-flash", home=tmp_path, columns=100, changes=hub.environment()
    ) as terminal:
        terminal.wait_for("v4-flash ")
        terminal.wait_for(" of 1.7 MiB ")
        terminal.wait_for("/s left")
        terminal.wait_for("try it:")
        assert terminal.wait() == 0


# ---- lines where there is no terminal


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("localv4.cli.transfer.time.monotonic", lambda: now)
    with Transfer("v4-flash", 100 << 20, 10 << 20, quiet=False) as transfer:
        transfer.advance(10 << 20)
        assert capsys.readouterr().err == ""
        now += 10
        transfer.advance(10 << 20)
        transfer.note("a \x1bword")
        assert capsys.readouterr().err == (
            "v4-flash: 30 %, 30.0 MiB of 100.0 MiB, 2.0 MiB/s, 35 s left\nnote: a \u241bword\n"
        )
        transfer.advance(5 << 20)
        assert capsys.readouterr().err == ""
    with Transfer("v4-flash", 100, quiet=True) as transfer:
        now += 100
        transfer.advance(50)
        transfer.note("word")
    assert capsys.readouterr().err == ""


def test_lengths_of_time() -> None:
    assert [format_seconds(value) for value in (0.5, 59, 61, 3599, 7322)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 2 min",
    ]
