"""The device code of the RecPO objective on top of log-probabilities.

For T tokens of R trajectories (docs/method.md#objective), with d the loss of a token or an item
action by its log-probability:

``trajectory_kernel`` sums over the tokens of each trajectory: how many are counted, their log
ratios new to old, their differences old to sampler, and their corrections. Grid: ceil(R / BLOCK_R)
programs, each over all tokens: a trajectory's tokens may stand anywhere, and the order of a sum
never changes. Tile: [BLOCK_R, BLOCK_T] comparisons. Reads 28 T bytes a program, writes 16 R.

``token_kernel`` makes d of each token and, of each program, partial sums and bounds for loss and
statistics. Grid: ceil(T / BLOCK_T). Tile: [BLOCK_T]. Reads up to 40 bytes a token and its
trajectory's numbers, writes 4 a token and 40 a program.

``total_kernel`` makes d of each item action and adds everything up. Grid: one program. Reads 40
bytes a program of ``token_kernel`` and 17 a trajectory; writes 4 a trajectory and the results.

FLOPs: tens a token and trajectory. Numerics: float32, totals in float64.
"""

import triton
import triton.language as tl


@triton.jit
def _total(p_values, num, BLOCK: tl.constexpr):
    """Sum of ``num`` numbers, float64, always in the same order."""
    o_n = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num, BLOCK):
        b_sum += tl.load(p_values + start + o_n, mask=start + o_n < num, other=0.0).to(tl.float64)
    return tl.sum(b_sum, axis=0)


@triton.jit
def _largest(p_values, num, BLOCK: tl.constexpr):
    """The largest of ``num`` numbers; -inf of none."""
    o_n = tl.arange(0, BLOCK)
    b_top = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, num, BLOCK):
        b_value = tl.load(p_values + start + o_n, mask=start + o_n < num, other=-float("inf"))
        b_top = tl.maximum(b_top, b_value)
    return tl.max(b_top, axis=0)


@triton.jit
def _count(p_count, count, factor, ON_DEVICE: tl.constexpr):
    """A count as a divisor, 1 instead of 0, times ``factor``."""
    if ON_DEVICE:
        count = tl.load(p_count).to(tl.float32)
    return tl.maximum(count, 1.0) * factor


@triton.jit
def _tokens(sums_ptr, p_count, count, num_rows, LOCAL: tl.constexpr, ON_DEVICE: tl.constexpr):
    """Counted tokens of the step as a divisor; ``LOCAL``: of this call."""
    if LOCAL:
        return tl.maximum(_total(sums_ptr, num_rows, 128), 1.0).to(tl.float32)
    return _count(p_count, count, 1.0, ON_DEVICE)


@triton.jit
def _action_weight(b_length, tokens, trajectories, length, REDUCTION: tl.constexpr):
    """What one action of a trajectory with ``b_length`` counted tokens weighs."""
    if REDUCTION == "token":
        return tl.zeros_like(b_length) + 1.0 / tokens
    if REDUCTION == "sequence":
        return 1.0 / (tl.maximum(b_length, 1.0) * trajectories)
    if REDUCTION == "constant":
        return tl.zeros_like(b_length) + 1.0 / (trajectories * length)
    return tl.zeros_like(b_length) + 1.0 / trajectories


@triton.jit
def _clipped(b_ratio, b_advantage, clip_low, clip_high):
    """min(r A, clip(r) A), its derivative by log r, and where each bound stops that."""
    m_low = (b_ratio < clip_low) & (b_advantage < 0)
    m_high = (b_ratio > clip_high) & (b_advantage > 0)
    b_product = b_ratio * b_advantage
    b_value = tl.where(m_low, clip_low * b_advantage, b_product)
    b_value = tl.where(m_high, clip_high * b_advantage, b_value)
    return b_value, tl.where(m_low | m_high, 0.0, b_product), m_low, m_high


@triton.jit
def _difference(p_sampler, b_old, m_counted):
    """Old log-probabilities less the sampler's; 0 where not counted or where that has none."""
    b_difference = b_old - tl.load(p_sampler, mask=m_counted, other=0.0).to(tl.float32)
    return tl.where(m_counted & (b_difference == b_difference), b_difference, 0.0)


@triton.jit
def _bounded(b_ratio, low, high, MASK: tl.constexpr):
    """Importance ratios within their bounds; outside 0 with ``MASK``, else the bound."""
    if MASK:
        return tl.where((b_ratio < low) | (b_ratio > high), 0.0, b_ratio)
    return tl.minimum(tl.maximum(b_ratio, low), high)


@triton.jit
def trajectory_kernel(
    log_prob_ptr,
    target_ptr,
    trajectory_ptr,
    old_ptr,
    sampler_ptr,
    sums_ptr,
    num_tokens,
    num_rows,
    low,
    high,
    MASK: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sums of BLOCK_R trajectories over their counted tokens, [4, R]: 1, log ratio, difference to
    the sampler, correction of each token."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_length = tl.zeros((BLOCK_R,), tl.float32)
    b_log_ratio = tl.zeros((BLOCK_R,), tl.float32)
    b_apart = tl.zeros((BLOCK_R,), tl.float32)
    b_correction = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_tokens, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < num_tokens
        # [BLOCK_T]
        m_counted = tl.load(target_ptr + o_t, mask=m_t, other=-1) >= 0
        b_row = tl.load(trajectory_ptr + o_t, mask=m_t, other=-1)
        b_log_prob = tl.load(log_prob_ptr + o_t, mask=m_counted, other=0.0)
        b_old = b_log_prob
        if HAS_OLD:
            b_old = tl.load(old_ptr + o_t, mask=m_counted, other=0.0).to(tl.float32)
        # [BLOCK_R, BLOCK_T]
        m_own = (o_r[:, None] == b_row[None, :]) & m_counted[None, :]
        b_length += tl.sum(m_own.to(tl.float32), axis=1)
        b_log_ratio += tl.sum(tl.where(m_own, (b_log_prob - b_old)[None, :], 0.0), axis=1)
        if HAS_SAMPLER:
            b_part = _difference(sampler_ptr + o_t, b_old, m_counted)
            b_apart += tl.sum(tl.where(m_own, b_part[None, :], 0.0), axis=1)
            b_part = _bounded(tl.exp(b_part), low, high, MASK)
            b_correction += tl.sum(tl.where(m_own, b_part[None, :], 0.0), axis=1)
    m_r = o_r < num_rows
    tl.store(sums_ptr + o_r, b_length, mask=m_r)
    tl.store(sums_ptr + num_rows + o_r, b_log_ratio, mask=m_r)
    tl.store(sums_ptr + 2 * num_rows + o_r, b_apart, mask=m_r)
    tl.store(sums_ptr + 3 * num_rows + o_r, b_correction, mask=m_r)


@triton.jit
def token_kernel(
    log_prob_ptr,
    entropy_ptr,
    target_ptr,
    trajectory_ptr,
    advantage_ptr,
    sums_ptr,
    old_ptr,
    sampler_ptr,
    ref_ptr,
    grad_ptr,
    partial_ptr,
    tokens_ptr,
    selected_ptr,
    num_tokens,
    num_rows,
    programs,
    tokens,
    selected,
    per_selected,
    length,
    clip_low,
    clip_high,
    low,
    high,
    kl_weight,
    REDUCTION: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TOKENS_LOCAL: tl.constexpr,
    TOKENS_ON_DEVICE: tl.constexpr,
    SELECTED_ON_DEVICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_T tokens: the gradient of the loss by their log-probabilities, and partial totals.

    partial: [10, programs], sums of loss, counted, clipped low, clipped high, ratio, correction,
    k3, entropy; then the largest of minus the correction and of the correction.
    """
    i_p = tl.program_id(0)
    o_t = i_p.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_tokens
    # [BLOCK_T]
    m_counted = tl.load(target_ptr + o_t, mask=m_t, other=-1) >= 0
    b_row = tl.load(trajectory_ptr + o_t, mask=m_counted, other=0)
    b_log_prob = tl.load(log_prob_ptr + o_t, mask=m_counted, other=0.0)
    b_advantage = tl.load(advantage_ptr + b_row, mask=m_counted, other=0.0).to(tl.float32)
    b_length = tl.full((BLOCK_T,), 1.0, tl.float32)
    if HAS_SUMS:
        b_length = tl.load(sums_ptr + b_row, mask=m_counted, other=1.0)
    step_tokens = _tokens(sums_ptr, tokens_ptr, tokens, num_rows, TOKENS_LOCAL, TOKENS_ON_DEVICE)
    step_rows = _count(selected_ptr, selected, per_selected, SELECTED_ON_DEVICE)
    b_weight = _action_weight(b_length, step_tokens, step_rows, length, REDUCTION)

    b_old = b_log_prob
    if HAS_OLD:
        b_old = tl.load(old_ptr + o_t, mask=m_counted, other=0.0).to(tl.float32)
    b_log_ratio = b_log_prob - b_old
    if SEQUENCE_RATIO:
        b_sum = tl.load(sums_ptr + num_rows + b_row, mask=m_counted, other=0.0)
        b_log_ratio = b_sum / b_length
    b_ratio = tl.exp(b_log_ratio)
    b_value, b_slope, m_low, m_high = _clipped(b_ratio, b_advantage, clip_low, clip_high)

    b_correction = tl.full((BLOCK_T,), 1.0, tl.float32)
    b_pull = b_correction  # of all tokens that share this one's ratio
    if HAS_SAMPLER:
        if SEQUENCE_CORRECTION:
            b_apart = tl.load(sums_ptr + 2 * num_rows + b_row, mask=m_counted, other=0.0)
            b_correction = _bounded(tl.exp(b_apart), low, high, MASK)
            b_pull = b_correction
        else:
            b_apart = _difference(sampler_ptr + o_t, b_old, m_counted)
            b_correction = _bounded(tl.exp(b_apart), low, high, MASK)
            b_pull = b_correction
            if SEQUENCE_RATIO:
                b_sum = tl.load(sums_ptr + 3 * num_rows + b_row, mask=m_counted, other=0.0)
                b_pull = b_sum / b_length
    b_loss = -b_value * b_correction
    b_grad = -b_slope * b_pull
    b_k3 = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_REF:
        b_gap = tl.load(ref_ptr + o_t, mask=m_counted, other=0.0).to(tl.float32) - b_log_prob
        b_k3 = tl.exp(b_gap) - b_gap - 1.0
        b_loss += kl_weight * b_k3
        b_grad += kl_weight * (1.0 - tl.exp(b_gap))
    tl.store(grad_ptr + o_t, tl.where(m_counted, b_grad * b_weight, 0.0), mask=m_t)

    p_partial = partial_ptr + i_p
    b_one = m_counted.to(tl.float32)
    tl.store(p_partial, tl.sum(tl.where(m_counted, b_loss * b_weight, 0.0), axis=0))
    tl.store(p_partial + programs, tl.sum(b_one, axis=0))
    tl.store(p_partial + 2 * programs, tl.sum((m_low & m_counted).to(tl.float32), axis=0))
    tl.store(p_partial + 3 * programs, tl.sum((m_high & m_counted).to(tl.float32), axis=0))
    tl.store(p_partial + 4 * programs, tl.sum(tl.where(m_counted, b_ratio, 0.0), axis=0))
    if HAS_SAMPLER and not SEQUENCE_CORRECTION:
        b_correction = tl.where(m_counted, b_correction, 0.0)
        tl.store(p_partial + 5 * programs, tl.sum(b_correction, axis=0))
        b_least = tl.where(m_counted, -b_correction, -float("inf"))
        tl.store(p_partial + 8 * programs, tl.max(b_least, axis=0))
        b_most = tl.where(m_counted, b_correction, -float("inf"))
        tl.store(p_partial + 9 * programs, tl.max(b_most, axis=0))
    if HAS_REF:
        tl.store(p_partial + 6 * programs, tl.sum(tl.where(m_counted, b_k3, 0.0), axis=0))
    if HAS_ENTROPY:
        b_entropy = tl.load(entropy_ptr + o_t, mask=m_counted, other=0.0)
        tl.store(p_partial + 7 * programs, tl.sum(b_entropy, axis=0))


@triton.jit
def total_kernel(
    item_log_prob_ptr,
    old_item_ptr,
    advantage_ptr,
    best_ptr,
    sums_ptr,
    partial_ptr,
    grad_ptr,
    loss_ptr,
    result_ptr,
    count_ptr,
    tokens_ptr,
    selected_ptr,
    num_rows,
    programs,
    tokens,
    selected,
    per_selected,
    length,
    clip_low,
    clip_high,
    low,
    high,
    item_weight,
    REDUCTION: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_OLD_ITEM: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TOKENS_LOCAL: tl.constexpr,
    TOKENS_ON_DEVICE: tl.constexpr,
    SELECTED_ON_DEVICE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Item actions [R], and all results.

    result: [12], in the order of ``triton.RESULTS``. grad: [R].
    """
    step_tokens = _tokens(sums_ptr, tokens_ptr, tokens, num_rows, TOKENS_LOCAL, TOKENS_ON_DEVICE)
    step_rows = _count(selected_ptr, selected, per_selected, SELECTED_ON_DEVICE)
    b_loss = tl.zeros((BLOCK_R,), tl.float64)
    b_stopped = tl.zeros((BLOCK_R,), tl.float32)
    b_chosen = tl.zeros((BLOCK_R,), tl.float32)
    b_rows = tl.zeros((BLOCK_R,), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float64)  # corrections of whole trajectories
    b_least = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    b_most = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < num_rows
        # [BLOCK_R]
        m_best = tl.load(best_ptr + o_r, mask=m_r, other=0) > 0
        b_log_prob = tl.load(item_log_prob_ptr + o_r, mask=m_best, other=0.0)
        b_advantage = tl.load(advantage_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
        b_length = tl.full((BLOCK_R,), 1.0, tl.float32)
        if HAS_SUMS:
            b_length = tl.load(sums_ptr + o_r, mask=m_r, other=1.0)
        b_old = b_log_prob
        if HAS_OLD_ITEM:
            b_old = tl.load(old_item_ptr + o_r, mask=m_best, other=0.0).to(tl.float32)
        b_weight = _action_weight(b_length, step_tokens, step_rows, length, REDUCTION)
        b_ratio = tl.exp(b_log_prob - b_old)
        b_value, b_slope, m_low, m_high = _clipped(b_ratio, b_advantage, clip_low, clip_high)
        b_loss += tl.where(m_best, -b_value * b_weight, 0.0).to(tl.float64)
        b_stopped += ((m_low | m_high) & m_best).to(tl.float32)
        b_chosen += m_best.to(tl.float32)
        b_grad = tl.where(m_best, -b_slope * b_weight * item_weight, 0.0)
        tl.store(grad_ptr + o_r, b_grad, mask=m_r)
        if HAS_SAMPLER and SEQUENCE_CORRECTION:
            b_apart = tl.load(sums_ptr + 2 * num_rows + o_r, mask=m_r, other=0.0)
            b_correction = _bounded(tl.exp(b_apart), low, high, MASK)
            b_rows += m_r.to(tl.float32)
            b_sum += tl.where(m_r, b_correction, 0.0).to(tl.float64)
            b_least = tl.maximum(b_least, tl.where(m_r, -b_correction, -float("inf")))
            b_most = tl.maximum(b_most, tl.where(m_r, b_correction, -float("inf")))

    token_loss = _total(partial_ptr, programs, BLOCK_P)
    item_loss = tl.sum(b_loss, axis=0)
    counted = _total(partial_ptr + programs, programs, BLOCK_P)
    some = tl.maximum(counted, 1.0)
    clipped_low = _total(partial_ptr + 2 * programs, programs, BLOCK_P) / some
    clipped_high = _total(partial_ptr + 3 * programs, programs, BLOCK_P) / some
    chosen = tl.maximum(tl.sum(b_chosen, axis=0), 1.0)
    tl.store(loss_ptr, token_loss + item_weight * item_loss)
    tl.store(count_ptr, counted.to(tl.int64))
    tl.store(result_ptr, token_loss)
    tl.store(result_ptr + 1, item_loss)
    tl.store(result_ptr + 2, clipped_low + clipped_high)
    tl.store(result_ptr + 3, clipped_low)
    tl.store(result_ptr + 4, clipped_high)
    tl.store(result_ptr + 5, tl.sum(b_stopped, axis=0) / chosen)
    tl.store(result_ptr + 6, _total(partial_ptr + 4 * programs, programs, BLOCK_P) / some)
    if HAS_SAMPLER:
        if SEQUENCE_CORRECTION:
            among = tl.sum(b_rows, axis=0)
            total = tl.sum(b_sum, axis=0)
            least = -tl.max(b_least, axis=0)
            most = tl.max(b_most, axis=0)
        else:
            among = counted
            total = _total(partial_ptr + 5 * programs, programs, BLOCK_P)
            least = -_largest(partial_ptr + 8 * programs, programs, BLOCK_P)
            most = _largest(partial_ptr + 9 * programs, programs, BLOCK_P)
        tl.store(result_ptr + 7, total / tl.maximum(among, 1.0))
        tl.store(result_ptr + 8, tl.where(among > 0, least, 0.0))
        tl.store(result_ptr + 9, tl.where(among > 0, most, 0.0))
    if HAS_REF:
        tl.store(result_ptr + 10, _total(partial_ptr + 6 * programs, programs, BLOCK_P) / some)
    if HAS_ENTROPY:
        tl.store(result_ptr + 11, _total(partial_ptr + 7 * programs, programs, BLOCK_P) / some)
