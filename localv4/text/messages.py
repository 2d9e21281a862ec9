"""Chat messages: OpenAI-style objects, checked and brought into one form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from localv4.errors import UsageError
from localv4.text.dsml import ToolCall, to_json
from localv4.text.unicode import well_formed

Role = Literal["system", "user", "developer", "assistant", "tool", "latest_reminder"]
Task = Literal["action", "query", "authority", "domain", "title", "read_url"]

_MANY = 1 << 16  # messages, parts, tools or calls in one list


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    `tools` are the JSON texts of function schemas, `response_format` is JSON text as well.
    `prefix` leaves an assistant message open, so that the model continues it.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[str, ...] = ()
    response_format: str | None = None
    task: Task | None = None
    prefix: bool = False


class _Lenient(BaseModel):
    """An object of a request; clients send more fields than matter here."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Part(_Lenient):
    type: str
    text: str | None = None


class _Function(_Lenient):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _Call(_Lenient):
    id: str | None = None
    function: _Function


class _Named(_Lenient):
    name: Annotated[str, Field(min_length=1)]


class _Tool(_Lenient):
    function: dict[str, Any]


class _Message(_Lenient):
    role: Role
    content: str | Annotated[list[_Part], Field(max_length=_MANY)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=_MANY)] | None = None
    tool_call_id: str | None = None
    tools: Annotated[list[_Tool], Field(max_length=_MANY)] | None = None
    response_format: dict[str, Any] | None = None
    task: Task | None = None
    prefix: bool | None = None
    wo_eos: bool | None = None


_MESSAGES = TypeAdapter(Annotated[list[_Message], Field(min_length=1, max_length=_MANY)])


def parse_messages(objects: Iterable[Any]) -> list[Message]:
    """Check OpenAI-style dictionaries; raise UsageError that names the field at fault."""
    try:
        found = _MESSAGES.validate_python(list(objects))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise UsageError(f"{_field(first['loc'])}: {first['msg']}") from None
    return [_message(f"messages[{index}]", message) for index, message in enumerate(found)]


def _field(location: tuple[int | str, ...]) -> str:
    """Return a location such as messages[2].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "messages" + "".join(parts)


def _message(where: str, found: _Message) -> Message:
    """Return the message in our form."""
    _check_role(where, found)
    reasoning = found.reasoning_content if found.reasoning is None else found.reasoning
    return Message(
        role=found.role,
        content=_content(where, found),
        reasoning=None if reasoning is None else well_formed(reasoning),
        tool_calls=tuple(_call(where, call) for call in found.tool_calls or ()),
        tool_call_id=found.tool_call_id or "",
        tools=tuple(_schema(where, tool) for tool in found.tools or ()),
        response_format=_json(where, found.response_format) if found.response_format else None,
        task=found.task,
        prefix=bool(found.prefix or found.wo_eos),
    )


def _check_role(where: str, found: _Message) -> None:
    """Refuse fields that the role would silently drop."""
    allowed: Mapping[str, tuple[Any, tuple[Role, ...]]] = {
        "tools": (found.tools, ("system", "developer")),
        "response_format": (found.response_format, ("system", "developer")),
        "tool_calls": (found.tool_calls, ("assistant",)),
        "prefix": (found.prefix or found.wo_eos, ("assistant",)),
        "task": (found.task, ("user", "developer")),
    }
    for field, (value, roles) in allowed.items():
        if value and found.role not in roles:
            raise UsageError(f"{where}.{field}: belongs to {' or '.join(roles)} messages")
    if found.content is None and found.role not in ("assistant", "system"):
        raise UsageError(f"{where}.content: is missing")
    if found.role == "developer" and not found.content:
        raise UsageError(f"{where}.content: is empty")


def _content(where: str, found: _Message) -> str:
    """Return the text; parts are joined by an empty line, as the official renderer joins blocks."""
    if found.content is None or isinstance(found.content, str):
        return well_formed(found.content or "")
    texts = []
    for index, part in enumerate(found.content):
        if part.type == "text" and part.text is not None:
            texts.append(part.text)
        elif found.role == "tool":
            texts.append(f"[Unsupported {part.type}]")
        else:
            raise UsageError(
                f"{where}.content[{index}]: a part of type {part.type[:40]!r} is not supported",
                hint="the model reads text only",
            )
    return well_formed("\n\n".join(texts))


def _call(where: str, call: _Call) -> ToolCall:
    """Return a tool call; arguments may come as JSON text or as an object."""
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else _json(where, arguments)
    return ToolCall(well_formed(call.function.name), well_formed(text), call.id or "")


def _schema(where: str, tool: _Tool) -> str:
    """Return the schema of a tool as JSON text."""
    try:
        _Named.model_validate(tool.function)
    except ValidationError:
        raise UsageError(f"{where}.tools: a function has no name") from None
    return _json(where, tool.function)


def _json(where: str, value: dict[str, Any]) -> str:
    """Return JSON text; raise UsageError for what JSON cannot say."""
    try:
        return well_formed(to_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: holds a value that is not JSON ({error})") from None
