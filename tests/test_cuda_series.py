"""Operations side by side that differ by steady distances become one."""

from collections.abc import Sequence

import pytest

from localv4.cuda.fused import Operation
from localv4.cuda.series import as_series
from localv4.cuda.twin import Twin
from localv4.cuda.twins.gemm import MANY_PRODUCTS, SERIES, TILES, Tile, best_tile
from localv4.kernels.operation import WORDS
from localv4.kernels.packed import Q8

PRODUCT = MANY_PRODUCTS["formats.q8_gemm"]


def always(start: int, distance: int, count: int) -> bool:
    """All arrays lie on the GPU as they do here."""
    return True


def products(*numbers: int, twin: Twin = PRODUCT, columns: int = 256) -> list[Operation]:
    """Products of so many parts of a matrix."""
    return [(twin, words(number, columns)) for number in numbers]


def words(number: int, columns: int) -> Sequence[int]:
    """All words of one of them."""
    given = [1000 + 10 * number, 4, columns, 2000 + 20 * number, 3000 + 30 * number]
    given += [4000 + 40 * number, 7, 5000 + 50 * number, 999, 8]
    return [0, *given, *[0] * (WORDS - 1 - len(given))]


def test_steady_distances_make_one_operation() -> None:
    ((twin, own),) = as_series(products(0, 1, 2), always)
    assert twin is PRODUCT
    assert list(own[:SERIES]) == list(words(0, 256)[:SERIES])
    assert own[SERIES : SERIES + 6] == [3, 10, 20, 30, 40, 50] and len(own) == WORDS


@pytest.mark.parametrize(
    "group",
    [
        products(0),
        products(0, 1, 3),
        [*products(0), *products(1, columns=128)],
        [*products(0), *products(1, twin=MANY_PRODUCTS["formats.q4_gemm"])],
        products(0, 1, twin=Twin(PRODUCT.kinds, PRODUCT.kernels)),
    ],
    ids=["one", "distances", "sizes", "formats", "without a series"],
)
def test_others_stay_apart(group: list[Operation]) -> None:
    assert as_series(group, always) is group


def test_arrays_that_lie_elsewhere_on_the_gpu_stay_apart() -> None:
    group = products(0, 1)
    assert as_series(group, lambda start, distance, count: start != 3000) is group


def test_together_they_fill_larger_tiles() -> None:
    groups, tokens = 64, 480

    def tile(products: int) -> Tile:
        return best_tile(TILES[Q8], groups, tokens, products)

    assert tile(1).tokens < tile(8).tokens
    assert tile(8).blocks(groups, tokens) * 8 == sum(
        kernel.blocks([0, 0, groups, 0, 0, 0, 0, tokens, 0, 0, 0, 8]) for kernel in PRODUCT.kernels
    )
