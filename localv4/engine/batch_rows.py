"""One answer among others that are made at the same time: which tokens so far, and its end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.engine.growing_answer import REPEAT_WINDOW, FinishReason, GrowingAnswer, ReplyOptions
from localv4.engine.session import Session
from localv4.model.matrix import Floats
from localv4.text.completion import Completion
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
    memory for `planned_tokens` is counted for it.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, ctx_size: int) -> None:
        """Raises DoesNotFitError when the prompt leaves no room for an answer."""
        self.job = job
        self.session: Session | None = None
        self.planned_tokens = 0
        self._answer = GrowingAnswer(tokenizer, job.options, len(job.prompt_ids), ctx_size)

    @property
    def budget(self) -> int:
        """How many tokens the answer may have."""
        return self._answer.budget

    @property
    def newest(self) -> int:
        """The token to process next: the last of the answer, at first that of the prompt."""
        ids = self._answer.token_ids
        return ids[-1] if ids else int(self.job.prompt_ids[-1])

    @property
    def ids_before(self) -> NDArray[np.int64]:
        """The tokens (n,) i64 before the newest."""
        own = np.array(self._answer.token_ids, np.int64)
        return np.concatenate([self.job.prompt_ids, own])[:-1]

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens are wanted."""
        return self._answer.finish_reason is not None

    def take(self, logits: Floats) -> None:
        """Choose the next token by its logits (vocab,). Raises NumericsError for bad ones."""
        self._answer.take(logits, self._recent())

    def answer(self) -> Answer:
        """Return the whole answer, once it has ended."""
        _, completion = self._answer.finish()
        reason = self._answer.finish_reason
        assert reason is not None
        return Answer(completion, tuple(self._answer.token_ids), reason)

    def _recent(self) -> list[int]:
        """Return the newest tokens of prompt and answer, for the repetition penalty."""
        ids = self._answer.token_ids
        missing = REPEAT_WINDOW - len(ids)
        before = self.job.prompt_ids[-missing:].tolist() if missing > 0 else []
        return before + ids[-REPEAT_WINDOW:]
