"""The operations of each packed integer format, and where to find them by its name."""

from dataclasses import dataclass

from localv4.kernels import kquant_operations, matvec, panel_sums
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.kquant_gemm import MANY_OPERATIONS
from localv4.kernels.many_tokens import share_experts_down, share_experts_gate_up, share_gemm
from localv4.kernels.single_token import share_down, share_gate_up, share_matvec


@dataclass(frozen=True, slots=True)
class Operations:
    """What a format can do: the first three for one token, the others for many."""

    matvec: Entry
    gate_up: Entry
    down: Entry
    gemm: Entry
    experts_gate_up: Entry
    experts_down: Entry


# --- MX4 ---


@entry("MX4")
def mx4_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, matvec.matvec_mx4)


@entry("MX4")
def mx4_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, matvec.expert_gate_up_mx4)


@entry("MX4")
def mx4_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, matvec.expert_down_mx4)


@entry("MX4")
def mx4_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_mx4)


@entry("MX4")
def mx4_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_mx4)


@entry("MX4")
def mx4_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_mx4)


_MX4 = Operations(
    mx4_matvec, mx4_gate_up, mx4_down, mx4_gemm, mx4_experts_gate_up, mx4_experts_down
)

# --- Q4 ---


@entry("Q4")
def q4_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, matvec.matvec_q4)


@entry("Q4")
def q4_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, matvec.expert_gate_up_q4)


@entry("Q4")
def q4_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, matvec.expert_down_q4)


@entry("Q4")
def q4_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q4)


@entry("Q4")
def q4_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q4)


@entry("Q4")
def q4_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q4)


_Q4 = Operations(q4_matvec, q4_gate_up, q4_down, q4_gemm, q4_experts_gate_up, q4_experts_down)

# --- Q8 ---


@entry("Q8")
def q8_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, matvec.matvec_q8)


@entry("Q8")
def q8_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, matvec.expert_gate_up_q8)


@entry("Q8")
def q8_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, matvec.expert_down_q8)


@entry("Q8")
def q8_gemm(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_gemm`"""
    share_gemm(operation, member, panel_sums.sums_q8)


@entry("Q8")
def q8_experts_gate_up(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_gate_up`"""
    share_experts_gate_up(operation, member, panel_sums.sums_q8)


@entry("Q8")
def q8_experts_down(operation: int, member: int, members: int) -> None:
    """`many_tokens.share_experts_down`"""
    share_experts_down(operation, member, members, panel_sums.sums_q8)


_Q8 = Operations(q8_matvec, q8_gate_up, q8_down, q8_gemm, q8_experts_gate_up, q8_experts_down)

_KQUANTS = {
    fmt.name: Operations(
        *(kquant_operations.MATVEC[fmt], kquant_operations.GATE_UP[fmt]),
        *(kquant_operations.DOWN[fmt], many.gemm, many.experts_gate_up, many.experts_down),
    )
    for fmt, many in MANY_OPERATIONS.items()
}

OPERATIONS = {"MX4": _MX4, "Q4": _Q4, "Q8": _Q8, **_KQUANTS}
"""By the name of the format."""
