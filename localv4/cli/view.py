"""How an answer is shown while it is generated: plain text, or live Markdown on a terminal."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from localv4.cli import terminal
from localv4.cli.generation import Generation

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

    from localv4.cli.markdown import Block
    from localv4.cli.rendering import Lines
    from localv4.engine.reply import Reply
    from localv4.text.completion import Delta, ToolCall

REFRESH_S = 0.08

# Only the end of an unfinished block fits the screen; laying out all of it again and again would
# take time from the engine.
MAX_PREVIEW_CHARS = 8000


class View(Protocol):
    """Shows one answer; a context manager, so that a terminal is left clean."""

    shows_progress: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, delta: "Delta") -> None:
        """Show the next piece."""

    def tick(self, generation: Generation) -> None:
        """Bring what tells of progress up to date; called often."""

    def finish(self, reply: "Reply") -> None:
        """Show what only the whole answer tells, and end the last line."""


def tool_call_line(call: "ToolCall") -> str:
    """Write a tool call for people to read: the name, then its arguments as JSON."""
    return f"{call.name} {call.arguments}"


class _QuietView:
    """What the views have in common that draw nothing on a terminal."""

    shows_progress = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def tick(self, generation: Generation) -> None:
        """Show nothing: progress is no part of the answer."""


class JsonView(_QuietView):
    """One JSON object when the answer is complete."""

    def __init__(self, stream: TextIO, model: str) -> None:
        self._stream = stream
        self._model = model

    def show(self, delta: "Delta") -> None:
        """Wait: the whole answer comes with `finish`."""

    def finish(self, reply: "Reply") -> None:
        """Write the object on one line."""
        text = json.dumps(self._document(reply), ensure_ascii=False)
        self._stream.write(terminal.escape_json(text) + "\n")
        self._stream.flush()

    def _document(self, reply: "Reply") -> dict[str, Any]:
        stats = reply.stats
        calls = [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in reply.completion.tool_calls
        ]
        return {
            "model": self._model,
            "text": reply.completion.content,
            "reasoning": reply.completion.reasoning,
            "tool_calls": calls,
            "raw_tool_text": reply.completion.raw_tool_text,
            "finish_reason": reply.finish_reason,
            "usage": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.generated_tokens,
                "reused": stats.reused_tokens,
            },
            "timings": {
                "prefill_s": stats.prefill_s,
                "decode_s": stats.decode_s,
                "prefill_tok_s": stats.prefill_tok_s,
                "decode_tok_s": stats.decode_tok_s,
                "paging": stats.paging.document() if stats.paging is not None else None,
            },
        }


class HeldView(_QuietView):
    """Another view, which gets the answer when it is complete."""

    def __init__(self, inner: View) -> None:
        self._inner = inner
        self._held: list[Delta] = []

    def show(self, delta: "Delta") -> None:
        """Keep the piece."""
        self._held.append(delta)

    def finish(self, reply: "Reply") -> None:
        """Show everything at once."""
        with self._inner as inner:
            for delta in self._held:
                inner.show(delta)
            inner.finish(reply)


class PlainView(_QuietView):
    """Text as it comes: exact into a pipe, sanitised on a terminal; reasoning on its own stream."""

    def __init__(self, stream: TextIO, reasoning: TextIO | None) -> None:
        self._stream = stream
        self._reasoning = reasoning
        self._last: dict[int, str] = {}  # what was written last, by stream
        self._shown: str | None = None

    def show(self, delta: "Delta") -> None:
        """Write an answer or reasoning delta; tool calls are written when complete."""
        if delta.kind == "content":
            if self._shown == "reasoning":
                self._end_reasoning()
            self._write(self._stream, delta.text)
        elif delta.kind == "reasoning" and self._reasoning is not None:
            if self._shown is None:
                self._write(self._reasoning, "thinking:\n")
            self._write(self._reasoning, delta.text)
        else:
            return
        self._shown = delta.kind

    def finish(self, reply: "Reply") -> None:
        """Write the tool calls and end the last line."""
        if self._shown == "reasoning":
            self._end_reasoning()
        raw = reply.completion.raw_tool_text
        extra = [tool_call_line(call) for call in reply.completion.tool_calls]
        for line in [raw] if raw and not extra else extra:
            self._end_line(self._stream)
            self._write(self._stream, line)
        self._end_line(self._stream)

    def _end_reasoning(self) -> None:
        assert self._reasoning is not None
        self._end_line(self._reasoning)
        self._write(self._reasoning, "\n")

    def _end_line(self, stream: TextIO) -> None:
        if not self._last.get(id(stream), "\n").endswith("\n"):
            self._write(stream, "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        if text:
            stream.write(terminal.sanitize(text) if terminal.is_terminal(stream) else text)
            stream.flush()
            self._last[id(stream)] = text


class TerminalView:
    """Markdown on a terminal: finished blocks are printed once, below them a small live part.

    The live part holds the end of the unfinished block and one line of progress. It never grows
    beyond the screen, so nothing above it is ever drawn again.
    """

    shows_progress = True

    def __init__(self, console: "Console", *, hide_thinking: bool) -> None:
        from localv4.cli.markdown import BlockSplitter
        from localv4.cli.rendering import BlockRenderer

        self._console = console
        self._hide_thinking = hide_thinking
        self._splitter = BlockSplitter()
        self._renderer = BlockRenderer(console)
        self._thought = ""  # the unfinished line of reasoning
        self._thought_tokens = 0
        self._shown: str | None = None
        self._anything_printed = False
        self._progress: RenderableType | None = None
        self._drawn_at = 0.0
        self._live: Live | None = None
        self._quiet_keys: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Self:
        from rich.live import Live

        self._quiet_keys = terminal.no_echo()
        self._quiet_keys.__enter__()
        self._live = Live(
            self,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress = None
        self._print_rest()  # what an error or a signal cut off is kept on screen
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._quiet_keys.__exit__(kind, error, trace)

    def show(self, delta: "Delta") -> None:
        """Print the blocks that `delta` finishes; the rest appears with the next tick."""
        if delta.kind == "reasoning":
            self._show_reasoning(delta.text)
        elif delta.kind == "content":
            if self._shown == "reasoning":
                self._end_reasoning()
            self._print_blocks(self._splitter.feed(delta.text))
        self._shown = delta.kind

    def tick(self, generation: Generation) -> None:
        """Redraw the live part, at most every REFRESH_S."""
        if self._shown == "reasoning" or self._shown is None:
            self._thought_tokens = generation.tokens
        now = time.monotonic()
        if self._live is not None and now - self._drawn_at >= REFRESH_S:
            self._drawn_at = now
            self._progress = _progress(self._console, generation, self._shown)
            self._live.refresh()

    def finish(self, reply: "Reply") -> None:
        """Print what is left of the last block, then tool calls."""
        self._print_rest()
        calls = [tool_call_line(call) for call in reply.completion.tool_calls]
        raw = reply.completion.raw_tool_text
        for line in [raw] if raw and not calls else calls:
            self._print_text(line, "bold")

    def _print_rest(self) -> None:
        if self._shown == "reasoning":
            self._end_reasoning()
            self._shown = "content"
        self._print_blocks(self._splitter.finish())

    def _show_reasoning(self, text: str) -> None:
        if self._hide_thinking:
            return
        *lines, self._thought = (self._thought + text).split("\n")
        for line in lines:
            self._print_text(line, "dim")

    def _end_reasoning(self) -> None:
        if self._hide_thinking:
            self._print_text(f"thought for {self._thought_tokens} tokens", "dim")
        elif self._thought:
            self._print_text(self._thought, "dim")
        self._thought = ""
        self._print_text("", "none")

    def _print_text(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(terminal.sanitize(text), style=style, overflow="fold"))

    def _print_blocks(self, blocks: "list[Block]") -> None:
        from localv4.cli.rendering import Lined

        for block in blocks:
            self._console.print(Lined(self._lines(block)), end="")
            self._anything_printed = True

    def _lines(self, block: "Block", *, preview: bool = False) -> "Lines":
        lines = self._renderer.lines(block, preview=preview)
        return [[], *lines] if block.gap and self._anything_printed else lines

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Draw the live part: as many lines of the unfinished block as leave room on screen.

        Drawn anew whenever something is printed above it, so it never shows text twice.
        """
        from rich.text import Text

        from localv4.cli.rendering import Lined

        lines: Lines = []
        if self._thought:
            tail_of_thought = terminal.sanitize(self._thought[-MAX_PREVIEW_CHARS:])
            thought = Text(tail_of_thought, style="dim", overflow="fold")
            lines = console.render_lines(thought, pad=False)
        elif (block := self._splitter.unfinished) is not None:
            tail = replace(block, text=block.text[-MAX_PREVIEW_CHARS:])
            lines = self._lines(tail, preview=True)
        yield Lined(lines[-max(1, console.height - 3) :])
        if self._progress is not None:
            yield self._progress


def _progress(console: "Console", generation: Generation, shown: str | None) -> "RenderableType":
    """Return one line: a bar while the prompt is read, then tokens and speed."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if generation.is_reading:
        done, total = generation.prefill
        table = Table.grid(padding=(0, 1))
        table.add_row(
            Text("reading", style="dim"),
            ProgressBar(total=total, completed=done, width=max(4, min(40, console.width - 32))),
            Text(f"{done}/{total} tokens", style="dim", no_wrap=True),
        )
        return table
    doing = "thinking" if shown == "reasoning" else "writing"
    speed = [f"{generation.tokens_per_s:.1f} tok/s"] if generation.tokens_per_s else []
    parts = [doing, f"{generation.tokens} tok", *speed, *_paging(generation), "Ctrl-C stops"]
    return Text(" | ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def _paging(generation: Generation) -> list[str]:
    """Return what paging does at the moment, if statistics are wanted and experts are paged."""
    paging = generation.live_paging()
    if paging is None or not paging.counts.tokens:
        return []
    misses = paging.per_token(float(paging.counts.misses.sum()))
    wait_ms = 1e3 * paging.per_token(paging.counts.wait_s)
    return [f"hits {paging.hit_rate:.0%}", f"{misses:.0f} misses, {wait_ms:.0f} ms wait per tok"]
