"""From products of queries and keys to scores, and from scores to weights; every kernel takes these steps.

A product is scaled and capped, ALiBi and masks are added, and the softmax has the sink in its sum. Whatever a call
does without is None there, and no instruction of its kernels.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fused_mha.backends.triton.tiles import EDGE, NEGATIVE_INFINITY, PLAIN, all_rows, load_of_rows

LOG2_E = tl.constexpr(1.4426950408889634)
# tanh x = x P(x^2) / Q(x^2), fitted for the least relative error, 0.2 * 2^-24, up to MOST_OF_TANH; beyond that it is
# within 2^-23 of 1. Evaluated in fp32, it is wrong by at most 6 * 2^-24.
MOST_OF_TANH = tl.constexpr(8.4)


@triton.jit
def tanh(x):
    """By one division and no exponential, with a small relative error for small x too; NaN of NaN."""
    square = x * x
    above = 1.44580927e-8 * square + 2.13799552e-5
    above = (above * square + 3.54162887e-3) * square + 1.34195895e-1
    above = above * square + 1.0
    below = 8.22006156e-7 * square + 3.36144565e-4
    below = (below * square + 2.60514837e-2) * square + 4.67529134e-1
    below = below * square + 1.0
    return tl.where(x > MOST_OF_TANH, 1.0, tl.where(x < -MOST_OF_TANH, -1.0, x * above / below))


@triton.jit
def scores_of(call, products, TILE: tl.constexpr):
    """Scores before ALiBi and masks, which the cap has in its range. If not NATURAL, `exponentials` scales."""
    scores = products
    if call.softcap is not None:
        scores = call.softcap * tanh(scores * (call.scale / call.softcap))
    elif TILE.NATURAL:
        scores = scores * call.scale
    return scores


@triton.jit
def grad_of_products(call, grad, scores):
    """From the gradient of what `scores_of` gives to that of the scaled products."""
    if call.softcap is not None:
        share = scores * (1.0 / call.softcap)
        grad = grad * (1.0 - share * share)
    return grad


@triton.jit
def distances(call, rows, columns, TILE: tl.constexpr, KIND: tl.constexpr):
    """How far keys are from the positions of queries; 0 for virtual keys, which have no position."""
    found = tl.abs((rows + call.diagonal).to(tl.float32) - columns.to(tl.float32))
    return tl.where(columns < call.S, found, 0.0) if TILE.VIRTUAL and KIND == EDGE else found


@triton.jit
def _masked(scores, mask):
    return tl.where(mask != 0, NEGATIVE_INFINITY, scores) if mask.dtype == tl.uint8 else scores + mask.to(tl.float32)


@triton.jit
def masked_scores(call, head, scores, rows, columns, TILE: tl.constexpr, KIND: tl.constexpr):
    """Scores with ALiBi and the additive masks, -inf where hidden; rows and columns broadcast to their shape."""
    if call.alibi_slopes is not None:
        slope = tl.load(call.alibi_slopes + head.h).to(tl.float32)
        scores = scores - slope * distances(call, rows, columns, TILE, KIND)
    if call.attn_mask is not None and KIND != PLAIN:
        at = call.attn_mask + head.mask + rows.to(tl.int64) * call.mask_l + columns
        is_read = (rows < call.L) & (columns < call.S) if KIND == EDGE else rows < call.L
        scores = _masked(scores, tl.load(at, mask=is_read, other=0))
    if call.padding is not None and KIND != PLAIN:
        at = call.padding + head.padding + columns
        scores = _masked(scores, tl.load(at, mask=columns < call.S, other=0) if KIND == EDGE else tl.load(at))
    if KIND == EDGE:
        first = rows + call.first_visible
        last = tl.where(rows < call.L, tl.minimum(rows + call.last_visible, call.S - 1), -1)
        is_visible = (columns >= first) & (columns <= last)
        if TILE.VIRTUAL:
            is_visible = is_visible | ((rows < call.L) & (columns >= call.S) & (columns < call.columns))
        scores = tl.where(is_visible, scores, NEGATIVE_INFINITY)
    return scores


@triton.jit
def shift_of(row_max):
    """What is subtracted from the scores of rows: their maxima, 0 where all is hidden, since -inf - -inf = NaN."""
    return tl.where(row_max == NEGATIVE_INFINITY, 0.0, row_max)


@triton.jit
def exponentials(scores, shift, call, TILE: tl.constexpr):
    """exp(score - the row's shift), 0 where hidden; the shifts broadcast.

    If EXACT, the largest is exactly 1, however large the scores are: masks often hide by the lowest finite number.
    Else one multiply-add has to do, of which the relative error is |score| * 2^-24.
    """
    factor = _factor(call, TILE)
    return tl.exp2((scores - shift) * factor if TILE.EXACT else scores * factor - shift * factor)


@triton.jit
def _factor(call, TILE: tl.constexpr):
    """From scores to exponents of 2."""
    return LOG2_E if TILE.NATURAL else call.scale * LOG2_E


@triton.jit
def softmax_tile(call, head, shift, row_factor, scores, rows, columns, TILE: tl.constexpr, KIND: tl.constexpr):
    """The softmax of what `scores_of` gives, before dropout, by what `load_stats` gives of the rows."""
    return softmax(masked_scores(call, head, scores, rows, columns, TILE, KIND), shift, row_factor, call, TILE)


@triton.jit
def softmax(scores, shift, row_factor, call, TILE: tl.constexpr):
    """That of masked scores, or of a sink."""
    if TILE.EXACT:
        return exponentials(scores, shift, call, TILE) * row_factor
    return tl.exp2(scores * _factor(call, TILE) - shift)


@triton.jit
def load_stats(stats, call, head, rows, TILE: tl.constexpr):
    """The shifts of rows and 1 / their sums, 0 where all is hidden, from what the forward stored, (2, N, H, L).

    If not EXACT, the sum is in the shift, a binary logarithm: one operation less for each score. Rows are
    one-dimensional here: loads that broadcast cost a register for each element of a tile.
    """
    shift = shift_of(load_of_rows(stats, call, head, rows))
    row_sum = load_of_rows(stats + all_rows(call), call, head, rows)
    if not TILE.EXACT:
        shift = tl.where(row_sum == 0.0, float("inf"), shift * _factor(call, TILE) + tl.log2(row_sum))
    return shift, tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)


@triton.jit
def load_sink(call, head):
    """The logit of a head's sink."""
    return tl.load(call.sinks + head.h).to(tl.float32)


@triton.jit
def as_score(logit, call, TILE: tl.constexpr):
    """A logit in the units of the scores."""
    return logit if TILE.NATURAL else logit / call.scale
