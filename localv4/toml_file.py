"""TOML files that users write: parsed with care, and what is wrong in them told in one line."""

import json
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.errors import BadFileError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_LINE_CHARS = 500  # tomllib needs minutes for one key of 60,000 dotted parts
MAX_FIELD_CHARS = 120  # of a key path in an error line
MAX_VALUE_CHARS = 40  # of a wrong value

_QUOTED = re.compile("'([^']*)'")


def parse_toml(data: bytes, path: Path) -> dict[str, Any]:
    """Return the tables in `data`, the contents of the file at `path`.

    Raises BadFileError when they are not valid TOML, or a line is too long for one.
    """
    try:
        text = data.decode("utf-8")
        for number, line in enumerate(text.split("\n"), start=1):
            if len(line) > MAX_LINE_CHARS:
                raise BadFileError(
                    path, f"line {number} is longer than {MAX_LINE_CHARS} characters"
                )
        # ValueError covers bad UTF-8, bad TOML and integers of thousands of digits
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadFileError(path, f"not valid TOML: {detail}") from error


def first_problem(error: "ValidationError", known: Collection[str]) -> str:
    """Return the first thing wrong in a file as `place: what`, in words of who wrote it.

    An unknown key comes before all else, since a missing one may be meant by it; the nearest of the
    `known` keys is named. Entries of lists are counted from one: "rule 2, formats".
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    detail = _detail(first, known)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{_place(first['loc'])}: {detail}{more}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean "..."?` with what is nearest to a mistyped name, "" for none."""
    by_small_letters = {one.lower(): one for one in known}
    nearest = get_close_matches(name.lower(), by_small_letters, n=1)
    return f'; did you mean "{by_small_letters[nearest[0]]}"?' if nearest else ""


def _place(path: Sequence[str | int]) -> str:
    """Write the path of a value: ("rules", 0, "formats", 1) is `rule 1, format 2`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text = f"{text.removesuffix('s')} {part + 1}, "
        else:
            text += f".{part}" if text and not text.endswith(", ") else part
    return text.removesuffix(", ")[:MAX_FIELD_CHARS]


def _detail(problem: "ErrorDetails", known: Collection[str]) -> str:
    """Say what is wrong with a value, and what is expected there."""
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return "no such key" + did_you_mean(str(problem["loc"][-1]), known)
    if kind == "missing":
        return "is missing"
    if kind in ("enum", "literal_error") and isinstance(value, str):
        expected = str(problem["ctx"]["expected"])
        names = _QUOTED.findall(expected)
        return f'"{_short(value)}" is not {expected}' + did_you_mean(_short(value), names)
    if kind == "list_type":
        form = "[[...]] for each entry" if isinstance(value, dict) else f"[{_toml(value)}]"
        return f"expected a list: {form}"
    if kind == "string_type":
        return f"expected a text in quotes, not {_toml(value)}"
    detail = problem["msg"].removeprefix("Value error, ")
    return f"{_toml(value)}: {detail}" if isinstance(value, int | float) else detail


def _toml(value: object) -> str:
    """Write a value as it may stand in the file, cut short."""
    return _short(json.dumps(value, default=str))


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
