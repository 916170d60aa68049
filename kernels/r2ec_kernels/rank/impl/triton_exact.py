"""What makes ranks exact and log-probabilities whole: four small kernels round the scan.

``_origin``   the target's canonical score, and the raw score that the scan compares with.
``_compare``  near-ties, by their canonical scores.
``_merge``    ranks and log-probabilities of the splits together.
``_every``    the same from canonical scores of all rows, for queries of which the scan could not
              be certain: no room for their near-ties, numbers beyond float32, distances. It is
              launched always and ends at once where nothing is to be done.
``_finish``   puts its parts together, by the rules for numbers that are not finite (docs/kernels).

Numerics: float64 in the canonical order (``_exact.triton_scores``); log-sum-exps relative to the
target, so that large scores lose no digits.
"""

import triton
import triton.language as tl

from ..._exact.triton_scores import canonical_scores, float64_of, halving_places, halving_sum
from ..._numbers import LOG2_E
from ..._scan.triton_exclusions import excluded_ids
from ..._scan.triton_queries import fits_float32, scale_of

_LOG2_E = tl.constexpr(LOG2_E)
_GONE = tl.constexpr(2)  # the state of a query whose target has no row
_LARGEST = tl.constexpr(0.99 * (2.0 - 2.0**-23) * 2.0**127)  # near float32's end


@triton.jit
def _query_at_places(q_ptr, i_m, stride_q, o_d, m_d, WIDTH: tl.constexpr):
    b_q = tl.load(q_ptr + i_m * stride_q + o_d, mask=m_d, other=0.0).to(tl.float32)
    return tl.reshape(b_q.to(tl.float64), [1, WIDTH])


@triton.jit
def origin_kernel(
    q_ptr,
    x_ptr,
    own_ptr,
    wanted_ptr,
    place_ptr,
    targets_ptr,
    target_ptr,
    origin_ptr,
    logit_ptr,
    moved_ptr,
    state_ptr,
    num_places,
    d,
    stride_q,
    stride_x,
    temperature,
    HAS_PLACE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
):
    """One query and its wanted target, an id where there are places, else a row.

    targets: int64 [M], the row; -1 for an id that has none. own: [M, D], the targets' rows where
    they are not read from the table; -1 is the place of one before the table then.

    target, origin, logit: float32 [M], canonical score, raw score, log 2 units of a unit of raw
    score; moved: float64 [M], what the rounding of origin moves all other terms by. state: int32,
    1 for a query that the scan cannot serve, _GONE without a row, else 0.
    """
    i_m = tl.program_id(0).to(tl.int64)
    temperature = float64_of(temperature)
    o_d, m_d = halving_places(d, WIDTH, LEVELS)
    b_q = _query_at_places(q_ptr, i_m, stride_q, o_d, m_d, WIDTH)
    row = tl.load(wanted_ptr + i_m)
    if HAS_PLACE:
        known = (row >= 0) & (row < num_places)
        row = tl.load(place_ptr + row, mask=known, other=-1)
    tl.store(targets_ptr + i_m, row)
    if HAS_OWN:
        b_x = _query_at_places(own_ptr, i_m, d, o_d, m_d, WIDTH)
    else:
        b_x = _query_at_places(x_ptr, tl.maximum(row, 0), stride_x, o_d, m_d, WIDTH)
    b_target = canonical_scores(b_q, b_x, temperature, 1, WIDTH, LEVELS, SIMILARITY)
    target = tl.sum(b_target, axis=0)  # of one
    norm = tl.sqrt(tl.sum(halving_sum(b_q * b_q, 1, WIDTH, LEVELS), axis=0))
    fits = fits_float32(norm, temperature)
    scale = scale_of(norm, fits, SIMILARITY)
    raw = tl.sum(halving_sum(b_q * b_x, 1, WIDTH, LEVELS), axis=0) * scale
    length = scale
    if SIMILARITY == "cosine":
        size = tl.sqrt(tl.sum(halving_sum(b_x * b_x, 1, WIDTH, LEVELS), axis=0))
        raw = raw / tl.where(size == 0, 1.0, size)
        length = tl.where(norm == 0, 1.0, norm * scale)
    logit = _LOG2_E / (length * temperature)
    rounded = raw.to(tl.float32)
    served = fits & (tl.abs(target) < float("inf"))
    if SIMILARITY == "l2":  # a float32 square loses its digits where the query is near the item
        served = served & (norm < 0)
    tl.store(target_ptr + i_m, target)
    tl.store(origin_ptr + i_m, tl.where(served, rounded, 0.0))
    tl.store(logit_ptr + i_m, tl.where(served, logit, 0.0).to(tl.float32))
    tl.store(moved_ptr + i_m, (raw - rounded.to(tl.float64)) * logit)
    gone = (row < 0) & (not HAS_OWN)
    tl.store(state_ptr + i_m, tl.where(gone, _GONE, tl.where(served, 0, 1)))


@triton.jit
def compare_kernel(
    q_ptr,
    x_ptr,
    ids_ptr,
    targets_ptr,
    target_ptr,
    near_ptr,
    near_row_ptr,
    wins_ptr,
    d,
    stride_q,
    stride_x,
    room,
    temperature,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """A part of a query's near-ties. wins: int64 [M], those ahead of the target, from 0."""
    i_m = tl.program_id(0).to(tl.int64)
    last = tl.load(near_ptr + i_m)
    last = tl.where(last <= room, last, 0)  # one without room is answered by ``every_kernel``
    temperature = float64_of(temperature)
    if tl.program_id(1) * ROWS < last:
        o_d, m_d = halving_places(d, WIDTH, LEVELS)
        b_q = _query_at_places(q_ptr, i_m, stride_q, o_d, m_d, WIDTH)
        target, own = tl.load(target_ptr + i_m), tl.load(targets_ptr + i_m)
        if HAS_IDS:
            own = tl.load(ids_ptr + own)
        wins = tl.zeros([], tl.int64)
        for start in range(tl.program_id(1) * ROWS, last, tl.num_programs(1) * ROWS):
            o_p = start + tl.arange(0, ROWS)
            m_p = o_p < last
            b_row = tl.load(near_row_ptr + i_m * room + o_p, mask=m_p, other=0).to(tl.int64)
            p_x = x_ptr + b_row[:, None] * stride_x + o_d[None, :]
            b_x = tl.load(p_x, mask=m_p[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            score = canonical_scores(
                b_q, b_x.to(tl.float64), temperature, ROWS, WIDTH, LEVELS, SIMILARITY
            )
            if HAS_IDS:
                b_row = tl.load(ids_ptr + b_row, mask=m_p, other=0)
            m_wins = m_p & ((score > target) | ((score == target) & (b_row < own)))
            wins += tl.sum(m_wins.to(tl.int64), axis=0)
        tl.atomic_add(wins_ptr + i_m, wins)


@triton.jit
def merge_kernel(
    ahead_ptr,
    m_ptr,
    l_ptr,
    wins_ptr,
    target_ptr,
    moved_ptr,
    state_ptr,
    rank_ptr,
    log_prob_ptr,
    near_ptr,
    room,
    num_queries,
    num_splits,
    BLOCK_S: tl.constexpr,
):
    """One query over the splits of the scan. rank: int64 [M]; log_prob: float32 [M]."""
    i_m = tl.program_id(0).to(tl.int64)
    moved = tl.load(moved_ptr + i_m)
    top = tl.zeros([], tl.float64)
    total = tl.exp2(moved)
    rank = tl.load(wins_ptr + i_m) + 1
    for first in range(0, num_splits, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < num_splits
        p_s = o_s.to(tl.int64) * num_queries + i_m
        rank += tl.sum(tl.load(ahead_ptr + p_s, mask=m_s, other=0).to(tl.int64), axis=0)
        b_m = tl.load(m_ptr + p_s, mask=m_s, other=0.0).to(tl.float64)
        b_l = tl.load(l_ptr + p_s, mask=m_s, other=0.0).to(tl.float64)
        above = tl.maximum(top, tl.max(b_m, axis=0))
        total = total * tl.exp2(top - above) + tl.sum(b_l * tl.exp2(b_m - above), axis=0)
        top = above
    log_prob = ((moved - top - tl.log2(total)) / _LOG2_E).to(tl.float32)
    tl.store(rank_ptr + i_m, rank)
    tl.store(log_prob_ptr + i_m, log_prob)
    # Some canonical score may be infinite, which a scan does not see; NaN is not below either.
    below = tl.load(target_ptr + i_m).to(tl.float64) - log_prob.to(tl.float64) < _LARGEST
    state = tl.load(state_ptr + i_m) + tl.load(state_ptr + num_queries)
    state += (tl.load(near_ptr + i_m) > room).to(tl.int32)
    gone = tl.load(state_ptr + i_m) == _GONE
    tl.store(state_ptr + i_m, tl.where(gone, _GONE, tl.where((state == 0) & below, 0, 1)))


@triton.jit
def every_kernel(
    q_ptr,
    x_ptr,
    ids_ptr,
    exclude_ptr,
    exclude_start_ptr,
    allowed_ptr,
    targets_ptr,
    target_ptr,
    state_ptr,
    counts_ptr,
    sums_ptr,
    num_items,
    rows_per_split,
    d,
    stride_q,
    stride_x,
    temperature,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A query against a split of the rows, where its state is not 0.

    counts: int64 [M, splits, 4], rows ahead, at +inf, NaN, and competing; sums: float64 [M, splits,
    2], the largest natural logit of finite scores relative to a finite target, and the sum.
    """
    i_m = tl.program_id(0).to(tl.int64)
    temperature = float64_of(temperature)
    if tl.load(state_ptr + i_m) == 1:
        o_d, m_d = halving_places(d, WIDTH, LEVELS)
        b_q = _query_at_places(q_ptr, i_m, stride_q, o_d, m_d, WIDTH)
        target, own = tl.load(target_ptr + i_m), tl.load(targets_ptr + i_m)
        own_id = own
        if HAS_IDS:
            own_id = tl.load(ids_ptr + own)
        base = tl.where(tl.abs(target) < float("inf"), target, 0.0).to(tl.float64)
        b_ahead = tl.zeros([ROWS], tl.int64)
        b_top, b_nan, b_in = b_ahead, b_ahead, b_ahead
        m = tl.full([], -float("inf"), tl.float64)
        l = tl.zeros([], tl.float64)
        begin = tl.program_id(1).to(tl.int64) * rows_per_split
        for start in range(begin, tl.minimum(begin + rows_per_split, num_items), ROWS):
            b_row = start + tl.arange(0, ROWS)
            m_row = b_row < tl.minimum(begin + rows_per_split, num_items)
            b_id = b_row
            if HAS_IDS:
                b_id = tl.load(ids_ptr + b_row, mask=m_row, other=0)
            if HAS_ALLOWED:
                b_allowed = tl.load(allowed_ptr + b_row, mask=m_row, other=0)
                m_row = m_row & ((b_allowed != 0) | (b_row == own))
            if HAS_EXCLUDE:
                m_out = excluded_ids(b_id, i_m, exclude_ptr, exclude_start_ptr, BLOCK_E)
                m_row = m_row & ((m_out == 0) | (b_row == own))
            p_x = x_ptr + b_row[:, None] * stride_x + o_d[None, :]
            b_x = tl.load(p_x, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            score = canonical_scores(
                b_q, b_x.to(tl.float64), temperature, ROWS, WIDTH, LEVELS, SIMILARITY
            )
            m_ahead = (score > target) | ((score == target) & (b_id < own_id))
            b_ahead += (m_row & m_ahead).to(tl.int64)
            b_top += (m_row & (score == float("inf"))).to(tl.int64)
            b_nan += (m_row & (score != score)).to(tl.int64)
            b_in += m_row.to(tl.int64)
            m_finite = m_row & (tl.abs(score) < float("inf"))
            b_logit = tl.where(m_finite, score.to(tl.float64) - base, -float("inf"))
            above = tl.maximum(m, tl.max(b_logit, axis=0))
            safe = tl.where(above == -float("inf"), 0.0, above)
            l = l * tl.exp(m - safe) + tl.sum(tl.exp(b_logit - safe), axis=0)
            m = above
        at = i_m * tl.num_programs(1) + tl.program_id(1)
        tl.store(counts_ptr + 4 * at, tl.sum(b_ahead, axis=0))
        tl.store(counts_ptr + 4 * at + 1, tl.sum(b_top, axis=0))
        tl.store(counts_ptr + 4 * at + 2, tl.sum(b_nan, axis=0))
        tl.store(counts_ptr + 4 * at + 3, tl.sum(b_in, axis=0))
        tl.store(sums_ptr + 2 * at, m)
        tl.store(sums_ptr + 2 * at + 1, l)


@triton.jit
def finish_kernel(
    counts_ptr,
    sums_ptr,
    targets_ptr,
    target_ptr,
    state_ptr,
    rank_ptr,
    log_prob_ptr,
    num_splits,
    num_items,
    HAS_OWN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Rank and log-probability of a query that ``every_kernel`` answered.

    HAS_OWN: a target that is no row of the table, which no split has, is counted here.

    A target that cannot be compared (NaN) takes the last place and has probability 0. Items at
    +inf share the mass equally; where all scores are -inf, all of them do.
    """
    i_m = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + i_m) == _GONE:
        tl.store(rank_ptr + i_m, -1)
        tl.store(log_prob_ptr + i_m, float("nan"))
    if tl.load(state_ptr + i_m) == 1:
        o_s = tl.arange(0, BLOCK_S)
        m_s = o_s < num_splits
        p_s = i_m * num_splits + o_s
        ahead = tl.sum(tl.load(counts_ptr + 4 * p_s, mask=m_s, other=0), axis=0)
        at_top = tl.sum(tl.load(counts_ptr + 4 * p_s + 1, mask=m_s, other=0), axis=0)
        unordered = tl.sum(tl.load(counts_ptr + 4 * p_s + 2, mask=m_s, other=0), axis=0)
        competing = tl.sum(tl.load(counts_ptr + 4 * p_s + 3, mask=m_s, other=0), axis=0)
        b_m = tl.load(sums_ptr + 2 * p_s, mask=m_s, other=-float("inf"))
        b_l = tl.load(sums_ptr + 2 * p_s + 1, mask=m_s, other=0.0)
        target = tl.load(target_ptr + i_m)
        top = tl.max(b_m, axis=0)
        if HAS_OWN:
            row = tl.load(targets_ptr + i_m)
            foreign = (row < 0) | (row >= num_items)
            competing += foreign.to(tl.int64)
            at_top += (foreign & (target == float("inf"))).to(tl.int64)
            foreign = foreign & (tl.abs(target) < float("inf"))
            top = tl.where(foreign, tl.maximum(top, 0.0), top)
        safe = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(b_l * tl.exp(b_m - safe), axis=0)
        if HAS_OWN:
            total += tl.where(foreign, tl.exp(-safe), 0.0)
        lse = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
        lse = tl.where(at_top > 0, float("inf"), lse)
        sharing = tl.where(at_top > 0, at_top, competing - unordered)
        share = 0.0 - tl.log(tl.where(sharing > 1, sharing, 1).to(tl.float64))
        finite = (tl.abs(target) < float("inf")) & (tl.abs(lse) < float("inf"))
        log_prob = tl.where(finite, 0.0 - lse, -float("inf"))
        shares = (tl.abs(lse) == float("inf")) & (target.to(tl.float64) == lse)
        log_prob = tl.where(shares, share, log_prob)
        tl.store(log_prob_ptr + i_m, log_prob.to(tl.float32))
        tl.store(rank_ptr + i_m, tl.where(target != target, competing, ahead + 1))
