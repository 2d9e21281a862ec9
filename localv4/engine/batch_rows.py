"""One answer among others that are made at the same time: which tokens so far, and its end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.reply import REPEAT_WINDOW, FinishReason, ReplyOptions
from localv4.engine.sampler import Sampler
from localv4.engine.session import Session
from localv4.errors import DoesNotFitError
from localv4.model.matrix import Floats
from localv4.text.completion import Completion, CompletionStream
from localv4.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A prompt (tokens,) i64 and how to answer it."""

    prompt_ids: NDArray[np.int64]
    options: ReplyOptions


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to a prompt."""

    completion: Completion
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class RunningRow:
    """A job whose answer is under way.

    `session` has processed all tokens but the newest; it is None while the row waits for memory.
    `planned_bytes` of memory are counted for it.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, ctx_size: int) -> None:
        """Raises DoesNotFitError when the prompt leaves no room for an answer."""
        self.job = job
        self.budget = _token_budget(job, ctx_size)
        self.session: Session | None = None
        self.planned_bytes = 0
        self.token_ids: list[int] = []
        self._eos_id = tokenizer.eos_id
        self._sampler = Sampler(job.options.sampling)
        self._stream = CompletionStream(tokenizer, job.options.thinking, job.options.stop)
        self._finish_reason: FinishReason | None = None

    @property
    def newest(self) -> int:
        """The token to process next: the last of the answer, at first that of the prompt."""
        return self.token_ids[-1] if self.token_ids else int(self.job.prompt_ids[-1])

    @property
    def ids_before(self) -> NDArray[np.int64]:
        """The tokens (n,) i64 before the newest."""
        return np.concatenate([self.job.prompt_ids, np.array(self.token_ids, np.int64)])[:-1]

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens are wanted."""
        return self._finish_reason is not None

    def take(self, logits: Floats) -> None:
        """Choose the next token by its logits (vocab,). Raises NumericsError for bad ones."""
        token = self._sampler.pick(logits, self._recent())
        self.token_ids.append(token)
        self._stream.push(token)
        if token == self._eos_id or self._stream.stopped:
            self._finish_reason = "stop"
        elif len(self.token_ids) == self.budget:
            self._finish_reason = "length"

    def answer(self) -> Answer:
        """Return the whole answer, once it has ended."""
        assert self._finish_reason is not None
        _, completion = self._stream.finish()
        reason = self._finish_reason
        if self._stream.stopped:
            reason = "stop"  # the stop string lay in text that was held back
        elif completion.tool_calls and reason == "stop":
            reason = "tool_calls"
        return Answer(completion, tuple(self.token_ids), reason)

    def _recent(self) -> list[int]:
        """Return the newest tokens of prompt and answer, for the repetition penalty."""
        missing = REPEAT_WINDOW - len(self.token_ids)
        before = self.job.prompt_ids[-missing:].tolist() if missing > 0 else []
        return before + self.token_ids[-REPEAT_WINDOW:]


def _token_budget(job: Job, ctx_size: int) -> int:
    """Return how many tokens may be generated; the prompt must leave room for one."""
    room = ctx_size - len(job.prompt_ids)
    if room < 1:
        raise DoesNotFitError(
            f"the prompt has {len(job.prompt_ids)} tokens and leaves no room for an answer"
            f" in a context of {ctx_size}"
        )
    return room if job.options.max_tokens is None else min(job.options.max_tokens, room)
