"""Twins of the products of many tokens with packed weights of integers.

The shapes of tiles are those of the kernels in `kernels/gemm.cu`, by the number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localv4.cuda.twin import Kernel, Twin, Words
from localv4.kernels.packed import BLOCK, MX4, Q4, Q8, PackedFormat

MANY_BLOCKS = 256
"""Blocks of threads that keep a large GPU busy; with fewer a smaller tile is better."""

FEW_TOKENS = 16
"""Tokens that one tile takes, so that the weights are read once."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of threads computes: 16 * `groups` rows for each warp times `tokens` tokens."""

    fmt: PackedFormat
    groups: int
    tokens: int
    warps: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def all_groups(self) -> int:
        """Row groups of a tile."""
        return self.groups * self.warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory: some stages of weights, activations and their scales."""
        activations = self.fmt.columns + self.fmt.columns // BLOCK * 4
        stage = self.all_groups * self.fmt.superblock_bytes + self.tokens * activations
        return self.stages * stage

    def blocks(self, groups: int, tokens: int) -> int:
        """Return the number of tiles of a product."""
        return -(-groups // self.all_groups) * -(-tokens // self.tokens)


def _tiles(fmt: PackedFormat, many_stages: int, few_stages: int) -> tuple[Tile, ...]:
    return (
        Tile(fmt, 1, 8, 2, few_stages),
        Tile(fmt, 1, 16, 2, few_stages),
        Tile(fmt, 1, 32, 4, many_stages),
        Tile(fmt, 2, 64, 4, many_stages),
        Tile(fmt, 2, 128, 4, many_stages),
    )


TILES = {fmt: _tiles(fmt, *stages) for fmt, stages in {MX4: (2, 4), Q4: (3, 6), Q8: (3, 6)}.items()}
"""Of each format, smaller ones first."""


def best_tile(tiles: Sequence[Tile], groups: int, tokens: int) -> Tile:
    """Return the largest tile that leaves work for all of a GPU, and not much of it empty."""
    last = next((i for i, tile in enumerate(tiles) if tile.tokens >= tokens), len(tiles) - 1)
    if tokens <= FEW_TOKENS:
        return tiles[last]
    while tiles[last - 1].tokens > FEW_TOKENS and _is_too_large(tiles[last], groups, tokens):
        last -= 1
    return tiles[last]


def _is_too_large(tile: Tile, groups: int, tokens: int) -> bool:
    half = tile.tokens // 2
    computed, of_half = -(-tokens // tile.tokens) * tile.tokens, -(-tokens // half) * half
    is_rather_empty = 4 * computed > 5 * of_half
    return is_rather_empty or tile.blocks(groups, tokens) < MANY_BLOCKS


def _gemm_kernel(tiles: Sequence[Tile], tile: Tile) -> Kernel:
    def blocks(words: Words) -> int:
        groups, tokens = words[2], words[7]
        is_best = best_tile(tiles, groups, tokens) == tile
        return tile.blocks(groups, tokens) if is_best else 0

    def shared(words: Words) -> int:
        return tile.shared

    name = f"{tile.fmt.name.lower()}_gemm_{tile.tokens}"
    return Kernel("gemm.cu", name, tile.threads, blocks, shared)


def _gemm(tiles: Sequence[Tile]) -> Twin:
    return Twin("aiiaaaiaia", tuple(_gemm_kernel(tiles, tile) for tile in tiles))


def _twins(make: Callable[[Sequence[Tile]], Twin], kind: str) -> dict[str, Twin]:
    return {f"formats.{fmt.name.lower()}_{kind}": make(tiles) for fmt, tiles in TILES.items()}


MANY_PRODUCTS = {**_twins(_gemm, "gemm")}
