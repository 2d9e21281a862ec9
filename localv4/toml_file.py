"""TOML files that users write: parsed with care, and what is wrong in them told in one line."""

import tomllib
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localv4.errors import BadFileError

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_LINE_CHARS = 500  # tomllib needs minutes for one key of 60,000 dotted parts
MAX_FIELD_CHARS = 120  # of a key path in an error line


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
    """Return the first thing wrong in a file as `key path: what`.

    An unknown key comes before all else, since a missing one may be meant by it; the nearest of the
    `known` keys is named.
    """
    problems = error.errors(include_url=False, include_context=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    field = ".".join(str(part) for part in first["loc"])[:MAX_FIELD_CHARS]
    detail = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        nearest = get_close_matches(str(first["loc"][-1]), known, n=1)
        detail = "no such key" + (f'; did you mean "{nearest[0]}"?' if nearest else "")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: {detail}{more}"
