"""Search of a scale for a block of a tile: value = scale * code, code from low to high.

Codes are whole numbers in a range, or (`curved`) the sixteen levels of IQ4_NL. `tile` and `weights`
are addresses: of the first line of a block of n columns, and of its n importances (float32). Each
lane has its own block.

For fixed codes q the weighted error sum w (x - s q)^2 is least for s = sum w q x / sum w q^2, and
is then smaller than sum w x^2 by (sum w q x)^2 / sum w q^2, the *gain*. Which codes are best is not
convex; so many scales are tried, each a fraction of the one that maps the largest value to the end
of the range, and the best one is polished: codes for the scale, scale for the codes.
"""

from typing import Any

from localv4.kernels.device import device
from localv4.kernels.simd import (
    Vector,
    at_least,
    at_most,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    store_f32,
    zeros_f32,
)
from quant.quantizers.lanes import (
    LINE,
    inverse,
    iq4_level,
    magnitude,
    rounded,
    subtract,
    where_less,
)


@device
def nearest_code(x: Vector, low: Vector, high: Vector, curved: bool) -> Vector:
    """Return the code next to x."""
    if curved:
        return iq4_level(x)
    return at_least(at_most(rounded(x), high), low)


@device
def extreme(tile: int, n: int) -> Vector:
    """Return the value of the largest magnitude in each lane."""
    value = zeros_f32()
    for j in range(n):
        x = load_f32(tile + LINE * j)
        value = where_less(magnitude(value), magnitude(x), x, value)
    return value


@device
def fit(
    tile: int, weights: int, n: int, inverted: Vector, low: Vector, high: Vector, curved: bool
) -> Any:
    """Return the best scale for the codes of x * inverted, and its gain."""
    xq, qq = zeros_f32(), zeros_f32()
    for j in range(n):
        x = load_f32(tile + LINE * j)
        q = nearest_code(multiply(x, inverted), low, high, curved)
        wq = multiply(broadcast_f32(weights + 4 * j), q)
        xq = multiply_add(wq, x, xq)
        qq = multiply_add(wq, q, qq)
    scale = multiply(xq, inverse(qq))
    return scale, multiply(xq, scale)


@device
def best_scale(
    tile: int,
    weights: int,
    n: int,
    fractions: int,
    count: int,
    low: Vector,
    high: Vector,
    curved: bool,
    polish: int,
) -> Vector:
    """Return the scale of the least error; fractions: address of `count` codes of the extreme."""
    unit = inverse(extreme(tile, n))
    scale, gain = zeros_f32(), zeros_f32()
    for k in range(count):
        inverted = multiply(broadcast_f32(fractions + 4 * k), unit)
        own, own_gain = fit(tile, weights, n, inverted, low, high, curved)
        scale = where_less(gain, own_gain, own, scale)
        gain = at_least(own_gain, gain)
    for _ in range(polish):
        own, own_gain = fit(tile, weights, n, inverse(scale), low, high, curved)
        scale = where_less(gain, own_gain, own, scale)
        gain = at_least(own_gain, gain)
    return scale


@device
def error_of(
    tile: int, weights: int, n: int, step: Vector, low: Vector, high: Vector, curved: bool
) -> Vector:
    """Return the weighted squared error of a block with a given scale."""
    inverted, error = inverse(step), zeros_f32()
    for j in range(n):
        x = load_f32(tile + LINE * j)
        q = nearest_code(multiply(x, inverted), low, high, curved)
        rest = subtract(x, multiply(step, q))
        error = multiply_add(multiply(broadcast_f32(weights + 4 * j), rest), rest, error)
    return error


@device
def write_codes(
    out: int, tile: int, n: int, step: Vector, low: Vector, high: Vector, curved: bool
) -> None:
    """Write the codes of a block with a given scale, a line for each column."""
    inverted = inverse(step)
    for j in range(n):
        x = load_f32(tile + LINE * j)
        store_f32(out + LINE * j, nearest_code(multiply(x, inverted), low, high, curved))
