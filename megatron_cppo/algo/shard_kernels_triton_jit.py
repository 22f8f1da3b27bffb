# Triton's language, which no checker of Python knows:
# pyrefly: ignore-errors
"""The two Triton kernels of `shard_kernels_triton`, and the algebra of `shard_statistics` in Triton's language.

Forward: every lane of a program is a part whose sums grow online, column after column; the lanes are merged at the end,
and programs that share a row by the caller. Backward: every lane is one logit, so that its gradient may be written over
it.
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
def _meet(x, maximum, tail, inverse_temperature):
    """A lane meets a logit: (whether it is the new maximum, its distance from the old one, exp(−distance), and the
    lane's new maximum and tail)."""
    distance = tl.abs((x - maximum) * inverse_temperature)
    # A logit that is no number must leave no number, which the default forgets.
    distance = tl.minimum(distance, -FLOOR, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp(-distance)
    wins = x > maximum
    return wins, distance, weight, tl.where(wins, x, maximum), tl.where(wins, weight * (tail + 1), tail + weight)


@triton.jit
def _meet_cross(cross, wins_p, distance_p, weight_p, total_p, wins, distance):
    """A lane's cross sum after it met a logit of p and one of q."""
    old_gap = tl.where(wins, distance, 0.0) - tl.where(wins_p, distance_p, 0.0)
    new_gap = tl.where(wins, 0.0, distance) - tl.where(wins_p, 0.0, distance_p)
    old = tl.where(wins_p, weight_p, 1.0) * (cross + old_gap * total_p)
    return old + tl.where(wins_p, 1.0, weight_p) * new_gap


@triton.jit
def _merge_tails(maximum, tail, lane, inverse_temperature, LANES: tl.constexpr):
    """The lanes' (maximum, gap below it, exp(gap), total) and the tail of all."""
    highest = tl.max(maximum, 0)
    winner = tl.min(tl.where(maximum == highest, lane, LANES), 0)
    gap = tl.maximum((maximum - highest) * inverse_temperature, FLOOR)
    weight = tl.exp(gap)
    peak = tl.where(maximum > LOWEST, 1.0, 0.0).to(tail.dtype)
    others = tail + tl.where(lane == winner, 0.0, peak)
    return highest, gap, weight, tail + peak, tl.sum(weight * others, 0)


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
    INVERSE_TEMPERATURE,
    num_rows,
    columns,
    start,
    num_valid,
    NUM_VIEWS: tl.constexpr,
    NUM_RANGES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The sums of columns [split · columns, …) of one row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns
    end = tl.minimum(first + columns, num_valid)
    dtype = SUMS.dtype.element_ty
    inverse_temperature = tl.load(INVERSE_TEMPERATURE)
    lane = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), dtype)
    max_x, max_y, max_z = zeros + LOWEST, zeros + LOWEST, zeros + LOWEST
    tail_x, tail_y, tail_z = zeros, zeros, zeros
    slope, cross_y, cross_z = zeros, zeros, zeros
    for begin in range(first, end, LANES):
        column = begin + lane
        ok = _allowed(column, column < end, RANGES, NUM_RANGES)
        x = tl.load(X + row * stride_x + column, mask=ok, other=float("-inf")).to(dtype)
        total = tail_x + 1
        wins, distance, weight, max_x, tail_x = _meet(x, max_x, tail_x, inverse_temperature)
        slope = tl.where(wins, weight * (slope - distance * total), slope - distance * weight)
        if NUM_VIEWS > 1:
            y = tl.load(Y + row * stride_y + column, mask=ok, other=float("-inf")).to(dtype)
            wins_y, distance_y, _, max_y, tail_y = _meet(y, max_y, tail_y, inverse_temperature)
            cross_y = _meet_cross(cross_y, wins, distance, weight, total, wins_y, distance_y)
        if NUM_VIEWS > 2:
            z = tl.load(Z + row * stride_z + column, mask=ok, other=float("-inf")).to(dtype)
            wins_z, distance_z, _, max_z, tail_z = _meet(z, max_z, tail_z, inverse_temperature)
            cross_z = _meet_cross(cross_z, wins, distance, weight, total, wins_z, distance_z)

    target = tl.load(TARGETS + row) - start
    owned = _allowed(target, (target >= first) & (target < end), RANGES, NUM_RANGES)
    target = tl.where(owned, target, 0)
    out = SUMS + split.to(tl.int64) * NUM_VIEWS * 4 * num_rows + row
    highest, gap, weight, total, tail = _merge_tails(max_x, tail_x, lane, inverse_temperature, LANES)
    tl.store(out, highest)
    tl.store(out + num_rows, tail)
    tl.store(out + 2 * num_rows, tl.sum(weight * (slope + gap * total), 0))
    tl.store(out + 3 * num_rows, tl.load(X + row * stride_x + target, mask=owned, other=float("-inf")).to(dtype))
    if NUM_VIEWS > 1:
        out += 4 * num_rows
        highest_y, gap_y, _, _, tail_of_y = _merge_tails(max_y, tail_y, lane, inverse_temperature, LANES)
        tl.store(out, highest_y)
        tl.store(out + num_rows, tail_of_y)
        tl.store(out + 2 * num_rows, tl.sum(weight * (cross_y + (gap - gap_y) * total), 0))
        tl.store(out + 3 * num_rows, tl.load(Y + row * stride_y + target, mask=owned, other=float("-inf")).to(dtype))
    if NUM_VIEWS > 2:
        out += 4 * num_rows
        highest_z, gap_z, _, _, tail_of_z = _merge_tails(max_z, tail_z, lane, inverse_temperature, LANES)
        tl.store(out, highest_z)
        tl.store(out + num_rows, tail_of_z)
        tl.store(out + 2 * num_rows, tl.sum(weight * (cross_z + (gap - gap_z) * total), 0))
        tl.store(out + 3 * num_rows, tl.load(Z + row * stride_z + target, mask=owned, other=float("-inf")).to(dtype))


@triton.jit
def _shifted(pointer, ok, maximum, inverse_temperature, dtype: tl.constexpr):
    """(x − maximum)/T of some columns; FLOOR where there is none."""
    x = tl.load(pointer, mask=ok, other=float("-inf")).to(dtype)
    return tl.maximum((x - maximum) * inverse_temperature, FLOOR, propagate_nan=tl.PropagateNan.ALL)


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
    INVERSE_TEMPERATURE,
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
    """The gradients of some columns of one row, see `shard_statistics.Coefficients`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = column < width
    ok = _allowed(column, column < num_valid, RANGES, NUM_RANGES)
    dtype: tl.constexpr = MAXIMUM.dtype.element_ty
    inverse_temperature = tl.load(INVERSE_TEMPERATURE)
    hit = (column == tl.load(TARGETS + row) - start) & ok
    z_p = _shifted(X + row * stride_x + column, ok, tl.load(MAXIMUM + row), inverse_temperature, dtype)
    exp_p = tl.exp(z_p)
    factor = tl.load(CONSTANT + row) + tl.zeros((LANES,), dtype)
    if HAS_SLOPE:
        factor += tl.load(SLOPE + row) * z_p
    if NUM_VIEWS > 1:
        maximum = tl.load(MAXIMUM + num_rows + row)
        z_q = _shifted(Y + row * stride_y + column, ok, maximum, inverse_temperature, dtype)
        gradient = tl.load(OWN + row) * tl.exp(z_q) + tl.where(hit, tl.load(TARGET + num_rows + row), 0.0)
        if HAS_CROSS:
            cross = tl.load(CROSS + row)
            factor += cross * (z_p - z_q)
            gradient -= cross * exp_p
        if WANTS_1:
            place = OUT_Y + row * stride_out_y + column
            tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_Y.dtype.element_ty), mask=inside)
    if NUM_VIEWS > 2:
        maximum = tl.load(MAXIMUM + 2 * num_rows + row)
        z_q = _shifted(Z + row * stride_z + column, ok, maximum, inverse_temperature, dtype)
        gradient = tl.load(OWN + num_rows + row) * tl.exp(z_q)
        gradient += tl.where(hit, tl.load(TARGET + 2 * num_rows + row), 0.0)
        if HAS_CROSS:
            cross = tl.load(CROSS + num_rows + row)
            factor += cross * (z_p - z_q)
            gradient -= cross * exp_p
        if WANTS_2:
            place = OUT_Z + row * stride_out_z + column
            tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_Z.dtype.element_ty), mask=inside)
    if WANTS_0:
        gradient = exp_p * factor + tl.where(hit, tl.load(TARGET + row), 0.0)
        place = OUT_X + row * stride_out_x + column
        tl.store(place, tl.where(ok, gradient, 0.0).to(OUT_X.dtype.element_ty), mask=inside)
