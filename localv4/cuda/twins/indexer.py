"""Twins of the indexer (`kernels.index_keys`, `kernels.index_codes`, `kernels.index_scores`)."""

from localv4.cuda.twin import Kernel, Twin, Words

HEADS = 16
"""Heads of a tile."""

WARPS = 8
"""Of a block that prepares or scores."""

SCORE_BLOCKS = 264
"""Blocks that share the entries of one token, of which the words do not tell the number."""

CHOOSE_BLOCKS = 132
"""Blocks that take tokens in turn: each needs memory for the scores of one."""

CHOOSE_THREADS = 512

QUERY_BYTES = {"f32": 4, "bf16": 4, "compact": 1}
"""Of a channel of a query, by format."""


def _tiles(heads: int) -> int:
    return -(-heads // HEADS)


def _query(name: str) -> Twin:
    kernel = Kernel(
        *("indexer.cu", f"{name}_index_query", 32 * WARPS),
        lambda words: _tiles(words[2]) * HEADS // WARPS,
        joins=4,
    )
    return Twin("aiiaaiafa", (kernel,))


def _scores(name: str) -> Twin:
    kernel = Kernel(*("indexer.cu", f"{name}_index_scores", 32 * WARPS), lambda words: SCORE_BLOCKS)
    return Twin("aiiiicai", (kernel,))


def _choose_blocks(words: Words) -> int:
    return min(words[9], CHOOSE_BLOCKS)


def _choose(name: str) -> Twin:
    def query_bytes(words: Words) -> int:
        """Return what the query of a token and the weights of its heads take."""
        heads, n = HEADS * _tiles(words[4]), words[5]
        return heads * (n * QUERY_BYTES[name] + 4)

    kernel = Kernel(
        *("indexer.cu", f"{name}_index_choose", CHOOSE_THREADS, _choose_blocks, query_bytes),
        lambda words: _choose_blocks(words) * words[19],
    )
    return Twin("aiiiic" + "aii" + "aai" + "aif" + "aaii", (kernel,))


_SELECT = Kernel("indexer.cu", "index_select", CHOOSE_THREADS, lambda words: 1)

INDEXER = {
    "index_scores.index_rank": Twin("aiiiia", ()),
    "index_scores.index_select": Twin("aiiiiaaa", (_SELECT,)),
    **{f"row_operations.{name}_index_query": _query(name) for name in QUERY_BYTES},
    **{f"row_operations.{name}_index_scores": _scores(name) for name in QUERY_BYTES},
    **{f"row_operations.{name}_index_choose": _choose(name) for name in QUERY_BYTES},
}
