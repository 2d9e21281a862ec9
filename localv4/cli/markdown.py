"""Markdown that arrives in pieces, cut into blocks that can be printed once and for good.

Only as much of CommonMark is known here as it takes to see where a block ends; what the block says
is rendered elsewhere.
"""

import re
from dataclasses import dataclass
from typing import Literal

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$")
HEADING = re.compile(r" {0,3}#{1,6}([ \t]|$)")
RULE = re.compile(r" {0,3}([-*_])[ \t]*(\1[ \t]*){2,}$")
UNDERLINE = re.compile(r" {0,3}(-+|=+)[ \t]*$")
LIST_MARKER = re.compile(r" ?([-*+]|\d{1,9}[.)])([ \t]|$)")
INTERRUPTING_MARKER = re.compile(r" ?([-*+]|1[.)])[ \t]")
OTHER_START = re.compile(r" {0,3}(#{1,6}[ \t]|>|`{3}|~{3})")


@dataclass(frozen=True, slots=True)
class Block:
    """A finished piece: a text block, or one line of a code block (`fence` lines frame it)."""

    kind: Literal["text", "fence", "code"]
    text: str
    gap: bool = False  # an empty line stood before it
    language: str = ""


@dataclass(frozen=True, slots=True)
class _Fence:
    marker: str
    language: str

    def is_closed_by(self, line: str) -> bool:
        mark = line.strip()
        return (
            len(line) - len(line.lstrip(" ")) < 4
            and len(mark) >= len(self.marker)
            and set(mark) == {self.marker[0]}
        )


class BlockSplitter:
    """Takes text as it is generated and gives it back as blocks, each as soon as it is finished."""

    def __init__(self) -> None:
        self._partial = ""  # a line without its end
        self._lines: list[str] = []  # of the unfinished block
        self._fence: _Fence | None = None  # around the current code block
        self._inner_fence: _Fence | None = None  # around code inside a list item
        self._in_item = False
        self._gap = False
        self._done: list[Block] = []

    def feed(self, text: str) -> list[Block]:
        """Add `text` and return the blocks that it finished."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._add_line(line)
        return self._take_done()

    def finish(self) -> list[Block]:
        """Return what is left when no more text will come."""
        if self._partial:
            self._add_line(self._partial)
            self._partial = ""
        self._end_block()
        return self._take_done()

    @property
    def unfinished(self) -> Block | None:
        """The block that may still change, for a preview."""
        if self._fence is not None:
            return self._code(self._partial) if self._partial else None
        text = "\n".join([*self._lines, self._partial])
        return Block("text", text, self._gap) if text.strip() else None

    def _take_done(self) -> list[Block]:
        done, self._done = self._done, []
        return done

    def _add_line(self, line: str) -> None:
        if self._fence is not None:
            self._add_code_line(line, self._fence)
        elif not (self._in_item and self._continues_item(line)):
            self._start_or_continue(line)

    def _add_code_line(self, line: str, fence: _Fence) -> None:
        if fence.is_closed_by(line):
            self._done.append(Block("fence", line.strip()))
            self._fence = None
        else:
            self._done.append(self._code(line))

    def _code(self, line: str) -> Block:
        return Block("code", line, language=self._fence.language if self._fence else "")

    def _continues_item(self, line: str) -> bool:
        """Add `line` to the open list item, or end the item and return False."""
        indent = len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip(" "))
        if self._inner_fence is not None:
            if self._inner_fence.is_closed_by(line.strip()):
                self._inner_fence = None
        elif line.strip() and indent < 2:
            lazy = self._lines[-1].strip() and not OTHER_START.match(line)
            if not lazy or LIST_MARKER.match(line) or RULE.match(line):
                self._end_block()
                return False
        elif opened := FENCE.match(line.strip()):
            self._inner_fence = _Fence(opened[1], "")
        self._lines.append(line)
        return True

    def _start_or_continue(self, line: str) -> None:
        fence = FENCE.match(line)
        if fence is not None:
            self._end_block()
            self._fence = _Fence(fence[1], fence[2].strip())
            self._emit(Block("fence", line.strip(), self._gap, self._fence.language))
        elif not line.strip():
            self._end_block()
            self._gap = True
        elif self._lines and UNDERLINE.match(line):
            self._lines.append(line)
            self._end_block()
        elif HEADING.match(line) or RULE.match(line):
            self._end_block()
            self._emit(Block("text", line, self._gap))
        elif (INTERRUPTING_MARKER if self._lines else LIST_MARKER).match(line):
            self._end_block()
            self._in_item = True
            self._lines.append(line)
        else:
            self._lines.append(line)

    def _end_block(self) -> None:
        """Emit the collected lines; empty ones at their end count as the next block's gap."""
        lines = self._lines
        self._lines, self._in_item, self._inner_fence = [], False, None
        kept = "\n".join(lines).rstrip()
        if kept:
            self._emit(Block("text", kept, self._gap))
            self._gap = bool(lines) and not lines[-1].strip()

    def _emit(self, block: Block) -> None:
        self._done.append(block)
        self._gap = False
