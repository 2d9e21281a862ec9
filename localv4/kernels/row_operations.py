"""The operations that write and read compressed rows, and the formats of the decoder state.

A format says in which form (`kernels.row_forms`) keys and rows of the indexer are stored. Only the
operations of the format that a network uses are compiled.
"""

from dataclasses import dataclass

from localv4.kernels.attend_keys import attend_keys, is_tiled
from localv4.kernels.compiler import Entry, entry
from localv4.kernels.index_codes import index_codes
from localv4.kernels.index_keys import index_keys
from localv4.kernels.pooling import pooling
from localv4.kernels.row_forms import BF16_ROWS, E2M1_ROWS, E4M3_ROWS, F32_ROWS, RowForm


@dataclass(frozen=True, slots=True, eq=False)
class RowFormat:
    """How the compressed rows of a decoder state are stored, and what works on them.

    The operations are described where they are made: `pool` and `index_pool` in `kernels.pooling`,
    those of attention in `kernels.attend_keys`, those of the indexer in `kernels.index_keys` and
    `kernels.index_codes`.
    """

    name: str
    keys: RowForm
    index: RowForm
    pool: Entry
    index_pool: Entry
    attend: Entry
    attend_scores: Entry
    attend_values: Entry
    index_query: Entry
    index_scores: Entry
    index_choose: Entry

    @property
    def tiled(self) -> bool:
        """Whether queries and weights of attention are to be laid out for tiles."""
        return is_tiled(self.keys)

    @property
    def family(self) -> str:
        """The family of kernels of these operations."""
        return self.pool.family


# --- f32 ---

_f32_keys, _f32_index = attend_keys(F32_ROWS), index_keys(F32_ROWS)
_f32_attend, _f32_attend_scores = _f32_keys.attend, _f32_keys.scores
_f32_attend_values, _f32_index_query = _f32_keys.values, _f32_index.query
_f32_index_scores, _f32_index_choose = _f32_index.scores, _f32_index.choose
_f32_pool = pooling(F32_ROWS)


@entry("kv-f32")
def f32_pool(operation: int, member: int, members: int) -> None:
    """`pooling`"""
    _f32_pool(operation, member, members)


@entry("kv-f32")
def f32_attend(operation: int, member: int, members: int) -> None:
    """`attend_keys`: attend"""
    _f32_attend(operation, member, members)


@entry("kv-f32")
def f32_attend_scores(operation: int, member: int, members: int) -> None:
    """`attend_keys`: scores"""
    _f32_attend_scores(operation, member, members)


@entry("kv-f32")
def f32_attend_values(operation: int, member: int, members: int) -> None:
    """`attend_keys`: values"""
    _f32_attend_values(operation, member, members)


@entry("kv-f32")
def f32_index_query(operation: int, member: int, members: int) -> None:
    """`index_keys`: query"""
    _f32_index_query(operation, member, members)


@entry("kv-f32")
def f32_index_scores(operation: int, member: int, members: int) -> None:
    """`index_keys`: scores"""
    _f32_index_scores(operation, member, members)


@entry("kv-f32")
def f32_index_choose(operation: int, member: int, members: int) -> None:
    """`index_keys`: choose"""
    _f32_index_choose(operation, member, members)


F32 = RowFormat(
    *("f32", F32_ROWS, F32_ROWS, f32_pool, f32_pool),
    *(f32_attend, f32_attend_scores, f32_attend_values),
    *(f32_index_query, f32_index_scores, f32_index_choose),
)

# --- bf16 ---

_bf16_keys, _bf16_index = attend_keys(BF16_ROWS), index_keys(BF16_ROWS)
_bf16_attend, _bf16_attend_scores = _bf16_keys.attend, _bf16_keys.scores
_bf16_attend_values, _bf16_index_query = _bf16_keys.values, _bf16_index.query
_bf16_index_scores, _bf16_index_choose = _bf16_index.scores, _bf16_index.choose
_bf16_pool = pooling(BF16_ROWS)


@entry("kv-bf16")
def bf16_pool(operation: int, member: int, members: int) -> None:
    """`pooling`"""
    _bf16_pool(operation, member, members)


@entry("kv-bf16")
def bf16_attend(operation: int, member: int, members: int) -> None:
    """`attend_keys`: attend"""
    _bf16_attend(operation, member, members)


@entry("kv-bf16")
def bf16_attend_scores(operation: int, member: int, members: int) -> None:
    """`attend_keys`: scores"""
    _bf16_attend_scores(operation, member, members)


@entry("kv-bf16")
def bf16_attend_values(operation: int, member: int, members: int) -> None:
    """`attend_keys`: values"""
    _bf16_attend_values(operation, member, members)


@entry("kv-bf16")
def bf16_index_query(operation: int, member: int, members: int) -> None:
    """`index_keys`: query"""
    _bf16_index_query(operation, member, members)


@entry("kv-bf16")
def bf16_index_scores(operation: int, member: int, members: int) -> None:
    """`index_keys`: scores"""
    _bf16_index_scores(operation, member, members)


@entry("kv-bf16")
def bf16_index_choose(operation: int, member: int, members: int) -> None:
    """`index_keys`: choose"""
    _bf16_index_choose(operation, member, members)


BF16 = RowFormat(
    *("bf16", BF16_ROWS, BF16_ROWS, bf16_pool, bf16_pool),
    *(bf16_attend, bf16_attend_scores, bf16_attend_values),
    *(bf16_index_query, bf16_index_scores, bf16_index_choose),
)

# --- compact ---

_compact_keys, _compact_index = attend_keys(E4M3_ROWS), index_codes()
_compact_attend, _compact_attend_scores = _compact_keys.attend, _compact_keys.scores
_compact_attend_values, _compact_index_query = _compact_keys.values, _compact_index.query
_compact_index_scores, _compact_index_choose = _compact_index.scores, _compact_index.choose
_compact_pool = pooling(E4M3_ROWS)
_compact_index_pool = pooling(E2M1_ROWS)


@entry("kv-compact")
def compact_pool(operation: int, member: int, members: int) -> None:
    """`pooling`"""
    _compact_pool(operation, member, members)


@entry("kv-compact")
def compact_index_pool(operation: int, member: int, members: int) -> None:
    """`pooling`"""
    _compact_index_pool(operation, member, members)


@entry("kv-compact")
def compact_attend(operation: int, member: int, members: int) -> None:
    """`attend_keys`: attend"""
    _compact_attend(operation, member, members)


@entry("kv-compact")
def compact_attend_scores(operation: int, member: int, members: int) -> None:
    """`attend_keys`: scores"""
    _compact_attend_scores(operation, member, members)


@entry("kv-compact")
def compact_attend_values(operation: int, member: int, members: int) -> None:
    """`attend_keys`: values"""
    _compact_attend_values(operation, member, members)


@entry("kv-compact")
def compact_index_query(operation: int, member: int, members: int) -> None:
    """`index_codes`: query"""
    _compact_index_query(operation, member, members)


@entry("kv-compact")
def compact_index_scores(operation: int, member: int, members: int) -> None:
    """`index_codes`: scores"""
    _compact_index_scores(operation, member, members)


@entry("kv-compact")
def compact_index_choose(operation: int, member: int, members: int) -> None:
    """`index_codes`: choose"""
    _compact_index_choose(operation, member, members)


COMPACT = RowFormat(
    *("compact", E4M3_ROWS, E2M1_ROWS, compact_pool, compact_index_pool),
    *(compact_attend, compact_attend_scores, compact_attend_values),
    *(compact_index_query, compact_index_scores, compact_index_choose),
)

FORMATS = {fmt.name: fmt for fmt in (F32, BF16, COMPACT)}
"""By name."""
