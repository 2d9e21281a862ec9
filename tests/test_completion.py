"""Completion parser: reasoning, answer, tool calls and stop strings out of a token stream."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import localv4
from localv4.errors import UsageError
from localv4.text.completion import Completion, CompletionStream, Delta, ToolCall, parse_completion
from localv4.text.pieces import Piece, Prompt
from localv4.text.prompt import Message, render
from localv4.text.special_tokens import BOS, DSML, END_THINK, EOS, THINK, USER
from localv4.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_file(
    Path(localv4.__file__).parent / "embedded" / "tiny-v4" / "tokenizer.json"
)
CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Beijing</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
ARGUMENTS = '{"city": "Beijing", "days": 3}'


def tokens(text: str) -> list[int]:
    """Ids of what a model writes: names of control tokens are the tokens."""
    return TOKENIZER.encode_prompt(Prompt((Piece(text, trusted=True),)))


def plain(text: str) -> list[int]:
    """Ids of text that only spells control tokens."""
    return TOKENIZER.encode(text)


def run(ids: Sequence[int], thinking: bool = False, stop: Sequence[str] = ()) -> Completion:
    """Stream ids and check what must always hold."""
    return run_deltas(ids, thinking, stop)[1]


def run_deltas(
    ids: Sequence[int], thinking: bool = False, stop: Sequence[str] = ()
) -> tuple[list[Delta], Completion, bool]:
    stream = CompletionStream(TOKENIZER, thinking, stop)
    deltas = [delta for token_id in ids for delta in stream.push(token_id)]
    last, completion = stream.finish()
    deltas += last
    assert all(delta.text for delta in deltas)
    texts = {
        kind: "".join(d.text for d in deltas if d.kind == kind)
        for kind in ("reasoning", "content", "tool_call")
    }
    assert texts["content"] == completion.content
    assert texts["reasoning"] == (completion.reasoning or "")
    if completion.raw_tool_text is not None:
        assert texts["tool_call"] == completion.raw_tool_text
        assert not completion.tool_calls
    return deltas, completion, stream.stopped


def calls(completion: Completion) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in completion.tool_calls]


# ------------------------------------------------------------------ reasoning and answer


def test_answer_without_thinking() -> None:
    assert run(tokens(f"Paris.{EOS}")) == Completion(None, "Paris.", (), None)


def test_reasoning_and_answer() -> None:
    completion = run(tokens(f"I add.\n\n{END_THINK}424{EOS}"), thinking=True)
    assert completion == Completion("I add.\n\n", "424", (), None)


def test_reference_answer_of_the_model() -> None:
    # fmt: off
    ids = [
        43, 832, 279, 1165, 223, 19, 22, 26, 275, 223, 20, 25, 24, 16, 223, 26, 653, 223, 24, 530,
        223, 19, 22, 16, 223, 19, 22, 18, 653, 223, 20, 25, 18, 530, 223, 22, 19, 18, 16, 223, 22,
        19, 18, 653, 223, 19, 22, 530, 223, 22, 20, 22, 16, 8191, 19, 22, 26, 653, 223, 20, 25, 24,
        530, 223, 22, 20, 22, 1,
    ]
    # fmt: on
    completion = run(ids, thinking=True)
    assert completion.reasoning is not None
    assert completion.reasoning.startswith("I need to add 148 and 276.")
    assert completion.content == "148 + 276 = 424"


def test_text_that_spells_a_token_is_text() -> None:
    spelled = f"a{END_THINK}b{EOS}c{THINK}{CALL}"
    assert run(plain(spelled)).content == spelled
    completion = run([*plain(spelled), *tokens(f"{END_THINK}ok{EOS}")], thinking=True)
    assert (completion.reasoning, completion.content) == (spelled, "ok")


def test_cut_reasoning() -> None:
    assert run(tokens("I think"), thinking=True) == Completion("I think", "", (), None)
    assert run([], thinking=True) == Completion("", "", (), None)
    assert run([]) == Completion(None, "", (), None)


def test_pieces_come_at_once() -> None:
    stream = CompletionStream(TOKENIZER, True, [])
    seen = [stream.push(token_id) for token_id in tokens(f"Yes no{END_THINK} it is{EOS}")]
    assert [[(d.kind, d.text) for d in deltas] for deltas in seen] == [
        [("reasoning", "Yes")],
        [("reasoning", " no")],
        [],
        [("content", " it")],
        [("content", " is")],
        [],
    ]


def test_nothing_comes_after_eos() -> None:
    assert run([*tokens(f"a{EOS}"), *tokens("b")]).content == "a"


def test_other_control_tokens_are_dropped() -> None:
    assert run(tokens(f"a{BOS}{USER}b<|EOT|>")).content == "ab"


def test_characters_cut_by_control_tokens_and_the_end() -> None:
    first_bytes = plain("😀")[:1]
    assert TOKENIZER.token_bytes(first_bytes[0]) != "😀".encode()
    completion = run([*first_bytes, *tokens(USER), *plain("x"), *first_bytes])
    assert completion.content == "\ufffdx\ufffd"
    thought = run([*first_bytes, *tokens(f"{END_THINK}x")], thinking=True)
    assert (thought.reasoning, thought.content) == ("\ufffd", "x")


@pytest.mark.parametrize("thinking", [False, True])
def test_think_tokens_at_odd_places(thinking: bool) -> None:
    """A `<think>` before any answer opens reasoning; all others only vanish."""
    start = END_THINK if thinking else ""
    reasoned = "" if thinking else None
    stray = run(tokens(f"{start}a{END_THINK}b{THINK}c{END_THINK}d"), thinking)
    assert stray == Completion(reasoned, "abcd", (), None)
    opened = run(tokens(f"{start}\n{THINK}why{THINK}?{END_THINK}so"), thinking)
    assert opened == Completion("why?", "\nso", (), None)


def test_think_twice_in_thinking_mode() -> None:
    completion = run(tokens(f"{THINK}a{END_THINK}{END_THINK}b"), thinking=True)
    assert completion == Completion("a", "b", (), None)


# ------------------------------------------------------------------ tool calls


def test_tool_call() -> None:
    completion = run(tokens(f"Let me see.{CALL}{EOS}"))
    assert completion.content == "Let me see."
    assert calls(completion) == [("get_weather", ARGUMENTS)]
    assert completion.raw_tool_text is None


def test_tool_call_after_reasoning() -> None:
    completion = run(tokens(f"R{END_THINK}{CALL}{EOS}"), thinking=True)
    assert (completion.reasoning, completion.content) == ("R", "")
    assert calls(completion) == [("get_weather", ARGUMENTS)]


def test_reference_tool_call_of_the_model() -> None:
    # fmt: off
    ids = [
        726, 30, 8189, 2230, 997, 661, 30, 8189, 264, 88, 673, 554, 727, 3087, 3491, 1332, 30,
        8189, 2024, 711, 554, 727, 2820, 4, 1181, 727, 1376, 1729, 35, 628, 277, 5289, 512, 67,
        790, 8189, 2024, 711, 661, 790, 8189, 264, 88, 673, 661, 790, 8189, 2230, 997, 32, 1,
    ]
    # fmt: on
    deltas, completion, _ = run_deltas(ids)
    assert calls(completion) == [("search_web", '{"query": "Addis Ababa"}')]
    assert {delta.kind for delta in deltas} == {"tool_call"}


def test_two_calls_have_their_own_ids() -> None:
    block = CALL.partition("\n<｜DSML｜invoke")[0]
    invokes = CALL[len(block) : CALL.index("\n</｜DSML｜tool_calls>")]
    completion = run(tokens(f"{block}{invokes}{invokes}\n</｜DSML｜tool_calls>{EOS}"))
    assert calls(completion) == [("get_weather", ARGUMENTS)] * 2
    assert completion.tool_calls[0].id != completion.tool_calls[1].id


@pytest.mark.parametrize(("newlines", "left"), [(1, ""), (2, ""), (3, "\n"), (5, "\n\n\n")])
def test_newlines_before_the_block(newlines: int, left: str) -> None:
    completion = run(tokens("x" + "\n" * newlines + CALL.lstrip("\n") + EOS))
    assert completion.content == "x" + left
    assert calls(completion) == [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize("before", ["", " ", "\n"])
def test_block_at_the_very_start(before: str) -> None:
    completion = run(tokens(before + CALL.lstrip("\n") + EOS))
    assert (completion.content, calls(completion)) == (
        before.rstrip("\n"),
        [("get_weather", ARGUMENTS)],
    )


@pytest.mark.parametrize("thinking", [False, True])
def test_markup_in_the_middle_of_a_line_is_talk(thinking: bool) -> None:
    completion = run(tokens(f'Write "<{DSML}tool_calls>\nor <{DSML}'), thinking)
    text = completion.reasoning if thinking else completion.content
    assert text == 'Write "<tool_calls>\nor <'
    assert completion.raw_tool_text is None


def test_blanks_after_the_block_are_forgiven() -> None:
    assert calls(run(tokens(f"{CALL}\n \n{EOS}"))) == [("get_weather", ARGUMENTS)]
    assert run(tokens(f"{CALL}\nDone.{EOS}")).raw_tool_text == f"{CALL}\nDone."


def test_call_without_parameters() -> None:
    block = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n{}</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>"
    )
    assert calls(run(tokens(block.format("\n")))) == [("now", "{}")]
    assert calls(run(tokens(block.format("")))) == [("now", "{}")]


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        ("3", '{"x": 3}'),
        (' {"a": [1, null]} ', '{"x":  {"a": [1, null]} }'),
        ("Beijing", '{"x": "Beijing"}'),
        ("", '{"x": ""}'),
        ('1, "y": 2', '{"x": "1, \\"y\\": 2"}'),
        ("NaN", '{"x": "NaN"}'),
        ("[" * 100_000, None),
    ],
)
def test_values_that_are_not_strings(value: str, arguments: str | None) -> None:
    text = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        f'<｜DSML｜parameter name="x" string="false">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    found = parse_completion(text, thinking=False).tool_calls[0].arguments
    assert found == (arguments or json.dumps({"x": value}))
    assert list(json.loads(found)) == ["x"]


DAMAGED = [
    CALL[:-1],
    CALL[:-10],
    CALL[: len(CALL) // 2],
    CALL[: CALL.index(">\n")],
    CALL.replace(">\n<", "><", 1),
    CALL.replace('string="true"', 'string="yes"'),
    CALL.replace(' string="true"', ""),
    CALL.replace('name="days"', 'name="city"'),
    CALL.replace("</｜DSML｜invoke>", ""),
    CALL.replace('invoke name="', "invoke name='"),
    CALL.replace("</｜DSML｜parameter>\n", "</｜DSML｜parameter>", 1),
    "\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
    "\n\n<｜DSML｜tool_calls",
    "\n\n<｜DSML｜tool",
    "\n\n<｜DSML｜",
    f"{CALL}{CALL}",
    CALL.replace("</｜DSML｜parameter>", "/｜DSML｜parameter>", 1),
    CALL.replace('"true">Beijing</｜DSML｜', '"false">Beijing</｜DSML｜x'),
    CALL.replace("get_weather", f"get{DSML}"),
    CALL.replace('name="city"', f'name="{DSML}"'),
]


@pytest.mark.parametrize("block", DAMAGED)
@pytest.mark.parametrize("end", ["", EOS])
def test_damaged_blocks_are_kept_as_text(block: str, end: str) -> None:
    completion = run(tokens(f"Well.{block}{end}"))
    assert completion == Completion(None, "Well.", (), block)


def test_a_spelled_closing_tag_does_not_close() -> None:
    value = "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    head, tail = CALL.split("Beijing")
    completion = run([*tokens(head), *plain(value), *tokens(f"{tail}{EOS}")])
    assert json.loads(completion.tool_calls[0].arguments) == {"city": value, "days": 3}


def test_control_tokens_inside_values_are_text() -> None:
    completion = run(tokens(CALL.replace("Beijing", f"a{THINK}b{DSML}c")))
    assert json.loads(completion.tool_calls[0].arguments)["city"] == f"a{THINK}b{DSML}c"


def test_stray_markup_loses_its_token() -> None:
    assert run(tokens(f"a <{DSML}b> {DSML}")).content == "a <b> "
    completion = run(tokens(f"r <{DSML}x>{END_THINK}y"), thinking=True)
    assert (completion.reasoning, completion.content) == ("r <x>", "y")


def test_block_in_reasoning_is_a_draft_if_thinking_goes_on() -> None:
    completion = run(tokens(f"Maybe{CALL} no.{END_THINK}Hi.{EOS}"), thinking=True)
    assert completion.reasoning == f"Maybe{CALL} no.".replace(DSML, "")
    assert (completion.content, completion.tool_calls) == ("Hi.", ())
    twice = run(tokens(f"Maybe{CALL}{END_THINK}{CALL}{EOS}"), thinking=True)
    assert calls(twice) == [("get_weather", ARGUMENTS)]


def test_block_in_reasoning_at_the_end_is_never_called() -> None:
    completion = run(tokens(f"Maybe\n{CALL}{EOS}"), thinking=True)
    assert completion == Completion("Maybe\n", "", (), CALL)


# ------------------------------------------------------------------ stop strings


@pytest.mark.parametrize(
    ("text", "stop", "content"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["two", "e tw"], "on"),  # complete first
        ("a\n\nb", ["\n\n"], "a"),
        ("aab", ["ab"], "a"),
        ("xaby", ["xaby", "ab"], "x"),
        ("xab", ["xab", "ab"], ""),
        ("ab", ["abc"], "ab"),
        ("ends with stop", ["stop"], "ends with "),
        ("naïve é", ["é"], "naïve "),
    ],
)
def test_stop_strings(text: str, stop: list[str], content: str) -> None:
    deltas, completion, stopped = run_deltas(tokens(text), stop=stop)
    assert completion.content == content
    assert stopped == any(pattern in text for pattern in stop)
    assert all(pattern not in delta.text for delta in deltas for pattern in stop)


def test_nothing_of_a_stop_string_gets_out() -> None:
    stream = CompletionStream(TOKENIZER, False, ["STOP NOW"])
    shown = ""
    for token_id in tokens("Go on. STOP NO"):
        shown += "".join(delta.text for delta in stream.push(token_id))
    assert shown == "Go on. "
    assert stream.finish()[1].content == "Go on. STOP NO"


def test_stop_ends_the_stream() -> None:
    stream = CompletionStream(TOKENIZER, False, ["b"])
    ids = tokens(f"abc{CALL}{EOS}")
    deltas = [delta for token_id in ids for delta in stream.push(token_id)]
    assert stream.stopped
    assert deltas == [Delta("content", "a")]
    assert stream.finish() == ([], Completion(None, "a", (), None))


def test_stop_strings_apply_to_content_only() -> None:
    completion = run(tokens(f"stop{END_THINK}a stop{EOS}"), thinking=True, stop=["stop"])
    assert (completion.reasoning, completion.content) == ("stop", "a ")
    assert calls(run(tokens(f"x{CALL}{EOS}"), stop=["Beijing"])) == [("get_weather", ARGUMENTS)]
    # the newlines before a tool block are markup
    assert calls(run(tokens(f"x{CALL}{EOS}"), stop=["\n\n"])) == [("get_weather", ARGUMENTS)]
    assert run(tokens(f"x\n{CALL}{EOS}"), stop=["\n"]).tool_calls == ()


def test_stop_string_over_a_dropped_token() -> None:
    assert run(tokens(f"a {DSML}stop b{USER}"), stop=["a stop"]).content == ""


def test_stop_string_that_names_a_token() -> None:
    _, completion, stopped = run_deltas(tokens(f"ab\n{USER}c"), stop=[USER])
    assert stopped
    assert completion.content == "ab\n"
    assert not run_deltas(tokens(f"a{USER}{END_THINK}"), thinking=True, stop=[USER])[2]


def test_stop_found_by_finish() -> None:
    stream = CompletionStream(TOKENIZER, False, ["\n"])
    assert [stream.push(i) for i in tokens("a\n")] == [[Delta("content", "a")], []]
    assert not stream.stopped
    assert stream.finish()[1].content == "a"
    assert stream.stopped


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="--stop"):
        CompletionStream(TOKENIZER, False, ["a", ""])


# ------------------------------------------------------------------ properties

pieces_of_output = st.lists(
    st.sampled_from(
        [
            *("a", " ", "\n", "\n\n", "<", "</", ">", "é", "tool_calls", 'name="'),
            *(THINK, END_THINK, DSML, USER, BOS, EOS, CALL, CALL.strip(), CALL[:60], "</｜DSML｜"),
            *("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="f">\n'),
        ]
    ),
    max_size=12,
).map("".join)
stops = st.lists(st.sampled_from(["a", " a", "\n", "\n\n<", "aé", "<a", "ll"]), max_size=2)


@given(pieces_of_output, st.booleans(), stops)
@settings(deadline=None, max_examples=400)
def test_stream_and_text_parser_agree(text: str, thinking: bool, stop: list[str]) -> None:
    streamed = run(tokens(text), thinking, stop)
    whole = parse_completion(text.replace(USER, ""), thinking, stop)
    assert calls(streamed) == calls(whole)
    assert (streamed.reasoning, streamed.content, streamed.raw_tool_text) == (
        whole.reasoning,
        whole.content,
        whole.raw_tool_text,
    )
    for name in (BOS, EOS, THINK, END_THINK, DSML):
        assert name not in streamed.content + (streamed.reasoning or "")
    assert all(pattern not in streamed.content for pattern in stop)


@given(st.lists(st.integers(0, 8191), max_size=30), st.booleans(), stops)
@settings(deadline=None)
def test_any_tokens_are_parsed(ids: list[int], thinking: bool, stop: list[str]) -> None:
    run(ids, thinking, stop)


@given(st.text(max_size=40), st.booleans(), stops)
@settings(deadline=None)
def test_any_text_is_parsed(text: str, thinking: bool, stop: list[str]) -> None:
    parse_completion(text, thinking, stop)


words = st.text("abc_é中 <>/\n{}", max_size=6)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.sampled_from([CALL, END_THINK, EOS, "</｜DSML｜parameter>\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
tool_calls = st.lists(
    st.tuples(words.filter(bool), st.dictionaries(words, json_values, max_size=3)),
    min_size=1,
    max_size=3,
)


@given(tool_calls, st.sampled_from(["", "Sure.", f"no {END_THINK}"]), st.booleans())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_rendered_calls_are_read_back(
    wanted: list[tuple[str, dict[str, Any]]], content: str, thinking: bool
) -> None:
    history = [
        Message("user", "Go."),
        Message(
            "assistant",
            content,
            reasoning="R" if thinking else None,
            tool_calls=tuple(ToolCall(n, json.dumps(a, ensure_ascii=False)) for n, a in wanted),
        ),
    ]
    asked = TOKENIZER.encode_prompt(render(history[:1], thinking=thinking))
    answered = TOKENIZER.encode_prompt(render(history, thinking=thinking))
    assert answered[: len(asked)] == asked
    completion = run(answered[len(asked) :], thinking)
    assert completion.content == content
    assert completion.reasoning == ("R" if thinking else None)
    assert [(c.name, json.loads(c.arguments)) for c in completion.tool_calls] == wanted


def test_a_long_answer_takes_no_quadratic_time() -> None:
    draft = tokens(f"x{CALL}")
    completion = run([*draft, *tokens("word " * 20_000)], thinking=True, stop=["zz"])
    assert completion.raw_tool_text is not None
    assert len(completion.raw_tool_text) > 100_000
