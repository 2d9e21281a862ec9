"""What the programs for one token and for many have in common: layers, team, experts, state."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from localv4.cancellation import Cancellation
from localv4.errors import Cancelled
from localv4.kernels.operation import COUNTER
from localv4.kernels.row_operations import RowFormat
from localv4.kernels.team import Team
from localv4.model.config import ModelConfig
from localv4.model.experts import Experts, MakeStore
from localv4.model.fast_layer import FastLayer, Site
from localv4.model.fast_moe import FastMoe, WaveBuffers
from localv4.model.matrix import F32, Floats, Numerics, look_up
from localv4.model.program import Program, Scratch
from localv4.model.state import CELLS, State
from localv4.model.weights import Weights
from localv4.model.workspace import ChunkBuffers
from localv4.paging.store import ExpertStore

NO_CHUNK = 1 << 40
"""More than an operation has chunks."""

LOOKED_UP = 16
"""Embeddings that are read between two looks at whether to stop."""

OnRoutes = Callable[[NDArray[np.integer], bool], None]
"""Told which experts (tokens, layers, k) some tokens have chosen, and whether they are a prompt."""


class FastNetwork:
    """The layers of a network over packed weights, and the team that runs their programs.

    `slack` and `rows` are those of every `State` that the network is used with.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        team: Team,
        slack: int,
        make_store: MakeStore,
        rows: RowFormat,
    ) -> None:
        self.config, self.weights, self.rows = config, weights, rows
        self._cancelled: threading.Event | None = None
        self._running: NDArray[np.int64] | None = None
        self.on_routes: OnRoutes | None = None
        self.team = team
        self.experts = Experts([layer.experts for layer in weights.layers])
        self.store = make_store(self.experts)
        self._exact = Numerics(team, weights.widest)
        self.scratch = Scratch.of(team.members, weights.widest)
        self._cells = np.zeros((config.n_layers, CELLS), np.int64)
        self.layers = [
            FastLayer(i, layer, config, self.experts, self.store_of(i), self._cells[i], slack, rows)
            for i, layer in enumerate(weights.layers)
        ]
        self.head_site = Site(weights.head_hc, weights.norm, config)

    @property
    def most_forms(self) -> int:
        """The most forms that the experts of one layer have."""
        return max(1, *map(len, self.experts.forms))

    @property
    def workers(self) -> int:
        """For how many workers attention of many tokens needs scratch memory."""
        return self.team.members

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory and of the packed matrices of the hyper-connections."""
        sites = [site for layer in self.layers for site in (layer.attn_site, layer.ffn_site)]
        mixing = sum(site.fn.nbytes for site in [*sites, self.head_site])
        return self.scratch.nbytes + mixing

    def new_program(self) -> Program:
        """Return an empty program."""
        return Program(self.scratch)

    def store_of(self, layer: int) -> ExpertStore:
        """Return where the records of a layer are."""
        return self.store

    def enter_layer(self, layer: int, chunk: ChunkBuffers, tokens: int) -> None:
        """Be told that programs go on with a layer, for the first `tokens` of a chunk."""

    def adopt(self, *owners: object) -> None:
        """Let programs use the arrays of some objects, from now on."""

    def disown(self, *owners: object) -> None:
        """Let go of arrays that no program uses any more."""

    def publish(self, *arrays: NDArray[np.generic]) -> None:
        """Let programs see what was written into some of their arrays."""

    def publish_addresses(self, *tables: NDArray[np.int64]) -> None:
        """The same for arrays of addresses."""

    def fetch(self, *arrays: NDArray[np.generic]) -> None:
        """See what programs have written into some of their arrays."""

    def ask(self, *arrays: NDArray[np.generic]) -> Callable[[], None]:
        """The same, of programs that were run so far, when the function that is returned returns.

        To be called before anything else is asked for.
        """
        return lambda: None

    @property
    def cancelled(self) -> threading.Event | None:
        """The event that makes programs end, and whoever runs them raise Cancelled.

        One that can tell ends the program that runs, others are looked at between two programs.
        """
        return self._cancelled

    @cancelled.setter
    def cancelled(self, event: threading.Event | None) -> None:
        if isinstance(self._cancelled, Cancellation):
            self._cancelled.listener = None
        self._cancelled = event
        if isinstance(event, Cancellation):
            event.listener = self._abandon

    def _abandon(self) -> None:
        """End the program that runs: members finish the chunks that they have, and take no more.

        It halts at the next barrier, so that nothing reads what was not finished.
        """
        running = self._running
        if running is not None:
            ctypes.c_int64.from_address(self.team.halt_address).value = 1
            running[:, COUNTER] += NO_CHUNK

    def run_some(self, program: NDArray[np.int64]) -> int:
        """Run a finished program; return how many operations were done. Raises Cancelled."""
        self._running = program
        try:
            done = self.team.run(program)
        finally:
            self._running = None
        self.check_cancelled()
        return done

    def run(self, program: Program) -> None:
        """Run a program that nothing halts; raise Cancelled when asked to stop."""
        self.check_cancelled()
        self.run_some(program.finish())

    def check_cancelled(self) -> None:
        """Raise Cancelled when the event `cancelled` is set."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled("stopped")

    def begin(self, chunk: ChunkBuffers, ids: NDArray[np.int64], state: State) -> None:
        """Take in tokens: their embeddings in all streams, room in the state, its addresses."""
        self._take_in(chunk, ids, [state], [len(ids)], self._cells[None])
        self.store.uses.clock += len(ids)

    def begin_many(
        self,
        chunk: ChunkBuffers,
        ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        cells: NDArray[np.int64],
    ) -> None:
        """Take in `counts` tokens of several sequences; fill cells (sequences, layers, CELLS)."""
        self._take_in(chunk, ids, states, counts, cells)
        self.store.uses.clock += len(ids)

    def begin_rows(
        self,
        chunk: ChunkBuffers,
        ids: NDArray[np.int64],
        states: Sequence[State],
        cells: NDArray[np.int64],
    ) -> None:
        """Take in one token of each of several sequences; fill cells (rows, layers, CELLS)."""
        self._take_in(chunk, ids, states, [1] * len(states), cells)
        self.store.uses.clock += 1

    def _take_in(
        self,
        chunk: ChunkBuffers,
        ids: NDArray[np.int64],
        states: Sequence[State],
        counts: Sequence[int],
        cells: NDArray[np.int64],
    ) -> None:
        for state, count, own in zip(states, counts, cells, strict=True):
            self._begin_state(state, count)
            own[:] = state.addresses
        self._embed(chunk, ids)
        self.publish_addresses(cells)

    def _embed(self, chunk: ChunkBuffers, ids: NDArray[np.int64]) -> None:
        """Put tokens and their embeddings, which may have to come from the disk, into a chunk."""
        tokens = len(ids)
        chunk.ids[:tokens] = ids
        for part, vectors in self._embeddings(ids):
            chunk.streams[part] = vectors[:, None, :]
        self.publish(chunk.ids[:tokens], chunk.streams[:tokens])

    def _embeddings(self, ids: NDArray[np.int64]) -> Iterator[tuple[slice, Floats]]:
        """Yield the embeddings of some tokens at a time; Ctrl-C has to wait for as many."""
        for first in range(0, len(ids), LOOKED_UP):
            self.check_cancelled()
            part = slice(first, min(first + LOOKED_UP, len(ids)))
            yield part, look_up(self.weights.embed, ids[part])

    def _begin_state(self, state: State, tokens: int) -> None:
        """Make room; other kernels than those of its format would read its rows as noise."""
        if state.rows is not self.rows:
            raise ValueError(f"a state of {state.rows.name} rows in a network of {self.rows.name}")
        state.begin(tokens)

    def mix_packed(
        self, moe: FastMoe, chunk: ChunkBuffers, buffers: WaveBuffers, tokens: int
    ) -> None:
        """Add the weighted outputs of the experts that some tokens have chosen to `update`."""
        for wave in moe.waves(chunk, buffers, tokens):
            program = self.new_program()
            self.publish(*wave.arrays)
            moe.add_wave(program, chunk, buffers, wave)
            self.run(program)

    def mix_stored(self, index: int, chunk: ChunkBuffers, tokens: int) -> None:
        """Compute `update` of a layer whose experts have no packed form."""
        self._exact.cancelled = self.cancelled
        layer, limit = self.weights.layers[index], F32(self.config.swiglu_limits[index])
        chosen, shares = chunk.chosen[:tokens], chunk.shares[:tokens]
        x = np.ascontiguousarray(chunk.x.values[:tokens])
        mixed = self._exact.mix_experts(x, chosen, shares, layer.experts, limit)
        chunk.update.values[:tokens] = mixed
