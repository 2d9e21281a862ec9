"""The operations of many tokens of the formats of `kernels.packed_kquants`, by format."""

from dataclasses import dataclass

from localv4.kernels import panel_sums
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.many_tokens import share_experts_down, share_experts_gate_up, share_gemm
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6


@dataclass(frozen=True, slots=True)
class ManyOperations:
    """Products with many tokens: of a matrix, and of the two halves of experts."""

    gemm: Entry
    experts_gate_up: Entry
    experts_down: Entry


# --- Q4K ---


@entry("Q4K")
def q4k_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q4k)


@entry("Q4K")
def q4k_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q4k)


@entry("Q4K")
def q4k_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q4k)


# --- Q6 ---


@entry("Q6")
def q6_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q6)


@entry("Q6")
def q6_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q6)


@entry("Q6")
def q6_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q6)


# --- Q3 ---


@entry("Q3")
def q3_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q3)


@entry("Q3")
def q3_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q3)


@entry("Q3")
def q3_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q3)


# --- Q2 ---


@entry("Q2")
def q2_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q2)


@entry("Q2")
def q2_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q2)


@entry("Q2")
def q2_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q2)


# --- IQ2 ---


@entry("IQ2")
def iq2_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_iq2)


@entry("IQ2")
def iq2_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_iq2)


@entry("IQ2")
def iq2_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_iq2)


MANY_OPERATIONS: dict[PackedFormat, ManyOperations] = {
    Q4K: ManyOperations(q4k_gemm, q4k_experts_gate_up, q4k_experts_down),
    Q6: ManyOperations(q6_gemm, q6_experts_gate_up, q6_experts_down),
    Q3: ManyOperations(q3_gemm, q3_experts_gate_up, q3_experts_down),
    Q2: ManyOperations(q2_gemm, q2_experts_gate_up, q2_experts_down),
    IQ2: ManyOperations(iq2_gemm, iq2_experts_gate_up, iq2_experts_down),
}
"""By format."""
