"""The network in the arithmetic `fast`: packed weights, programs of a team of threads.

Activations are rounded to int8 in blocks of 32 before they meet integer weights, which is finer
than the FP8 activations in blocks of 128 that the released models were trained with. Float weights
(router, hyper-connections, compressors) and FP8 ones see them unrounded. A token's result has the
same bits whatever is processed together with it, by however many threads.
"""

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import row_operations
from localv4.kernels.gemm import BATCH_TOKENS
from localv4.kernels.route import MOST_EXPERTS
from localv4.kernels.row_forms import MOST_CHANNELS
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.streams import COLUMNS, MOST_STREAMS
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.expert_source import open_store
from localv4.model.experts import Experts, MakeStore
from localv4.model.fast_chunk import ChunkPlan
from localv4.model.fast_head import HeadPlan
from localv4.model.fast_network import FastNetwork, OnRoutes
from localv4.model.fast_rows import MOST_ROWS, RowsPlan
from localv4.model.fast_token import TokenPlan
from localv4.model.matrix import Floats
from localv4.model.packing import packed_bytes_of
from localv4.model.state import SLACK_TOKENS, State
from localv4.model.weights import Weights
from localv4.paging.look_ahead import LookAhead
from localv4.paging.options import KEEP_ALL
from localv4.paging.paged_store import PagedStore
from localv4.paging.row_memory import RowMemory
from localv4.paging.store import ExpertStore

CHUNK_TOKENS = 18 * BATCH_TOKENS
"""Tokens for which each expert is read once, unless asked otherwise: some more than 4,096."""

MOST_CHUNK_TOKENS = 2 * CHUNK_TOKENS
"""The most of them, where experts have to be read from a slow disk."""

BALANCE = 0.1
"""Share of the time of a chunk that may be spent waiting for the disk before chunks grow."""

LEAST_ARENA = 8
"""Chunks grow only while an arena is so many times as large as their activations."""


def keep_all(experts: Experts) -> ExpertStore:
    """Return a store that reads experts from mapped files and never gives one up."""
    return open_store(experts, KEEP_ALL)


def can_run(config: ModelConfig) -> bool:
    """Say whether the dimensions of a network suit the kernels; those of released models do."""
    multiples = (
        (config.hidden_size, COLUMNS),
        (config.head_dim, 32),
        (config.index_head_dim, 32),
        (config.q_lora_rank, 32),
        (config.o_lora_rank, 32),
        (config.expert_width, 64),
    )
    narrow = max(config.head_dim, config.index_head_dim) <= MOST_CHANNELS
    fit = narrow and config.hc_mult <= MOST_STREAMS and config.n_experts <= MOST_EXPERTS
    return fit and not any(size % unit for size, unit in multiples)


class FastTransformer:
    """Packed weights and the forward pass over them; sequences live in `State` objects.

    Not for use by two threads at once: the buffers of activations are its own.
    """

    name = "fast"
    row_memory = RowMemory()
    slack = SLACK_TOKENS
    together = BATCH_TOKENS
    """Tokens of a prompt that attention takes at a time; no more than `slack`."""
    most_rows = MOST_ROWS
    reads_together = True  # `forward_many` gains by having several sequences

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        team: Team,
        make_store: MakeStore = keep_all,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        looks_ahead: bool = True,
        rows: RowFormat = row_operations.F32,
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self._look_ahead = LookAhead() if looks_ahead else None
        network = FastNetwork(config, weights, team, SLACK_TOKENS, make_store, rows)
        self._token = TokenPlan(network)
        self._take(network, RowsPlan(network), HeadPlan(network))

    def _take(self, network: FastNetwork, rows_plan: RowsPlan, head_plan: HeadPlan) -> None:
        """Compute with a network."""
        self._network, self._rows, self._head = network, rows_plan, head_plan
        self.config, self.weights = network.config, network.weights
        self.threads = network.team.members
        self._many = ChunkPlan(network, self.together)

    @property
    def rows(self) -> RowFormat:
        """The format of compressed rows in decoder states."""
        return self._network.rows

    def new_state(self) -> State:
        """Return the state of an empty sequence."""
        return State(self.config, self.slack, self.rows, self.row_memory)

    @property
    def cancelled(self) -> threading.Event | None:
        """The event that makes a forward pass raise Cancelled."""
        return self._network.cancelled

    @cancelled.setter
    def cancelled(self, event: threading.Event | None) -> None:
        self._network.cancelled = event

    @property
    def store(self) -> ExpertStore:
        """Where the records of the experts are."""
        return self._network.store

    @property
    def host_store(self) -> ExpertStore:
        """Where they are in the memory of this machine; a GPU has a store of its own."""
        return self.store

    def close(self) -> None:
        """Stop reading experts."""
        self.store.close()

    @property
    def record_bytes(self) -> NDArray[np.int64]:
        """Bytes of the records of experts (layers, experts), 0 where they are not packed."""
        return self._network.experts.nbytes

    @property
    def on_routes(self) -> OnRoutes | None:
        """Told which experts tokens have chosen: (tokens, layers, k), and if of a prompt."""
        return self._network.on_routes

    @on_routes.setter
    def on_routes(self, note: OnRoutes | None) -> None:
        self._network.on_routes = note

    def memory(self) -> dict[str, int]:
        """Return the bytes held by component, but for decoder state and mapped files."""
        plans = (self._token, self._many, self._rows, self._head)
        buffers = sum(plan.nbytes for plan in plans)
        return {
            "packed weights": packed_bytes_of(self.weights),
            "packed experts": self._network.store.held_bytes,
            "workspace": buffers + self._network.nbytes,
        }

    def forward(
        self, token_ids: NDArray[np.int64], state: State, wanted: int | None = None
    ) -> Floats:
        """Process tokens at `state.position` and return their final vectors (tokens, hidden).

        token_ids (tokens,) must be in the vocabulary and at most `chunk_tokens` many; only the
        vectors of the last `wanted`, one or more, are returned, if given. When anything is raised
        on the way, the state still stands before the tokens.
        """
        with self.store.in_use():
            if len(token_ids) == 1:
                vectors = self._decode(token_ids, state)
            else:
                vectors = self._read(token_ids, [state], [len(token_ids)], wanted)
        state.advance(len(token_ids))
        return vectors

    def forward_many(
        self,
        token_ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int | None = None,
    ) -> Floats:
        """Process the next tokens of several sequences, `counts` of each, one after the other.

        Returns final vectors as `forward` does, each with the bits that it has alone; takes at most
        `chunk_tokens` in all. When anything is raised, the states still stand before them.
        """
        if len(states) == 1:
            return self.forward(token_ids, states[0], wanted)
        with self.store.in_use():
            vectors = self._read(token_ids, states, counts, wanted)
        for state, count in zip(states, counts, strict=True):
            state.advance(count)
        return vectors

    def _read(
        self,
        token_ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        wanted: int | None,
    ) -> Floats:
        """Process some tokens of prompts; take more at a time from now on if they had to wait.

        Each chunk streams the experts that are not in memory once, so the more tokens it has, the
        more work there is to hide that behind. Memory for more activations is taken from experts.
        """
        store, held = self.store, self._many.nbytes
        if not isinstance(store, PagedStore):
            return self._many.run(token_ids, states, counts, wanted)
        waited_s, start = store.counts.wait_s, time.perf_counter()
        vectors = self._many.run(token_ids, states, counts, wanted)
        waited_s = store.counts.wait_s - waited_s
        added = self._many.nbytes - held
        if len(token_ids) > CHUNK_TOKENS:  # smaller chunks have their part in every plan
            store.change_memory(-added)
        may_grow = (
            len(token_ids) > self.chunk_tokens // 2
            and self.chunk_tokens < MOST_CHUNK_TOKENS
            and 2 * self._many.nbytes < store.arena.capacity // LEAST_ARENA
        )
        if may_grow and waited_s > BALANCE * (time.perf_counter() - start):
            self.chunk_tokens *= 2
        return vectors

    def decode_rows(self, token_ids: NDArray[np.int64], states: Sequence[State]) -> Floats:
        """Process one token (rows,) of each of several sequences together.

        Returns their final vectors (rows, hidden), each with the bits that it has alone. At most
        `most_rows` at a time. When anything is raised, the states still stand before the tokens.
        """
        if len(states) == 1:
            return self.forward(token_ids, states[0])
        with self.store.in_use():
            parts = [
                self._rows.run(token_ids[first:end], states[first:end])
                for first, end in _groups(states)
            ]
        for state in states:
            state.advance(1)
        return np.concatenate(parts)

    def _decode(self, token_ids: NDArray[np.int64], state: State) -> Floats:
        """Process one token, looking ahead while that pays."""
        store, look_ahead = self.store, self._look_ahead
        if look_ahead is None or not isinstance(store, PagedStore):
            return self._token.run(token_ids, state)
        self._token.look_ahead(look_ahead.on)
        counts, start = store.counts, time.perf_counter()
        waited_s, used = counts.wait_s, counts.guesses_used
        vectors = self._token.run(token_ids, state)
        # one that need not wait since its guesses were right is what guessing is for
        lacked = counts.wait_s > waited_s or counts.guesses_used > used
        is_full = counts.evictions > 0  # while memory is being filled, tokens get faster anyhow
        look_ahead.note(time.perf_counter() - start, lacked and is_full)
        return vectors

    def logits(self, vectors: Floats) -> Floats:
        """Return logits (tokens, vocab) for final vectors (tokens, hidden)."""
        return self._head.logits(vectors)


def _groups(states: Sequence[State]) -> Iterator[tuple[int, int]]:
    """Divide sequences into groups that have room in memory for what a token of each reads."""
    room = states[0].memory.room
    if room is None:
        yield 0, len(states)
        return
    first, taken = 0, 0
    for number, state in enumerate(states):
        coming = state.reads(1)
        if number > first and taken + coming > room:
            yield first, number
            first, taken = number, 0
        taken += coming
    yield first, len(states)
