"""How an answer is shown while it is generated: as plain text, or when it is complete."""

import json
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from localv4.cli import terminal
from localv4.cli.generation import Generation

if TYPE_CHECKING:
    from localv4.engine.reply import Reply
    from localv4.text.completion import Completion, Delta


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


def tool_lines(completion: "Completion") -> list[str]:
    """Write tool calls for people to read: the name, then its arguments as JSON.

    What was meant to be a call and is none is shown as the model wrote it.
    """
    calls = [f"{call.name} {call.arguments}" for call in completion.tool_calls]
    raw = completion.raw_tool_text
    return [raw] if raw and not calls else calls


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
                **({} if stats.gpu is None else {"gpu": stats.gpu.document(stats.decode_s)}),
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
        for line in tool_lines(reply.completion):
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
