"""Panels of weights for large products: their sizes, and where the memory of a thread holds what.

A panel is 64 rows of packed weights. Some columns of it at a time are expanded to bytes once and
used for many tokens: lines [columns / 4][TILE_GROUPS][16 rows][4 columns] and float32 scales, a row
of TILE_GROUPS * 16 for each block of 32 columns.
"""

from typing import Any

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.packed import BLOCK
from localv4.kernels.readers import HEAD_BYTES, Reader, prefetch_lines
from localv4.kernels.simd import multiply, splat_f32, store_f32
from localv4.kernels.simd_blocks import scatter_block
from localv4.kernels.tiles import LINE

PANEL_GROUPS = 4
PANEL_ROWS = 16 * PANEL_GROUPS

BATCH_TOKENS = 240
"""Tokens of one call: their sums and activations stay in the second cache."""

SPARE_TOKENS = 16
"""Rows of activations that may be read behind the last one."""

SUMS_ROW = 4 * PANEL_ROWS
"""Bytes of the sums of a token, which start at the scratch memory."""

CHUNK = 256
"""Columns expanded at a time: at most 16 KiB of lines, which stay in the first cache beside the
activations of a tile."""

LINES_OFFSET = (BATCH_TOKENS + SPARE_TOKENS) * SUMS_ROW
"""Where the expanded lines stand in the scratch memory."""

SCALES_OFFSET = LINES_OFFSET + CHUNK // 4 * LINE
"""Where their scales do."""

STEPS_OFFSET = SCALES_OFFSET + CHUNK // BLOCK * LINE
"""What is behind: room for int32 sums."""

_BLOCK_LINES = LINE * BLOCK // 4


def panels(rows: int) -> int:
    """Return the number of panels of a matrix."""
    return -(-rows // PANEL_ROWS)


@device
def panel_groups(panel: int, groups: int) -> int:
    """Return the number of groups in a panel of a matrix of `groups` groups."""
    return min(PANEL_GROUPS, groups - panel * PANEL_GROUPS)


def expander(reader: Reader, decode: Any) -> Any:
    """Make the function that expands superblocks of a format; `decode` as in `Reader`."""
    load_scale = reader.load_scale
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
