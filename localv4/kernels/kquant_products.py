"""Products of one token, and of a few, with the packed formats of `kernels.packed_kquants`.

The functions are those of `kernels.matvec` and `kernels.gemm`, with the same arguments. A row's
result is the sum over its superblocks, in order, of d * (sum over blocks, in order, of whole number
* scale of the activations): the same bits whatever the range of groups and the number of tokens.
"""

from typing import Any

from localv4.kernels.activations import SUMS_BYTES, b_row, d_row, q_row
from localv4.kernels.device import device
from localv4.kernels.gemm import SUMS_ROW, Sums
from localv4.kernels.kquant_readers import (
    IQ2_READER,
    Q2_READER,
    Q3_READER,
    Q4K_READER,
    Q6_READER,
    SuperblockReader,
)
from localv4.kernels.matvec import Expert, Matvec, products
from localv4.kernels.packed import BLOCK
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6, STEP, STEPS, SUPERBLOCK
from localv4.kernels.simd import Vector, store_f32
from localv4.kernels.small_batches import TOKENS, panel_sums

_D_STEP, _B_STEP = STEP // BLOCK * 4, STEP // BLOCK * SUMS_BYTES


def _pair_products(reader: SuperblockReader) -> Any:
    """Make the function that multiplies two groups of sixteen rows with one token."""
    one, size = reader.operations(1), reader.fmt.superblock_bytes
    nothing, no_parts, add_step, finish = one.nothing, one.no_parts, one.add_step, one.finish
    prefetch_head, arrange = one.prefetch_head, one.arrange

    @device
    def pair(w: int, v: int, cols: int, q: int, d: int, b: int) -> tuple[Vector, Vector]:
        acc_w, acc_v = nothing(), nothing()
        for _ in range(cols // SUPERBLOCK):
            prefetch_head(w)
            prefetch_head(v)
            parts_w, parts_v, own_q = no_parts(), no_parts(), arrange((q,))
            for step in range(STEPS):
                step_q = (own_q[0] + STEP * step,)
                parts_w = add_step(parts_w, w, step, step_q, (d,), (b,))
                parts_v = add_step(parts_v, v, step, step_q, (d,), (b,))
                d, b = d + _D_STEP, b + _B_STEP
            acc_w, acc_v = finish(acc_w, parts_w, w), finish(acc_v, parts_v, v)
            w, v, q = w + size, v + size, q + SUPERBLOCK
        return acc_w[0], acc_v[0]

    return pair


def _summer(reader: SuperblockReader) -> Sums:
    """Make the function that multiplies panels of a format with a few tokens."""
    four = reader.operations(TOKENS)
    nothing, no_parts, add_step, finish = four.nothing, four.no_parts, four.add_step, four.finish
    prefetch_head, arrange = four.prefetch_head, four.arrange
    superblock_bytes = reader.fmt.superblock_bytes

    @device
    def multiply_four(
        out: int, w: int, cols: int, q: int, d: int, b: int, r1: int, r2: int, r3: int
    ) -> None:
        """Write the sums of a group with four rows of activations: the first, and r1 ... r3."""
        qr, dr, br = q_row(cols), d_row(cols), b_row(cols)
        acc = nothing()
        for _ in range(cols // SUPERBLOCK):
            prefetch_head(w)
            parts = no_parts()
            q0, q1, q2, q3 = arrange((q, q + r1 * qr, q + r2 * qr, q + r3 * qr))
            for step in range(STEPS):
                own_q = (q0, q1, q2, q3)
                own_d = (d, d + r1 * dr, d + r2 * dr, d + r3 * dr)
                own_b = (b, b + r1 * br, b + r2 * br, b + r3 * br)
                parts = add_step(parts, w, step, own_q, own_d, own_b)
                q0, q1, q2, q3 = q0 + STEP, q1 + STEP, q2 + STEP, q3 + STEP
                d, b = d + _D_STEP, b + _B_STEP
            acc = finish(acc, parts, w)
            w, q = w + superblock_bytes, q + SUPERBLOCK
        store_f32(out, acc[0])
        store_f32(out + SUMS_ROW, acc[1])
        store_f32(out + 2 * SUMS_ROW, acc[2])
        store_f32(out + 3 * SUMS_ROW, acc[3])

    return panel_sums(reader.fmt, multiply_four)


matvec_q4k: Matvec
matvec_q6: Matvec
matvec_q3: Matvec
matvec_q2: Matvec
matvec_iq2: Matvec
expert_gate_up_q4k: Expert
expert_gate_up_q6: Expert
expert_gate_up_q3: Expert
expert_gate_up_q2: Expert
expert_gate_up_iq2: Expert
expert_down_q4k: Expert
expert_down_q6: Expert
expert_down_q3: Expert
expert_down_q2: Expert
expert_down_iq2: Expert

matvec_q4k, expert_gate_up_q4k, expert_down_q4k = products(Q4K, _pair_products(Q4K_READER))
matvec_q6, expert_gate_up_q6, expert_down_q6 = products(Q6, _pair_products(Q6_READER))
matvec_q3, expert_gate_up_q3, expert_down_q3 = products(Q3, _pair_products(Q3_READER))
matvec_q2, expert_gate_up_q2, expert_down_q2 = products(Q2, _pair_products(Q2_READER))
matvec_iq2, expert_gate_up_iq2, expert_down_iq2 = products(IQ2, _pair_products(IQ2_READER))
sums_q4k = _summer(Q4K_READER)
sums_q6 = _summer(Q6_READER)
sums_q3 = _summer(Q3_READER)
sums_q2 = _summer(Q2_READER)
sums_iq2 = _summer(IQ2_READER)
