"""Twins of the products of many tokens with packed float weights."""

from collections.abc import Sequence

from localv4.cuda.twin import Kernel, Twin, Words
from localv4.cuda.twins.gemm import FEW_TOKENS, Tile, best_tile, gemm_kernels
from localv4.kernels.packed import F8, PackedFormat
from localv4.kernels.packing_floats import B16, F32R

SOURCE = "gemm_floats.cu"

COLUMNS = 32
"""Columns of a stage; several times as many where there are few tokens."""

GAP = 64
"""Bytes behind the activations of a token."""

SPLIT_THREADS, SPLIT_BLOCKS = 256, 1024


class FloatTile(Tile):
    """A tile with 32 columns of weights and float32 activations in the place of a superblock."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        columns = COLUMNS * self.superblocks
        weights = self.all_groups * self.fmt.superblock_bytes * columns
        return self.stages * (weights + self.tokens * (4 * columns + GAP))


def _splitting(tiles: Sequence[Tile]) -> Kernel:
    """Return the kernel that splits activations for the tiles of many tokens."""

    def is_wanted(words: Words) -> bool:
        return best_tile(tiles, words[2], words[7]).tokens > FEW_TOKENS

    def blocks(words: Words) -> int:
        quads = words[7] * words[3] // 4
        return min(SPLIT_BLOCKS, -(-quads // SPLIT_THREADS)) if is_wanted(words) else 0

    def scratch(words: Words) -> int:
        return 4 * words[7] * words[3] if is_wanted(words) else 0

    return Kernel(SOURCE, "split_activations", SPLIT_THREADS, blocks, scratch=scratch)


def _twin(fmt: PackedFormat, superblocks: int) -> Twin:
    tiles = (
        FloatTile(fmt, 1, 8, 2, 3, superblocks, SOURCE),
        FloatTile(fmt, 1, 16, 2, 3, superblocks, SOURCE),
        FloatTile(fmt, 1, 32, 4, 3, 1, SOURCE),
        FloatTile(fmt, 2, 64, 4, 3, 1, SOURCE),
    )
    return Twin("aiiaaiiaii", (_splitting(tiles), *gemm_kernels(tiles)))


MANY_FLOAT_PRODUCTS = {
    "float_operations.b16_gemm": _twin(B16, 4),
    "float_operations.f8_gemm": _twin(F8, 4),
    "float_operations.f32r_gemm": _twin(F32R, 2),
}
