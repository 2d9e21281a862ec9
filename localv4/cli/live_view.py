"""How an answer is shown on a terminal while it is generated: live Markdown and a progress line."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from localv4.cli import terminal
from localv4.cli.generation import Generation
from localv4.cli.view import tool_lines

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

    from localv4.cli.markdown import Block
    from localv4.cli.rendering import Lines
    from localv4.engine.reply import Reply
    from localv4.text.completion import Delta

REFRESH_S = 0.08

# Only the end of an unfinished block fits the screen; laying out all of it again and again would
# take time from the engine.
MAX_PREVIEW_CHARS = 8000


class LiveView:
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
        for line in tool_lines(reply.completion):
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
