"""Search of a scale and a least value for a block of a tile: value = scale * code - least.

Codes are whole numbers from 0 to `high`; `tile` and `weights` as in `scales`. For fixed codes q the
two numbers follow from the weighted regression of x on q; a least value below 0 is not allowed and
becomes 0. Codes come from lines that map multiples of the least and of the largest value of the
block to the ends of the codes.
"""

from typing import Any

import numpy as np

from localv4.kernels.device import device
from localv4.kernels.simd import (
    Vector,
    add,
    at_least,
    at_most,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    negative,
    splat_f32,
    zeros_f32,
)
from quant.quantizers.lanes import LINE, inverse, rounded, subtract, where_less


@device
def plane_solution(aa: Vector, ab: Vector, bb: Vector, ax: Vector, bx: Vector) -> Any:
    """Return s, t >= 0 of least (x - s a - t b)^2, by the sums of products; t first becomes 0."""
    zero = zeros_f32()
    determinant = subtract(multiply(aa, bb), multiply(ab, ab))
    # what is left of equal products after rounding counts as no determinant
    floor = multiply(multiply(aa, bb), splat_f32(np.float32(1e-6)))
    scale = inverse(where_less(floor, determinant, determinant, zero))
    s = multiply(subtract(multiply(ax, bb), multiply(bx, ab)), scale)
    t = multiply(subtract(multiply(bx, aa), multiply(ax, ab)), scale)
    alone = multiply(ax, inverse(aa))
    s = where_less(zero, t, s, alone)
    t = where_less(zero, t, t, zero)
    other = at_least(multiply(bx, inverse(bb)), zero)
    t = where_less(zero, s, t, other)
    return at_least(s, zero), t


@device
def fit_line(tile: int, weights: int, n: int, inverted: Vector, shift: Vector, high: Vector) -> Any:
    """Return scale, least value, and gain for the codes of x * inverted + shift."""
    zero = zeros_f32()
    w1, wq, wx, qq, qx = zero, zero, zero, zero, zero
    for j in range(n):
        x, w = load_f32(tile + LINE * j), broadcast_f32(weights + 4 * j)
        q = at_least(at_most(rounded(multiply_add(x, inverted, shift)), high), zero)
        product = multiply(w, q)
        w1 = add(w1, w)
        wq = add(wq, product)
        wx = multiply_add(w, x, wx)
        qq = multiply_add(product, q, qq)
        qx = multiply_add(product, x, qx)
    s, t = plane_solution(qq, negative(wq), w1, qx, negative(wx))
    # sum w x^2 less the error: 2 s qx - 2 t wx - s^2 qq - t^2 w1 + 2 s t wq
    half = subtract(multiply(s, qx), multiply(t, wx))
    first = multiply(s, subtract(multiply(s, qq), multiply(t, wq)))
    second = multiply(t, subtract(multiply(t, w1), multiply(s, wq)))
    return s, t, subtract(add(half, half), add(first, second))


@device
def best_line(
    tile: int, weights: int, n: int, spans: int, count: int, high: Vector, polish: int
) -> Any:
    """Return scale and least value of the least error; spans: address of `count` pairs."""
    least, largest = zeros_f32(), zeros_f32()
    for j in range(n):
        x = load_f32(tile + LINE * j)
        least, largest = at_most(x, least), at_least(x, largest)
    scale, offset, gain = zeros_f32(), zeros_f32(), zeros_f32()
    for k in range(count + polish):
        if k < count:
            low = multiply(least, broadcast_f32(spans + 8 * k))
            top = multiply(largest, broadcast_f32(spans + 8 * k + 4))
            inverted = multiply(high, inverse(subtract(top, low)))
            shift = negative(multiply(low, inverted))
        else:
            inverted = inverse(scale)
            shift = multiply(offset, inverted)
        s, t, own = fit_line(tile, weights, n, inverted, shift, high)
        scale = where_less(gain, own, s, scale)
        offset = where_less(gain, own, t, offset)
        gain = at_least(own, gain)
    return scale, offset


@device
def line_error(
    tile: int, weights: int, n: int, step: Vector, offset: Vector, high: Vector
) -> Vector:
    """Return the weighted squared error of a block with given numbers."""
    inverted, error = inverse(step), zeros_f32()
    shift = multiply(offset, inverted)
    for j in range(n):
        x = load_f32(tile + LINE * j)
        q = at_least(at_most(rounded(multiply_add(x, inverted, shift)), high), zeros_f32())
        rest = subtract(add(x, offset), multiply(step, q))
        error = multiply_add(multiply(broadcast_f32(weights + 4 * j), rest), rest, error)
    return error
