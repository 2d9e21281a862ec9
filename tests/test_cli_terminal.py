"""What may reach a terminal, and in which colours."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localv4.cli import terminal

ATTACKS = [
    "\x1b[2J",
    "\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://x\x1b\\text",
    "\x9b31m",
    "a\rb",
    "a\bb",
    "\x7f",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\U000e0041\U000e007f",
    "\udc80",
]


def is_harmless(text: str) -> bool:
    """Judge by the classes of the Unicode standard, not by the table under test."""
    import unicodedata

    return all(
        char in "\t\n"
        or (
            unicodedata.category(char) not in ("Cc", "Cs")
            and unicodedata.bidirectional(char)
            not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
            and not 0xE0000 <= ord(char) <= 0xE007F
        )
        for char in text
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_becomes_visible(attack: str) -> None:
    clean = terminal.sanitize(attack)
    assert is_harmless(clean)
    assert len(clean) == len(attack)


def test_signs() -> None:
    assert terminal.sanitize("a\x1b[0m\tb\nc\x7f\x85") == "a␛[0m\tb\nc␡\ufffd"
    assert terminal.sanitize_line("a\tb\nc") == "a␉b␊c"


@given(st.text(st.characters()))
def test_no_control_survives(text: str) -> None:
    assert is_harmless(terminal.sanitize(text))
    assert terminal.sanitize_line(text).isprintable() or is_harmless(terminal.sanitize_line(text))
    assert not set("\t\n") & set(terminal.sanitize_line(text))


@given(st.text(st.characters()), st.integers(0, 50))
def test_cutting_changes_nothing(text: str, at: int) -> None:
    whole = terminal.sanitize(text)
    assert terminal.sanitize(text[:at]) + terminal.sanitize(text[at:]) == whole


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Co", "Cn", "Cf"])))
def test_ordinary_text_is_kept(text: str) -> None:
    assert terminal.sanitize(text) == text


@given(st.text(st.characters()))
def test_json_escapes_keep_the_value(text: str) -> None:
    written = terminal.escape_json(json.dumps([text], ensure_ascii=False))
    assert json.loads(written) == json.loads(json.dumps([text]))
    assert is_harmless(written)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("changes", "stream", "no_color", "wanted"),
    [
        ({}, Screen(), False, True),
        ({}, Screen(), True, False),
        ({}, io.StringIO(), False, False),
        ({"NO_COLOR": "1"}, Screen(), False, False),
        ({"NO_COLOR": ""}, Screen(), False, False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), False, True),
        ({"FORCE_COLOR": "0"}, io.StringIO(), False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Screen(), False, False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True, False),
        ({"TERM": "dumb"}, Screen(), False, False),
    ],
)
def test_color_rules(
    changes: dict[str, str],
    stream: io.StringIO,
    no_color: bool,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert terminal.wants_color(stream, no_color=no_color) is wanted
    console = terminal.make_console(stream, no_color=no_color)
    console.print("text", style="red")
    assert ("\x1b[31m" in stream.getvalue()) is wanted
    stream.seek(0)
    stream.truncate()


def test_console_reads_no_markup_and_no_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    terminal.make_console(stream).print("[red]x[/red] :smile: " + "y" * 300)
    assert stream.getvalue() == "[red]x[/red] :smile: " + "y" * 300 + "\n"


def test_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not terminal.is_terminal(stream)
    assert not terminal.is_terminal(None)


def test_no_echo_without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with terminal.no_echo():
        pass
