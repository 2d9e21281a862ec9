"""The tokens of one answer: each is picked from logits, until something ends it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from localv4.engine.sampler import Sampler, Sampling
from localv4.engine.session import SHORTER_PROMPT
from localv4.errors import DoesNotFitError, UsageError
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


class GrowingAnswer:
    """An answer under way; `budget` tokens at most.

    `finish_reason` is None until its last token is there, and final after `finish`.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: ReplyOptions, prompt_tokens: int, ctx_size: int
    ) -> None:
        """Raises DoesNotFitError when the prompt leaves no room, UsageError for bad options."""
        self.budget = _token_budget(options.max_tokens, prompt_tokens, ctx_size)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos_id = tokenizer.eos_id
        self._sampler = Sampler(options.sampling)
        self._stream = CompletionStream(tokenizer, options.thinking, options.stop)

    def take(self, logits: Floats, recent: Sequence[int]) -> list[Delta]:
        """Pick the next token by its logits (vocab,); return the text that is certain with it.

        `recent` are the REPEAT_WINDOW newest tokens of prompt and answer. Raises NumericsError for
        logits that are not finite.
        """
        token = self._sampler.pick(logits, recent)
        self.token_ids.append(token)
        deltas = self._stream.push(token)
        if token == self._eos_id or self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.budget:
            self.finish_reason = "length"
        return deltas

    def finish(self) -> tuple[list[Delta], Completion]:
        """Return the text that was held back, and the whole answer; no more tokens follow."""
        rest, completion = self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"  # the stop string lay in text that was held back
        elif completion.tool_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return rest, completion


def _token_budget(max_tokens: int | None, prompt_tokens: int, ctx_size: int) -> int:
    """Return how many tokens may be generated; the prompt must leave room for one."""
    room = ctx_size - prompt_tokens
    if room < 1:
        raise DoesNotFitError(
            f"the prompt has {prompt_tokens} tokens and leaves no room for an answer"
            f" in a context of {ctx_size}",
            hint=SHORTER_PROMPT,
        )
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}, expected at least 1")
    return room if max_tokens is None else min(max_tokens, room)
