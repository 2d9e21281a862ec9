"""Messages of a request: accepted forms, and errors that name the field."""

from typing import Any

import pytest
from chat_messages import assistant, call, rendered, result, system, tools, user

from localv4.errors import UsageError
from localv4.text.effort import choose_effort, effort_text
from localv4.text.prompt import Message, parse_messages, render

SEARCH = '{"name": "search", "description": "Search the web"}'


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered({"role": "user", "content": parts}) == rendered(user("a\n\nb"))
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert "<tool_result>a\n\nb\n\n[Unsupported image_url]</tool_result>" in rendered(result(image))


def test_effort_names() -> None:
    assert effort_text(None, "preview") == effort_text(None, "0731") == ""
    with pytest.raises(UsageError, match="--think-effort low is unknown to the preview") as error:
        effort_text("low", "preview")
    assert error.value.hint == "it knows high and max"
    names = ("minimal", "low", "medium", "high", "xhigh", "max")
    assert [choose_effort(n, "0731") for n in names] == ["low"] * 3 + ["high"] * 2 + ["max"]
    assert [choose_effort(n, "preview") for n in names] == ["high"] * 5 + ["max"]
    with pytest.raises(UsageError, match="--think-effort none"):
        choose_effort("none", "0731")


DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]

BAD_MESSAGES: list[tuple[list[Any], str]] = [
    ([], r"messages: List should have at least 1 item"),
    (["hi"], r"messages\[0\]"),
    ([{"content": "x"}], r"messages\[0\].role: Field required"),
    ([{"role": "function", "content": "x"}], r"messages\[0\].role"),
    ([{"role": "user"}], r"messages\[0\].content: is missing"),
    ([{"role": "user", "content": None}], r"messages\[0\].content: is missing"),
    ([user("a"), {"role": "tool"}], r"messages\[1\].content: is missing"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\].*'image_url'"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].*'text'"),
    ([{"role": "developer", "content": ""}], r"messages\[0\].content: is empty"),
    ([user("a", task="sing")], r"messages\[0\].task"),
    ([user("a", tools=tools(SEARCH))], r"messages\[0\].tools: belongs to system or developer"),
    ([user("a", response_format={"a": 1})], r"response_format: belongs to"),
    ([user("a", prefix=True)], r"prefix: belongs to assistant"),
    ([user("a", tool_calls=[call("f", "{}")])], r"tool_calls: belongs to assistant"),
    ([assistant("a", task="title")], r"task: belongs to user or developer"),
    ([assistant(tool_calls=[{"id": "1"}])], r"tool_calls\[0\].function: Field required"),
    ([assistant(tool_calls=[call("f", 5)])], r"arguments"),
    ([system("", tools=[{"function": {"x": 1}}])], r"tools: a function has no name"),
    ([system("", tools=[{"type": "function"}])], r"tools\[0\].function"),
    ([system("", tools=[{"function": {"name": "f", "x": {1, 2}}}])], r"not JSON"),
    ([system("", tools=[{"function": {"name": "f", "x": DEEP}}])], r"not JSON"),
    ([assistant("x", prefix="yes")], r"messages\[0\].prefix"),
]


@pytest.mark.parametrize(("objects", "message"), BAD_MESSAGES)
def test_bad_messages(objects: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_messages(objects)
    assert "\n" not in caught.value.message


def test_impossible_conversations() -> None:
    with pytest.raises(UsageError, match="no messages"):
        render([], thinking=False)
    with pytest.raises(UsageError, match=r"messages\[1\].task"):
        render(parse_messages([user("a"), user("b", task="title")]), thinking=False)


def test_deep_arguments_are_one_string() -> None:
    arguments = "[" * 100_000
    assert arguments in rendered(assistant(tool_calls=[call("f", arguments)]))
    nested = '{"a": ' + arguments + "]" * 100_000 + "}"
    assert 'name="arguments"' in rendered(assistant(tool_calls=[call("f", nested)]))


def test_surrogates_in_messages_are_replaced() -> None:
    found = parse_messages([user("a\ud800"), assistant("\ud83d\ude00", reasoning="\udc00")])
    assert [m.content for m in found] == ["a\ufffd", "😀"]
    assert found[1].reasoning == "\ufffd"


def test_unknown_fields_do_not_matter() -> None:
    found = parse_messages([user("a", name="Bob", refusal=None), assistant("b", annotations=[])])
    assert found == [Message("user", "a"), Message("assistant", "b")]
