"""Many tokens times packed weights of the formats of `kernels.packed_kquants`.

The functions are those of `kernels.gemm`, with the same arguments and the bits of the mat-vec.
"""

from typing import Any

from localv4.kernels.activations import SUMS_BYTES, b_row, d_row, q_row
from localv4.kernels.device import device
from localv4.kernels.gemm import SCRATCH_BYTES, Sums
from localv4.kernels.kquant_readers import (
    IQ2_READER,
    Q2_READER,
    Q3_READER,
    Q4K_READER,
    Q6_READER,
    SuperblockReader,
)
from localv4.kernels.kquant_tiles import (
    AT_ONCE,
    BLOCKS,
    TileOperations,
    panel_bytes,
    parts_bytes,
    tile_operations,
    tile_tokens,
)
from localv4.kernels.packed import BLOCK
from localv4.kernels.packed_kquants import STEPS, SUPERBLOCK
from localv4.kernels.panels import LINES_OFFSET, PANEL_GROUPS, SUMS_ROW, panel_groups
from localv4.kernels.simd import store_f32, zeros_f32
from localv4.kernels.tiles import LINE, TILE_GROUPS

# of a superblock, in the buffers of the activations
_D_BYTES, _B_BYTES = SUPERBLOCK // BLOCK * 4, SUPERBLOCK // BLOCK * SUMS_BYTES


def _block_products(reader: SuperblockReader, tile: TileOperations) -> Any:
    """Make the function that adds the products of a superblock to the parts of a tile."""
    starts, add_lines, add_block = tile.starts, tile.add_lines, tile.add_block
    first_start, last_start, rounds = starts[0], starts[-1], reader.kind.part_lines // AT_ONCE

    @device
    def add_whole(
        parts: int, panel: int, q: int, qr: int, d: int, dr: int, b: int, br: int
    ) -> None:
        lines = panel
        for block in range(BLOCKS):
            sums = first_start(b, br)
            for _ in range(rounds):
                sums = add_lines(sums, lines, q, qr)
                lines, q = lines + AT_ONCE * LINE, q + 4 * AT_ONCE
            add_block(parts, panel, block, d, dr, b, br, (sums,))
            d, b = d + 4, b + SUMS_BYTES

    @device
    def add_halves(
        parts: int, panel: int, q: int, qr: int, d: int, dr: int, b: int, br: int
    ) -> None:
        lines = panel
        for block in range(BLOCKS):
            low, high = first_start(b, br), last_start(b, br)
            for _ in range(rounds):
                low = add_lines(low, lines, q, qr)
                lines, q = lines + AT_ONCE * LINE, q + 4 * AT_ONCE
            for _ in range(rounds):
                high = add_lines(high, lines, q, qr)
                lines, q = lines + AT_ONCE * LINE, q + 4 * AT_ONCE
            add_block(parts, panel, block, d, dr, b, br, (low, high))
            d, b = d + 4, b + SUMS_BYTES

    return add_whole if reader.kind.parts == 1 else add_halves


def _tile_adder(reader: SuperblockReader, tile: TileOperations) -> Any:
    """Make the function that adds an expanded superblock to the sums of a tile of tokens."""
    arrange, clear, finish = tile.arrange, tile.clear, tile.finish
    add_blocks = _block_products(reader, tile)

    @device
    def add_tile(out: int, panel: int, parts: int, cols: int, q: int, d: int, b: int) -> None:
        """Add the products of an expanded superblock with a tile of tokens to the sums at out."""
        own_q, own_row = arrange(q, q_row(cols))
        clear(parts)
        add_blocks(parts, panel, own_q, own_row, d, d_row(cols), b, b_row(cols))
        finish(out, SUMS_ROW, parts, panel)

    return add_tile


def _summer(reader: SuperblockReader) -> Sums:
    """Make the function that multiplies panels of a format."""
    tokens, few = tile_tokens(reader), (tile_tokens(reader) + 1) // 2
    whole = tile_operations(reader, tokens)
    expand, expand_head = whole.expand, whole.expand_head
    add_tile = _tile_adder(reader, whole)
    add_few = _tile_adder(reader, tile_operations(reader, few))
    superblock_bytes, parts_at = reader.fmt.superblock_bytes, LINES_OFFSET + panel_bytes(reader)
    # the scratch memory of `kernels.gemm`
    assert parts_at + parts_bytes(reader, tokens) <= SCRATCH_BYTES

    @device
    def expand_groups(panel: int, w: int, size: int, width: int) -> None:
        """Expand a superblock of some groups that are `size` bytes apart."""
        for group in range(width):
            expand_head(panel + 64 * group, w + group * size)
            for step in range(STEPS):
                expand(panel + 64 * group, w + group * size, step)

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
        superblocks = cols // SUPERBLOCK
        size, lines = superblocks * superblock_bytes, scratch + LINES_OFFSET
        for i in range((count + tokens - 1) * PANEL_GROUPS):
            store_f32(scratch + 64 * i, zeros_f32())
        for i in range(superblocks):
            for group in range(0, panel_groups(panel, groups), TILE_GROUPS):
                source = w + (panel * PANEL_GROUPS + group) * size + i * superblock_bytes
                width = min(TILE_GROUPS, panel_groups(panel, groups) - group)
                expand_groups(lines, source, size, width)
                for token in range(0, count, tokens):
                    out, row = scratch + token * SUMS_ROW + 64 * group, first + token
                    own_q = q + row * q_row(cols) + SUPERBLOCK * i
                    own_d = d + row * d_row(cols) + _D_BYTES * i
                    own_b = b + row * b_row(cols) + _B_BYTES * i
                    if count - token > few:
                        add_tile(out, lines, scratch + parts_at, cols, own_q, own_d, own_b)
                    else:
                        add_few(out, lines, scratch + parts_at, cols, own_q, own_d, own_b)

    return sums


sums_q4k = _summer(Q4K_READER)
sums_q6 = _summer(Q6_READER)
sums_q3 = _summer(Q3_READER)
sums_q2 = _summer(Q2_READER)
sums_iq2 = _summer(IQ2_READER)
