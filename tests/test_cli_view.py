"""How an answer is shown while it comes, from deltas made by hand."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from terminal import ESCAPE
from test_cli_terminal import ATTACKS, Screen, is_harmless

from localv4.cli import generation, terminal
from localv4.cli.live_view import LiveView
from localv4.cli.progress import Progress
from localv4.cli.view import HeldView, JsonView, PlainView, View
from localv4.engine.paging_stats import PagingStats
from localv4.engine.reply import ReplyStats
from localv4.paging.counts import PagingCounts
from localv4.paging.read_statistics import ReadStatistics
from localv4.text.completion import Completion, Delta, ToolCall

CALL = ToolCall(name="search", arguments='{"q": "\x1b]x"}', id="1")


def fake_reply(
    deltas: Sequence[Delta], calls: tuple[ToolCall, ...] = (), raw: str | None = None
) -> Any:
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning")
    return SimpleNamespace(
        completion=Completion(reasoning or None, content, calls, raw),
        finish_reason="stop",
        stats=ReplyStats(10, 4, 0.5, 5, 0.25),
        token_ids=[1] * 5,
    )


def fake_paging() -> PagingStats:
    counts = PagingCounts(2)
    counts.tokens, counts.wait_s, counts.guesses, counts.guesses_used = 10, 0.5, 8, 2
    counts.misses[:] = 30, 6
    counts.add_read("demand", 2_000_000_000)
    reads = ReadStatistics(2_000_000_000, 36, 1.0, 3.0, 0.1, 0.02, 0.05)
    return PagingStats(counts, reads, 6, 1 << 30, 2 << 30)


def fake_generation(tokens: int = 3, done: int = 5, paging: PagingStats | None = None) -> Any:
    return SimpleNamespace(
        is_reading=tokens == 0,
        prefill=(done, 10),
        tokens=tokens,
        tokens_per_s=7.5,
        live_paging=lambda: paging,
    )


def show(view: View, deltas: Sequence[Delta], **reply: Any) -> None:
    with view:
        view.tick(fake_generation(0))
        for delta in deltas:
            view.show(delta)
            view.tick(fake_generation())
        view.finish(fake_reply(deltas, **reply))


def content(*texts: str) -> list[Delta]:
    return [Delta("content", text) for text in texts]


def test_plain_into_a_pipe_is_exact() -> None:
    out = io.StringIO()
    show(PlainView(out, None), [Delta("reasoning", "hm"), *content("a\x1b[2J", "\u202e b")])
    assert out.getvalue() == "a\x1b[2J\u202e b\n"


@pytest.mark.parametrize("attack", ATTACKS)
def test_plain_on_a_terminal_is_sanitised(attack: str) -> None:
    out = Screen()
    reply: dict[str, Any] = {"calls": (ToolCall("f" + attack, "{}", "1"),)}
    show(PlainView(out, out), [Delta("reasoning", attack), *content(*attack)], **reply)
    assert is_harmless(out.getvalue())


def test_plain_reasoning_stands_apart() -> None:
    out = io.StringIO()
    show(
        PlainView(out, out),
        [Delta("reasoning", "let me"), Delta("reasoning", " see"), *content("42")],
    )
    assert out.getvalue() == "thinking:\nlet me see\n\n42\n"
    alone = io.StringIO()
    show(PlainView(alone, alone), [Delta("reasoning", "cut")])
    assert alone.getvalue() == "thinking:\ncut\n\n"


def test_plain_line_end_and_tool_calls() -> None:
    out = io.StringIO()
    show(PlainView(out, None), [*content("done\n"), Delta("tool_call", "<markup>")], calls=(CALL,))
    assert out.getvalue() == 'done\nsearch {"q": "\x1b]x"}\n'
    damaged = io.StringIO()
    show(PlainView(damaged, None), content("done"), raw="<cut")
    assert damaged.getvalue() == "done\n<cut\n"
    empty = io.StringIO()
    show(PlainView(empty, None), [])
    assert empty.getvalue() == ""


def test_json() -> None:
    out = io.StringIO()
    show(JsonView(out, "m"), [Delta("reasoning", "r"), *content("a\u202eb\n")], calls=(CALL,))
    assert is_harmless(out.getvalue())
    assert out.getvalue().count("\n") == 1
    answer = json.loads(out.getvalue())
    assert answer["text"] == "a\u202eb\n"
    assert answer["reasoning"] == "r"
    assert answer["tool_calls"] == [{"id": "1", "name": "search", "arguments": CALL.arguments}]
    assert answer["raw_tool_text"] is None
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "reused": 4}
    assert answer["timings"]["prefill_tok_s"] == 12.0
    assert answer["timings"]["decode_tok_s"] == 16.0


def test_held_view_waits() -> None:
    out = io.StringIO()
    view = HeldView(PlainView(out, None))
    view.show(Delta("content", "text"))
    assert out.getvalue() == ""
    view.finish(fake_reply([]))
    assert out.getvalue() == "text\n"


def on_terminal(
    deltas: Sequence[Delta], *, columns: int = 40, hide_thinking: bool = False, **reply: Any
) -> str:
    """Return everything that the live view writes, escape sequences included."""
    screen = Screen()
    console = terminal.make_console(screen)
    console.size = (columns, 12)
    show(LiveView(console, hide_thinking=hide_thinking), deltas, **reply)
    return screen.getvalue()


@pytest.fixture(autouse=True)
def _capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("localv4.cli.live_view.REFRESH_S", 0.0)


def screen_lines(written: str) -> list[str]:
    """Play the escape sequences that the live view uses; return what the screen ends up with."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            number = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row -= number
                assert row >= 0, "the cursor left what the view has drawn"
            elif part.endswith("K"):
                lines[row] = ""
            elif part[-1] not in "mhl":
                raise AssertionError(f"unexpected sequence {part!r}")
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]


def test_finished_blocks_stay_and_progress_goes() -> None:
    text = "# Title\n\nSome **bold** text\n\n- one\n- two\n\n```python\nx = 1\n```\nlast"
    written = on_terminal([Delta("content", char) for char in text])
    assert screen_lines(written) == [
        "Title",
        "",
        "Some bold text",
        "",
        " • one",
        " • two",
        "",
        "```python",
        "x = 1",
        "```",
        "last",
    ]
    shown = ESCAPE.sub("", written)
    assert "writing | 3 tok | 7.5 tok/s" in shown
    assert "5/10" in shown
    assert shown.count("Title") < 30  # only its own preview, never drawn again once finished


def test_live_part_never_exceeds_the_screen() -> None:
    words = [f"word{number} " for number in range(200)]
    written = on_terminal(content(*words), columns=20)
    assert max(int(rows) for rows in re.findall(r"\x1b\[(\d+)A", written) or ["1"]) <= 12
    assert " ".join(screen_lines(written)).split() == "".join(words).split()


def test_reasoning_is_dimmed_and_folds() -> None:
    deltas = [Delta("reasoning", "first\nsecond"), *content("answer")]
    written = on_terminal(deltas)
    assert screen_lines(written) == ["first", "second", "", "answer"]
    assert "\x1b[2mfirst" in written
    folded = on_terminal(deltas, hide_thinking=True)
    assert screen_lines(folded) == ["thought for 3 tokens", "", "answer"]
    assert "first" not in folded


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_on_the_live_view(attack: str) -> None:
    whole = f"a{attack}b\n\n`{attack}`\n\n{attack}"
    deltas = [Delta("reasoning", whole), *[Delta("content", char) for char in whole]]
    written = on_terminal(deltas, calls=(ToolCall(attack, attack, "1"),))
    assert is_harmless(re.sub(r"\x1b\[([0-9;]*m|[12]?[AK]|[0-9]+A|\?25[hl])|\r", "", written))


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_narrow_screens(columns: int) -> None:
    text = "# T\n\n1. one\n\n> quote\n\n|a|b|\n|-|-|\n|1|2|\n\n```py\nx = 1\n```\n"
    on_terminal([Delta("reasoning", "hm"), *content(*text)], columns=columns)


def test_error_keeps_the_text_and_gives_the_cursor_back() -> None:
    screen = Screen()
    view = LiveView(terminal.make_console(screen), hide_thinking=False)
    with pytest.raises(KeyboardInterrupt), view:
        view.show(Delta("content", "text"))
        raise KeyboardInterrupt
    assert screen_lines(screen.getvalue()) == ["text"]
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")


def test_stats_line() -> None:
    line = generation.stats_line(fake_reply([]))
    assert line.startswith(
        "prompt 6 tok, 12.0 tok/s (+4 reused) | gen 5 tok, 16.0 tok/s | peak RSS "
    )


def test_paging_lines() -> None:
    reply = fake_reply([])
    assert generation.paging_lines(reply) == []
    reply.stats = SimpleNamespace(paging=fake_paging(), decode_s=1.0)
    assert generation.paging_lines(reply) == [
        "experts 1.0 GiB of 2.0 GiB | hits 70.0% (layer 0: 50% ... layer 1: 90%) | "
        "3.6 misses per token",
        "read 0.200 GB per token, 0.000 GB guessed | waited 50 ms per token | bound by disk | "
        "25% of guesses used",
        "disk 2.00 GB/s, 3.0 reads at a time, 20.0 ms each (p99 50.0), 0.05 core-s per GB",
    ]


def test_paging_while_an_answer_is_written() -> None:
    screen = Screen()
    console = terminal.make_console(screen)
    console.size = (120, 12)
    with LiveView(console, hide_thinking=False) as view:
        view.tick(fake_generation(paging=fake_paging()))
    assert "hits 70% | 4 misses, 50 ms wait per tok" in screen.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (25_656_762, "24.5 MiB"),
        (159_609_485_896, "148.6 GiB"),
        (2 * 2**40, "2.00 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert generation.format_bytes(count) == text


def test_plain_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Progress(quiet=False) as progress:
        progress("loading", 1, 2)
        assert capsys.readouterr().err == ""  # too early to be worth a line
        progress.announce("compiling")
        progress("compiling", 1, 2)
    assert capsys.readouterr().err == "compiling: 0 %\n"
    with Progress(quiet=True) as progress:
        progress.announce("compiling")
    assert capsys.readouterr().err == ""


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(quiet=False) as progress:
        progress.announce("compiling \x1b]x")
        progress("loading", 1, 2)
    assert "loading" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in screen.getvalue()
