"""One answer: prefill the prompt, then decode token by token until something ends it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from localv4.engine.gpu_stats import GpuStats
from localv4.engine.growing_answer import REPEAT_WINDOW, FinishReason, GrowingAnswer, ReplyOptions
from localv4.engine.paging_stats import PagingMeter, PagingStats
from localv4.engine.session import Progress, Session
from localv4.errors import Cancelled
from localv4.model.matrix import Floats
from localv4.text.completion import Completion, Delta
from localv4.text.tokenizer import Tokenizer


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
    def gpu(self) -> GpuStats | None:
        """What a GPU did for decoding, None where none helps."""
        return self.meter.gpu_stats() if self.meter is not None else None

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
        self.stats = ReplyStats(prompt_tokens=len(prompt_ids))
        self.completion = Completion(None, "", (), None)
        self._session = session
        self._prompt_ids = prompt_ids
        self._answer = GrowingAnswer(tokenizer, options, len(prompt_ids), session.ctx_size)
        self._on_prefill = on_prefill
        self._cancelled = cancelled
        self._check_files = check_files

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return self._answer.token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """What has ended the answer."""
        return self._answer.finish_reason or "cancelled"

    def __iter__(self) -> Iterator[Delta]:
        """Yield pieces of reasoning, content and tool calls as they become certain."""
        try:
            yield from self._decode(self._prefill())
        except Cancelled:
            pass
        finally:
            rest, self.completion = self._answer.finish()
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
            deltas = self._answer.take(logits, self._session.tokens[-REPEAT_WINDOW:])
            self.stats.generated_tokens += 1
            self.stats.decode_s = time.perf_counter() - start
            yield from deltas
            if self._answer.finish_reason is not None:
                return
            if self._cancelled is not None and self._cancelled.is_set():
                raise Cancelled("stopped")
            logits = self._session.extend(self.token_ids[-1:], cancelled=self._cancelled)
