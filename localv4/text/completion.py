"""Split what the model writes into reasoning, answer and tool calls, while it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from localv4.text.dsml import CALLS_OPEN, ToolCall
from localv4.text.dsml_parser import parse_calls
from localv4.text.marks import (
    DSML_MARK,
    END_THINK_MARK,
    MARKS,
    THINK_MARK,
    marked,
    spelled,
    unmarked,
)
from localv4.text.special_tokens import BOS, EOS
from localv4.text.stop_strings import StopFilter, held_length
from localv4.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Completion", "CompletionStream", "Delta", "ToolCall", "parse_completion"]

Kind = Literal["reasoning", "content", "tool_call"]

_CALLS = marked(CALLS_OPEN)
# Official output has two newlines before the block. One is enough, and none at the very start; but
# in the middle of a line the model only talks about the markup.
_CALLS_AFTER_NEWLINES = (f"\n\n{_CALLS}", f"\n{_CALLS}", _CALLS)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of output; the texts of a kind join to the whole. Tool calls come as raw markup."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    `reasoning` is None where the model did not think. `raw_tool_text` holds the markup of tool
    calls that was cut or damaged; there are no `tool_calls` then.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    raw_tool_text: str | None


class CompletionStream:
    """Token ids in, pieces of the answer out.

    * Control tokens never show up in reasoning or content. `<think>`, `</think>` and `｜DSML｜`
      work, EOS ends the answer, all others are dropped.
    * Text that merely spells a control token is ordinary text.
    * Stop strings apply to the content only, not to reasoning or tool calls. One that is the name
      of a control token matches that token.
    * Read `stopped` after `finish`: a stop string may be completed by text that was held back.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = _Splitter(thinking, stop)
        self._marks = {tokenizer.special_id(name): mark for name, mark in MARKS.items()}
        self._stop = frozenset(stop)
        self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._splitter.stopped

    def push(self, token_id: int) -> list[Delta]:
        """Take the next token; after EOS or a stop string nothing more comes out."""
        if self._ended or self.stopped:
            return []
        name = self._tokenizer.special_text(token_id)
        if name is None:
            return self._splitter.feed(self._decoder.feed(token_id))
        self._ended = token_id == self._tokenizer.eos_id
        deltas = self._splitter.feed(self._decoder.finish() + self._marks.get(token_id, ""))
        if name in self._stop:
            deltas += self._splitter.stop_here()
        return deltas

    def finish(self) -> tuple[list[Delta], Completion]:
        """Return what was held back, and the whole answer."""
        deltas = self._splitter.feed(self._decoder.finish()) + self._splitter.finish()
        return deltas, self._splitter.completion()


def parse_completion(text: str, thinking: bool, stop: Sequence[str] = ()) -> Completion:
    """Parse a completion that exists as text, where names of control tokens count as tokens."""
    splitter = _Splitter(thinking, stop)
    splitter.feed(marked(text.partition(EOS)[0].replace(BOS, "")))
    splitter.finish()
    return splitter.completion()


class _Splitter:
    """The parser proper, on marked text.

    It begins in reasoning or in content. `</think>` leads to content, and `<think>` to reasoning
    as long as there is no content but blanks. A tool block leads from content to its end; in
    reasoning it is only a draft if `</think>` follows, and damage otherwise.
    """

    def __init__(self, thinking: bool, stop: Sequence[str]) -> None:
        self._state: Kind = "reasoning" if thinking else "content"
        self._buffer = ""  # marked text that is not decided yet
        self._block: list[str] = []  # marked text of tool calls
        self._reasoned = thinking
        self._texts: dict[Kind, list[str]] = {"reasoning": [], "content": [], "tool_call": []}
        self._answered = False
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def feed(self, text: str) -> list[Delta]:
        """Take more marked text."""
        if self.stopped:
            return []
        self._buffer += text
        deltas: list[Delta] = []
        while self._buffer and not self.stopped:
            state, length = self._state, len(self._buffer)
            deltas += self._step()
            if (state, length) == (self._state, len(self._buffer)):
                break
        return deltas

    def finish(self) -> list[Delta]:
        """Decide what was held back: no more text follows."""
        deltas = []
        rest, self._buffer = self._buffer, ""
        if not self.stopped:
            start = self._block_start(rest, f"<{DSML_MARK}")
            before, block = (rest[:start], rest[start:]) if start >= 0 else (rest, "")
            if self._state == "reasoning":
                deltas += self._emit("reasoning", before)
            else:
                deltas += self._content(before)
            if not self.stopped:
                deltas += self._tool_text(block)
        deltas += self._emit("content", self._filter.flush())
        return deltas

    def stop_here(self) -> list[Delta]:
        """Stop if the answer is at its content; what was held back belongs to it."""
        if self._state != "content" or self.stopped:
            return []
        held, self._buffer = self._buffer, ""
        deltas = self._content(held)
        deltas += self._emit("content", self._filter.flush())
        self._filter.stopped = True
        return deltas

    def completion(self) -> Completion:
        """Return the whole answer, after `finish`."""
        block = "".join(self._block)
        calls = parse_calls(block.lstrip("\n")) if self._state == "tool_call" else None
        return Completion(
            reasoning="".join(self._texts["reasoning"]) if self._reasoned else None,
            content="".join(self._texts["content"]),
            tool_calls=calls or (),
            raw_tool_text=spelled(block) if block and not calls else None,
        )

    def _step(self) -> list[Delta]:
        """Take one part off the buffer if it can be decided."""
        if self._state == "reasoning":
            return self._step_reasoning()
        if self._state == "content":
            return self._step_content()
        text, self._buffer = self._buffer, ""
        return self._tool_text(text)

    def _step_reasoning(self) -> list[Delta]:
        text, end, rest = self._buffer.partition(END_THINK_MARK)
        if end:
            self._state, self._buffer = "content", rest
            return self._emit("reasoning", text)
        draft = self._block_start(text, _CALLS)
        before = draft if draft >= 0 else self._decided(text)
        self._buffer = text[before:]
        return self._emit("reasoning", text[:before])

    def _step_content(self) -> list[Delta]:
        text = self._buffer
        start = self._block_start(text, _CALLS)
        think = text.find(THINK_MARK) if not self._answered else -1
        if think >= 0 and not unmarked(text[:think]).strip() and (start < 0 or think < start):
            self._state, self._reasoned = "reasoning", True
            self._buffer = text[think + 1 :]
            return self._content(text[:think])
        if start < 0:
            decided = self._decided(text)
            self._buffer = text[decided:]
            return self._content(text[:decided])
        deltas = self._content(text[:start])
        if not self.stopped:
            deltas += self._emit("content", self._filter.flush())
            self._state, self._buffer = "tool_call", text[start:]
        return deltas

    def _block_start(self, text: str, opening: str) -> int:
        """Return where a tool block begins, with up to two newlines before it; -1 if nowhere."""
        at = text.find(opening)
        while at >= 0:
            newlines = min(2, at - len(text[:at].rstrip("\n")))
            first = self._state == "content" and not self._answered
            if newlines or (first and not unmarked(text[:at]).strip()):
                return at - newlines
            at = text.find(opening, at + 1)
        return -1

    def _decided(self, text: str) -> int:
        """Return how much of `text` cannot belong to the opening of a tool block."""
        return len(text) - held_length(text, _CALLS_AFTER_NEWLINES)

    def _content(self, text: str) -> list[Delta]:
        """Pass text on to the stop strings."""
        self._answered = self._answered or bool(unmarked(text).strip())
        return self._emit("content", self._filter.feed(unmarked(text)))

    def _tool_text(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._block.append(text)
        return self._emit("tool_call", text)

    def _emit(self, kind: Kind, text: str) -> list[Delta]:
        clean = spelled(text) if kind == "tool_call" else unmarked(text)
        if not clean:
            return []
        self._texts[kind].append(clean)
        return [Delta(kind, clean)]
