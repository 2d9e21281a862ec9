"""Measure what a long context costs: bytes of decoder state, and the time that attention takes.

    python tools/measure_context.py --model flash --formats f32 compact --positions 4096 1048576

Times are those of the operations of one token over compressed rows that are made up: of one layer
with an indexer and one without, times the number of such layers of the model. Weights have no part
in it. Bytes are those of a `State` after room was made for so many positions.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import attend, index_scores, row_operations
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.head_lanes import spread
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.row_operations import FORMATS, RowFormat
from localv4.kernels.team import Team
from localv4.kernels.threads import default_threads
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.config_json import read_config
from localv4.model.state import State
from localv4.planning.subject import NETWORKS

F32 = np.float32
SLACK = 256
LEAST_S, MOST_RUNS = 0.5, 200
ROW_BYTE = 0x3D
"""What all made-up rows consist of: finite numbers in every format."""


@dataclass
class Layer:
    """The operations of a token at the end of `positions` in a layer of one kind."""

    config: ModelConfig
    rows: RowFormat
    kind: LayerKind
    positions: int

    def __post_init__(self) -> None:
        config = self.config
        rng = np.random.default_rng(0)
        ratio = config.ratios[config.layer_kinds.index(self.kind)]
        self.entries = self.positions // ratio
        keys = min(self.entries, config.index_top_k) if self.is_indexed else self.entries
        heads, width, pairs = config.n_heads, config.head_dim, config.rope_dim // 2
        self.query = rng.standard_normal(heads * width, F32)
        self.index_query = rng.standard_normal(config.index_heads * config.index_head_dim, F32)
        self.weights = rng.standard_normal(config.index_heads + 16, F32)
        self.angle = rng.standard_normal((2, pairs), F32)
        self.window = rng.standard_normal((config.window + SLACK, width), F32)
        self.keys = _made_up(self.entries, self.rows.keys.nbytes(width, 2 * pairs))
        index_row = self.rows.index.nbytes(config.index_head_dim, 2 * pairs)
        self.index_rows = _made_up(self.entries if self.is_indexed else 0, index_row)
        self.sinks = spread(rng.standard_normal(heads, F32))
        self.scratch = aligned_bytes(attend.scratch_bytes(heads, width, config.window + keys))
        size = index_scores.scratch_bytes(config.index_heads, config.index_head_dim, self.entries)
        self.index_scratch = aligned_bytes(size)
        self.chosen = np.zeros(config.index_top_k, np.int32)
        self.counts = np.zeros(1, np.int64)
        self.context = np.array([self.positions - 1], np.int64)
        arrays = (self.window, self.keys, self.index_rows)
        self.cells = np.array([array.ctypes.data for array in arrays])
        self.ratio = ratio

    @property
    def is_indexed(self) -> bool:
        """Whether an indexer chooses entries."""
        return self.kind is LayerKind.CSA

    @property
    def read_bytes(self) -> int:
        """Bytes of the compressed rows that the token reads."""
        top_k = self.config.index_top_k if self.is_indexed else self.entries
        keys: int = min(self.entries, top_k) * self.keys.shape[1]
        return keys + (int(self.index_rows.nbytes) if self.entries > top_k else 0)

    def indexing(self) -> NDArray[np.int64]:
        """Return the program of the indexer."""
        config, rows = self.config, self.rows
        heads, width = config.index_heads, config.index_head_dim
        seen = (self.context.ctypes.data, self.ratio, config.index_top_k, heads, width)
        scratch, entries = self.index_scratch.ctypes.data, self.cells.ctypes.data + 16
        inputs = (self.weights.ctypes.data, float_bits(1), scratch)
        turn = self._turn()
        query = self.index_query.ctypes.data
        return _program(
            (rows.index_query, query, heads, width, *turn, *inputs),
            (rows.index_scores, *seen, entries, scratch, turn[2]),
            (index_scores.index_rank, *seen, scratch),
            (
                index_scores.index_select,
                *(*seen, scratch, self.chosen.ctypes.data, self.counts.ctypes.data),
            ),
        )

    def attending(self) -> NDArray[np.int64]:
        """Return the program of attention, over what the indexer has chosen last."""
        config, rows, scratch = self.config, self.rows, self.scratch.ctypes.data
        heads, width = config.n_heads, config.head_dim
        counts, chosen = 0, 0
        if self.is_indexed:
            counts, chosen = self.counts.ctypes.data, self.chosen.ctypes.data
        seen = (self.context.ctypes.data, config.window, self.ratio, counts)
        window, entries = self.cells.ctypes.data, self.cells.ctypes.data + 8
        where = (chosen, config.index_top_k, window, len(self.window), entries)
        query, turn = self.query.ctypes.data, self._turn()
        sinks, eps = self.sinks.ctypes.data, float_bits(1e-6)
        return _program(
            (attend.attend_query, query, heads, width, *turn, eps, scratch),
            (rows.attend_scores, *seen, *where, heads, width, scratch, turn[2]),
            (attend.attend_softmax, *seen, heads, width, sinks, scratch),
            (rows.attend_values, *seen, heads, width, *turn, scratch, query),
        )

    def _turn(self) -> tuple[int, int, int]:
        cos, sin = self.angle
        return cos.ctypes.data, sin.ctypes.data, self.angle.shape[1]


def _made_up(count: int, nbytes: int) -> NDArray[np.uint8]:
    """Return rows that read as ordinary numbers."""
    return np.full((max(count, 1), nbytes), ROW_BYTE, np.uint8)


def _program(*operations: tuple[object, ...]) -> NDArray[np.int64]:
    program = np.zeros((len(operations), WORDS), np.int64)
    for row, (entry, *words) in zip(program, operations, strict=True):
        row[: len(words) + 1] = (entry.address, *words)  # type: ignore[attr-defined]
    return program


def seconds(run: Callable[[], object]) -> float:
    """Return the least time of some runs."""
    best, start, runs = np.inf, time.perf_counter(), 0
    while runs < 3 or (runs < MOST_RUNS and time.perf_counter() - start < LEAST_S):
        before = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - before), runs + 1
    return float(best)


def measure(config: ModelConfig, rows: RowFormat, positions: int, team: Team) -> None:
    """Print what a token at the end of `positions` takes."""
    layers = {kind: config.layer_kinds.count(kind) for kind in (LayerKind.CSA, LayerKind.HCA)}
    total, read, parts = 0.0, 0, []
    for kind, count in layers.items():
        layer = Layer(config, rows, kind, positions)
        if layer.is_indexed:
            program = layer.indexing()
            taken = seconds(lambda program=program: team.run(program))  # type: ignore[misc]
            parts.append(("index", taken))
            total += count * taken
        program = layer.attending()
        taken = seconds(lambda program=program: team.run(program))  # type: ignore[misc]
        parts.append((kind.name, taken))
        total, read = total + count * taken, read + count * layer.read_bytes
    columns = "  ".join(f"{name} {1e3 * taken:8.3f} ms" for name, taken in parts)
    sys.stdout.write(
        f"{rows.name:8} {positions:>9,}  {columns}  all layers {1e3 * total:8.1f} ms"
        f"  rows {read / 1e6:8.1f} MB  {read / total / 1e9:6.2f} GB/s\n"
    )
    sys.stdout.flush()


def state_bytes_per_token(config: ModelConfig, rows: RowFormat, positions: int) -> float:
    """Return the bytes that the arrays of a state grow by for each token."""
    state = State(config, SLACK, rows)
    before = state.nbytes
    state.begin(positions)
    return (state.nbytes - before) / positions


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--positions", nargs="+", type=int, default=[4096, 16384, 65536, 262144, 1048576]
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--bytes-only", action="store_true")
    given = parser.parse_args(arguments)
    config = read_config(NETWORKS / f"{given.model}.json")
    most = max(given.positions)
    for name in given.formats:
        per_token = state_bytes_per_token(config, row_operations.FORMATS[name], most)
        sys.stdout.write(f"{name:8} {per_token:10,.1f} bytes per token of {most:,}\n")
    if given.bytes_only:
        return
    team = Team(given.threads)
    for name in given.formats:
        for positions in given.positions:
            measure(config, row_operations.FORMATS[name], positions, team)
    team.close()


if __name__ == "__main__":
    main()
