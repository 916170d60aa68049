"""The kernels with nothing to do: on a GPU and in the interpreter."""

import pytest
import torch

from r2ec_kernels import (
    RecPOLossConfig,
    item_topk,
    linear_logprob,
    recpo_loss,
    reward_and_advantage,
    target_stats,
)


def nothing(device, *shape, **options):
    return torch.empty(*(shape or (0, 4)), device=device, **options)


def ids(device):
    return torch.empty(0, dtype=torch.int64, device=device)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_rows(softcap, device):
    weight = torch.randn(11, 4, device=device, requires_grad=True)
    hidden = nothing(device, requires_grad=True)
    found = linear_logprob(
        hidden, weight, ids(device), softcap=softcap, entropy=True, impl="triton"
    )
    (found.log_prob.sum() + found.entropy.sum()).backward()
    assert found.log_prob.shape == (0,) and not weight.grad.any()


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant", "sum"])
def test_no_trajectories_and_no_counted_tokens(reduction, device):
    config = RecPOLossConfig(impl="triton", reduction=reduction, max_completion_length=3)
    weight = torch.randn(11, 4, device=device)
    hidden, states = nothing(device, requires_grad=True), nothing(device, requires_grad=True)
    groups = (torch.rand(0, 3, device=device), states, nothing(device), ids(device))
    loss = recpo_loss(hidden, weight, ids(device), ids(device), *groups, config=config)
    loss.loss.backward()
    assert loss.loss == 0 and loss.num_tokens == 0
    hidden = torch.randn(5, 4, device=device, requires_grad=True)
    states = torch.randn(6, 4, device=device, requires_grad=True)
    ignored = torch.full((5,), -100, device=device)
    groups = (torch.rand(2, 3, device=device), states, torch.randn(2, 4, device=device))
    loss = recpo_loss(
        hidden,
        weight,
        ignored,
        torch.arange(5, device=device),
        *groups,
        torch.arange(2, device=device),
        config=config,
        num_tokens=0,
    )
    loss.loss.backward()
    assert loss.token_loss == 0 and not hidden.grad.any() and torch.isfinite(loss.loss)


def test_no_groups(device):
    rank = ids(device).view(0, 3)
    found = reward_and_advantage(rank, nothing(device, 0, 3), impl="triton")
    assert found.advantages.shape == (0, 3)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_no_queries_and_no_items(similarity, device):
    how = {"similarity": similarity, "impl": "triton"}
    some = torch.randn(11, 4, device=device)
    for queries, items in ((nothing(device), some), (some, nothing(device))):
        found = item_topk(queries, items, 2, **how)
        assert found.indices.shape == (len(queries), 2) and (found.indices == -1).all()
    assert target_stats(nothing(device), some, ids(device), **how).rank.shape == (0,)
