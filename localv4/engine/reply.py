"""One answer: prefill the prompt, then decode token by token until something ends it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from localv4.engine.paging_stats import PagingMeter, PagingStats
from localv4.engine.sampler import Sampler, Sampling
from localv4.engine.session import Progress, Session
from localv4.errors import Cancelled, DoesNotFitError, UsageError
from localv4.model.matrix import Floats
from localv4.text.completion import Completion, CompletionStream, Delta
from localv4.text.tokenizer import Tokenizer

REPEAT_WINDOW = 256
"""Newest tokens, of prompt and answer, that a repetition penalty looks at."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """What the caller wants: `max_tokens` None means as many as the context holds."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    thinking: bool = False
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class ReplyStats:
    """Counts and wall-clock seconds of one answer; `reused_tokens` of the prompt cost nothing.

    `meter` counts what is paged in the meantime.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    generated_tokens: int = 0
    decode_s: float = 0.0
    meter: PagingMeter | None = None

    @property
    def paging(self) -> PagingStats | None:
        """What decoding has paged, None where everything is in memory."""
        return self.meter.stats() if self.meter is not None else None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens processed per second."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_s)

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first, which prefill pays for."""
        return _rate(self.generated_tokens - 1, self.decode_s)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0


class Reply:
    """Iterate it once for the pieces of text; afterwards the other attributes are final.

    They are final, too, when the iteration is left early or ends in an exception.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: ReplyOptions,
        on_prefill: Progress | None,
        cancelled: threading.Event | None,
        check_files: Callable[[], None],
    ) -> None:
        self.finish_reason: FinishReason = "cancelled"
        self.token_ids: list[int] = []
        self.stats = ReplyStats(prompt_tokens=len(prompt_ids))
        self.completion = Completion(None, "", (), None)
        self._session = session
        self._prompt_ids = prompt_ids
        self._eos_id = tokenizer.eos_id
        self._sampler = Sampler(options.sampling)
        self._stream = CompletionStream(tokenizer, options.thinking, options.stop)
        self._on_prefill = on_prefill
        self._cancelled = cancelled
        self._check_files = check_files
        self._budget = self._token_budget(options.max_tokens)

    def _token_budget(self, max_tokens: int | None) -> int:
        """Return how many tokens may be generated; the prompt must leave room for one."""
        room = self._session.ctx_size - len(self._prompt_ids)
        if room < 1:
            raise DoesNotFitError(
                f"the prompt has {len(self._prompt_ids)} tokens and leaves no room for an answer"
                f" in a context of {self._session.ctx_size}",
                hint="use a larger context (--ctx-size) or a shorter prompt",
            )
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"--max-tokens is {max_tokens}, expected at least 1")
        return room if max_tokens is None else min(max_tokens, room)

    def __iter__(self) -> Iterator[Delta]:
        """Yield pieces of reasoning, content and tool calls as they become certain."""
        try:
            yield from self._decode(self._prefill())
        except Cancelled:
            self.finish_reason = "cancelled"
        finally:
            rest, self.completion = self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"  # the stop string lay in text that was held back
        elif self.completion.tool_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        yield from rest

    def _prefill(self) -> Floats:
        start = time.perf_counter()
        self.stats.reused_tokens = self._session.reuse(self._prompt_ids)
        try:
            return self._session.extend(
                self._prompt_ids[self.stats.reused_tokens :],
                on_progress=self._on_prefill,
                cancelled=self._cancelled,
            )
        finally:
            self.stats.prefill_s = time.perf_counter() - start

    def _decode(self, logits: Floats) -> Iterator[Delta]:
        start = time.perf_counter()
        self.stats.meter = meter = PagingMeter(self._session.network)
        try:
            yield from self._pick_tokens(logits, start)
        finally:
            meter.stop()

    def _pick_tokens(self, logits: Floats, start: float) -> Iterator[Delta]:
        while True:
            self._check_files()  # of changed weights no token may come
            token = self._sampler.pick(logits, self._session.tokens[-REPEAT_WINDOW:])
            self.token_ids.append(token)
            self.stats.generated_tokens += 1
            self.stats.decode_s = time.perf_counter() - start
            yield from self._stream.push(token)
            if token == self._eos_id or self._stream.stopped:
                self.finish_reason = "stop"
                return
            if len(self.token_ids) == self._budget:
                self.finish_reason = "length"
                return
            if self._cancelled is not None and self._cancelled.is_set():
                raise Cancelled("stopped")
            logits = self._session.extend([token], cancelled=self._cancelled)
