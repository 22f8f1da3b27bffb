# Triton's language, which no checker of Python knows:
# pyrefly: ignore-errors
"""The two Triton kernels of `shard_kernels_triton`, and the algebra of `shard_statistics` in Triton's language.

Forward: every lane of a program is a part whose sums grow online, a few neighbouring columns at a time (one load, one
rescaling); the lanes are merged at the end, and programs that share a row by the caller. Backward: every lane is one
logit, so that its gradient may be written over it.
"""

import triton
import triton.language as tl

from megatron_cppo.algo import shard_statistics

FLOOR = tl.constexpr(shard_statistics.FLOOR)
LOWEST = tl.constexpr(shard_statistics.LOWEST)


@triton.jit
def _allowed(column, ok, RANGES, NUM_RANGES: tl.constexpr):
    """`ok` without the banned columns."""
    for number in tl.static_range(NUM_RANGES):
        first = tl.load(RANGES + 2 * number)
        end = tl.load(RANGES + 2 * number + 1)
        ok = ok & ((column < first) | (column >= end))
    return ok


@triton.jit
def _has_banned(begin, end, RANGES, NUM_RANGES: tl.constexpr):
    """Whether any of the columns [begin, end) is banned; a number, so that most tiles need no mask for it."""
    found = begin < begin  # no
    for number in tl.static_range(NUM_RANGES):
        found = found | ((tl.load(RANGES + 2 * number) < end) & (tl.load(RANGES + 2 * number + 1) > begin))
    return found


@triton.jit
def _load(pointer, column, end, is_masked, RANGES, NUM_RANGES: tl.constexpr, dtype: tl.constexpr):
    """Logits in `dtype`; −∞ from `end` on, and where they are banned."""
    x = tl.load(pointer + column, mask=column < end, other=float("-inf")).to(dtype)
    if is_masked:
        x = tl.where(_allowed(column, column < end, RANGES, NUM_RANGES), x, float("-inf"))
    return x


@triton.jit
def _meet(x, maximum, tail, ties, scale):
    """A lane meets some logits: its new (maximum, tail, ties), z and exp(z) of the logits [lanes, n], and by how much
    its old maximum is below the new one, and exp of that.

    `ties` counts the logits that are as high as the maximum, itself among them; the tail has none of them. z and the
    gap are in units of log 2 (`scale` is log2(e)/T), which saves a product for each logit.
    """
    higher = tl.maximum(maximum, tl.max(x, 1))
    gap = tl.maximum((maximum - higher) * scale, FLOOR)
    weight = tl.exp2(gap)
    # A logit that is no number must leave no number, which the default forgets.
    z = tl.maximum((x - higher[:, None]) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    exp = tl.exp2(z)
    is_new = higher > maximum
    tail = tl.where(is_new, weight * (tail + ties), tail) + tl.sum(tl.where(z == 0, 0.0, exp), 1)
    ties = tl.where(is_new, 0.0, ties) + tl.sum(tl.where(z == 0, 1.0, 0.0), 1)
    return higher, tail, ties, z, exp, gap, weight


@triton.jit
def _merge_tails(maximum, tail, ties, scale):
    """The lanes' (maximum, gap below it, exp(gap), total) and the tail of all."""
    highest = tl.max(maximum, 0)
    gap = tl.maximum((maximum - highest) * scale, FLOOR)
    weight = tl.exp2(gap)
    is_highest = maximum == highest
    # Where nothing may be sampled there are no ties either.
    others = tl.maximum(tl.sum(tl.where(is_highest, ties, 0.0), 0) - 1, 0.0)
    total = tail + ties
    return highest, gap, weight, total, tl.sum(weight * tl.where(is_highest, tail, total), 0) + others


@triton.jit
def sums_kernel(
    X,
    Y,
    Z,
    stride_x,
    stride_y,
    stride_z,
    TARGETS,
    SUMS,
    RANGES,
    SCALES,
    num_rows,
    columns,
    start,
    num_valid,
    NUM_VIEWS: tl.constexpr,
    NUM_RANGES: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """The sums of columns [split · columns, …) of one row; a lane meets `EACH` neighbours at a time.

    `SCALES` holds log2(e)/T and log(2).
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns
    end = tl.minimum(first + columns, num_valid)
    dtype = SUMS.dtype.element_ty
    scale = tl.load(SCALES)
    log_2 = tl.load(SCALES + 1)
    place = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    X += row * stride_x
    Y += row * stride_y
    Z += row * stride_z
    zeros = tl.zeros((LANES,), dtype)
    max_x, max_y, max_z = zeros + LOWEST, zeros + LOWEST, zeros + LOWEST
    tail_x, tail_y, tail_z = zeros, zeros, zeros
    ties_x, ties_y, ties_z = zeros, zeros, zeros
    slope, cross_y, cross_z = zeros, zeros, zeros
    for begin in range(first, end, LANES * EACH):
        column = begin + place
        is_masked = _has_banned(begin, begin + LANES * EACH, RANGES, NUM_RANGES)
        total = tail_x + ties_x
        x = _load(X, column, end, is_masked, RANGES, NUM_RANGES, dtype)
        max_x, tail_x, ties_x, z_x, exp, gap, weight = _meet(x, max_x, tail_x, ties_x, scale)
        slope = weight * (slope + gap * total) + tl.sum(exp * z_x, 1)
        if NUM_VIEWS > 1:
            y = _load(Y, column, end, is_masked, RANGES, NUM_RANGES, dtype)
            max_y, tail_y, ties_y, z_y, _, gap_y, _ = _meet(y, max_y, tail_y, ties_y, scale)
            cross_y = weight * (cross_y + (gap - gap_y) * total) + tl.sum(exp * (z_x - z_y), 1)
        if NUM_VIEWS > 2:
            z = _load(Z, column, end, is_masked, RANGES, NUM_RANGES, dtype)
            max_z, tail_z, ties_z, z_z, _, gap_z, _ = _meet(z, max_z, tail_z, ties_z, scale)
            cross_z = weight * (cross_z + (gap - gap_z) * total) + tl.sum(exp * (z_x - z_z), 1)

    target = tl.load(TARGETS + row) - start
    owned = _allowed(target, (target >= first) & (target < end), RANGES, NUM_RANGES)
    target = tl.where(owned, target, 0)
    out = SUMS + split.to(tl.int64) * NUM_VIEWS * 4 * num_rows + row
    highest, gap, weight, total, tail = _merge_tails(max_x, tail_x, ties_x, scale)
    tl.store(out, highest)
    tl.store(out + num_rows, tail)
    tl.store(out + 2 * num_rows, log_2 * tl.sum(weight * (slope + gap * total), 0))
    tl.store(out + 3 * num_rows, tl.load(X + target, mask=owned, other=float("-inf")).to(dtype))
    if NUM_VIEWS > 1:
        out += 4 * num_rows
        highest_y, gap_y, _, _, tail_of_y = _merge_tails(max_y, tail_y, ties_y, scale)
        tl.store(out, highest_y)
        tl.store(out + num_rows, tail_of_y)
        tl.store(out + 2 * num_rows, log_2 * tl.sum(weight * (cross_y + (gap - gap_y) * total), 0))
        tl.store(out + 3 * num_rows, tl.load(Y + target, mask=owned, other=float("-inf")).to(dtype))
    if NUM_VIEWS > 2:
        out += 4 * num_rows
        highest_z, gap_z, _, _, tail_of_z = _merge_tails(max_z, tail_z, ties_z, scale)
        tl.store(out, highest_z)
        tl.store(out + num_rows, tail_of_z)
        tl.store(out + 2 * num_rows, log_2 * tl.sum(weight * (cross_z + (gap - gap_z) * total), 0))
        tl.store(out + 3 * num_rows, tl.load(Z + target, mask=owned, other=float("-inf")).to(dtype))


@triton.jit
def _shifted(pointer, ok, maximum, scale, dtype: tl.constexpr):
    """(x − maximum)/T of some columns in units of log 2; FLOOR where there is none."""
    x = tl.load(pointer, mask=ok, other=float("-inf")).to(dtype)
    return tl.maximum((x - maximum) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gradients_kernel(
    X,
    Y,
    Z,
    stride_x,
    stride_y,
    stride_z,
    OUT_X,
    OUT_Y,
    OUT_Z,
    stride_out_x,
    stride_out_y,
    stride_out_z,
    TARGETS,
    MAXIMUM,
    CONSTANT,
    SLOPE,
    CROSS,
    OWN,
    TARGET,
    RANGES,
    SCALES,
    num_rows,
    width,
    start,
    num_valid,
    NUM_VIEWS: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    WANTS_0: tl.constexpr,
    WANTS_1: tl.constexpr,
    WANTS_2: tl.constexpr,
    NUM_RANGES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradients of some columns of one row, see `shard_statistics.Coefficients`; `SCALES` as of `sums_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = column < width
    ok = column < num_valid
    if _has_banned(tl.program_id(1) * LANES, (tl.program_id(1) + 1) * LANES, RANGES, NUM_RANGES):
        ok = _allowed(column, ok, RANGES, NUM_RANGES)
    dtype: tl.constexpr = MAXIMUM.dtype.element_ty
    scale = tl.load(SCALES)
    log_2 = tl.load(SCALES + 1)
    hit = (column == tl.load(TARGETS + row) - start) & ok
    z_p = _shifted(X + row * stride_x + column, ok, tl.load(MAXIMUM + row), scale, dtype)
    exp_p = tl.exp2(z_p)
    factor = tl.load(CONSTANT + row) + tl.zeros((LANES,), dtype)
    if HAS_SLOPE:
        factor += log_2 * tl.load(SLOPE + row) * z_p
    if NUM_VIEWS > 1:
        maximum = tl.load(MAXIMUM + num_rows + row)
        z_q = _shifted(Y + row * stride_y + column, ok, maximum, scale, dtype)
        gradient = tl.load(OWN + row) * tl.exp2(z_q) + tl.where(hit, tl.load(TARGET + num_rows + row), 0.0)
        if HAS_CROSS:
            cross = tl.load(CROSS + row)
            factor += log_2 * cross * (z_p - z_q)
            gradient -= cross * exp_p
        if WANTS_1:
            place = OUT_Y + row * stride_out_y + column
            tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_Y.dtype.element_ty), mask=inside)
    if NUM_VIEWS > 2:
        maximum = tl.load(MAXIMUM + 2 * num_rows + row)
        z_q = _shifted(Z + row * stride_z + column, ok, maximum, scale, dtype)
        gradient = tl.load(OWN + num_rows + row) * tl.exp2(z_q)
        gradient += tl.where(hit, tl.load(TARGET + 2 * num_rows + row), 0.0)
        if HAS_CROSS:
            cross = tl.load(CROSS + num_rows + row)
            factor += log_2 * cross * (z_p - z_q)
            gradient -= cross * exp_p
        if WANTS_2:
            place = OUT_Z + row * stride_out_z + column
            tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_Z.dtype.element_ty), mask=inside)
    if WANTS_0:
        gradient = exp_p * factor + tl.where(hit, tl.load(TARGET + row), 0.0)
        place = OUT_X + row * stride_out_x + column
        tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_X.dtype.element_ty), mask=inside)
