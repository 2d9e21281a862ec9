"""DSML, the markup of tool calls: the section that explains tools, and calls as the model writes
them. `dsml_parser` reads them back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localv4.text.pieces import PromptBuilder
from localv4.text.special_tokens import DSML, END_THINK, THINK

CALLS_OPEN = f"<{DSML}tool_calls"

_TOOLS_INTRODUCTION = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), \
you MUST output your complete reasoning inside {THINK}...{END_THINK} \
BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_CONCLUSION = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


def to_json(value: Any) -> str:
    """Return JSON as the official renderer writes it: key order and non-ASCII characters kept."""
    return json.dumps(value, ensure_ascii=False)


def write_tools(out: PromptBuilder, schemas: Sequence[str]) -> None:
    """Append the section that explains tools; `schemas` are JSON texts, one per tool."""
    out.trusted(_TOOLS_INTRODUCTION)
    out.untrusted("\n".join(schemas))
    out.trusted(_TOOLS_CONCLUSION)


def write_calls(out: PromptBuilder, calls: Sequence[ToolCall]) -> None:
    """Append a block of calls; names and values are untrusted and cannot close a tag."""
    out.trusted(f"\n\n{CALLS_OPEN}>\n")
    for call in calls:
        out.trusted(f'<{DSML}invoke name="')
        out.untrusted(call.name)
        out.trusted('">\n')
        for index, (key, value) in enumerate(_parameters(call.arguments)):
            out.trusted(f'{chr(10) if index else ""}<{DSML}parameter name="')
            out.untrusted(key)
            is_string = isinstance(value, str)
            out.trusted(f'" string="{"true" if is_string else "false"}">')
            out.untrusted(value if is_string else to_json(value))
            out.trusted(f"</{DSML}parameter>")
        out.trusted(f"\n</{DSML}invoke>\n")
    out.trusted(f"</{DSML}tool_calls>")


def _parameters(arguments: str) -> list[tuple[str, Any]]:
    """Return the items of a JSON object; anything else is one string called `arguments`."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return [("arguments", arguments)]
    return list(value.items())
