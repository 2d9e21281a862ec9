"""One mutable timeline over an immutable network: tokens in, logits out, and back again."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localv4.engine.ladder import Ladder
from localv4.errors import DoesNotFitError, UsageError
from localv4.kernels.row_operations import COMPACT
from localv4.kernels.threads import use_threads
from localv4.model.fast import FastTransformer
from localv4.model.matrix import Floats
from localv4.model.rungs import STEP_TOKENS, last_step, wanted_rungs
from localv4.model.snapshot import Passing, Snapshot, fork, restore, take_snapshot
from localv4.model.state import State
from localv4.model.transformer import Transformer

Network = Transformer | FastTransformer

Progress = Callable[[int, int], None]

SHORTER_PROMPT = "use a shorter prompt, or a larger context (--ctx-size) if the model allows it"
"""What helps a prompt that is longer than the context."""


class Store(Protocol):
    """Where prefixes of timelines are kept beyond the life of a session."""

    def load(self, state: State, token_ids: Sequence[int], valid: int) -> Snapshot | None:
        """Bring `state` to the longest prefix of `token_ids` that is stored, if that is a gain.

        The entries of the first `valid` tokens are in the state already. Returns the snapshot
        at which the state stands now, None when nothing was changed.
        """


class Session:
    """A sequence of tokens that the network has processed.

    `tokens` are the processed ids; `position` is their number; `store`, if there is one, knows
    prefixes that this or another process had. Not for use by two threads at once.
    """

    def __init__(self, network: Network, ctx_size: int) -> None:
        self.network = network
        self.ctx_size = ctx_size
        self.tokens: list[int] = []
        self.ladder = Ladder()
        self.store: Store | None = None
        self._keeps_snapshots = True
        try:
            self._state = network.new_state()
        except MemoryError:
            raise _no_room_for_a_session(network) from None

    @property
    def state(self) -> State:
        """The decoder state, for those who copy it."""
        return self._state

    @property
    def position(self) -> int:
        """Number of tokens processed so far."""
        return self._state.position

    @property
    def state_bytes(self) -> int:
        """Bytes of memory that the decoder state and its snapshots hold."""
        return self._state.nbytes + self.ladder.nbytes

    def reset(self) -> None:
        """Forget everything."""
        self.rollback(0)

    def keep_no_snapshots(self) -> None:
        """Give up the ways back, now and later: beyond the rings there is only the beginning."""
        self._keeps_snapshots = False
        self.ladder = Ladder()

    def fork(self) -> "Session":
        """Return another timeline that begins with the same tokens and goes its own way.

        It shares what it can: see `model.snapshot.fork`.
        """
        twin = Session(self.network, self.ctx_size)
        twin.tokens, twin.ladder, twin.store = self.tokens.copy(), self.ladder.copy(), self.store
        try:
            twin._state = fork(self._state)
        except MemoryError:
            raise _no_room_for_a_session(self.network) from None
        return twin

    def rollback(self, position: int) -> None:
        """Forget the tokens at `position` and after.

        Free for the last `network.slack` tokens. Further back the sequence stands at the nearest
        rung of its ladder afterwards (`position` tells where), and the next `extend` has to process
        the tokens from there on.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot go to token {position} of {self.position}")
        rung = self.ladder.below(position)
        if self._state.can_roll_back(position):
            self._state.roll_back(position)
        elif rung is not None:
            restore(self._state, rung)
        else:
            self._state.roll_back(0)
        self.ladder.cut(self.position)
        del self.tokens[self.position :]

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Keep what the timeline has in common with `token_ids`, drop the rest; return its length.

        What the store knows of them is used if that is more. At least the last of `token_ids` is
        left to be processed, since its logits are wanted.
        """
        shared = common_prefix(self.tokens, token_ids[:-1])
        self.rollback(shared)
        if self.store is not None:
            try:
                found = self.store.load(self._state, token_ids[:-1], shared)
            except MemoryError:
                raise DoesNotFitError(
                    "not enough memory for a stored session", hint=remedy(self.network)
                ) from None
            if found is not None:
                self.tokens = list(token_ids[: found.position])
                self.ladder.add(found)
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
        for vectors in self._process(token_ids, chunk, on_progress, cancelled, wanted=1):
            last = vectors[-1:]
        if len(token_ids) > 1:
            self.ladder.note_prompt(self.position)
        logits: Floats = self.network.logits(last)[0]
        return logits

    def read(self, token_ids: Sequence[int], cancelled: threading.Event | None = None) -> None:
        """Process tokens as `extend` does, without the logits after the last one."""
        for _ in self._process(token_ids, None, None, cancelled, wanted=1):
            pass
        self.ladder.note_prompt(self.position)

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
        *,
        wanted: int | None = None,
    ) -> Iterator[Floats]:
        """Yield the final vectors (tokens, hidden) of each chunk; there is at least one.

        At most those of the last `wanted` tokens of each, if given.
        """
        ids = self._checked(token_ids)
        start = 0
        use_threads(self.network.threads)
        self.network.cancelled = cancelled
        try:
            while start < ids.shape[0]:
                most = self.network.chunk_tokens  # it may change with what the disk achieves
                size = most if chunk is None else min(max(chunk, 1), most)
                left = ids.shape[0] - start
                size = -(-left // -(-left // size))  # equal parts: a short one costs as much
                part = ids[start : start + size]
                vectors = self._pass(part, wanted)
                self.tokens.extend(part.tolist())
                self._climb(part.shape[0])
                start += part.shape[0]
                if on_progress is not None:
                    on_progress(start, ids.shape[0])
                yield vectors
        except MemoryError:
            raise DoesNotFitError(
                f"out of memory at token {self.position} of the context",
                hint="use a smaller context: --ctx-size",
            ) from None
        finally:
            self.network.cancelled = None

    def _pass(self, part: NDArray[np.int64], wanted_vectors: int | None) -> Floats:
        """Process some tokens; put up the rungs that they pass where the rings move on."""
        first, end = self.position, self.position + len(part)
        wanted = wanted_rungs(first, end - self.network.slack) if self._keeps_snapshots else ()
        passing = Passing(wanted)
        self._state.passer = passing
        try:
            vectors = self.network.forward(part, self._state, wanted_vectors)
        finally:
            self._state.passer = None
        for rung in passing.taken(self._state):
            self.ladder.add(rung)
        return vectors

    def _climb(self, tokens: int) -> None:
        """Put up the rungs that the last `tokens` tokens have passed, where the rings allow it."""
        if not self._keeps_snapshots:
            return
        tip = self.position
        passed = range(last_step(tip), tip - tokens, -STEP_TOKENS)
        for place in filter(self._state.can_roll_back, passed):
            self.ladder.add(take_snapshot(self._state, place))
        if passed:
            self.ladder.thin_out(tip)

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
                hint=SHORTER_PROMPT,
            )
        return ids


def extend_together(
    sessions: Sequence[Session],
    parts: Sequence[Sequence[int]],
    cancelled: threading.Event | None = None,
) -> None:
    """Process the next tokens of several timelines of one network; no logits are computed.

    In all they are at most `network.chunk_tokens`. Raises as `Session.extend`; then those that
    were not finished stand where they stood.
    """
    network = sessions[0].network
    if not (network.reads_together and isinstance(network, FastTransformer)):
        for session, part in zip(sessions, parts, strict=True):
            session.read(part, cancelled)
        return
    ids = [session._checked(part) for session, part in zip(sessions, parts, strict=True)]
    counts = [part.size for part in ids]
    use_threads(network.threads)
    network.cancelled = cancelled
    try:
        states = [session.state for session in sessions]
        network.forward_many(np.concatenate(ids), states, counts, wanted=1)
    except MemoryError:
        raise DoesNotFitError(
            f"out of memory in a prompt of {max(counts)} tokens", hint=remedy(network)
        ) from None
    finally:
        network.cancelled = None
    for session, own in zip(sessions, ids, strict=True):
        session.tokens.extend(own.tolist())
        session._climb(own.size)


def remedy(network: Network) -> str:
    """Say what leaves more memory to the context of a network."""
    if isinstance(network, Transformer):
        return "close other programs, or use --numerics fast, whose context takes less"
    smaller_rows = "" if network.rows is COMPACT else ", use --kv compact"
    return f"close other programs{smaller_rows}, or keep fewer experts in memory: a smaller --ram"


def _no_room_for_a_session(network: Network) -> DoesNotFitError:
    """Say what helps where there is no memory for rings: how rows are stored does not matter."""
    is_paged = isinstance(network, FastTransformer)
    fewer = ", or keep fewer experts in memory: a smaller --ram" if is_paged else ""
    message = "not enough memory for the state of a new session"
    return DoesNotFitError(message, hint=f"close other programs{fewer}")


def common_prefix(mine: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    most = min(len(mine), len(wanted))
    different = np.flatnonzero(np.asarray(mine[:most]) != np.asarray(wanted[:most]))
    return int(different[0]) if different.size else most
