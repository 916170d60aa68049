"""Nothing to count: no counted token, no trajectory, no row. Losses are 0, gradients finite."""

import itertools
import math

import numpy as np
import pytest
import torch

from r2ec_kernels import (
    ItemIndex,
    RecPOLossConfig,
    grouped_advantage,
    item_topk,
    linear_logprob,
    recpo_loss,
    recpo_reward,
    reward_and_advantage,
    target_stats,
)

REDUCTIONS = ("token", "sequence", "constant", "sum")
IMPLEMENTATIONS = ("torch", "reference")
GROUP, WIDTH, VOCAB = 3, 4, 11


def make(groups, tokens, ignored, dtype=torch.float32):
    """Arguments of one call; ``ignored``: no token counts."""
    generator = torch.Generator().manual_seed(groups + tokens)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    case = {
        "hidden": randn(tokens, WIDTH).requires_grad_(),
        "weight": randn(VOCAB, WIDTH).requires_grad_(),
        "targets": torch.full_like(targets, -100) if ignored else targets,
        "trajectory": torch.arange(tokens) % max(1, groups * GROUP),
        "rewards": torch.rand(groups, GROUP, generator=generator),
        "user_states": randn(groups * GROUP, WIDTH).requires_grad_(),
        "item_states": randn(groups, WIDTH).requires_grad_(),
        "item_ids": torch.arange(groups),
    }
    stored = {name: randn(tokens) for name in ("old_log_prob", "sampler_log_prob", "ref_log_prob")}
    stored["old_item_log_prob"] = randn(groups * GROUP)
    return case, stored


def call(case, config, **extra):
    return recpo_loss(*case.values(), config=config, **extra)


def assert_sound(case, loss):
    for name, value in loss._asdict().items():
        if value is not None:
            assert torch.isfinite(value).all(), name
    learned = [value for value in case.values() if value.requires_grad]
    for gradient in torch.autograd.grad(loss.loss, learned, allow_unused=True, retain_graph=True):
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("stored", [False, True])
def test_no_counted_token(impl, reduction, stored):
    for level, catalog in itertools.product(("token", "sequence"), (False, True)):
        config = RecPOLossConfig(
            reduction=reduction,
            max_completion_length=7,
            impl=impl,
            ratio_level=level,
            kl_weight=0.1 if stored else 0.0,
            entropy=True,
            item_negatives="catalog" if catalog else "in-batch",
        )
        for groups, tokens, ignored in ((2, 5, True), (2, 0, True), (2, 0, False)):
            case, extra = make(groups, tokens, ignored)
            extra = extra if stored else {}
            if catalog:
                extra["item_table"] = torch.randn(9, WIDTH)
            for given in (None, 0, np.int64(0), torch.tensor(0)):
                loss = call(case, config, num_tokens=given, **extra)
                assert loss.token_loss == 0 and loss.num_tokens == 0
                assert_sound(case, loss)
                gradient = torch.autograd.grad(loss.loss, case["hidden"])[0]
                assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_trajectory(impl, reduction):
    for catalog, estimator, stored in itertools.product(
        (False, True), ("grpo", "rloo"), (False, True)
    ):
        config = RecPOLossConfig(
            reduction=reduction,
            max_completion_length=7,
            impl=impl,
            estimator=estimator,
            entropy=True,
            kl_weight=0.1 if stored else 0.0,
            item_negatives="catalog" if catalog else "in-batch",
        )
        case, extra = make(0, 0, False)
        extra = extra if stored else {}
        if catalog:
            extra["item_table"] = torch.randn(9, WIDTH)
        counts = ({}, {"num_tokens": 0, "num_selected": 0}, {"num_tokens": 12, "num_selected": 4})
        for given in (*counts, {"num_selected": torch.tensor(0)}):
            loss = call(case, config, **given, **extra)
            assert loss.loss == loss.token_loss == loss.item_loss == 0 and loss.num_tokens == 0
            assert loss.advantages.shape == loss.item_log_prob.shape == (0, GROUP)
            assert_sound(case, loss)
        case["item_states"] = torch.randn(5, WIDTH, requires_grad=True)  # M rows, no user
        case["item_ids"] = torch.arange(5)
        loss = call(case, config, **extra)
        assert loss.loss == 0
        assert_sound(case, loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_step_whose_other_calls_hold_the_tokens(impl):
    """One call has none, the step has some: its share is 0, the others' are unchanged."""
    config = RecPOLossConfig(impl=impl)
    case, _ = make(2, 6, True)
    loss = call(case, config, num_tokens=30, num_selected=8)
    assert loss.token_loss == 0
    assert_sound(case, loss)


@pytest.mark.parametrize("count", [-1, -5])
def test_negative_counts_are_refused(count):
    case, _ = make(2, 6, False)
    for name in ("num_tokens", "num_selected"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0, got {count}"):
            call(case, RecPOLossConfig(), **{name: count})


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probabilities_of_no_tokens(impl, softcap):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        hidden = torch.empty(0, WIDTH, dtype=dtype, requires_grad=True)
        weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
        bias = torch.randn(VOCAB, requires_grad=True)
        targets = torch.empty(0, dtype=torch.int64)
        given = {"bias": bias, "softcap": softcap, "entropy": True, "impl": impl}
        found = linear_logprob(hidden, weight, targets, **given)
        assert found.log_prob.shape == found.entropy.shape == (0,)
        (found.log_prob.sum() + found.entropy.sum()).backward()
        assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_searches_and_ranks_of_nothing(impl):
    items, none = torch.randn(5, WIDTH), torch.empty(0, WIDTH)
    ids = torch.empty(0, dtype=torch.int64)
    for similarity in ("dot", "cosine", "l2"):
        how = {"similarity": similarity, "impl": impl}
        for queries, table, k in ((none, items, 3), (items, none, 3), (none, none, 3)):
            found = item_topk(queries, table, k, **how)
            assert found.indices.shape == (len(queries), k)
            assert (found.indices == -1).all() and (found.scores == -math.inf).all()
        for exclude in (torch.empty(5, 0, dtype=torch.int64), [[]] * 5, None):
            assert item_topk(items, items, 0, exclude=exclude, **how).scores.shape == (5, 0)
        for table in (items, none):
            for exclude in (None, [], torch.empty(0, 3, dtype=torch.int64)):
                found = target_stats(none, table, ids, exclude=exclude, **how)
                assert found.rank.shape == found.log_prob.shape == (0,)
                assert found.rank.dtype == torch.int64 and found.log_prob.dtype == torch.float32
        assert target_stats(none, items, [], **how).rank.shape == (0,)


@pytest.mark.parametrize("scan", ["none", "fp16", "bf16", "int8", "auto"])
def test_an_index_of_nothing(scan):
    none = torch.empty(0, WIDTH)
    for index in (ItemIndex(none, scan=scan), ItemIndex(torch.randn(5, WIDTH), scan=scan)):
        assert index.search(none, 3).indices.shape == (0, 3)
        assert index.target_stats(none, []).rank.shape == (0,)
        index.write([], none)
        index.remove([])
        assert index.append(none).shape == (0,)
        index.remove(index.ids)
        assert (index.search(torch.randn(2, WIDTH), 2).indices == -1).all()


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_rewards_of_nothing(estimator):
    for group in (1, 4):
        found = grouped_advantage(torch.empty(0, group), estimator=estimator)
        assert found.advantages.shape == found.best.shape == (0, group)
        rank = torch.empty(0, group, dtype=torch.int64)
        both = reward_and_advantage(rank, torch.empty(0, group), estimator=estimator)
        assert both.rewards.shape == (0, group)
    assert recpo_reward(rank[:, :0], torch.empty(0, 0)).shape == (0, 0)
    with pytest.raises(ValueError, match="G >= 1"):
        grouped_advantage(torch.empty(3, 0))
