"""Several operations as one launch: the bits that each of them has alone."""

from collections.abc import Sequence

import numpy as np
import pytest
from cuda_products import random_packed, rounded
from cuda_twins import launch, needs_compiler
from operation_runs import Floats, assert_same_bits
from reference_packed import address, floats
from test_cuda_compiler import ARCHITECTURES, needs_nvrtc
from test_cuda_matvec import FloatMatrix

from localv4.cuda.compiler import compile_source
from localv4.cuda.gpu import Launch
from localv4.cuda.merged import MOST, NAME, merge
from localv4.cuda.twin import BESIDE, MERGED_THREADS
from localv4.cuda.twins import TWINS
from localv4.kernels.operation import WORDS
from localv4.kernels.packed import Q8

Words = tuple[int, ...]
COLS = 512


def launched(name: str, operands: Sequence[int]) -> Launch:
    """The one launch of an operation that runs beside others."""
    words = [0, *operands, *[0] * (WORDS - 1 - len(operands))]
    words[BESIDE] = 3
    (kernel,) = (kernel for kernel in TWINS[name].kernels if kernel.blocks(words))
    return Launch(kernel, kernel.blocks(words), kernel.shared(words), tuple(words))


class Products:
    """Two products with integers, one with floats, of different sizes; `outs` have the results."""

    def __init__(self) -> None:
        self.x, self.plain = rounded(1, COLS), floats(COLS, fill=0.5)
        self.matrices = [random_packed(rows, Q8, rows, COLS) for rows in (48, 160)]
        self.floats = FloatMatrix("B16", 80, COLS)
        self.outs: list[Floats] = [floats(rows) for rows in (48, 160, 80)]

    def launches(self) -> list[Launch]:
        source = self.x.addresses(0)
        integers = [
            launched(
                "formats.q8_matvec",
                (address(matrix), len(out) // 16, COLS, *source, address(out)),
            )
            for matrix, out in zip(self.matrices, self.outs, strict=False)
        ]
        matrix = (address(self.floats.packed), self.floats.groups, COLS, address(self.plain))
        words = (*matrix, address(self.floats.scale), 0, address(self.outs[2]))
        return [*integers, launched("float_operations.b16_matvec", words)]


@needs_compiler
def test_merged_operations_give_the_same_bits() -> None:
    apart, together = Products(), Products()
    for one in apart.launches():
        launch(one.kernel, [*one.words[:BESIDE], 0, 0], one.blocks)
    (merged,) = merge(together.launches())
    assert merged.kernel.name == NAME and merged.kernel.threads == MERGED_THREADS
    assert len(merged.words) == 3 * WORDS
    launch(merged.kernel, merged.words)
    for mine, theirs in zip(together.outs, apart.outs, strict=True):
        assert_same_bits(mine, theirs)
        assert np.isfinite(mine).all() and mine.any()


def test_one_operation_stays_as_it_is() -> None:
    alone = Products().launches()[0]
    assert merge([alone]) == [alone]
    assert merge([]) == []


def test_words_of_a_launch_are_bounded() -> None:
    launches = Products().launches()[:1] * (MOST + 2)
    assert [len(each.words) // WORDS for each in merge(launches)] == [MOST, 2]


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_kernels_compile(arch: str) -> None:
    (merged,) = merge(Products().launches())
    assert NAME.encode() in compile_source(merged.kernel.source, arch)
