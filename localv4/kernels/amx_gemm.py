"""Products of panels by AMX: the sums of `kernels.gemm`, with the same bits."""

from dataclasses import dataclass
from typing import Any

from localv4.kernels import amx
from localv4.kernels.activations import d_row, q_row
from localv4.kernels.amx import (
    BLOCK_LINES,
    CONFIGURATION_BYTES,
    FEW_TOKENS,
    SOME_TOKENS,
    STEP,
    TOKENS,
    begin_tiles,
    end_tiles,
    tile_operations,
)
from localv4.kernels.device import device
from localv4.kernels.packed import BLOCK, Q8
from localv4.kernels.panels import (
    CHUNK,
    LINES_OFFSET,
    PANEL_GROUPS,
    SCALES_OFFSET,
    STEPS_OFFSET,
    SUMS_ROW,
    expander,
    panel_groups,
)
from localv4.kernels.readers import (
    HEAD_BYTES,
    MX4_READER,
    Q4_READER,
    Q8_READER,
    Reader,
    prefetch_lines,
)
from localv4.kernels.simd import store_f32, zeros_f32
from localv4.kernels.tiles import LINE

_SUMS_BYTES = STEP * TOKENS * 64  # of a step
_CONFIGURATION = STEPS_OFFSET + 2 * _SUMS_BYTES
SCRATCH_BYTES = _CONFIGURATION + CONFIGURATION_BYTES
"""Memory that each thread needs for itself."""

_DECODERS = {MX4_READER: amx.mx4_codes, Q4_READER: amx.q4_codes}


@dataclass(frozen=True, slots=True)
class _Lines:
    """Where weights are while they are multiplied, `chunk` columns at a time.

    `line` and `step` are the bytes from a line of a group to the next, and from a step to the next;
    `scales` is where the scales are in the scratch memory.
    """

    line: int
    step: int
    scales: int
    chunk: int


_EXPANDED = _Lines(LINE, STEP * BLOCK_LINES * LINE, SCALES_OFFSET, CHUNK)
# Lines of Q8 are bytes already, a step is a superblock: there is room for more scales.
_IN_PLACE = _Lines(64, Q8.superblock_bytes, LINES_OFFSET, 2 * CHUNK)


def _tile_adder(tokens: int, layout: _Lines) -> Any:
    """Make the function that adds a chunk of columns to the sums of a tile of tokens."""
    tile, line_step = tile_operations(tokens, layout.line), layout.step
    scales_offset = layout.scales
    load, store, multiply, add, both = tile.load, tile.store, tile.multiply, tile.add, tile.both

    @device
    def add_tile(
        scratch: int,
        out: int,
        lines: int,
        group_bytes: int,
        groups: int,
        blocks: int,
        cols: int,
        q: int,
        d: int,
    ) -> None:
        """Add `blocks` blocks of some groups, whose lines are `group_bytes` apart, to out."""
        qr, dr = q_row(cols), d_row(cols)
        ready, free = scratch + STEPS_OFFSET, scratch + STEPS_OFFSET + _SUMS_BYTES
        multiply(ready, lines, q, qr)
        for group in range(groups):
            own_lines, own_q = lines + group_bytes * group, q
            scales, own_d = scratch + scales_offset + 64 * group, d
            sums = load(out + 64 * group, SUMS_ROW)
            for block in range(0, blocks, STEP):
                own_lines, own_q = own_lines + line_step, own_q + STEP * BLOCK
                if block + STEP == blocks:
                    own_lines, own_q = lines + group_bytes * (group + 1), q
                if block + STEP < blocks or group + 1 < groups:
                    sums = both(sums, ready, scales, own_d, dr, free, own_lines, own_q, qr)
                else:
                    sums = add(sums, ready, scales, own_d, dr)
                ready, free = free, ready
                scales, own_d = scales + STEP * LINE, own_d + 4 * STEP
            store(out + 64 * group, SUMS_ROW, sums)

    return add_tile


def _prefetcher(reader: Reader) -> Any:
    """Make the function that converts the scales of superblocks, and asks for their weights."""
    load_scale, scale_bytes, blocks = reader.load_scale, reader.scale_bytes, reader.blocks
    superblock_bytes = reader.fmt.superblock_bytes

    @device
    def prepare(lines: int, scales: int, w: int, size: int, groups: int, count: int) -> None:
        """The same as `expand` of `panels.expander` for weights that need not be expanded."""
        for i in range(count):
            for group in range(groups):
                source = w + group * size + i * superblock_bytes
                prefetch_lines(source, superblock_bytes // 64)
                for block in range(blocks):
                    target = scales + LINE * (blocks * i + block) + 64 * group
                    store_f32(target, load_scale(source + scale_bytes * block))

    return prepare


def summer(reader: Reader) -> Any:
    """Make the function that multiplies panels of a format."""
    in_place, layout = reader is Q8_READER, _IN_PLACE if reader is Q8_READER else _EXPANDED
    prepare = _prefetcher(reader) if in_place else expander(reader, _DECODERS[reader])
    add_tile, add_some, add_few = (
        _tile_adder(tokens, layout) for tokens in (TOKENS, SOME_TOKENS, FEW_TOKENS)
    )
    fmt, blocks = reader.fmt, reader.blocks
    columns, superblock_bytes = fmt.columns, fmt.superblock_bytes
    scales_offset, chunk = layout.scales, layout.chunk // fmt.columns

    @device
    def sums(
        scratch: int,
        w: int,
        panel: int,
        groups: int,
        cols: int,
        q: int,
        d: int,
        b: int,
        first: int,
        count: int,
    ) -> None:
        superblocks, width = cols // columns, panel_groups(panel, groups)
        size = superblocks * superblock_bytes
        is_some = FEW_TOKENS < count % TOKENS <= SOME_TOKENS
        begin_tiles(scratch + _CONFIGURATION, SOME_TOKENS if is_some else FEW_TOKENS)
        for i in range((count + TOKENS - 1) // TOKENS * TOKENS * PANEL_GROUPS):
            store_f32(scratch + 64 * i, zeros_f32())
        for start in range(0, superblocks, chunk):
            length, at = min(chunk, superblocks - start), start * blocks
            source = w + panel * PANEL_GROUPS * size + start * superblock_bytes
            lines, group_bytes = scratch + LINES_OFFSET, 64
            prepare(lines, scratch + scales_offset, source, size, width, length)
            if in_place:
                lines, group_bytes = source + HEAD_BYTES, size
            for token in range(0, count, TOKENS):
                row, left, out = first + token, count - token, scratch + token * SUMS_ROW
                own_q, own_d = q + row * q_row(cols) + BLOCK * at, d + row * d_row(cols) + 4 * at
                weights = (lines, group_bytes, width, length * blocks, cols)
                if left > SOME_TOKENS:
                    add_tile(scratch, out, *weights, own_q, own_d)
                elif left > FEW_TOKENS:
                    add_some(scratch, out, *weights, own_q, own_d)
                else:
                    add_few(scratch, out, *weights, own_q, own_d)
        end_tiles()

    return sums
