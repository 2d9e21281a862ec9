"""Weights of a large product, prepared for the register tile (`kernels.tiles`).

A panel is 64 rows of packed weights, some columns at a time, expanded to bytes once and used for
many tokens: lines [columns / 4][TILE_GROUPS][16 rows][4 columns] and float32 scales, a row of
TILE_GROUPS * 16 for each block of 32 columns.
"""

from typing import Any

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.packed import BLOCK
from localv4.kernels.readers import HEAD_BYTES, Reader, prefetch_lines
from localv4.kernels.simd import multiply, splat_f32, store_f32
from localv4.kernels.simd_blocks import scatter_block
from localv4.kernels.tiles import LINE

_BLOCK_LINES = LINE * BLOCK // 4


def expander(reader: Reader) -> Any:
    """Make the function that expands superblocks of a format."""
    decode, load_scale = reader.decode, reader.load_scale
    blocks, block_bytes, scale_bytes = reader.blocks, reader.block_bytes, reader.scale_bytes
    superblock_bytes, unit = reader.fmt.superblock_bytes, np.float32(reader.factor)

    @device
    def expand(lines: int, scales: int, w: int, size: int, groups: int, count: int) -> None:
        """Expand `count` superblocks from w on, of `groups` groups that are `size` bytes apart."""
        for i in range(count):
            for group in range(groups):
                source = w + group * size + i * superblock_bytes
                prefetch_lines(source, superblock_bytes // 64)
                for block in range(blocks):
                    target = lines + _BLOCK_LINES * block + 64 * group
                    scatter_block(target, LINE, decode(source + HEAD_BYTES + block_bytes * block))
                    scale = multiply(load_scale(source + scale_bytes * block), splat_f32(unit))
                    store_f32(scales + LINE * block + 64 * group, scale)
            lines, scales = lines + _BLOCK_LINES * blocks, scales + LINE * blocks

    return expand
