"""Messages of a conversation as clients send them, and the prompts that they make."""

import json
from typing import Any

from localv4.text.prompt import parse_messages, render


def user(text: str, **more: Any) -> dict[str, Any]:
    """Return a question."""
    return {"role": "user", "content": text, **more}


def assistant(text: str | None = None, **more: Any) -> dict[str, Any]:
    """Return an answer, or a turn of calls."""
    return {"role": "assistant", "content": text, **more}


def system(text: str, **more: Any) -> dict[str, Any]:
    """Return a system prompt."""
    return {"role": "system", "content": text, **more}


def result(text: Any, call_id: str | None = None) -> dict[str, Any]:
    """Return what a tool gave back."""
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def call(name: str, arguments: Any, call_id: str = "") -> dict[str, Any]:
    """Return a tool call."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def tools(*schemas: str) -> list[dict[str, Any]]:
    """Return tools by the JSON texts of their functions."""
    return [{"type": "function", "function": json.loads(schema)} for schema in schemas]


def rendered(*objects: dict[str, Any], thinking: bool = False, **options: Any) -> str:
    """Return the prompt for some messages, as text."""
    return render(parse_messages(objects), thinking=thinking, **options).text
