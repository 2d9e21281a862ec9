"""Products with packed weight matrices: rows are decoded one at a time, never the whole matrix."""

from localv4.kernels.arrays import Bytes, Floats, Indices, Scalar
from localv4.kernels.blocks import BF16, F32, decode_row
from localv4.kernels.compiler import kernel
from localv4.kernels.device import device
from localv4.kernels.vectors import (
    LANES,
    load,
    load_bf16_bytes,
    load_f32_bytes,
    multiply_add,
    total,
    zeros,
)


@device
def dot(a: Floats, b: Floats) -> Scalar:
    """Return sum over k of a[k] * b[k]; a, b (k,) f32. Lane order, then the tail in sequence."""
    n = a.shape[0]
    body = n - n % LANES
    acc = zeros()
    for k in range(0, body, LANES):
        acc = multiply_add(load(a, k), load(b, k), acc)
    result: Scalar = total(acc)
    for k in range(body, n):
        result += a[k] * b[k]
    return result


@device
def dot_f32_row(raw: Bytes, x: Floats) -> Scalar:
    """dot(row, x) for a stored F32 row, in the same order; raw (4 * k,) u8, x (k,) f32."""
    acc = zeros()
    for k in range(0, x.shape[0], LANES):
        acc = multiply_add(load_f32_bytes(raw, k), load(x, k), acc)
    result: Scalar = total(acc)
    return result


@device
def dot_bf16_row(raw: Bytes, x: Floats) -> Scalar:
    """dot(row, x) for a stored BF16 row, in the same order; raw (2 * k,) u8, x (k,) f32."""
    acc = zeros()
    for k in range(0, x.shape[0], LANES):
        acc = multiply_add(load_bf16_bytes(raw, k), load(x, k), acc)
    result: Scalar = total(acc)
    return result


@device
def dot4(out: Floats, row: Floats, x: Floats, first: int, start: int) -> None:
    """out[i] = dot(row, x[first + i, start:start + k]) for four tokens, reading `row` once.

    out (4,) f32; row (k,) f32; x (tokens, n) f32. Each sum has exactly the order of `dot`.
    """
    n = row.shape[0]
    body = n - n % LANES
    x0, x1 = x[first, start : start + n], x[first + 1, start : start + n]
    x2, x3 = x[first + 2, start : start + n], x[first + 3, start : start + n]
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    for k in range(0, body, LANES):
        w = load(row, k)
        a0 = multiply_add(w, load(x0, k), a0)
        a1 = multiply_add(w, load(x1, k), a1)
        a2 = multiply_add(w, load(x2, k), a2)
        a3 = multiply_add(w, load(x3, k), a3)
    t0, t1, t2, t3 = total(a0), total(a1), total(a2), total(a3)
    for k in range(body, n):
        t0 += row[k] * x0[k]
        t1 += row[k] * x1[k]
        t2 += row[k] * x2[k]
        t3 += row[k] * x3[k]
    out[0], out[1], out[2], out[3] = t0, t1, t2, t3


@device
def product_rows(
    out: Floats,
    x: Floats,
    fmt: int,
    data: Bytes,
    scale: Bytes,
    cols: int,
    groups: int,
    scratch: Floats,
    first: int,
    end: int,
) -> None:
    """Rows first ... end - 1 of `matmul`; x and out may have more columns, scratch has cols + 4."""
    tokens = x.shape[0]
    rows_per_group = data.shape[0] // groups
    row = scratch[:cols]
    four = scratch[cols : cols + 4]
    # float rows need no decoding: for a single token they go from the file into the registers
    direct = tokens == 1 and cols % LANES == 0
    for r in range(first, end):
        start = (r // rows_per_group) * cols
        if direct and fmt == BF16:
            out[0, r] = dot_bf16_row(data[r], x[0, start : start + cols])
            continue
        if direct and fmt == F32:
            out[0, r] = dot_f32_row(data[r], x[0, start : start + cols])
            continue
        decode_row(row, fmt, data, scale, r)
        t = 0
        while t + 4 <= tokens:
            dot4(four, row, x, t, start)
            for i in range(4):
                out[t + i, r] = four[i]
            t += 4
        while t < tokens:
            out[t, r] = dot(row, x[t, start : start + cols])
            t += 1


@kernel(
    "void(f4[:, ::1], f4[:, ::1], i8, Array(u1, 2, 'C', readonly=True),"
    " Array(u1, 2, 'C', readonly=True), i8, f4[::1])"
)
def matmul(
    out: Floats, x: Floats, fmt: int, data: Bytes, scale: Bytes, groups: int, scratch: Floats
) -> None:
    """out[t, r] = sum over k of weight[r, k] * x[t, group(r) * cols + k]

    out (tokens, rows) f32; x (tokens, groups * cols) f32; data (rows, row_bytes) u8 and scale u8:
    a packed matrix as `blocks.decode_row` reads it. With `groups` > 1 the product is
    block-diagonal: rows fall into equal groups and each group sees its own slice of x.
    scratch (>= cols + 4,) f32 holds a decoded row. One thread; a team runs `product_rows`.
    """
    cols = x.shape[1] // groups
    product_rows(out, x, fmt, data, scale, cols, groups, scratch, 0, data.shape[0])


@kernel(
    "void(f4[:, ::1], i8[::1], i8, Array(u1, 2, 'C', readonly=True),"
    " Array(u1, 2, 'C', readonly=True))"
)
def gather_rows(out: Floats, indices: Indices, fmt: int, data: Bytes, scale: Bytes) -> None:
    """out[i] = weight[indices[i]]; out (n, cols) f32; indices (n,) i64 within the rows of data."""
    for i in range(indices.shape[0]):
        decode_row(out[i], fmt, data, scale, indices[i])
