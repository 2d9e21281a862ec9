"""Twins of the products of many tokens with packed float weights."""

from localv4.cuda.twin import Twin
from localv4.cuda.twins.gemm import Tile, gemm_kernel
from localv4.kernels.packed import F8, PackedFormat
from localv4.kernels.packing_floats import B16, F32R

SOURCE = "gemm_floats.cu"

COLUMNS = 32
"""Columns of a stage."""

GAP = 64
"""Bytes behind the activations of a token."""


class FloatTile(Tile):
    """A tile with columns of weights and float32 activations."""

    @property
    def size(self) -> int:
        """Bytes of some columns of weights and of activations."""
        weights = self.all_groups * self.fmt.superblock_bytes * COLUMNS
        return weights + self.tokens * (4 * COLUMNS + GAP)


def _twin(fmt: PackedFormat) -> Twin:
    tiles = (
        FloatTile(fmt, 1, 8, 2, 6, source=SOURCE),
        FloatTile(fmt, 1, 16, 2, 6, source=SOURCE),
        FloatTile(fmt, 1, 32, 4, 3, source=SOURCE),
        FloatTile(fmt, 2, 64, 4, 2, source=SOURCE),
    )
    return Twin("aiiaaiiaia", tuple(gemm_kernel(tiles, tile) for tile in tiles))


MANY_FLOAT_PRODUCTS = {
    f"float_operations.{fmt.name.lower()}_gemm": _twin(fmt) for fmt in (B16, F8, F32R)
}
