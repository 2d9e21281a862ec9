"""Attention's products with keys in the tiles of AMX: bfloat16 times bfloat16, summed in float32.

Compressed keys are bfloat16 or less already; queries, weights and the keys of the window are
rounded to it. 32 keys times 32 heads, or 32 heads times 32 channels, are four tiles of sums. A line
of an operand has sixteen pairs of what is summed over, channels or keys, as *words*
(`kernels.row_codes`). A sum has one order whatever is beside it.

Memory and words are those of `kernels.attend`, but for three parts of it:

* The lanes of a pair of channels lie in the place of the first one: `turn` puts them there.
* The weights of 32 keys, from j on, lie in the first sixteen of their rows: row i has those of a
  vector's head number i, keys j + r and j + r + 16 side by side. `weigh` puts them there.
* Sums of values are (lanes, n) float32. In each 32 channels, the two halves of a vector's 128-bit
  parts are apart, since keys are put side by side within such parts: `finish` puts them together.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types

from localv4.kernels import simd_ir
from localv4.kernels.amx import (
    CONFIGURATION_BYTES,
    WHOLE,
    begin_whole_tiles,
    end_tiles,
)
from localv4.kernels.attend import LINE, KeyProducts, find_keys, float_count, keys_of, softmax
from localv4.kernels.device import device, inlined
from localv4.kernels.float_tiles import add_products, clear_sums, load_sums, store_sums
from localv4.kernels.head_lanes import lane_row, turn_square
from localv4.kernels.operation import float_at
from localv4.kernels.row_codes import pair_words, paired_words
from localv4.kernels.row_forms import F32_ROWS, MOST_CHANNELS, RowForm
from localv4.kernels.rows import rotate_pair
from localv4.kernels.simd import (
    Vector,
    i32x16,
    load_f32,
    operation,
    prefetch_far,
    read_i64,
    store_f32,
    store_i32,
    zeros_f32,
)
from localv4.kernels.simd_ir import FLOATS, I64, LANES, SHORTS, Builder, Value
from localv4.kernels.stack import stack_floats

KEYS = CHANNELS = 2 * WHOLE
"""Keys and channels that are multiplied together."""

AT_ONCE = 16 * KEYS
"""Keys whose words of CHANNELS channels stay in the first cache."""

_HEADS = 4 * KEYS  # bytes of as many lanes
_BLOCK = 4 * KEYS * LANES  # bytes of the words of KEYS keys and CHANNELS channels
_address = types.int64
_configuration = stack_floats(CONFIGURATION_BYTES // 4)
_rows = stack_floats(KEYS * MOST_CHANNELS // 2)
_pairs = stack_floats(AT_ONCE * CHANNELS // 2)


def tile_products(form: RowForm) -> KeyProducts:
    """Make the functions for entries of one form."""
    return KeyProducts(
        keys=KEYS,
        channels=CHANNELS,
        turn=pair_queries,
        score=_scorer(form),
        weigh=weigh_pairs,
        sum_values=_summer(form),
        finish=_finish,
    )


# --- queries times keys ---


@device
def pair_queries(scratch: int, v: int, heads: int, n: int) -> None:
    """Put vector v of the lanes of channels 2i and 2i + 1 side by side, in the place of 2i."""
    row, at = lane_row(heads), scratch + 64 * v
    for channel in range(0, n, 2):
        own = at + row * channel
        store_i32(own, paired_words(load_f32(own), load_f32(own + row)))


def _scorer(form: RowForm) -> Callable[[int, int, int, int, int, int, int, int], None]:
    stride = form.stride
    window_words, entry_words = F32_ROWS.words, form.words

    @device
    def write_rows(
        out: int, keys: int, key_row: int, raw: int, ahead: int, n: int, rope: int
    ) -> None:
        """Write KEYS keys as words, of which the first `raw` are float32.

        Memory is asked for the keys whose addresses are `ahead` bytes further on.
        """
        size = stride(n, rope)
        for i in range(KEYS):
            key = read_i64(keys + i * key_row)
            following = read_i64(keys + i * key_row + ahead)
            for line in range(0, size, LINE):
                prefetch_far(following + line)
            for channel in range(0, n, CHANNELS):
                at = out + 2 * (n * i + channel)
                if i < raw:
                    store_i32(at, window_words(key, channel, n, rope))
                else:
                    store_i32(at, entry_words(key, channel, n, rope))

    @device
    def score(
        operation: int, t: int, scratch: int, heads: int, n: int, rope: int, first: int, end: int
    ) -> None:
        """Find and score keys first ... end - 1 of token t, whole blocks of KEYS."""
        find_keys(operation, t, scratch, heads, n, stride(n, rope), first, end)
        row, raw, rows = lane_row(heads), float_count(operation, t), _rows()
        key_row, keys = row + LINE, keys_of(scratch, heads, n)
        begin_whole_tiles(_configuration())
        for j in range(first, end, KEYS):
            at = keys + j * key_row
            ahead = KEYS * key_row if j + KEYS < end else 0
            write_rows(rows, at + row, key_row, raw - j, ahead, n, rope)
            for v in range(0, row, _HEADS):
                clear_sums()
                for channel in range(0, n, CHANNELS):
                    queries = scratch + channel * row + v
                    add_products(rows + 2 * channel, 2 * n * WHOLE, 2 * n, queries, 64, 2 * row)
                store_sums(at + v, WHOLE * key_row, key_row)
        end_tiles()

    return score


# --- weights times values ---


@device
def sums_row(n: int) -> int:
    """Return the bytes from the sums of a head to those of the next."""
    return 4 * n + LINE


@operation(types.void, _address, _address)
def _pair_weights(b: Builder, at: Value, key_row: Value) -> None:
    """Replace the weights of sixteen heads and KEYS keys, rows of heads, by rows of pairs."""
    places = [b.add(at, b.mul(key_row, ir.Constant(I64, key))) for key in range(KEYS)]
    vectors = [simd_ir.load(b, FLOATS, place) for place in places]
    halves = [turn_square(b, vectors[first : first + LANES]) for first in (0, LANES)]
    for place, low, high in zip(places, *halves, strict=False):
        simd_ir.store(b, pair_words(b, low, high), place)


@device
def weigh_pairs(at: int, row: int, count: int, sink: Vector) -> None:
    """Make weights of the scores of sixteen heads, and pairs of the weights."""
    softmax(at, row, count, sink)
    for j in range(count, (count + KEYS - 1) // KEYS * KEYS):
        store_f32(at + row * j, zeros_f32())
    for j in range(0, count, KEYS):
        _pair_weights(at + row * j, row)


@operation(types.void, _address, i32x16, i32x16)
def _store_beside(b: Builder, at: Value, first: Value, second: Value) -> None:
    """Write the words of two keys side by side: CHANNELS pairs, to two tiles."""
    words = [b.bitcast(value, SHORTS) for value in (first, second)]
    for half in range(2):
        lanes = [8 * (i // 8) + 4 * half + i // 2 % 4 + 2 * LANES * (i % 2) for i in range(32)]
        order = simd_ir.constant(simd_ir.vector(simd_ir.I32, 32), lanes)
        pairs = b.shuffle_vector(*words, order)
        simd_ir.store(b, pairs, simd_ir.offset(b, at, _BLOCK // 2 * half))


def _summer(form: RowForm) -> Callable[[int, int, int, int, int, int, int, int], None]:
    window_words, entry_words = F32_ROWS.words, form.words

    @inlined
    def words(key: int, is_float: bool, channel: int, n: int, rope: int) -> Vector:
        """Return the words of CHANNELS channels of a key."""
        if is_float:
            return window_words(key, channel, n, rope)
        return entry_words(key, channel, n, rope)

    @device
    def write_pairs(
        out: int, keys: int, key_row: int, raw: int, channel: int, n: int, rope: int
    ) -> None:
        """Write CHANNELS channels of KEYS keys in pairs; the first `raw` keys are float32."""
        for i in range(WHOLE):
            low, high = read_i64(keys + i * key_row), read_i64(keys + (i + WHOLE) * key_row)
            first = words(low, i < raw, channel, n, rope)
            second = words(high, i + WHOLE < raw, channel, n, rope)
            _store_beside(out + LINE * i, first, second)

    @device
    def sum_values(
        scratch: int, heads: int, n: int, rope: int, raw: int, count: int, start: int, end: int
    ) -> None:
        """Sum channels start ... end - 1 of all keys."""
        row, pairs, size = lane_row(heads), _pairs(), sums_row(n)
        key_row, keys = row + LINE, keys_of(scratch, heads, n)
        begin_whole_tiles(_configuration())
        for j in range(0, count, AT_ONCE):
            at = keys + j * key_row
            blocks = (min(AT_ONCE, count - j) + KEYS - 1) // KEYS
            for channel in range(start, end, CHANNELS):
                for i in range(blocks):
                    own, left = at + KEYS * i * key_row + row, raw - j - KEYS * i
                    write_pairs(pairs + _BLOCK * i, own, key_row, left, channel, n, rope)
                for v in range(0, row, _HEADS):
                    out = scratch + v // 4 * size + 4 * channel
                    if j == 0:
                        clear_sums()
                    else:
                        load_sums(out, size * WHOLE, size)
                    for i in range(blocks):
                        weights, own = at + KEYS * i * key_row + v, pairs + _BLOCK * i
                        add_products(weights, 64, key_row, own, _BLOCK // 2, LINE)
                    store_sums(out, size * WHOLE, size)
        end_tiles()

    return sum_values


@operation(types.void, _address, _address)
def _put_together(b: Builder, out: Value, source: Value) -> None:
    """Write CHANNELS sums in the order of the channels."""
    halves = [simd_ir.load(b, FLOATS, simd_ir.offset(b, source, 64 * half)) for half in range(2)]
    for first in range(2):
        lanes = [8 * first + 4 * (i // 8) + i % 4 + LANES * (i // 4 % 2) for i in range(LANES)]
        order = simd_ir.constant(simd_ir.INTS, lanes)
        simd_ir.store(b, b.shuffle_vector(*halves, order), simd_ir.offset(b, out, 64 * first))


@device
def _finish(
    out: int, scratch: int, first: int, heads: int, n: int, cos: int, sin: int, pairs: int
) -> None:
    """Turn CHANNELS sums back by the angles of the query and write them to the row at out."""
    start = n - 2 * pairs
    for head in range(heads):
        at = 4 * n * head
        _put_together(out + at + 4 * first, scratch + sums_row(n) * head + 4 * first)
        for channel in range(max(first, start), first + CHANNELS, 2):
            angle = 4 * ((channel - start) // 2)
            rotate_pair(out + at + 4 * channel, float_at(cos + angle), -float_at(sin + angle))
