"""`localv4 batch` with the built-in model: every kind of row, every way to be stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from terminal import Ended, Terminal, needs_jit, needs_pty, run_here, start_localv4

from localv4.engine.batch_input import MAX_LINE_BYTES
from localv4.paging.trace import read_trace

pytestmark = needs_jit

CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."
ENDLESS = {"prompt": "Once", "temperature": 100, "seed": 1}
ROWS: list[Any] = [
    {"prompt": CAPITAL},
    {"prompt": "What is 148 + 276?"},
    {"prompt": "Hi", "max_tokens": 3},
]


def batch(home: Path, *more: str, rows: Any = None, name: str = "in.jsonl") -> Ended:
    """Answer the rows, given as objects or as the bytes of the file, greedily."""
    if rows is not None:
        data = rows if isinstance(rows, bytes) else jsonl(rows)
        (home / name).write_bytes(data)
    paths = ("-i", str(home / name), "-o", str(home / "out.jsonl"))
    return run_here("batch", "-m", "tiny-v4", "--greedy", *paths, *more, home=home)


def jsonl(rows: list[Any]) -> bytes:
    """Return objects as lines."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def results(home: Path) -> dict[str, Any]:
    """Return the rows of the output by custom_id; each is there once."""
    lines = (home / "out.jsonl").read_text("utf-8").splitlines()
    found = {row["custom_id"]: row for row in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def message(row: Any) -> Any:
    """Return what the model said."""
    assert row["error"] is None and row["response"]["status_code"] == 200
    return row["response"]["body"]["choices"][0]["message"]


def test_rows_of_every_form(tmp_path: Path) -> None:
    body = {"model": "Tiny-V4", "messages": [{"role": "user", "content": CAPITAL}]}
    full = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    completion = {
        "custom_id": "c",
        "url": "/v1/completions",
        "body": {"prompt": "Once", "max_tokens": 4},
    }
    short = {"messages": [{"role": "user", "content": CAPITAL}], "max_completion_tokens": 2}
    done = batch(tmp_path, rows=[full, {"prompt": CAPITAL}, short, completion])
    assert done.code == 0 and done.stdout == ""
    assert "4 of 4 rows answered" in done.stderr
    found = results(tmp_path)
    assert set(found) == {"a", "line-2", "line-3", "c"}
    assert message(found["a"]) == {"role": "assistant", "content": PARIS}
    assert message(found["line-2"])["content"] == PARIS
    answer = found["a"]["response"]["body"]
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny-v4"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 8, "total_tokens": 19}
    cut = found["line-3"]["response"]["body"]
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 2
    text = found["c"]["response"]["body"]
    assert text["object"] == "text_completion" and text["choices"][0]["text"]


def test_text_file(tmp_path: Path) -> None:
    given = f"\ufeff{CAPITAL}\r\n\r\n  \nWhat is the opposite of hot?".encode()
    assert batch(tmp_path, rows=given, name="prompts.txt").code == 0
    found = results(tmp_path)
    assert set(found) == {"line-1", "line-4"}
    assert message(found["line-1"])["content"] == PARIS


def test_thinking_and_tools(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather for a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    rows = [
        {"prompt": "What is 148 + 276?", "reasoning_effort": "high"},
        {"prompt": "What is 148 + 276?", "thinking": {"type": "disabled"}},
        {"prompt": "What is the weather in Paris?", "tools": [tool]},
        {"prompt": "What is the weather in Paris?", "tools": [tool], "tool_choice": "none"},
    ]
    assert batch(tmp_path, "--think", rows=rows).code == 0
    found = results(tmp_path)
    assert message(found["line-1"])["reasoning_content"].startswith("I need to add 148 and 276.")
    assert message(found["line-1"])["content"] == "148 + 276 = 424"
    assert "reasoning_content" not in message(found["line-2"])
    (call,) = message(found["line-3"])["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert found["line-3"]["response"]["body"]["choices"][0]["finish_reason"] == "tool_calls"
    assert "tool_calls" not in message(found["line-4"])


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b"{bad", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "x", "temperature": 1e999}', "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 10_000, "invalid_json"),
        (b'{"prompt": ' + b"[" * 10_000, "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_text"),
        (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "line_too_long"),
        (b'{"prompt": "x", "url": "/v1/embeddings"}', "unknown_url"),
        (b'{"prompt": "x", "method": "GET"}', "invalid_request"),
        (b'{"prompt": "x", "model": "gpt-4o"}', "model_not_found"),
        (b'{"custom_id": 7, "prompt": "x"}', "invalid_request"),
        (b'{"custom_id": "bad", "body": {}}', "invalid_request"),
        (b'{"body": 7}', "invalid_request"),
        (b'{"messages": []}', "invalid_request"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "invalid_request"),
        (b'{"messages": [{"role": "user"}]}', "invalid_request"),
        (b'{"prompt": "x", "max_tokens": 0}', "invalid_request"),
        (b'{"prompt": "x", "max_tokens": "7"}', "invalid_request"),
        (b'{"prompt": "x", "top_p": 1.5}', "invalid_request"),
        (b'{"prompt": "x", "reasoning_effort": "hard"}', "invalid_request"),
        (b'{"prompt": "x", "n": 2}', "unsupported"),
        (b'{"prompt": "x", "stream": true}', "unsupported"),
        (b'{"prompt": "x", "logprobs": true}', "unsupported"),
        (b'{"prompt": "x", "response_format": {"type": "json_object"}}', "unsupported"),
        (b'{"prompt": "x", "tool_choice": "required"}', "unsupported"),
        (b'{"prompt": "x", "messages": []}', "unsupported"),
        (b'{"prompt": "' + b"word " * 9000 + b'"}', "does_not_fit"),
    ],
)
def test_a_bad_row_stops_nothing(row: bytes, code: str, tmp_path: Path) -> None:
    good = jsonl([{"custom_id": "good", "prompt": CAPITAL}])
    done = batch(tmp_path, rows=row + b"\n" + good)
    assert done.code == 3
    assert "1 failed" in done.stderr
    found = results(tmp_path)
    assert message(found.pop("good"))["content"] == PARIS
    ((custom_id, bad),) = found.items()
    assert custom_id == ("bad" if b'"bad"' in row else "line-1")
    assert bad["response"] is None and bad["error"]["code"] == code
    again = batch(tmp_path)
    assert again.code == 3 and "nothing to do" in again.stderr


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"\x1f\x8b\x08\0abc", 5, "compressed by gzip"),
        (b"\xff\xfe{\0", 5, "UTF-16"),
        (
            jsonl([{"custom_id": "a", "prompt": "x"}] * 2),
            2,
            "lines 1 and 2 have the same custom_id",
        ),
        (jsonl([{"prompt": "x"}, {"custom_id": "line-1", "prompt": "x"}]), 2, "lines 1 and 2"),
    ],
)
def test_files_that_are_refused(data: bytes, code: int, said: str, tmp_path: Path) -> None:
    done = batch(tmp_path, rows=data)
    assert done.code == code
    assert said in done.stderr.splitlines()[0]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_empty_file(data: bytes, tmp_path: Path) -> None:
    assert batch(tmp_path, rows=data).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_input_that_is_no_file(tmp_path: Path) -> None:
    assert batch(tmp_path).code == 1
    (tmp_path / "in.jsonl").mkdir()
    assert batch(tmp_path).code == 5


def test_output_that_cannot_be(tmp_path: Path) -> None:
    rows = jsonl(ROWS)
    given = tmp_path / "in.jsonl"
    given.write_bytes(rows)
    os.link(given, tmp_path / "out.jsonl")
    done = batch(tmp_path)
    assert done.code == 2 and "is the input" in done.stderr
    assert given.read_bytes() == rows
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl").mkdir()
    assert batch(tmp_path).code == 2


def test_every_cut_of_the_output_is_mended(tmp_path: Path) -> None:
    assert batch(tmp_path, rows=ROWS).code == 0
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, 5, 18, 19, ends[0] - 1, ends[0], ends[0] + 1, ends[1] + 40, len(whole) - 1):
        out.write_bytes(whole[:cut])
        assert batch(tmp_path).code == 0
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    out.write_bytes(whole[: ends[0] + 30] + bytes(100))
    assert batch(tmp_path).code == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        (("-n", "5"), ROWS),
        (("--numerics", "exact"), ROWS),
        (("--system", "Be brief."), ROWS),
        ((), [ROWS[0] | {"max_tokens": 7}, *ROWS[1:]]),
        ((), ROWS[1:]),
    ],
)
def test_results_of_another_run_are_refused(
    more: tuple[str, ...], rows: list[Any], tmp_path: Path
) -> None:
    batch(tmp_path, rows=ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    done = batch(tmp_path, *more, rows=rows)
    assert done.code == 2 and "is not of this run" in done.stderr and "--overwrite" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert batch(tmp_path, *more, "--overwrite").code == 0
    assert (tmp_path / "out.jsonl").read_bytes() != before


@pytest.mark.parametrize("data", [b"my notes", b"my notes\n", b'{"id": "x"}\n', b"\0\0\0 "])
def test_another_file_is_not_touched(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(data)
    assert batch(tmp_path, rows=ROWS).code == 2
    assert (tmp_path / "out.jsonl").read_bytes() == data


def test_rows_may_be_added_to_the_input(tmp_path: Path) -> None:
    batch(tmp_path, rows=ROWS[:1])
    first = (tmp_path / "out.jsonl").read_bytes()
    done = batch(tmp_path, rows=ROWS)
    assert done.code == 0 and "1 were done before" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes().startswith(first)
    assert len(results(tmp_path)) == len(ROWS)


def test_same_bytes_whatever_runs_beside(tmp_path: Path) -> None:
    rows = [row | {"temperature": t} for row in ROWS for t in (0, 1.2)]
    seen = []
    for parallel in ("1", "3", "64"):
        batch(tmp_path, "--parallel", parallel, "--overwrite", rows=rows)
        seen.append(sorted((tmp_path / "out.jsonl").read_bytes().splitlines()))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == len(rows)


def test_seeds(tmp_path: Path) -> None:
    rows = [{"prompt": "Once", "temperature": 3, "max_tokens": 12}] * 2

    def texts(*more: str) -> list[str]:
        batch(tmp_path, "--overwrite", *more, rows=rows)
        return [message(row)["content"] for row in results(tmp_path).values()]

    first = texts()
    assert first[0] != first[1] and texts() == first and texts("--seed", "9") != first


def test_shards(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "max_tokens": 1} for _ in range(5)]
    ids = []
    for shard in ("1/2", "2/2"):
        assert batch(tmp_path, "--shard", shard, "--overwrite", rows=rows).code == 0
        ids.append(set(results(tmp_path)))
    assert ids == [{"line-1", "line-3", "line-5"}, {"line-2", "line-4"}]
    batch(tmp_path, "--shard", "1/2")
    assert set(results(tmp_path)) == ids[0] | ids[1]
    for wrong in ("0/2", "3/2", "1/0", "2", "a/b", "-1/2"):
        assert batch(tmp_path, "--shard", wrong).code == 2


def test_raw_and_system_options(tmp_path: Path) -> None:
    assert batch(tmp_path, "--raw", "-n", "4", rows=ROWS).code == 0
    plain = results(tmp_path)["line-1"]["response"]["body"]["usage"]["prompt_tokens"]
    assert batch(tmp_path, "--system", "Be brief.", "--overwrite", rows=ROWS).code == 0
    asked = results(tmp_path)["line-1"]["response"]["body"]["usage"]["prompt_tokens"]
    assert plain < 11 < asked
    assert batch(tmp_path, "--raw", "--think").code == 2


def test_json_summary(tmp_path: Path) -> None:
    done = batch(tmp_path, "--json", "-q", rows=[*ROWS, {"bad": 1}])
    assert done.code == 3 and done.stderr == ""
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["answered"], summary["failed"]) == (4, 3, 1)
    assert summary["completion_tokens"] > 10 and summary["seconds"] > 0
    assert summary["api_cost_usd"] is None
    again = json.loads(batch(tmp_path, "--json", "-q").stdout)
    assert (again["done_before"], again["answered"]) == (4, 0)


def test_statistics(tmp_path: Path) -> None:
    done = batch(tmp_path, "--stats", rows=ROWS * 3)
    line = next(line for line in done.stderr.splitlines() if line.startswith("prompts"))
    assert [part.split()[0] for part in line.split(" | ")[:2]] == ["prompts", "gen"]
    assert "rows at a time" in line and "peak RSS" in line


def test_routes_of_all_rows_are_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "routes"
    assert batch(tmp_path, "--trace-routes", str(trace), rows=ROWS).code == 0
    found = read_trace(trace)
    answered = sum(
        row["response"]["body"]["usage"]["completion_tokens"] for row in results(tmp_path).values()
    )
    assert found.chosen.shape[1:] == (8, 4)
    # the last token of a prompt is decoded with the answer, whose own last is never processed
    assert (~found.is_prompt).sum() == answered and found.is_prompt.any()
    for wrong in ("in.jsonl", "out.jsonl"):
        before = (tmp_path / wrong).read_bytes()
        done = batch(tmp_path, "--trace-routes", str(tmp_path / wrong))
        assert done.code == 2 and "a file of their own" in done.stderr
        assert (tmp_path / wrong).read_bytes() == before
    assert batch(tmp_path, "--trace-routes", str(trace), "--ray", "auto").code == 2


@needs_pty
def test_kills_at_moments_of_all_kinds_cost_no_row(tmp_path: Path) -> None:
    """`python tests/batch_crash_loop.py SCRATCH KILLS SEED` takes as many as one likes."""
    script = Path(__file__).with_name("batch_crash_loop.py")
    command = [sys.executable, str(script), str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(kind in done.stdout for kind in ("'step'", "'write'", "'fsync'"))


def started(home: Path, rows: list[Any]) -> "subprocess.Popen[bytes]":
    """Start a batch in a process and wait until it has its first result."""
    (home / "in.jsonl").write_bytes(jsonl(rows))
    paths = ("-i", str(home / "in.jsonl"), "-o", str(home / "out.jsonl"))
    process = start_localv4("batch", "-m", "tiny-v4", "--greedy", *paths, home=home)
    deadline = time.monotonic() + 240
    while not (home / "out.jsonl").exists() or not (home / "out.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: int, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, [*ROWS, ENDLESS])
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    lines = said.decode().splitlines()
    assert lines[-2].startswith("stopped: ") and lines[-1].startswith("to go on: localv4 batch -m")
    assert len(results(tmp_path)) >= 1


def test_second_process_is_refused_and_kill_costs_nothing(tmp_path: Path) -> None:
    process = started(tmp_path, [*ROWS, ENDLESS | {"max_tokens": 3000}])
    done = batch(tmp_path)
    assert done.code == 2 and "is being written by another" in done.stderr
    process.kill()
    process.communicate(timeout=60)
    (tmp_path / "in.jsonl").write_bytes(jsonl([*ROWS, {"prompt": CAPITAL}]))
    assert batch(tmp_path).code == 0
    found = results(tmp_path)
    assert set(found) == {"line-1", "line-2", "line-3", "line-4"}
    assert message(found["line-1"])["content"] == PARIS


@needs_pty
def test_live_line_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([*ROWS, ENDLESS]))
    paths = ("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    with Terminal("batch", "-m", "tiny-v4", "--greedy", *paths, home=tmp_path) as terminal:
        terminal.wait_for("3/4 rows, ")
        terminal.wait_for("left, 1 at a time")
        terminal.send("\x03")
        terminal.wait_for("to go on: localv4 batch")
        assert terminal.wait() == 130
        assert terminal.echoes() or terminal.exit_code == 130
