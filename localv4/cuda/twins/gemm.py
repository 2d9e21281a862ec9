"""Twins of the products of many tokens with packed weights of integers.

The shapes of tiles are those of the kernels in `kernels/gemm.cu`, by the number of tokens, and in
`kernels/gemm_experts.cu`. No operation on experts has more slots (pairs of a token and an expert)
than a wave: so much scratch memory keeps the products of all slots until they are added up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from localv4.cuda.twin import Kernel, Twin, Words, nothing
from localv4.kernels.activations import SUMS_BYTES
from localv4.kernels.packed import BLOCK, GROUP_ROWS, MX4, Q4, Q8, PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6
from localv4.model.fast_moe import WAVE_SLOTS

KQUANTS = "gemm_kquants.cu"
WITH_LEAST = (Q4K, Q2)
"""Formats that want the sums of activations."""

MANY_BLOCKS = 256
"""Blocks of threads that keep a large GPU busy; with fewer a smaller tile is better."""

SERIES = 11
"""The word of a product that has the number of those that it stands for."""

KNOWN_SIZES = 256
"""Sizes of products whose tiles are remembered: all kernels ask for each, time and again."""

FEW_TOKENS = 16
"""Tokens that one tile takes, so that the weights are read once."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of threads computes: 16 * `groups` rows for each warp times `tokens` tokens.

    Its shared memory holds `stages` stages of `superblocks` superblocks; `source` has the kernel.
    """

    fmt: PackedFormat
    groups: int
    tokens: int
    warps: int
    stages: int
    superblocks: int = 1
    source: str = "gemm.cu"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def all_groups(self) -> int:
        """Row groups of a tile."""
        return self.groups * self.warps

    @property
    def size(self) -> int:
        """Bytes of a superblock of weights, activations and what belongs to them."""
        of_block = BLOCK + 4 + (SUMS_BYTES if self.fmt in WITH_LEAST else 0)
        activations = self.fmt.columns // BLOCK * of_block
        return self.all_groups * self.fmt.superblock_bytes + self.tokens * activations

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.stages * self.superblocks * self.size

    def blocks(self, groups: int, tokens: int) -> int:
        """Return the number of tiles of a product."""
        return -(-groups // self.all_groups) * -(-tokens // self.tokens)


def _tiles(fmt: PackedFormat, stages: int, superblocks: int) -> tuple[Tile, ...]:
    return (
        Tile(fmt, 1, 8, 2, 3, superblocks),
        Tile(fmt, 1, 16, 2, 3, superblocks),
        Tile(fmt, 1, 32, 4, stages),
        Tile(fmt, 2, 64, 4, stages),
        Tile(fmt, 2, 128, 4, stages),
    )


def _kquant_tiles(fmt: PackedFormat, warps: int) -> tuple[Tile, ...]:
    return (
        Tile(fmt, 1, 8, 2, 3, source=KQUANTS),
        Tile(fmt, 1, 16, 2, 3, source=KQUANTS),
        Tile(fmt, 2, 32, warps, 2, source=KQUANTS),
    )


TILES = {fmt: _tiles(fmt, *stages) for fmt, stages in {MX4: (2, 2), Q4: (3, 4), Q8: (3, 4)}.items()}
KQUANT_TILES = {
    fmt: _kquant_tiles(fmt, warps) for fmt, warps in {Q4K: 4, Q6: 2, Q3: 4, Q2: 4, IQ2: 4}.items()
}
"""Of each format, smaller ones first."""


def best_tile(tiles: Sequence[Tile], groups: int, tokens: int, products: int = 1) -> Tile:
    """Return the largest tile that leaves work for all of a GPU, and not much of it empty.

    `products` of that size are computed together.
    """
    last = next((i for i, tile in enumerate(tiles) if tile.tokens >= tokens), len(tiles) - 1)
    if tokens <= FEW_TOKENS:
        return tiles[last]
    while tiles[last - 1].tokens > FEW_TOKENS and _is_too_large(
        tiles[last], groups, tokens, products
    ):
        last -= 1
    return tiles[last]


def _is_too_large(tile: Tile, groups: int, tokens: int, products: int) -> bool:
    half = tile.tokens // 2
    computed, of_half = -(-tokens // tile.tokens) * tile.tokens, -(-tokens // half) * half
    is_rather_empty = 4 * computed > 5 * of_half
    return is_rather_empty or products * tile.blocks(groups, tokens) < MANY_BLOCKS


def gemm_kernels(tiles: Sequence[Tile]) -> tuple[Kernel, ...]:
    """Return the kernels of some tiles, of which the one of the best tile is launched."""
    best = lru_cache(KNOWN_SIZES)(partial(best_tile, tiles))
    return tuple(_gemm_kernel(tile, best) for tile in tiles)


def _gemm_kernel(tile: Tile, best: Callable[[int, int, int], Tile]) -> Kernel:
    def blocks(words: Words) -> int:
        groups, tokens, products = words[2], words[7], max(1, words[SERIES])
        is_best = best(groups, tokens, products) is tile
        return products * tile.blocks(groups, tokens) if is_best else 0

    def shared(words: Words) -> int:
        return tile.shared

    name = f"{tile.fmt.name.lower()}_gemm_{tile.tokens}"
    return Kernel(tile.source, name, tile.threads, blocks, shared)


def _gemm(tiles: Sequence[Tile]) -> Twin:
    return Twin("aiiaaaiaii", gemm_kernels(tiles), series=SERIES)


EXPERT_STAGES = {MX4: 2, Q4: 4, Q8: 3}
"""Stages of the largest tile of experts, which is one of 64 tokens."""

MOST_BLOCKS = 2048
"""Blocks of threads that go through the tiles of experts: several times as many as run at once."""

FEW_EXPERTS = 16
"""Experts whose tokens are shared out among blocks of threads as if these were more experts: the
shared one has tokens for as many tiles."""

SUM_THREADS, SUM_BLOCKS = 256, 1024


def _expert_kernel(tile: Tile, kind: str, scratch: Callable[[Words], int] = nothing) -> Kernel:
    def blocks(words: Words) -> int:
        experts = max(words[2], FEW_EXPERTS) if words[2] else 0
        return min(MOST_BLOCKS, experts * -(-words[4] // tile.all_groups))

    def shared(words: Words) -> int:
        return tile.shared + 4 * (words[2] + 1)

    name = f"{tile.fmt.name.lower()}_experts_{kind}"
    source = KQUANTS if tile.source == KQUANTS else "gemm_experts.cu"
    return Kernel(source, name, tile.threads, blocks, shared, scratch)


def _products_bytes(words: Words) -> int:
    return 4 * WAVE_SLOTS * GROUP_ROWS * words[4]


def _slots_blocks(words: Words) -> int:
    return SUM_BLOCKS if words[2] else 0


def _slots_bytes(words: Words) -> int:
    return 4 * WAVE_SLOTS


EXPERT_SUM = Kernel(
    "gemm_experts.cu", "experts_down_sum", SUM_THREADS, _slots_blocks, _slots_bytes, _products_bytes
)
"""Adds the products of the experts of each token."""


DOWN_KINDS = "tiaiiaaaaiiaai"

OUTPUTS_KINDS = f"{DOWN_KINDS}iiiiiia"
"""The words of a down, and in that of scratch memory an array for the outputs of slots."""

EXPERTS_SUM = Twin(OUTPUTS_KINDS, (replace(EXPERT_SUM, scratch=nothing),))
"""The rest of a `down` whose outputs (slots, 16 * row groups) are in an array."""


def expert_products(name: str) -> Twin:
    """Return the first part of the `down` of that name: outputs of slots, into an array."""
    kernel = MANY_PRODUCTS[name].kernels[0]
    return Twin(OUTPUTS_KINDS, (replace(kernel, scratch=nothing),))


def _gate_up(tile: Tile) -> Twin:
    return Twin("tiaiiaaaaaaifi", (_expert_kernel(tile, "gate_up"),))


def _down(tile: Tile) -> Twin:
    return Twin(DOWN_KINDS, (_expert_kernel(tile, "down", _products_bytes), EXPERT_SUM))


def _twins(prefix: str, tiles: Sequence[Tile], experts: Tile) -> dict[str, Twin]:
    return {
        f"{prefix}_gemm": _gemm(tiles),
        f"{prefix}_experts_gate_up": _gate_up(experts),
        f"{prefix}_experts_down": _down(experts),
    }


def _all_twins() -> dict[str, Twin]:
    twins: dict[str, Twin] = {}
    for fmt, tiles in TILES.items():
        experts = Tile(fmt, 2, 64, 4, EXPERT_STAGES[fmt])
        twins |= _twins(f"formats.{fmt.name.lower()}", tiles, experts)
    for fmt, tiles in KQUANT_TILES.items():
        twins |= _twins(f"kquant_gemm.{fmt.name.lower()}", tiles, tiles[-1])
    return twins


MANY_PRODUCTS = _all_twins()
