"""The best way to multiply a panel with some tokens, for each packed integer format."""

from collections.abc import Callable

from localv4.kernels import gemm, kquant_panels, kquant_products, small_batches
from localv4.kernels.device import device
from localv4.kernels.gemm import Sums
from localv4.kernels.isa import ISA
from localv4.kernels.pair_gemm import can_pair, sum_pairs

BestSums = Callable[[int, int, int, int, int, int, int, int, int, int, int, int], None]
"""`gemm.Sums` with pairs and their distance, or 0, before the first token."""

FEW_TOKENS = 8
"""Tokens up to which the weights are better decoded for each four than expanded once."""

SOME_TOKENS = 16
"""Tokens up to which pairs are not worth their expansion."""


def _best(few_sums: Sums, many_sums: Sums, *, takes_pairs: bool = False) -> BestSums:
    """Make the function that multiplies a panel in the best way for so many tokens.

    takes_pairs: tiles multiply pairs, if activations are there as such, too.
    """

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
        pairs: int,
        distance: int,
        first: int,
        count: int,
    ) -> None:
        if count <= FEW_TOKENS:
            few_sums(scratch, w, panel, groups, cols, q, d, b, first, count)
        elif (
            takes_pairs and pairs != 0 and count > SOME_TOKENS and can_pair(w, panel, groups, cols)
        ):
            sum_pairs(scratch, w, panel, groups, cols, pairs, distance, first, count)
        else:
            many_sums(scratch, w, panel, groups, cols, q, d, b, first, count)

    chosen: BestSums = sums
    return chosen


sums_mx4 = _best(small_batches.few_sums_mx4, gemm.sums_mx4, takes_pairs=ISA.amx)
sums_q4 = _best(small_batches.few_sums_q4, gemm.sums_q4)
sums_q8 = _best(small_batches.few_sums_q8, gemm.sums_q8)
sums_q4k = _best(kquant_products.sums_q4k, kquant_panels.sums_q4k)
sums_q6 = _best(kquant_products.sums_q6, kquant_panels.sums_q6)
sums_q3 = _best(kquant_products.sums_q3, kquant_panels.sums_q3)
sums_q2 = _best(kquant_products.sums_q2, kquant_panels.sums_q2)
sums_iq2 = _best(kquant_products.sums_iq2, kquant_panels.sums_iq2)
