"""The policy ops under torch.compile, opcheck, autocast and deterministic mode."""

import pytest
import torch
from torch import library

import r2ec_kernels as rk

T, V, D, B, G = 24, 97, 12, 2, 3


def _inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(0, V, (T,), generator=generator)
    targets[3] = -100
    return {
        "hidden": rand(T, D).requires_grad_(),
        "weight": rand(V, D),
        "targets": targets,
        "trajectory": torch.arange(T) // 4,
        "rewards": torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.3, 0.3]], dtype=dtype),
        "user_states": rand(B * G, D).requires_grad_(),
        "item_states": rand(B, D).requires_grad_(),
        "item_ids": torch.tensor([4, 9]),
    }


def _leaves(inputs):
    return [x for x in inputs.values() if x.requires_grad]


def _run(function, inputs, **settings):
    out = function(**inputs, **settings)
    loss = out.loss if hasattr(out, "loss") else out.log_prob.sum()
    leaves = _leaves(inputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_logprob_compiles_in_one_graph(frozen, entropy):
    full = _inputs()
    inputs = {k: full[k] for k in ("hidden", "weight", "targets")}
    inputs["weight"].requires_grad_(not frozen)

    def run(hidden, weight, targets):
        out = rk.linear_logprob(hidden * 1.5, weight, targets, softcap=5.0, entropy=entropy)
        return out.log_prob.sum() + (out.entropy.sum() if entropy else 0)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = _leaves(inputs)
    want, got = run(**inputs), compiled(**inputs)
    assert torch.equal(got, want)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("negatives", ["in-batch", "catalog"])
def test_recpo_loss_compiles_in_one_graph(negatives):
    inputs = _inputs()
    config = rk.RecPOLossConfig(item_negatives=negatives, temperature=1.5, softcap=8.0)
    table = torch.randn(40, D) if negatives == "catalog" else None

    def run(**inputs):
        return rk.recpo_loss(**inputs, item_table=table, config=config)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = _run(compiled, inputs), _run(run, inputs)
    assert len(got) == 4
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_target_stats_compiles_in_one_graph():
    queries, items, targets = torch.randn(5, D), torch.randn(300, D), torch.arange(5)

    def run(queries, items, targets):
        return rk.target_stats(queries * 2, items, targets, similarity="cosine", temperature=0.1)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(queries, items, targets)
    want = run(queries, items, targets)
    assert torch.equal(got.rank, want.rank) and torch.equal(got.log_prob, want.log_prob)


SETTINGS = (5.0, 1.5, True, torch.float32, "torch", False)


@pytest.mark.parametrize("mode", ["value", "jacobian", "logits"])
def test_opcheck_of_the_head(mode):
    inputs = _inputs()
    # stored logits of rows that are not counted are not written, so every row counts here
    targets = inputs["targets"].clamp(min=0)
    args = (inputs["hidden"].detach(), inputs["weight"], targets, torch.randn(V))
    ops = torch.ops.r2ec_kernels
    library.opcheck(ops.linear_logprob_forward.default, (*args, None, mode, *SETTINGS))
    forward = ops.linear_logprob_forward(*args, None, "logits", *SETTINGS)
    grads = (torch.randn(T), torch.randn(T), [True, True, True])
    library.opcheck(ops.linear_logprob_backward.default, (*args, list(forward), *grads, *SETTINGS))


@pytest.mark.parametrize("jacobian", [False, True])
def test_opcheck_of_the_items(jacobian):
    queries, items = torch.randn(4, D), torch.randn(60, D)
    ops = torch.ops.r2ec_kernels
    left_out = torch.tensor([7, 41])
    library.opcheck(ops.catalog_lse.default, (queries, items, left_out, "cosine", 0.1, jacobian))
    exclude = torch.tensor([[3, -1]]).expand(4, 2).contiguous()
    library.opcheck(
        ops.target_stats.default,
        (queries, items, torch.arange(4), "dot", 1.0, exclude, None, None, "torch"),
    )


def test_autocast_reaches_neither_the_sums_nor_the_results():
    inputs = _inputs()
    named = {k: inputs[k] for k in ("hidden", "weight", "targets")}
    outside = rk.linear_logprob(**named).log_prob
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = rk.linear_logprob(**named).log_prob
        (grad,) = torch.autograd.grad(log_prob.sum(), [named["hidden"]])
        loss = rk.recpo_loss(**inputs).loss
    # a CPU multiplies bfloat16 inputs in float32
    assert log_prob.dtype == torch.float32 and torch.equal(log_prob, outside)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(loss, rk.recpo_loss(**inputs).loss, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("frozen", [True, False])
def test_deterministic_mode_runs_and_repeats_bit_for_bit(frozen):
    inputs = _inputs()
    inputs["weight"].requires_grad_(not frozen)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (_run(rk.recpo_loss, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
