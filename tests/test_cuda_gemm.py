"""CUDA twins of products of many tokens: the bits of the CPU's."""

import numpy as np
import pytest
from cuda_products import FORMATS, random_packed
from cuda_twins import needs_compiler, run_twin
from operation_runs import ROW_GAP, Rounded, assert_same_bits, run
from reference_packed import Bytes, Floats, address, aligned, floats

from localv4.cuda.twins.gemm import MANY_PRODUCTS, TILES, best_tile
from localv4.kernels.formats import OPERATIONS
from localv4.kernels.gemm import SCRATCH_BYTES, SPARE_TOKENS
from localv4.kernels.packed import MX4, Q4, Q8, PackedFormat
from localv4.kernels.single_token import quantize

pytestmark = needs_compiler

F32 = np.float32
all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def activations(seed: int, tokens: int, cols: int) -> Rounded:
    """Rounded rows, and behind them what a product may read but not use."""
    x = floats(tokens, cols)
    x[...] = np.random.default_rng(seed).normal(size=x.shape)
    return rounded(x)


def rounded(x: Floats) -> Rounded:
    """The same of given rows."""
    tokens, cols = x.shape
    rows = Rounded(tokens + SPARE_TOKENS, cols)
    run(1, quantize, (address(x), cols, 0, tokens, cols, *rows.addresses(0)))
    return rows


def products(
    fmt: PackedFormat, weights: Bytes, rows: int, x: Rounded, tokens: int
) -> tuple[Floats, Floats]:
    """Those of the twin and those of the CPU, gaps between rows included."""
    mine, theirs = (floats(tokens, rows + ROW_GAP, fill=7) for _ in range(2))
    scratch = aligned(np.zeros(SCRATCH_BYTES, np.uint8))
    entry = OPERATIONS[fmt.name].gemm
    words = (address(weights), rows // 16, x.cols, *x.addresses(0), tokens)
    row = 4 * (rows + ROW_GAP)
    run(1, entry, (*words, address(theirs), row, address(scratch)))
    run_twin(entry, (*words, address(mine), row, 0))
    return mine, theirs


@all_formats
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [
        pytest.param(48, 256, 3, id="tile of 8"),
        pytest.param(80, 768, 16, id="tile of 16"),
        pytest.param(80, 512, 29, id="tile of 32"),
    ],
)
def test_products_have_the_bits_of_the_cpu(
    fmt: PackedFormat, rows: int, cols: int, tokens: int
) -> None:
    weights = random_packed(rows, fmt, rows, cols)
    mine, theirs = products(fmt, weights, rows, activations(1, tokens, cols), tokens)
    assert_same_bits(mine, theirs)
    assert np.isfinite(mine).all() and (mine[:, rows:] == 7).all()


@pytest.mark.parametrize("fmt", (MX4, Q4, Q8), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("tile", "tokens"), [(3, 133), (4, 251)], ids=["tile of 64", "tile of 128"]
)
def test_large_tiles(
    fmt: PackedFormat, tile: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localv4.cuda.twins.gemm.MANY_BLOCKS", 1)
    shape = TILES[fmt][tile]
    rows, cols = 16 * shape.all_groups + 48, 256
    assert best_tile(TILES[fmt], rows // 16, tokens) == shape
    words = [0, 0, rows // 16, cols, 0, 0, 0, tokens, *[0] * 16]
    kernels = MANY_PRODUCTS[f"formats.{fmt.name.lower()}_gemm"].kernels
    assert [k.name.endswith(f"_{shape.tokens}") for k in kernels if k.blocks(words)] == [True]
    weights = random_packed(rows, fmt, rows, cols)
    mine, theirs = products(fmt, weights, rows, activations(1, tokens, cols), tokens)
    assert_same_bits(mine, theirs)


@pytest.mark.parametrize("fmt", [Q4, Q8], ids=["Q4", "Q8"])
@pytest.mark.parametrize("cols", [64, 192, 832])
@pytest.mark.parametrize("tokens", [5, 21])
def test_columns_may_be_a_multiple_of_64(fmt: PackedFormat, cols: int, tokens: int) -> None:
    weights = random_packed(1, fmt, 32, cols)
    assert_same_bits(*products(fmt, weights, 32, activations(2, tokens, cols), tokens))


@all_formats
@pytest.mark.parametrize("fill", [0x00, 0x77, 0x7F, 0x80, 0x88, 0xFF])
def test_extreme_weights(fmt: PackedFormat, fill: int) -> None:
    weights = random_packed(1, fmt, 64, 256)
    weights.reshape(-1, fmt.superblock_bytes)[:, 64:] = fill
    x = rounded(np.repeat(np.array([[3], [-3]] * 3, F32), 256, axis=1))
    assert_same_bits(*products(fmt, weights, 64, x, 6))


@all_formats
def test_errors_stay_with_their_token(fmt: PackedFormat) -> None:
    x = floats(9, 256, fill=1)
    x[1, 77], x[4, 3] = np.nan, np.inf
    mine, _ = products(fmt, random_packed(1, fmt, 32, 256), 32, rounded(x), 9)
    assert not np.isfinite(mine[[1, 4], :32]).any()
    assert np.isfinite(np.delete(mine, [1, 4], axis=0)).all()


@pytest.mark.parametrize(
    ("groups", "tokens", "expected"),
    [(64, 1, 8), (64, 9, 16), (64, 17, 32), (4096, 64, 64), (4096, 96, 128), (4096, 129, 64)],
)
def test_tiles_suit_the_number_of_tokens(groups: int, tokens: int, expected: int) -> None:
    assert best_tile(TILES[Q8], groups, tokens).tokens == expected
