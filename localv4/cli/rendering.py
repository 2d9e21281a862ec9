"""Blocks of Markdown drawn as lines for the terminal, with nothing in them that it would obey."""

import re
from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, ListItem, Markdown, MarkdownElement, TextElement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from localv4.cli import terminal
from localv4.cli.markdown import Block

# Lines of code before the current one that the highlighter sees, for strings over several lines.
HIGHLIGHT_LINES = 50
LANGUAGE_NAME = re.compile(r"[\w+#.-]{1,30}")

Lines = list[list[Segment]]


class _PlainHeading(Heading):
    """A heading at the left margin, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _PlainCode(TextElement):
    """Code inside another block: indented, no background."""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> MarkdownElement:
        return cls()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(str(self.text).rstrip("\n"), style="markdown.code_block")


class _NumberedItem(ListItem):
    """A list item whose number keeps its point."""

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        width = len(str(last_number)) + 3
        lines = console.render_lines(
            self.elements, options.update(width=max(1, options.max_width - width))
        )
        for index, line in enumerate(lines):
            yield Segment(f"{number}. ".rjust(width) if index == 0 else " " * width)
            yield from line
            yield Segment.line()


class _Markdown(Markdown):
    """rich's Markdown for chat: HTML is text, line ends are kept, links show their address."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _PlainHeading,
        "list_item_open": _NumberedItem,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class Lined:
    """Ready lines as something that a rich console prints."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


class BlockRenderer:
    """Draws the blocks of one answer; remembers recent code so that highlighting fits together."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._code: list[str] = []

    def lines(self, block: Block, *, preview: bool = False) -> Lines:
        """Return the lines of `block`; a preview leaves no trace in the memory of code."""
        if block.kind == "text":
            return _trimmed(clean_lines(self.console, _Markdown(block.text)))
        if block.kind == "fence":
            self._code = []
            return clean_lines(self.console, Text(block.text, style="dim"))
        shown = self._highlight(block)
        if not preview:
            self._code = [*self._code, block.text][-HIGHLIGHT_LINES:]
        return clean_lines(self.console, shown)

    def _highlight(self, block: Block) -> Text:
        name = (block.language.split() or [""])[0]
        if not LANGUAGE_NAME.fullmatch(name):
            return Text(block.text)
        code = "\n".join([*self._code, block.text])
        syntax = Syntax(code, name, theme="ansi_dark", background_color="default")
        return syntax.highlight(code).split("\n", allow_blank=True)[len(self._code)]


def clean_lines(console: Console, renderable: RenderableType) -> Lines:
    """Lay out and sanitise; cut the spaces that only fill lines."""
    # sanitised after the layout, because Markdown turns entities such as &#x202e; into characters
    options = console.options.update(overflow="fold")
    lines = console.render_lines(renderable, options, pad=False)
    return [_without_padding(line) for line in lines]


def _trimmed(lines: Lines) -> Lines:
    """Drop empty lines at both ends."""
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _without_padding(line: Iterable[Segment]) -> list[Segment]:
    """Sanitise the segments of a line and drop spaces at its end."""
    kept = [
        Segment(terminal.sanitize(text).replace("\n", ""), _without_link(style))
        for text, style, control in line
        if not control
    ]
    while kept and not kept[-1].text.strip(" "):
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(" "), kept[-1].style)
    return kept


def _without_link(style: Style | None) -> Style | None:
    return style.update_link(None) if style is not None and style.link else style
