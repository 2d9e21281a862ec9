"""Everything but products at the dimensions of DeepSeek-V4-Flash, to be timed on their own."""

from collections.abc import Sequence

import numpy as np
from kernel_cases import CHOSEN, EPS, EXPERTS, HIDDEN, Case, Chain, Memory, floats

from localv4.kernels import attend_keys, index_scores, mixes, pooling, route, row_operations, rows
from localv4.kernels import streams as hyper
from localv4.kernels.activations import row_bytes
from localv4.kernels.compiler import Entry
from localv4.kernels.head_lanes import lanes
from localv4.kernels.operation import float_bits
from localv4.kernels.row_operations import RowFormat

STREAMS, HEADS, WIDTH, PAIRS = 4, 64, 512, 32
INDEX_WIDTH, TOP_K, WINDOW = 128, 512, 128
CONTEXTS, PROMPTS = (4096, 65536), (512, 3840)
MIXES = 2 * STREAMS + STREAMS * STREAMS
ONE = float_bits(1.0)
CSA, HCA = 4, 128
"""Tokens of an entry in the two kinds of layers that have entries."""


def cases() -> list[Case]:
    """Return the operations that stand alone."""
    found: list[Case] = []
    for tokens in (1, *PROMPTS):
        found += [_leave(tokens), _enter(tokens), _route(tokens), _key(tokens)]
        found += [_append(tokens, 2 * WIDTH)]
        for fmt in row_operations.FORMATS.values():
            found += [_pool(fmt, tokens, CSA, False), _pool(fmt, tokens, HCA, False)]
            found += [_pool(fmt, tokens, CSA, True)]
    found += [_group(tokens) for tokens in PROMPTS]
    for tokens in PROMPTS:
        for fmt in row_operations.FORMATS.values():
            found += [_attend(fmt, tokens, ratio) for ratio in (0, CSA, HCA)]
            found += [_index_choose(fmt, tokens)]
    return found


def chains() -> list[Chain]:
    """Return attention and the indexer of one token."""
    found = []
    for context in CONTEXTS:
        for fmt in row_operations.FORMATS.values():
            found += [_attend_one(fmt, context, ratio) for ratio in (0, CSA, HCA)]
            found += [_index_one(fmt, context)]
    return found


# --- what operands are made of ---


def _cell(memory: Memory, address: int) -> int:
    """Return a word that holds an address, or any number."""
    return memory.array(np.array([address], np.int64))


def _rows(memory: Memory, fmt: RowFormat, count: int, is_index: bool) -> int:
    """Return compressed rows of ordinary numbers."""
    form, n = (fmt.index, INDEX_WIDTH) if is_index else (fmt.keys, WIDTH)
    if form.name == "F32":
        return floats(memory, count * n)
    rng = np.random.default_rng(count)
    if form.name == "BF16":
        values = rng.standard_normal((count, n), np.float32).view(np.uint32) >> 16
        return memory.array(values.astype(np.uint16))
    size = form.nbytes(n, 2 * PAIRS)
    stored = rng.integers(0, 256, (count, size), np.uint8)
    stored[:, n // 2 if form.name == "E2M1" else size - 8 :] = 130  # scales
    return memory.array(stored)


def _angles(memory: Memory, tokens: int) -> list[int]:
    return [floats(memory, tokens * PAIRS), floats(memory, tokens * PAIRS), PAIRS]


def _seen(ratio: int, last: int) -> int:
    """Return how many keys a token at a position sees."""
    entries = (last + 1) // ratio if ratio else 0
    return min(WINDOW, last + 1) + (min(entries, TOP_K) if ratio == CSA else entries)


def _keys(memory: Memory, fmt: RowFormat, position: int, tokens: int, ratio: int) -> list[int]:
    """Return the words that say which keys are seen."""
    entries = max((position + tokens) // ratio if ratio else 0, 1)
    capacity, chosen, counts = WINDOW + tokens, 0, 0
    if ratio == CSA:
        visible = (np.arange(position + 1, position + tokens + 1)) // ratio
        counts = memory.array(np.minimum(visible, TOP_K))
        rng = np.random.default_rng(1)
        picked = rng.integers(0, np.maximum(visible, 1)[:, None], (tokens, TOP_K))
        chosen = memory.array(picked.astype(np.int32))
    window = _cell(memory, floats(memory, capacity * WIDTH))
    stored = _cell(memory, _rows(memory, fmt, entries, is_index=False))
    seen = [_cell(memory, position), WINDOW, ratio, counts]
    return [*seen, chosen, TOP_K, window, capacity, stored]


# --- hyper-connections, router, keys ---


def _leave(tokens: int) -> Case:
    panels = hyper.partial_squares(MIXES) * STREAMS * HIDDEN

    def operands(memory: Memory) -> list[int]:
        x, update = floats(memory, tokens * STREAMS * HIDDEN), floats(memory, tokens * HIDDEN)
        mix, fn = floats(memory, tokens * (MIXES - STREAMS)), floats(memory, panels)
        partials = memory.random(4 * tokens * HIDDEN // hyper.COLUMNS * hyper.partial_row(MIXES))
        return [x, update, update, HIDDEN, mix, fn, MIXES, partials, tokens, STREAMS, HIDDEN]

    total = 4 * (panels + tokens * HIDDEN * (2 * STREAMS + 2))
    name = f"leave_and_mix, {tokens} tokens"
    return name, hyper.leave_and_mix, operands, total, 2 * tokens * MIXES * STREAMS * HIDDEN


def _enter(tokens: int) -> Case:
    row = hyper.partial_row(MIXES)

    def operands(memory: Memory) -> list[int]:
        partials = floats(memory, tokens * HIDDEN // hyper.COLUMNS * row)
        site = [partials, floats(memory, 3), floats(memory, MIXES), 20, EPS]
        x = [floats(memory, tokens * STREAMS * HIDDEN), floats(memory, HIDDEN), EPS]
        out = [memory.random(4 * tokens * HIDDEN), HIDDEN, memory.random(4 * tokens * MIXES)]
        rounded = [memory.random(tokens * size) for size in row_bytes(HIDDEN)]
        return [*site, *x, *out, *rounded, tokens, STREAMS, HIDDEN]

    total = 4 * tokens * (HIDDEN * (STREAMS + 1) + HIDDEN // hyper.COLUMNS * row)
    return f"enter, {tokens} tokens", mixes.enter, operands, total, 2 * tokens * STREAMS * HIDDEN


def _route(tokens: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        logits, bias = floats(memory, tokens * (EXPERTS + 16)), floats(memory, EXPERTS)
        out = [memory.random(8 * tokens * CHOSEN), memory.random(4 * tokens * CHOSEN)]
        return [logits, EXPERTS + 16, EXPERTS, bias, 0, 0, CHOSEN, ONE, *out, tokens]

    return f"route, {tokens} tokens", route.route, operands, 4 * tokens * EXPERTS, 0


def _group(tokens: int) -> Case:
    total = tokens * CHOSEN

    def operands(memory: Memory) -> list[int]:
        rng = np.random.default_rng(tokens)
        experts = np.sort(rng.random((tokens, EXPERTS)).argsort(1)[:, :CHOSEN], 1)
        table = memory.array(np.arange(1, EXPERTS + 1))
        words = [memory.array(experts), CHOSEN, table, memory.array(np.zeros(EXPERTS, np.int64)), 1]
        words += [memory.random(8 * total), 0, 0, 0, 0, 0, 0, tokens, memory.random(8 * total + 8)]
        return [*words, memory.random(8 * total), *[memory.random(4 * total)] * 2, EXPERTS]

    return f"group, {tokens} tokens", route.group, operands, 12 * total, 0


def _key(tokens: int) -> Case:
    def operands(memory: Memory) -> list[int]:
        x, weight = floats(memory, tokens * WIDTH), floats(memory, WIDTH)
        ring = _cell(memory, memory.random(4 * (WINDOW + tokens) * WIDTH))
        where = [ring, WINDOW + tokens, WIDTH, _cell(memory, 100), tokens]
        return [x, WIDTH, weight, EPS, *_angles(memory, tokens), *where]

    return f"key, {tokens} tokens", rows.key, operands, 8 * tokens * WIDTH, 0


def _append(tokens: int, width: int) -> Case:
    capacity = tokens + 8

    def operands(memory: Memory) -> list[int]:
        keys, gates = floats(memory, tokens * width), floats(memory, tokens * width)
        rings = [_cell(memory, memory.random(4 * capacity * width)) for _ in range(2)]
        ape = floats(memory, CSA * width)
        return [keys, gates, width, ape, CSA, *rings, capacity, width, _cell(memory, 40), tokens]

    total = 16 * tokens * width
    return f"append {width}, {tokens} tokens", pooling.append, operands, total, 0


def _pool(fmt: RowFormat, tokens: int, ratio: int, is_index: bool) -> Case:
    n = INDEX_WIDTH if is_index else WIDTH
    width, entry = 2 * n if ratio == CSA else n, fmt.index_pool if is_index else fmt.pool
    capacity, position = tokens + 2 * ratio, 3 * ratio - 1  # the first token completes an entry

    def operands(memory: Memory) -> list[int]:
        rings = [_cell(memory, floats(memory, capacity * width)) for _ in range(2)]
        entries = _cell(memory, memory.random(4 * n * (tokens // ratio + 4)))
        norm = [floats(memory, n), EPS, floats(memory, PAIRS), PAIRS]
        where = [entries, n, _cell(memory, position), tokens]
        return [*rings, capacity, width, ratio, *norm, *where]

    name = f"{entry.function.__name__}, entries of {ratio}, {tokens} tokens"
    done = (position + tokens) // ratio - position // ratio
    return name, entry, operands, 8 * width * ratio * done, 0


# --- attention and the indexer ---


def _attend(fmt: RowFormat, tokens: int, ratio: int) -> Case:
    keys = sum(_seen(ratio, t) for t in range(tokens))

    def operands(memory: Memory) -> list[int]:
        stride = HEADS * WIDTH
        x = [floats(memory, tokens * stride), stride, tokens, HEADS, WIDTH]
        seen = _keys(memory, fmt, 0, tokens, ratio)
        rest = [EPS, floats(memory, lanes(HEADS)), memory.random(64), 64]
        return [*seen, *x, *_angles(memory, tokens), *rest]

    total = 8 * tokens * HEADS * WIDTH + keys * WIDTH
    name = f"{fmt.name} attend, entries of {ratio}, {tokens} tokens"
    return name, fmt.attend, operands, total, 4 * keys * HEADS * WIDTH


def _attend_one(fmt: RowFormat, context: int, ratio: int) -> Chain:
    keys = _seen(ratio, context)

    def operations(memory: Memory) -> list[tuple[Entry, Sequence[int]]]:
        x, turn, scratch = floats(memory, HEADS * WIDTH), _angles(memory, 1), memory.random(64)
        seen = _keys(memory, fmt, context, 1, ratio)
        size, sinks = [HEADS, WIDTH], floats(memory, lanes(HEADS))
        return [
            (attend_keys.attend_query, [x, *size, *turn, EPS, scratch, 0]),
            (fmt.attend_scores, [*seen, *size, scratch, PAIRS]),
            (attend_keys.attend_softmax, [*seen[:4], *size, sinks, scratch, 0]),
            (fmt.attend_values, [*seen[:4], *size, *turn, scratch, x]),
        ]

    name = f"{fmt.name} attention of one token, entries of {ratio}, context {context}"
    total = fmt.keys.nbytes(WIDTH, 2 * PAIRS) * keys + 8 * HEADS * WIDTH
    return name, operations, total, 4 * keys * HEADS * WIDTH


def _index_one(fmt: RowFormat, context: int) -> Chain:
    entries = (context + 1) // CSA

    def operations(memory: Memory) -> list[tuple[Entry, Sequence[int]]]:
        x, weights = floats(memory, HEADS * INDEX_WIDTH), floats(memory, HEADS + 16)
        scratch = memory.random(index_scores.scratch_bytes(HEADS, INDEX_WIDTH, entries))
        stored = _cell(memory, _rows(memory, fmt, entries, is_index=True))
        seen = [_cell(memory, context), CSA, TOP_K, HEADS, INDEX_WIDTH]
        found, turn = [memory.random(4 * TOP_K), memory.random(8)], _angles(memory, 1)
        query = [x, HEADS, INDEX_WIDTH, *turn, weights, ONE, scratch]
        return [
            (fmt.index_query, query),
            (fmt.index_scores, [*seen, stored, scratch, PAIRS]),
            (index_scores.index_rank, [*seen, scratch]),
            (index_scores.index_select, [*seen, scratch, *found]),
        ]

    name = f"{fmt.name} indexer of one token, context {context}"
    total = entries * fmt.index.nbytes(INDEX_WIDTH, 2 * PAIRS)
    return name, operations, total, 2 * entries * HEADS * INDEX_WIDTH


def _index_choose(fmt: RowFormat, tokens: int) -> Case:
    entries = tokens // CSA
    scored = sum(t // CSA for t in range(tokens) if t // CSA > TOP_K)

    def operands(memory: Memory) -> list[int]:
        stride, size = HEADS * INDEX_WIDTH, HEADS + 16
        stored = _cell(memory, _rows(memory, fmt, entries, is_index=True))
        seen = [_cell(memory, 0), CSA, TOP_K, HEADS, INDEX_WIDTH, stored]
        x = [floats(memory, tokens * stride), stride, tokens, *_angles(memory, tokens)]
        found = [memory.random(4 * tokens * TOP_K), memory.random(8 * tokens)]
        nbytes = index_scores.scratch_bytes(HEADS, INDEX_WIDTH, entries)
        weights = [floats(memory, tokens * size), size, ONE]
        return [*seen, *x, *weights, *found, memory.random(64), nbytes]

    total = 4 * tokens * HEADS * INDEX_WIDTH
    name = f"{fmt.name} index_choose, {tokens} tokens"
    return name, fmt.index_choose, operands, total, 2 * scored * HEADS * INDEX_WIDTH
