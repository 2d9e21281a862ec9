"""Products of panels by AMX: the sums of `kernels.gemm`, with the same bits."""

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
from localv4.kernels.packed import BLOCK
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
from localv4.kernels.readers import MX4_READER, Q4_READER, Q8_READER, Reader
from localv4.kernels.simd import store_f32, zeros_f32
from localv4.kernels.tiles import LINE

_STEP_LINES = STEP * BLOCK_LINES * LINE
_SUMS_BYTES = STEP * TOKENS * 64  # of a step
_CONFIGURATION = STEPS_OFFSET + 2 * _SUMS_BYTES
SCRATCH_BYTES = _CONFIGURATION + CONFIGURATION_BYTES
"""Memory that each thread needs for itself."""

_DECODERS = {MX4_READER: amx.mx4_codes, Q4_READER: amx.q4_codes, Q8_READER: amx.q8_bytes}


def _tile_adder(tokens: int) -> Any:
    """Make the function that adds a chunk of columns to the sums of a tile of tokens."""
    tile = tile_operations(tokens)
    load, store, multiply, add, both = tile.load, tile.store, tile.multiply, tile.add, tile.both

    @device
    def add_tile(
        scratch: int, out: int, groups: int, blocks: int, cols: int, q: int, d: int
    ) -> None:
        """Add `blocks` expanded blocks of the groups of a panel; out: sums of the first token."""
        qr, dr = q_row(cols), d_row(cols)
        ready, free = scratch + STEPS_OFFSET, scratch + STEPS_OFFSET + _SUMS_BYTES
        lines = scratch + LINES_OFFSET
        multiply(ready, lines, q, qr)
        for group in range(groups):
            scales, own_d = scratch + SCALES_OFFSET + 64 * group, d
            own_lines, own_q = lines + 64 * group, q
            sums = load(out + 64 * group, SUMS_ROW)
            for block in range(0, blocks, STEP):
                own_lines, own_q = own_lines + _STEP_LINES, own_q + STEP * BLOCK
                if block + STEP == blocks:
                    own_lines, own_q = lines + 64 * (group + 1), q
                if block + STEP < blocks or group + 1 < groups:
                    sums = both(sums, ready, scales, own_d, dr, free, own_lines, own_q, qr)
                else:
                    sums = add(sums, ready, scales, own_d, dr)
                ready, free = free, ready
                scales, own_d = scales + STEP * LINE, own_d + 4 * STEP
            store(out + 64 * group, SUMS_ROW, sums)

    return add_tile


_add_tile = _tile_adder(TOKENS)
_add_some, _add_few = _tile_adder(SOME_TOKENS), _tile_adder(FEW_TOKENS)


def summer(reader: Reader) -> Any:
    """Make the function that multiplies panels of a format."""
    fmt, expand = reader.fmt, expander(reader, _DECODERS[reader])
    columns, superblock_bytes, blocks = fmt.columns, fmt.superblock_bytes, fmt.columns // BLOCK
    chunk = CHUNK // columns

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
            expand(scratch + LINES_OFFSET, scratch + SCALES_OFFSET, source, size, width, length)
            for token in range(0, count, TOKENS):
                own_q = q + (first + token) * q_row(cols) + BLOCK * at
                own_d, out = d + (first + token) * d_row(cols) + 4 * at, scratch + token * SUMS_ROW
                left = count - token
                if left > SOME_TOKENS:
                    _add_tile(scratch, out, width, length * blocks, cols, own_q, own_d)
                elif left > FEW_TOKENS:
                    _add_some(scratch, out, width, length * blocks, cols, own_q, own_d)
                else:
                    _add_few(scratch, out, width, length * blocks, cols, own_q, own_d)
        end_tiles()

    return sums
