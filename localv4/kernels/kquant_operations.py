"""The operations of one token of the formats of `kernels.packed_kquants`, by format."""

from localv4.kernels import kquant_products as products
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packed_kquants import IQ2, Q2, Q3, Q4K, Q6
from localv4.kernels.single_token import share_down, share_gate_up, share_matvec

# --- Q4K ---


@entry("Q4K")
def q4k_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, products.matvec_q4k)


@entry("Q4K")
def q4k_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, products.expert_gate_up_q4k)


@entry("Q4K")
def q4k_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, products.expert_down_q4k)


# --- Q6 ---


@entry("Q6")
def q6_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, products.matvec_q6)


@entry("Q6")
def q6_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, products.expert_gate_up_q6)


@entry("Q6")
def q6_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, products.expert_down_q6)


# --- Q3 ---


@entry("Q3")
def q3_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, products.matvec_q3)


@entry("Q3")
def q3_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, products.expert_gate_up_q3)


@entry("Q3")
def q3_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, products.expert_down_q3)


# --- Q2 ---


@entry("Q2")
def q2_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, products.matvec_q2)


@entry("Q2")
def q2_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, products.expert_gate_up_q2)


@entry("Q2")
def q2_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, products.expert_down_q2)


# --- IQ2 ---


@entry("IQ2")
def iq2_matvec(operation: int, member: int, members: int) -> None:
    """`single_token.share_matvec`"""
    share_matvec(operation, members, products.matvec_iq2)


@entry("IQ2")
def iq2_gate_up(operation: int, member: int, members: int) -> None:
    """`single_token.share_gate_up`"""
    share_gate_up(operation, members, products.expert_gate_up_iq2)


@entry("IQ2")
def iq2_down(operation: int, member: int, members: int) -> None:
    """`single_token.share_down`"""
    share_down(operation, members, products.expert_down_iq2)


MATVEC: dict[PackedFormat, Entry] = {
    Q4K: q4k_matvec,
    Q6: q6_matvec,
    Q3: q3_matvec,
    Q2: q2_matvec,
    IQ2: iq2_matvec,
}
GATE_UP: dict[PackedFormat, Entry] = {
    Q4K: q4k_gate_up,
    Q6: q6_gate_up,
    Q3: q3_gate_up,
    Q2: q2_gate_up,
    IQ2: iq2_gate_up,
}
DOWN: dict[PackedFormat, Entry] = {
    Q4K: q4k_down,
    Q6: q6_down,
    Q3: q3_down,
    Q2: q2_down,
    IQ2: iq2_down,
}
