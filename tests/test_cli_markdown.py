"""Markdown cut into blocks and drawn for the terminal."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli_terminal import ATTACKS, is_harmless

from localv4.cli import terminal
from localv4.cli.markdown import Block, BlockSplitter
from localv4.cli.rendering import BlockRenderer, Lined

ANSWER = """# Title
Some *text* with `code`.
second line

```python
def f(a):
    \"\"\"doc
    more\"\"\"
    return a
```
Steps:
1. One
2. Two
   ```sh
   - not an item
   ```

   more of two
3. Three

* a
  * b
* c
lazy line

| a | b |
|---|--:|
| 1 | 2 |

> quote
> more

Under
-----
***
last"""

# Pieces that make fences, lists, headings and the like out of random text.
SNIPPETS = st.sampled_from(
    ["```", "~~~", "```py", "- ", "1. ", "10) ", "# ", "> ", "---", "===", "|a|b|", "|-|-|"]
)
TEXTS = st.lists(
    st.one_of(st.sampled_from(["\n", "\n\n", "  ", "    ", "**", "`", "\t"]), SNIPPETS, st.text())
).map("".join)


def split(text: str, sizes: list[int]) -> list[Block]:
    """Feed `text` in pieces of the given sizes, then the rest."""
    splitter, blocks = BlockSplitter(), []
    for size in sizes:
        blocks += splitter.feed(text[:size])
        text = text[size:]
    return [*blocks, *splitter.feed(text), *splitter.finish()]


def draw(blocks: list[Block], width: int = 60) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    renderer = BlockRenderer(console)
    for block in blocks:
        console.print(Lined(renderer.lines(block)), end="")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_blocks_of_an_answer() -> None:
    blocks = split(ANSWER, [])
    assert [(block.kind, block.text.split("\n")[0]) for block in blocks] == [
        ("text", "# Title"),
        ("text", "Some *text* with `code`."),
        ("fence", "```python"),
        ("code", "def f(a):"),
        ("code", '    """doc'),
        ("code", '    more"""'),
        ("code", "    return a"),
        ("fence", "```"),
        ("text", "Steps:"),
        ("text", "1. One"),
        ("text", "2. Two"),
        ("text", "3. Three"),
        ("text", "* a"),
        ("text", "* c"),
        ("text", "| a | b |"),
        ("text", "> quote"),
        ("text", "Under"),
        ("text", "***"),
        ("text", "last"),
    ]
    gaps = [block.text.split("\n")[0] for block in blocks if block.gap]
    assert gaps == ["```python", "* a", "| a | b |", "> quote", "Under"]
    assert {block.language for block in blocks if block.kind == "code"} == {"python"}


@given(TEXTS, st.lists(st.integers(1, 8)))
def test_pieces_do_not_matter(text: str, sizes: list[int]) -> None:
    assert split(text, sizes) == split(text, [])


@given(TEXTS)
def test_no_text_is_lost(text: str) -> None:
    kept = "\n".join(block.text for block in split(text, []))
    assert re.sub(r"\s", "", kept) == re.sub(r"\s", "", text)


@given(TEXTS, st.integers(1, 60))
def test_any_text_can_be_drawn(text: str, width: int) -> None:
    assert is_harmless(draw(split(text, []), width))


@given(TEXTS)
def test_preview_has_all_that_is_not_printed_yet(text: str) -> None:
    splitter = BlockSplitter()
    printed = splitter.feed(text)
    preview = splitter.unfinished
    shown = [*printed, *([preview] if preview is not None else [])]
    assert re.sub(r"\s", "", "".join(block.text for block in shown)) == re.sub(r"\s", "", text)


def test_drawn_answer() -> None:
    drawn = draw(split(ANSWER, []))
    assert "Title\nSome text with code.\nsecond line\n" in drawn
    assert '```python\ndef f(a):\n    """doc\n    more"""\n    return a\n```\n' in drawn
    assert " 1. One\n 2. Two\n" in drawn
    assert all(line == line.rstrip() for line in drawn.splitlines())


def test_html_is_shown() -> None:
    assert draw(split("a <b>bold</b> List<int>\n\n<div>\nx\n</div>", [])) == (
        "a <b>bold</b> List<int>\n<div>\nx\n</div>\n"
    )


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["{}", "`{}`", "# {}", "- {}", "```\n{}\n```", "[x]({})"])
def test_attack_in_markdown(attack: str, form: str) -> None:
    assert is_harmless(draw(split(form.format(attack), [])))


@pytest.mark.parametrize(
    "entity", ["&#27;", "&#x202e;", "&#13;", "&#xE0041;", "&#x9b;", "&#x2067;"]
)
def test_entity_cannot_make_a_control(entity: str) -> None:
    assert is_harmless(draw(split(f"a {entity}[2J `{entity}` [x]({entity})", [])))


def test_link_is_shown_not_sent() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    blocks = split("[click](http://evil.example/x)", [])
    console.print(Lined(BlockRenderer(console).lines(blocks[0])))
    assert isinstance(console.file, io.StringIO)
    assert "\x1b]8" not in console.file.getvalue()
    assert "evil.example" in console.file.getvalue()


def test_code_is_highlighted_with_its_context() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=60, force_terminal=True, color_system="standard")
    renderer = BlockRenderer(console)
    for block in split('```python\n"""a\nif b\n"""\nif b: pass\n```', []):
        console.print(Lined(renderer.lines(block)), end="")
    in_string, keyword = [line for line in stream.getvalue().splitlines() if "if" in line]
    assert in_string.split("if")[0] != keyword.split("if")[0]


@pytest.mark.parametrize("language", ["no-such-language", "x" * 5000, "../../etc", "\x1b[2J", ""])
def test_unknown_language(language: str) -> None:
    drawn = draw(split(f"```{language}\nsome code\n```", []), width=6000)
    assert "\nsome code\n" in drawn
    assert is_harmless(drawn)
    assert terminal.sanitize(language) in drawn
