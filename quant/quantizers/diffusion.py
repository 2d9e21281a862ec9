"""Codes chosen for the activations that a row will meet, each error made good by later columns.

The rule of GPTQ and of optimal brain surgery: with the second moments H of the activations and
H^-1 = U^T U, U upper triangular, the least squared error of the output that is left when column j
deviates by e is reached by changing the columns k > j by -e U_jk / U_jj.

Columns come in units. Within a unit the codes are improved further, one at a time, to the code
nearest to its optimum while all others stay (coordinate descent). What counts there is the output's
error after the columns behind the unit have made it good: e^T S e, where S = (U^T U)^-1 for the
unit's part of U.
"""

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import (
    Vector,
    add,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    negative,
    splat_f32,
    store_f32,
    zeros_f32,
)
from quant.quantizers.choice import Codes
from quant.quantizers.lanes import LINE, inverse, subtract
from quant.quantizers.scales import nearest_code
from quant.quantizers.tiles import LANES, load_tile, store_codes, store_numbers

MOST_COLUMNS = 256
SCRATCH_LINES = 7 * MOST_COLUMNS

# Lines of scratch behind the tile of values as they were before the unit
CHANGED = MOST_COLUMNS
_CODES = 2 * MOST_COLUMNS
ROUNDED = 3 * MOST_COLUMNS
ERRORS = 4 * MOST_COLUMNS
STEPS = 5 * MOST_COLUMNS
_OFFSETS = 6 * MOST_COLUMNS

_ROWS, _COLUMNS = 4, 32
"""What one pass of `spread` holds in registers."""


@kernel(
    "void(i1[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], i8,"
    " f4, f4, b1, i8)",
    family="quantize",
)
def diffuse(
    codes: Codes,
    errors: Floats,
    values: Floats,
    steps: Floats,
    offsets: Floats,
    factor: Floats,
    metric: Floats,
    scratch: Floats,
    first: int,
    low: Scalar,
    high: Scalar,
    curved: bool,
    passes: int,
) -> None:
    """Choose codes of a unit, columns first ... of values (rows, all columns), by given scales.

    codes, errors (rows, cols); steps and offsets (rows, blocks); factor (all columns, all columns)
    f32: U_jk / U_jj; metric (cols, cols) f32: S. Errors get the sign minus: what to `spread`.
    scratch: SCRATCH_LINES vectors. At most 256 columns.
    """
    base, cols = scratch.ctypes.data, codes.shape[1]
    n = cols // steps.shape[1]
    lowest, highest = splat_f32(low), splat_f32(high)
    ratios = factor.ctypes.data + 4 * (first * factor.shape[1] + first)
    stride = 4 * factor.shape[1]
    for row in range(0, values.shape[0], LANES):
        load_tile(scratch[LANES * STEPS :], steps, row, 0, steps.shape[1])
        load_tile(scratch[LANES * _OFFSETS :], offsets, row, 0, steps.shape[1])
        load_tile(scratch, values, row, first, cols)
        for j in range(cols):
            store_f32(base + LINE * (CHANGED + j), load_f32(base + LINE * j))
        for j in range(cols):
            changed = load_f32(base + LINE * (CHANGED + j))
            _round(base, j, n, changed, lowest, highest, curved)
            make_good(base, j, cols, ratios + stride * j)
        if passes > 0:
            _descend(base, cols, n, metric.ctypes.data, lowest, highest, curved, passes)
            for j in range(cols):
                store_f32(base + LINE * (CHANGED + j), load_f32(base + LINE * j))
            for j in range(cols):
                make_good(base, j, cols, ratios + stride * j)
        store_codes(codes, scratch, _CODES, row, 0, cols)
        store_numbers(errors, scratch, ERRORS, row, 0, cols)


@device
def _round(base: int, j: int, n: int, x: Vector, low: Vector, high: Vector, curved: bool) -> None:
    """Write the code of column j that is nearest to x, and its value."""
    step = load_f32(base + LINE * (STEPS + j // n))
    offset = load_f32(base + LINE * (_OFFSETS + j // n))
    code = nearest_code(multiply(add(x, offset), inverse(step)), low, high, curved)
    store_f32(base + LINE * (_CODES + j), code)
    store_f32(base + LINE * (ROUNDED + j), multiply_add(step, code, negative(offset)))


@device
def make_good(base: int, j: int, cols: int, ratios: int) -> None:
    """Note the error of column j as it is now, and change the columns after it."""
    changed = load_f32(base + LINE * (CHANGED + j))
    error = subtract(load_f32(base + LINE * (ROUNDED + j)), changed)
    store_f32(base + LINE * (ERRORS + j), error)
    for k in range(j + 1, cols):
        later = base + LINE * (CHANGED + k)
        store_f32(later, multiply_add(error, broadcast_f32(ratios + 4 * k), load_f32(later)))


@device
def _descend(
    base: int, cols: int, n: int, metric: int, low: Vector, high: Vector, curved: bool, passes: int
) -> None:
    """Improve the codes one at a time; `ERRORS` holds S (values - rounded) meanwhile."""
    for j in range(cols):
        rest = subtract(load_f32(base + LINE * j), load_f32(base + LINE * (ROUNDED + j)))
        store_f32(base + LINE * (CHANGED + j), rest)
    for j in range(cols):
        slope = zeros_f32()
        for k in range(cols):
            own = broadcast_f32(metric + 4 * (cols * j + k))
            slope = multiply_add(own, load_f32(base + LINE * (CHANGED + k)), slope)
        store_f32(base + LINE * (ERRORS + j), slope)
    for _ in range(passes):
        for j in range(cols):
            own = metric + 4 * cols * j
            before = load_f32(base + LINE * (ROUNDED + j))
            slope = load_f32(base + LINE * (ERRORS + j))
            best = multiply_add(slope, inverse(broadcast_f32(own + 4 * j)), before)
            _round(base, j, n, best, low, high, curved)
            moved = subtract(before, load_f32(base + LINE * (ROUNDED + j)))
            for k in range(cols):
                line = base + LINE * (ERRORS + k)
                store_f32(line, multiply_add(moved, broadcast_f32(own + 4 * k), load_f32(line)))


@kernel("void(f4[:,::1], f4[:,::1], f4[:,::1], i8)", family="quantize")
def spread(values: Floats, errors: Floats, factor: Floats, first: int) -> None:
    """Change the columns of values (rows, all columns) behind those of `errors` (rows, cols).

    `first` is the first column of errors. Rows are a multiple of 4 and columns of 32.
    """
    cols, width = errors.shape[1], values.shape[1]
    for row in range(0, values.shape[0], _ROWS):
        own = errors.ctypes.data + 4 * cols * row
        for col in range(first + cols, width, _COLUMNS):
            out = values.ctypes.data + 4 * (row * width + col)
            ratios = factor.ctypes.data + 4 * (first * width + col)
            _spread_block(out, 4 * width, own, 4 * cols, ratios, cols)


@device
def _spread_block(
    out: int, stride: int, errors: int, errors_stride: int, ratios: int, count: int
) -> None:
    """Add to 4 rows of 32 columns; ratios has the same stride as out."""
    a, aa = load_f32(out), load_f32(out + LINE)
    b, bb = load_f32(out + stride), load_f32(out + stride + LINE)
    c, cc = load_f32(out + 2 * stride), load_f32(out + 2 * stride + LINE)
    d, dd = load_f32(out + 3 * stride), load_f32(out + 3 * stride + LINE)
    for j in range(count):
        left, right = load_f32(ratios + stride * j), load_f32(ratios + stride * j + LINE)
        error = broadcast_f32(errors + 4 * j)
        a, aa = multiply_add(error, left, a), multiply_add(error, right, aa)
        error = broadcast_f32(errors + errors_stride + 4 * j)
        b, bb = multiply_add(error, left, b), multiply_add(error, right, bb)
        error = broadcast_f32(errors + 2 * errors_stride + 4 * j)
        c, cc = multiply_add(error, left, c), multiply_add(error, right, cc)
        error = broadcast_f32(errors + 3 * errors_stride + 4 * j)
        d, dd = multiply_add(error, left, d), multiply_add(error, right, dd)
    store_f32(out, a)
    store_f32(out + LINE, aa)
    store_f32(out + stride, b)
    store_f32(out + stride + LINE, bb)
    store_f32(out + 2 * stride, c)
    store_f32(out + 2 * stride + LINE, cc)
    store_f32(out + 3 * stride, d)
    store_f32(out + 3 * stride + LINE, dd)
