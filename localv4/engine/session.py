"""One mutable timeline over an immutable network: tokens in, logits out, and back again."""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from localv4.errors import DoesNotFitError, UsageError
from localv4.kernels.threads import use_threads
from localv4.model.fast import FastTransformer
from localv4.model.matrix import Floats
from localv4.model.state import State
from localv4.model.transformer import Transformer

Network = Transformer | FastTransformer

Progress = Callable[[int, int], None]


class Session:
    """A sequence of tokens that the network has processed.

    `tokens` are the processed ids; `position` is their number. Not for use by two threads at once.
    """

    def __init__(self, network: Network, ctx_size: int) -> None:
        self.network = network
        self.ctx_size = ctx_size
        self.tokens: list[int] = []
        try:
            self._state = State(network.config, network.slack)
        except MemoryError:
            raise DoesNotFitError("not enough memory for the state of a new session") from None

    @property
    def position(self) -> int:
        """Number of tokens processed so far."""
        return self._state.position

    @property
    def state_bytes(self) -> int:
        """Bytes of memory that the decoder state holds."""
        return self._state.nbytes

    def reset(self) -> None:
        """Forget everything."""
        self.rollback(0)

    def rollback(self, position: int) -> None:
        """Forget the tokens at `position` and after.

        Free for the last `network.slack` tokens; further back the sequence starts anew and
        the next `extend` has to process its prefix again (`position` is then 0).
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot go to token {position} of {self.position}")
        reachable = position if self._state.can_roll_back(position) else 0
        self._state.roll_back(reachable)
        del self.tokens[reachable:]

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Keep what the timeline has in common with `token_ids`, drop the rest; return its length.

        At least the last of `token_ids` is left to be processed, since its logits are wanted.
        """
        shared = 0
        for mine, wanted in zip(self.tokens, token_ids[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        self.rollback(shared)
        return self.position

    def extend(
        self,
        token_ids: Sequence[int],
        *,
        chunk: int | None = None,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Floats:
        """Process tokens and return the logits (vocab,) after the last one.

        `chunk` tokens go through the network at a time (default `network.chunk_tokens`), which
        changes speed but no result. `on_progress(done, total)` is called after each chunk.
        Raises Cancelled when the event is set; finished chunks stay.
        """
        for vectors in self._process(token_ids, chunk, on_progress, cancelled):
            last = vectors[-1:]
        logits: Floats = self.network.logits(last)[0]
        return logits

    def all_logits(self, token_ids: Sequence[int], *, chunk: int | None = None) -> Floats:
        """Process tokens and return the logits (tokens, vocab) after each of them."""
        vectors = list(self._process(token_ids, chunk, None, None))
        return self.network.logits(np.concatenate(vectors))

    def _process(
        self,
        token_ids: Sequence[int],
        chunk: int | None,
        on_progress: Progress | None,
        cancelled: threading.Event | None,
    ) -> Iterator[Floats]:
        """Yield the final vectors (tokens, hidden) of each chunk; there is at least one."""
        ids = self._checked(token_ids)
        most = self.network.chunk_tokens
        size = most if chunk is None else min(max(chunk, 1), most)
        use_threads(self.network.threads)
        self.network.cancelled = cancelled
        try:
            for start in range(0, ids.shape[0], size):
                part = ids[start : start + size]
                vectors = self.network.forward(part, self._state)
                self.tokens.extend(part.tolist())
                if on_progress is not None:
                    on_progress(start + part.shape[0], ids.shape[0])
                yield vectors
        except MemoryError:
            raise DoesNotFitError(
                f"out of memory at token {self.position} of the context",
                hint="use a smaller context: --ctx-size",
            ) from None
        finally:
            self.network.cancelled = None

    def _checked(self, token_ids: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the ids as an array, all in the vocabulary and within the context."""
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise UsageError("no tokens to process")
        vocab = self.network.config.vocab_size
        outside = ids[(ids < 0) | (ids >= vocab)]
        if outside.size:
            raise UsageError(f"token id {outside[0]} is outside the vocabulary of {vocab}")
        if self.position + ids.size > self.ctx_size:
            raise DoesNotFitError(
                f"{self.position + ids.size} tokens do not fit into a context of {self.ctx_size}",
                hint="use a larger context (--ctx-size) or a shorter prompt",
            )
        return ids
