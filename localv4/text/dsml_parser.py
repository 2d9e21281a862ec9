"""Read a block of DSML tool calls."""

import json
import uuid

from localv4.text.dsml import CALLS_OPEN, ToolCall, to_json
from localv4.text.marks import DSML_MARK, marked, spelled

_CALLS_OPEN = marked(f"{CALLS_OPEN}>\n")
_CALLS_CLOSE = marked("</｜DSML｜tool_calls>")
_INVOKE_OPEN = marked('<｜DSML｜invoke name="')
_INVOKE_CLOSE = marked("</｜DSML｜invoke>\n")
_PARAMETER_OPEN = marked('<｜DSML｜parameter name="')
_PARAMETER_CLOSE = marked("/｜DSML｜parameter")  # after a "<"
_TAG_END = ">\n"
_NAME_END = '">\n'
_STRING_FLAGS = ('" string="true">', '" string="false">')


class _BadBlockError(Exception):
    """The block does not follow the grammar."""


def parse_calls(block: str) -> tuple[ToolCall, ...] | None:
    """Return the calls of a block in marked text; None if it is cut, damaged or empty.

    The grammar is the official one (section 4 of the format description), which is strict about
    every newline. Only blanks after the end are forgiven.
    """
    cursor = _Cursor(block)
    calls = []
    try:
        cursor.expect(_CALLS_OPEN)
        while not cursor.skips(_CALLS_CLOSE):
            calls.append(_call(cursor))
    except _BadBlockError:
        return None
    if not calls or cursor.rest().strip():
        return None
    return tuple(calls)


class _Cursor:
    """A place in a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def skips(self, literal: str) -> bool:
        """Step over `literal` if it stands here."""
        found = self._text.startswith(literal, self._at)
        self._at += len(literal) * found
        return found

    def expect(self, literal: str) -> None:
        """Step over `literal`, which must stand here."""
        if not self.skips(literal):
            raise _BadBlockError

    def until(self, *literals: str) -> tuple[str, str]:
        """Return the text before the first of `literals` and which it is; step over both."""
        places = [(self._text.find(literal, self._at), literal) for literal in literals]
        end, literal = min((p for p in places if p[0] >= 0), default=(-1, ""))
        if end < 0:
            raise _BadBlockError
        found = self._text[self._at : end]
        self._at = end + len(literal)
        return found, literal

    def rest(self) -> str:
        """Return everything from here on."""
        return self._text[self._at :]


def _call(cursor: _Cursor) -> ToolCall:
    """Read one call."""
    cursor.expect(_INVOKE_OPEN)
    name = _name(cursor.until(_NAME_END)[0])
    arguments: dict[str, str] = {}
    while cursor.skips(_PARAMETER_OPEN):
        key_text, flag = cursor.until(*_STRING_FLAGS)
        key = _name(key_text)
        value, _ = cursor.until(_PARAMETER_CLOSE)
        cursor.expect(_TAG_END)
        if key in arguments or not value.endswith("<"):
            raise _BadBlockError
        arguments[key] = _json_value(value[:-1], is_string=flag == _STRING_FLAGS[0])
    if not arguments:
        cursor.skips("\n")  # the renderer leaves an empty line where the parameters would be
    cursor.expect(_INVOKE_CLOSE)
    pairs = (f"{to_json(key)}: {value}" for key, value in arguments.items())
    return ToolCall(name, "{" + ", ".join(pairs) + "}", f"call_{uuid.uuid4().hex[:24]}")


def _name(text: str) -> str:
    """Return the name of a tool or parameter; with a control token in it, it is another tag."""
    if DSML_MARK in text:
        raise _BadBlockError
    return spelled(text)


def _json_value(text: str, *, is_string: bool) -> str:
    """Return a value as JSON: text in quotes, other values as the model wrote them.

    A value that is not JSON becomes a string, so that it cannot smuggle in a second key and the
    arguments stay readable; but one that runs on into other tags is damage.
    """
    if is_string:
        return to_json(spelled(text))
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        if DSML_MARK in text:
            raise _BadBlockError from None
        return to_json(spelled(text))
    return spelled(text)


def _refuse(constant: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(constant)
