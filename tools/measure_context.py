#!/usr/bin/env python3
"""Measure what a long context costs: bytes of decoder state, and the time that attention takes.

    python tools/measure_context.py --positions 4096 65536 1048576 --kv-dir DIR --kv-ram 1GiB

A decoder state of all layers of a released network is filled with rows that are made up, then
tokens at the end of so many positions go through the operations of indexer and attention of every
layer; weights have no part in it. Indexer and attention: the least time of each layer, the rows
being in memory. New: the median of tokens with new queries, which choose rows as scattered as can
be, some of them on the disk with --kv-dir. What weights take on top is computed: their bytes
divided by the bandwidth that is measured. RSS: the memory of the process.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from localv4.cli.sizes import parse_bytes
from localv4.kernels import attend, attend_keys, index_scores
from localv4.kernels.buffers import aligned_bytes
from localv4.kernels.compiler import compile_kernels
from localv4.kernels.head_lanes import spread
from localv4.kernels.operation import WORDS, float_bits
from localv4.kernels.probes import PROBES
from localv4.kernels.row_operations import BF16, COMPACT, FORMATS, RowFormat
from localv4.kernels.team import Team
from localv4.kernels.threads import default_threads
from localv4.model.config import LayerKind, ModelConfig
from localv4.model.config_json import read_config
from localv4.model.state import LayerState, State
from localv4.paging.row_memory import RowMemory
from localv4.planning.model_facts import facts_of_recipe
from localv4.planning.recipes import load_recipes
from localv4.planning.roofs import RoofProbe
from localv4.planning.subject import NETWORKS

F32 = np.float32
SLACK = 256
LEAST_S, LEAST_TOKENS, MOST_TOKENS = 2.0, 10, 50
FILL_POSITIONS = 1 << 14
POOL_ROWS = 4093
ROW_BYTE = 0x3D
"""What made-up bytes are: numbers of ordinary size in bfloat16 and FP8."""

KEY_SCALE, INDEX_SCALE = 0x87, 0x8D
"""Scales of compact rows with which their numbers are about 1: subnormal ones would take longer."""

ROOF_BYTES = 512 << 20
RECIPE = "q4"
MIB = 1 << 20


@dataclass
class Found:
    """What a token at the end of `positions` takes, in seconds, and the bytes of rows it reads."""

    positions: int
    index_s: float
    attend_s: float
    new_s: float
    row_bytes: int
    index_bytes: int
    resident: int


class Context:
    """A filled decoder state, and buffers for the operations of one token."""

    def __init__(self, config: ModelConfig, rows: RowFormat, memory: RowMemory, most: int) -> None:
        self.config, self.rows = config, rows
        self.rng = np.random.default_rng(0)
        heads, width, pairs = config.n_heads, config.head_dim, config.rope_dim // 2
        self.query = self.rng.standard_normal(heads * width, F32)
        self.index_query = np.empty(config.index_heads * config.index_head_dim, F32)
        self.weights = self.rng.standard_normal(config.index_heads + 16, F32)
        self.angle = self.rng.standard_normal((2, pairs), F32)
        self.sinks = spread(self.rng.standard_normal(heads, F32))
        ratios = dict(zip(config.layer_kinds, config.ratios, strict=True))
        seen = max(config.index_top_k, most // ratios[LayerKind.HCA])
        self.scratch = aligned_bytes(attend.scratch_bytes(heads, width, config.window + seen))
        entries = most // ratios[LayerKind.CSA]
        size = index_scores.scratch_bytes(config.index_heads, config.index_head_dim, entries)
        self.index_scratch = aligned_bytes(size)
        self.chosen = np.zeros(config.index_top_k, np.int32)
        self.counts = np.zeros(1, np.int64)
        self.context = np.zeros(1, np.int64)
        self.state = State(config, SLACK, rows, memory)
        self._fill(most)

    def _fill(self, most: int) -> None:
        state, keys, index = self.state, self._keys(), self._index_rows()
        for layer in state.layers:
            layer.window.values[:] = self.rng.standard_normal(layer.window.values.shape, F32)
        while state.position < most:
            tokens = min(FILL_POSITIONS, most - state.position)
            state.begin(tokens)
            state.make_way_to_copy(tokens)
            for layer in state.layers:
                if layer.compressor is None:
                    continue
                first, end = (at // layer.ratio for at in (state.position, state.position + tokens))
                rows = np.arange(first, end) % POOL_ROWS
                layer.compressor.entries.values[first:end] = keys[rows]
                if layer.indexer is not None:
                    layer.indexer.entries.values[first:end] = index[rows]
            state.advance(tokens)

    def _keys(self) -> NDArray[np.generic]:
        """Return some rows of keys that read as ordinary numbers."""
        config, form = self.config, self.rows.keys
        if form.is_plain:
            return self.rng.standard_normal((POOL_ROWS, config.head_dim), F32)
        shape = (POOL_ROWS, form.nbytes(config.head_dim, config.rope_dim))
        made = np.full(shape, ROW_BYTE, np.uint8)
        if self.rows is COMPACT:
            made[:, 2 * config.head_dim - (config.head_dim - config.rope_dim) :] = KEY_SCALE
        return made

    def _index_rows(self) -> NDArray[np.generic]:
        """Return some rows of an indexer that differ from one another."""
        n = self.config.index_head_dim
        if self.rows.index.is_plain:
            return self.rng.standard_normal((POOL_ROWS, n), F32)
        if self.rows is BF16:
            values = self.rng.standard_normal((POOL_ROWS, n), F32)
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        made = np.full((POOL_ROWS, self.rows.index.nbytes(n, 0)), INDEX_SCALE, np.uint8)
        made[:, : n // 2] = self.rng.integers(0, 256, (POOL_ROWS, n // 2), np.uint8)
        return made

    def programs(self) -> list[tuple[bool, NDArray[np.int64]]]:
        """Return whether it belongs to the indexer, and the program, for all layers."""
        found = []
        for number, layer in enumerate(self.state.layers):
            cells = self.state.addresses[number].ctypes.data
            if layer.indexer is not None:
                found.append((True, self._indexing(layer, cells)))
            if layer.compressor is not None:
                found.append((False, self._attending(layer, cells)))
        return found

    def _indexing(self, layer: LayerState, cells: int) -> NDArray[np.int64]:
        config, rows = self.config, self.rows
        heads, width = config.index_heads, config.index_head_dim
        seen = (self.context.ctypes.data, layer.ratio, config.index_top_k, heads, width)
        scratch, entries = self.index_scratch.ctypes.data, cells + 8 * 6
        turn = self._turn()
        inputs = (self.weights.ctypes.data, float_bits(1), scratch)
        found = (self.chosen.ctypes.data, self.counts.ctypes.data)
        return _program(
            (rows.index_query, self.index_query.ctypes.data, heads, width, *turn, *inputs),
            (rows.index_scores, *seen, entries, scratch, turn[2]),
            (index_scores.index_rank, *seen, scratch),
            (index_scores.index_select, *seen, scratch, *found),
        )

    def _attending(self, layer: LayerState, cells: int) -> NDArray[np.int64]:
        config, rows, scratch = self.config, self.rows, self.scratch.ctypes.data
        heads, width, counts, chosen = config.n_heads, config.head_dim, 0, 0
        if layer.indexer is not None:
            counts, chosen = self.counts.ctypes.data, self.chosen.ctypes.data
        seen = (self.context.ctypes.data, config.window, layer.ratio, counts)
        capacity = len(layer.window.values)
        where = (chosen, config.index_top_k, cells, capacity, cells + 8 * 3)
        query, turn = self.query.ctypes.data, self._turn()
        sinks, eps = self.sinks.ctypes.data, float_bits(1e-6)
        return _program(
            (attend_keys.attend_query, query, heads, width, *turn, eps, scratch, int(rows.tiled)),
            (rows.attend_scores, *seen, *where, heads, width, scratch, turn[2]),
            (attend_keys.attend_softmax, *seen, heads, width, sinks, scratch, int(rows.tiled)),
            (rows.attend_values, *seen, heads, width, *turn, scratch, query),
        )

    def _turn(self) -> tuple[int, int, int]:
        cos, sin = self.angle
        return cos.ctypes.data, sin.ctypes.data, self.angle.shape[1]

    def read_bytes(self, positions: int) -> tuple[int, int]:
        """Return the bytes of rows that a token reads, and those of them that the indexer reads."""
        total = index = 0
        for layer in self.state.layers:
            entries, top_k = positions // layer.ratio if layer.ratio else 0, self.config.index_top_k
            if layer.compressor is not None:
                keys = min(entries, top_k) if layer.indexer is not None else entries
                total += keys * layer.compressor.entries.row_bytes
            if layer.indexer is not None and entries > top_k:
                index += entries * layer.indexer.entries.row_bytes
        return total + index, index

    def measure(self, team: Team, positions: int) -> Found:
        """Run tokens at the end of `positions`; the best of each part counts."""
        self.context[0] = positions - 1
        programs, start = self.programs(), time.perf_counter()
        new: list[float] = []
        best = np.full(len(programs), np.inf)
        while len(new) < LEAST_TOKENS or (
            len(new) < MOST_TOKENS and time.perf_counter() - start < LEAST_S
        ):
            self.index_query[:] = self.rng.standard_normal(self.index_query.size, F32)
            self.state.make_way(1)
            new.append(float(_times(team, programs).sum()))
            best = np.minimum(best, _times(team, programs))
        is_indexer = np.array([mark for mark, _ in programs])
        index_s, attend_s = float(best[is_indexer].sum()), float(best[~is_indexer].sum())
        resident = psutil.Process().memory_info().rss
        new_s, read = float(np.median(new)), self.read_bytes(positions)
        return Found(positions, index_s, attend_s, new_s, *read, resident)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _times(team: Team, programs: Sequence[tuple[bool, NDArray[np.int64]]]) -> NDArray[np.float64]:
    """Return the seconds of each program."""
    times = []
    for _, program in programs:
        before = time.perf_counter()
        team.run(program)
        times.append(time.perf_counter() - before)
    return np.array(times)


def _program(*operations: tuple[object, ...]) -> NDArray[np.int64]:
    program = np.zeros((len(operations), WORDS), np.int64)
    for row, (entry, *words) in zip(program, operations, strict=True):
        row[: len(words) + 1] = (entry.address, *words)  # type: ignore[attr-defined]
    return program


def state_bytes_per_token(config: ModelConfig, rows: RowFormat, positions: int) -> float:
    """Return the bytes that the arrays of a state grow by for each token."""
    state = State(config, SLACK, rows)
    before = state.nbytes
    state.begin(positions)
    return (state.nbytes - before) / positions


def print_table(found: Sequence[Found], read_bytes_s: float, weight_bytes: int) -> None:
    """Print a line for each length of the context."""
    weight_s = weight_bytes / read_bytes_s
    say(f"reading {read_bytes_s / 1e9:.1f} GB/s; weights {weight_bytes / 1e9:.2f} GB a token")
    say("positions  indexer  attention      new  rows, MB  indexer/bound  tok/s  slower  RSS, MiB")
    first = None
    for each in found:
        token = weight_s + each.index_s + each.attend_s
        first = first or token
        bound = each.index_s * read_bytes_s / each.index_bytes if each.index_bytes else np.nan
        say(
            f"{each.positions:9,} {1e3 * each.index_s:6.1f}ms {1e3 * each.attend_s:8.1f}ms "
            f"{1e3 * each.new_s:6.1f}ms {each.row_bytes / 1e6:9.1f} {bound:14.2f} "
            f"{1 / token:6.2f} {token / first:7.2f} {each.resident // MIB:9,}"
        )


def draw(found: Sequence[Found], read_bytes_s: float, weight_bytes: int, path: Path) -> None:
    """Draw tokens per second against the context; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    weight_s = weight_bytes / read_bytes_s
    x = [each.positions for each in found]
    y = [1 / (weight_s + each.index_s + each.attend_s) for each in found]
    rows = [1 / (weight_s + each.row_bytes / read_bytes_s) for each in found]
    axes.plot(x, y, "o-", label="measured attention, weights at the bandwidth")
    axes.plot(x, rows, "--", color="0.5", label="everything at the bandwidth")
    axes.set(xscale="log", xlabel="tokens of context", ylabel="tokens/s", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--format", choices=tuple(FORMATS), default="compact")
    parser.add_argument(
        "--positions", nargs="+", type=int, default=[4096, 16384, 65536, 262144, 1048576]
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--kv-dir", type=Path)
    parser.add_argument("--kv-ram", type=lambda text: parse_bytes(text, "--kv-ram"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw tokens/s there (needs localv4[plot])")
    parser.add_argument("--bytes-only", action="store_true")
    given = parser.parse_args(arguments)
    config, most = read_config(NETWORKS / f"{given.model}.json"), max(given.positions)
    for name, rows in FORMATS.items():
        per_token = state_bytes_per_token(config, rows, most)
        say(f"{name:8} {per_token:10,.1f} bytes per token of {most:,}")
    if given.bytes_only:
        return
    rows = FORMATS[given.format]
    compile_kernels({"fast", "common", PROBES, rows.family}, None)
    read_bytes_s = RoofProbe(given.threads, ROOF_BYTES).measure().read_bytes_s
    context = Context(config, rows, RowMemory(given.kv_dir, given.kv_ram), most)
    team = Team(given.threads)
    found = [context.measure(team, positions) for positions in given.positions]
    team.close()
    facts = facts_of_recipe(given.model, config, load_recipes().by_name[RECIPE])
    weight_bytes = facts.weight_bytes_per_token
    print_table(found, read_bytes_s, weight_bytes)
    if given.json is not None:
        figures = {"read_bytes_s": read_bytes_s, "weight_bytes": weight_bytes}
        document = figures | {"found": [asdict(each) for each in found]}
        given.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if given.plot is not None:
        draw(found, read_bytes_s, weight_bytes, given.plot)


if __name__ == "__main__":
    main()
