"""Run with TRITON_INTERPRET=1: the kernels with nothing to do."""

import sys

import torch

from r2ec_kernels import (
    ItemIndex,
    RecPOLossConfig,
    item_topk,
    linear_logprob,
    recpo_loss,
    reward_and_advantage,
    target_stats,
)


def main():
    ids = torch.empty(0, dtype=torch.int64)
    weight = torch.randn(11, 4, requires_grad=True)
    none = torch.empty(0, 4)
    for softcap in (None, 5.0):
        hidden = torch.empty(0, 4, requires_grad=True)
        given = {"softcap": softcap, "entropy": True, "impl": "triton"}
        found = linear_logprob(hidden, weight, ids, **given)
        (found.log_prob.sum() + found.entropy.sum()).backward()
        assert found.log_prob.shape == (0,) and not weight.grad.any()
    for reduction in ("token", "sequence", "constant", "sum"):
        config = RecPOLossConfig(impl="triton", reduction=reduction, max_completion_length=3)
        states = torch.empty(0, 4, requires_grad=True)
        groups = (torch.rand(0, 3), states, none, ids)
        loss = recpo_loss(none.requires_grad_(), weight, ids, ids, *groups, config=config)
        loss.loss.backward()
        assert loss.loss == 0 and loss.num_tokens == 0
        none = none.detach()
        hidden = torch.randn(5, 4, requires_grad=True)
        ignored = torch.full((5,), -100)
        states = torch.randn(6, 4, requires_grad=True)
        groups = (torch.rand(2, 3), states, torch.randn(2, 4), torch.arange(2))
        loss = recpo_loss(
            hidden, weight, ignored, torch.arange(5), *groups, config=config, num_tokens=0
        )
        loss.loss.backward()
        assert loss.token_loss == 0 and not hidden.grad.any() and torch.isfinite(loss.loss)
    found = reward_and_advantage(ids.view(0, 3), torch.empty(0, 3), impl="triton")
    assert found.advantages.shape == (0, 3)
    for similarity in ("dot", "cosine", "l2"):
        how = {"similarity": similarity, "impl": "triton"}
        for queries, items in ((none, weight), (weight, none), (none, none)):
            found = item_topk(queries, items, 2, **how)
            assert found.indices.shape == (len(queries), 2) and (found.indices == -1).all()
            if not len(queries):
                assert target_stats(queries, items, ids, **how).rank.shape == (0,)
    index = ItemIndex(none)
    assert (index.search(weight, 2).indices == -1).all()
    sys.stdout.write("empty calls pass\n")


if __name__ == "__main__":
    main()
