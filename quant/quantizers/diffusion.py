"""Codes chosen column by column, each error made good by the columns after it.

The rule of GPTQ and of optimal brain surgery: with the second moments H of the activations and
H^-1 = U^T U, U upper triangular, the least squared error of the output that is left when column j
deviates by e is reached by changing the columns k > j by -e U_jk / U_jj.
"""

from localv4.kernels.arrays import Floats, Scalar
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.simd import (
    add,
    broadcast_f32,
    load_f32,
    multiply,
    multiply_add,
    negative,
    splat_f32,
    store_f32,
)
from quant.quantizers.choice import Codes
from quant.quantizers.lanes import LINE, inverse, subtract
from quant.quantizers.scales import nearest_code
from quant.quantizers.tiles import LANES, load_tile, store_codes, store_numbers

MOST_COLUMNS = 256
SCRATCH_LINES = 5 * MOST_COLUMNS

# Lines of scratch behind the tile
_CODES = MOST_COLUMNS
_ERRORS = 2 * MOST_COLUMNS
_STEPS = 3 * MOST_COLUMNS
_OFFSETS = 4 * MOST_COLUMNS

_ROWS, _COLUMNS = 4, 32
"""What one pass of `spread` holds in registers."""


@kernel(
    "void(i1[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], i8, f4, f4,"
    " b1)",
    family="quantize",
)
def diffuse(
    codes: Codes,
    errors: Floats,
    values: Floats,
    steps: Floats,
    offsets: Floats,
    factor: Floats,
    scratch: Floats,
    first: int,
    low: Scalar,
    high: Scalar,
    curved: bool,
) -> None:
    """Choose codes of columns first ... of values (rows, all columns) by given scales.

    codes, errors (rows, cols); steps (rows, blocks), offsets the same or without columns. factor
    (all columns, all columns) f32: U_jk / U_jj. Errors get the sign minus: what to spread.
    scratch: SCRATCH_LINES vectors. At most 256 columns.
    """
    base = scratch.ctypes.data
    cols, blocks = codes.shape[1], steps.shape[1]
    n = cols // blocks
    lowest, highest = splat_f32(low), splat_f32(high)
    for row in range(0, values.shape[0], LANES):
        load_tile(scratch[LANES * _STEPS :], steps, row, 0, blocks)
        load_tile(scratch[LANES * _OFFSETS :], offsets, row, 0, blocks)
        load_tile(scratch, values, row, first, cols)
        for j in range(cols):
            step = load_f32(base + LINE * (_STEPS + j // n))
            offset = load_f32(base + LINE * (_OFFSETS + j // n))
            x = load_f32(base + LINE * j)
            place = multiply(add(x, offset), inverse(step))
            code = nearest_code(place, lowest, highest, curved)
            error = subtract(multiply_add(step, code, negative(offset)), x)
            store_f32(base + LINE * (_CODES + j), code)
            store_f32(base + LINE * (_ERRORS + j), error)
            ratios = factor.ctypes.data + 4 * ((first + j) * factor.shape[1] + first)
            for k in range(j + 1, cols):
                later = base + LINE * k
                ratio = broadcast_f32(ratios + 4 * k)
                store_f32(later, multiply_add(error, ratio, load_f32(later)))
        store_codes(codes, scratch, _CODES, row, 0, cols)
        store_numbers(errors, scratch, _ERRORS, row, 0, cols)


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
