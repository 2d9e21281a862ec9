"""Experts of several tokens where the GPU lacks some: both devices compute.

The GPU computes those that it holds. Of the others, those with the most tokens are brought to it,
one after the other; meanwhile the host computes those with the fewest where they lie. How far that
goes is decided as it goes, by how long both have taken so far: few tokens are left to the host,
many make an upload worth while.

The outputs of all are kept apart, and added at the end in the order of the experts: so a token
gets the same bits whoever has computed.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localv4.cuda.gpu import Launch
from localv4.cuda.program import GpuProgram, name_of
from localv4.cuda.twin import SCRATCH, Words
from localv4.cuda.twins.gemm import EXPERTS_SUM, expert_products
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.packed import GROUP_ROWS
from localv4.kernels.single_token import quantize
from localv4.model.fast_moe import FastMoe, Slots, Wave, WaveBuffers
from localv4.model.matrix import F32
from localv4.model.program import Program
from localv4.model.workspace import ChunkBuffers

if TYPE_CHECKING:
    from localv4.cuda.network import GpuNetwork

PIECE_EXPERTS, PIECE_SLOTS = 24, 128
"""What the host computes between two looks at what has come to the GPU."""

READ_SLOTS = 16
"""The host takes about as long to read an expert as to multiply so many tokens with it: an estimate
to begin with, for shares that follow what is measured."""

SMOOTHING = 0.3
"""Weight of the last measurement in the mean."""


@dataclass(slots=True)
class Pace:
    """Seconds that something takes, a mean in which later measurements count more."""

    seconds: float | None = None

    def note(self, seconds: float) -> None:
        """Take in a measurement."""
        known = self.seconds if self.seconds is not None else seconds
        self.seconds = known + SMOOTHING * (seconds - known)


class PromptExperts:
    """What both devices compute of the experts of a layer of the GPU."""

    def __init__(self, network: "GpuNetwork") -> None:
        self.network, self.store = network, network.store
        self.upload, self.unit = Pace(), Pace()  # of a record; of the host for `units` of 1
        self.outputs = np.zeros((0, network.config.hidden_size), F32)
        self.slots, self.ones = np.zeros(0, np.int64), np.zeros(0, F32)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.outputs.nbytes + self.slots.nbytes + self.ones.nbytes

    def mix(self, moe: FastMoe, chunk: ChunkBuffers, buffers: WaveBuffers, tokens: int) -> None:
        """Add the weighted outputs of the experts that some tokens have chosen to `update`."""
        network, store, chosen = self.network, self.store, chunk.chosen[:tokens]
        self._make_room(buffers.slots)
        slots = Slots.of(chosen, network.config.n_experts)
        store.begin_prompt(moe.index, chosen)
        try:
            has_input = False
            for part in moe.parts(slots.sizes, buffers.slots, network.config.n_experts):
                shared = SharedWave(self, moe, chunk, buffers, part, slots)
                if shared.is_lacking and not has_input:
                    network.fetch(chunk.x.values[:tokens])
                    has_input = True
                shared.run()
        finally:
            store.end_prompt(moe.index)

    def _make_room(self, slots: int) -> None:
        """Have buffers for so many slots."""
        if len(self.slots) >= slots:
            return
        self.network.disown(self.outputs)
        self.outputs = np.zeros((slots, self.outputs.shape[1]), F32)
        self.slots, self.ones = np.arange(slots), np.ones(slots, F32)
        self.network.adopt(self.outputs)

    def may_upload(self, under_way: int, slots: Iterable[int]) -> bool:
        """Say if one more record can be there before the host has done those with these slots."""
        if self.upload.seconds is None or self.unit.seconds is None:
            return True
        host_s = self.unit.seconds * sum(map(units, slots))
        return (under_way + 1) * self.upload.seconds <= host_s


def units(slots: int) -> float:
    """Return what an expert with so many tokens takes of the host, that of few tokens being 1."""
    return 1 + slots / READ_SLOTS


@dataclass(frozen=True, slots=True)
class HostPiece:
    """Experts that the host computes together: i has tokens[starts[i] : starts[i + 1]]."""

    records: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]


class SharedWave:
    """Some experts of one form, in ascending order, and their slots.

    A *place* is that of an expert among them; `absent` are those that neither are on the GPU nor on
    their way, the one with the fewest tokens first.
    """

    def __init__(
        self,
        both: PromptExperts,
        moe: FastMoe,
        chunk: ChunkBuffers,
        buffers: WaveBuffers,
        part: NDArray[np.int64],
        slots: Slots,
    ) -> None:
        self._both, self._network, self._store = both, both.network, both.store
        self._moe, self._chunk, self._buffers = moe, chunk, buffers
        self._numbers: list[int] = part.tolist()
        self._sizes: list[int] = slots.sizes[part].tolist()
        self._wave: Wave = moe.wave(buffers, part, slots, chunk.shares)
        states = self._store.addresses[moe.index, part]
        absent = np.flatnonzero(states == 0)
        self._absent: list[int] = absent[np.argsort(slots.sizes[part][absent])].tolist()
        self._under_way: list[int] = np.flatnonzero(states < 0).tolist()
        self._here: list[int] = np.flatnonzero(states > 0).tolist()
        self._launches = self._templates()

    @property
    def is_lacking(self) -> bool:
        """Whether the host may have to compute."""
        return bool(self._absent)

    def run(self) -> None:
        """Compute all, and add it to `update`."""
        network, store, layer = self._network, self._store, self._moe.index
        self._round_on_gpu()
        self._claim(self._here + self._under_way)
        if self._here:
            self._on_gpu(self._here)
        start, uploads = time.perf_counter(), len(self._under_way)
        arrived_s = 0.0
        while self._absent or self._under_way:
            network.check_cancelled()
            store.poll()
            if arrived := [
                p for p in self._under_way if store.addresses[layer, self._numbers[p]] > 0
            ]:
                arrived_s = time.perf_counter() - start
                self._on_gpu(arrived)
                self._under_way = [p for p in self._under_way if p not in arrived]
            uploads += self._send_for_more()
            if self._absent:
                self._on_host(self._take_piece())
            elif self._under_way:
                store.wait(layer, [self._numbers[p] for p in self._under_way])
        if uploads:
            self._both.upload.note(arrived_s / uploads)
        self._add_up()

    def _claim(self, places: Sequence[int]) -> None:
        self._store.claim(self._moe.index, [self._numbers[p] for p in places])

    def _send_for_more(self) -> int:
        """Have records uploaded while they come in time; return how many."""
        room = self._store.most_under_way(self._moe.index) - len(self._under_way)
        places: list[int] = []
        while self._absent and len(places) < room:
            under_way = len(self._under_way) + len(places)
            others = [self._sizes[p] for p in self._absent[:-1]]
            if not self._both.may_upload(under_way, others):
                break
            places.append(self._absent.pop())
        if places:
            self._claim(places)
            self._under_way += places
        return len(places)

    def _take_piece(self) -> list[int]:
        """Take the experts that the host computes next."""
        most = min(PIECE_EXPERTS, self._store.host.largest_claim(self._moe.index))
        ends = np.cumsum([self._sizes[p] for p in self._absent[:most]])
        count = max(1, int(np.searchsorted(ends, PIECE_SLOTS, side="right")))
        piece, self._absent = self._absent[:count], self._absent[count:]
        return sorted(piece)

    def _round_on_gpu(self) -> None:
        """Round the inputs of all slots."""
        wave, buffers, x = self._wave, self._buffers, self._chunk.x
        self._network.publish(wave.starts, wave.tokens, wave.shares)
        program = GpuProgram(self._network.scratch)
        program.add(
            quantize,
            *(x.at(), x.stride, wave.tokens.ctypes.data, len(wave.tokens), x.cols),
            *(*buffers.x.addresses, int(self._moe.has_binary_inputs)),
        )
        self._network.run(program)

    def _templates(self) -> list[Launch]:
        """Return the launches of all experts together, in the words of the GPU."""
        wave, buffers, form = self._wave, self._buffers, self._wave.form
        program = GpuProgram(self._network.scratch)
        experts = (wave.records.ctypes.data, len(wave.records), wave.starts.ctypes.data)
        self._moe.add_hidden(program, form, experts, buffers.x, buffers.hidden)
        program.add_twin(
            expert_products(name_of(OPERATIONS[form.down.name].experts_down)),
            *(*experts, form.hidden // GROUP_ROWS, form.inner, *buffers.hidden.addresses),
            *(0, 0, 0, 0, 0, form.offset, *[0] * (SCRATCH - 15), self._both.outputs.ctypes.data),
        )
        steps = self._network.translator.steps(program)
        return [launch for step in steps for branch in step for launch in branch]

    def _on_gpu(self, places: Sequence[int]) -> None:
        """Compute the outputs of experts that are on the GPU, and let go of their records."""
        wave, layer, store = self._wave, self._moe.index, self._store
        numbers = [self._numbers[p] for p in places]
        wave.records[list(places)] = store.addresses[layer, numbers]
        self._network.publish(wave.records)
        runs = [self._launches_of(run) for run in runs_of(places)]
        self._network.gpu.run([[branch] for branch in runs])
        store.release(layer, numbers)

    def _launches_of(self, run: range) -> list[Launch]:
        """Return the launches for neighbours."""
        width = self._both.outputs.strides[0]
        launches = []
        for launch in self._launches:
            words = list(launch.words)
            words[1] += 8 * run.start
            words[2] = len(run)
            words[3] += 8 * run.start
            if words[SCRATCH]:  # products begin with those of the first slot
                words[SCRATCH] += width * int(self._wave.starts[run.start])
            launches.append(_with_words(launch, words))
        return launches

    def _on_host(self, places: Sequence[int]) -> None:
        """Compute the outputs of experts on the host, and send them."""
        both, network, host = self._both, self._network, self._store.host
        layer, numbers = self._moe.index, [self._numbers[p] for p in places]
        host.claim(layer, numbers)
        try:
            while (host.addresses[layer, numbers] <= 0).any():
                network.check_cancelled()
                host.wait(layer, numbers)
            start = time.perf_counter()
            piece = self._piece(places, host.addresses[layer, numbers])
            network.team.run(self._host_program(piece).finish())
        finally:
            host.release(layer, numbers)
        done = 0
        for own in self._slots_of(places):
            count = own.stop - own.start
            network.send(both.outputs[done : done + count], both.outputs[own])
            done += count
        both.unit.note((time.perf_counter() - start) / sum(units(self._sizes[p]) for p in places))

    def _slots_of(self, places: Sequence[int]) -> list[slice]:
        """Return the slots of experts; neighbours have theirs together."""
        starts = self._wave.starts
        return [slice(int(starts[r.start]), int(starts[r.stop])) for r in runs_of(places)]

    def _piece(self, places: Sequence[int], records: NDArray[np.int64]) -> HostPiece:
        sizes = [self._sizes[p] for p in places]
        tokens = np.concatenate([self._wave.tokens[own] for own in self._slots_of(places)])
        return HostPiece(records, np.concatenate([[0], np.cumsum(sizes)]), tokens)

    def _host_program(self, piece: HostPiece) -> Program:
        """Return the program of some experts, whose slots come one after the other on the host."""
        both, buffers, x, form = self._both, self._buffers, self._chunk.x, self._wave.form
        program, outputs, tokens = Program(self._network.scratch), both.outputs, piece.tokens
        outputs[: len(tokens)] = 0
        program.add(
            quantize,
            *(x.at(), x.stride, tokens.ctypes.data, len(tokens), x.cols),
            *(*buffers.x.addresses, int(self._moe.has_binary_inputs), *buffers.x.pairs),
        )
        experts = piece.records.ctypes.data, len(piece.records), piece.starts.ctypes.data
        self._moe.add_hidden(program, form, experts, buffers.x, buffers.hidden)
        slots = both.slots.ctypes.data, both.ones.ctypes.data
        out = outputs.ctypes.data, outputs.strides[0]
        self._moe.add_outputs(program, form, experts, buffers.hidden, out, slots)
        return program

    def _add_up(self) -> None:
        """Add the weighted outputs of all slots, those of a token in the order of the experts."""
        wave, update, form = self._wave, self._chunk.update, self._wave.form
        program = GpuProgram(self._network.scratch)
        program.add_twin(
            EXPERTS_SUM,
            *(wave.records.ctypes.data, len(wave.records), wave.starts.ctypes.data),
            *(form.hidden // GROUP_ROWS, form.inner, 0, 0, 0, update.at(), 4 * update.stride, 0),
            *(wave.tokens.ctypes.data, wave.shares.ctypes.data, form.offset),
            *(*[0] * (SCRATCH - 15), self._both.outputs.ctypes.data),
        )
        self._network.run(program)


def _with_words(launch: Launch, words: Words) -> Launch:
    """Return a launch with other words."""
    kernel = launch.kernel
    return replace(
        launch, blocks=kernel.blocks(words), shared=kernel.shared(words), words=tuple(words)
    )


def runs_of(places: Iterable[int]) -> list[range]:
    """Return neighbours among some places together, in ascending order."""
    runs: list[range] = []
    for place in sorted(places):
        if runs and runs[-1].stop == place:
            runs[-1] = range(runs[-1].start, place + 1)
        else:
            runs.append(range(place, place + 1))
    return runs
