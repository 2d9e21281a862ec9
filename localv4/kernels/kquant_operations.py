"""The operations of one token of the formats of `kernels.packed_kquants`, by format."""

from localv4.kernels import kquant_products as products
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.packed import PackedFormat
from localv4.kernels.packed_kquants import Q4K
from localv4.kernels.single_token import share_down, share_gate_up, share_matvec


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


MATVEC: dict[PackedFormat, Entry] = {Q4K: q4k_matvec}
GATE_UP: dict[PackedFormat, Entry] = {Q4K: q4k_gate_up}
DOWN: dict[PackedFormat, Entry] = {Q4K: q4k_down}
