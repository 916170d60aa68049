"""recpo_loss over the Triton kernels of its head: on a GPU and in Triton's interpreter."""

import contextlib
import dataclasses

import pytest
import torch
from _support.budget import assert_within_budget
from _support.loss_cases import BASE, NAMES, call, gradients, make

from r2ec_kernels._block_sizes import block_sizes

# on a CPU the products of narrow types are made in float32; its interpreter has no right float16
INTERPRETED_TYPES = ("float32", "bfloat16")
REDUCTIONS = ("token", "sequence", "constant", "sum")
WIDE = {"width": 160, "vocab": 4097, "catalog": 5003}


def small_blocks(device):
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.logprob.impl import triton as implementation

    return block_sizes(implementation, ROW_TILE=16, BLOCK_COLUMNS=16)


def results(device, dtype, config, sizes, names, with_catalog, kind):
    """Loss, log-probabilities and gradients: of the kernels, of plain torch, in float64."""
    case, stored, table = make(dtype=dtype, **sizes)
    values = [case, stored, {"item_table": table} if with_catalog else {}]
    for named in values:
        for name, value in named.items():
            exact = kind == "exact" and value.is_floating_point()
            named[name] = value.detach().to(device, torch.float64 if exact else value.dtype)
    case, stored, extra = values
    for name in names:
        case[name].requires_grad_()
    config = dataclasses.replace(config, impl="triton" if kind == "ours" else "reference")
    loss = call(case, config, **stored, **extra)
    return [loss.loss.detach(), loss.log_prob, *gradients(case, loss, names)]


def check(device, dtype, config, sizes, trainable=False):
    names = ("hidden", "weight", *NAMES[1:]) if trainable else NAMES
    given = (device, dtype, config, sizes, names, config.item_negatives == "catalog")
    with small_blocks(device):
        ours = results(*given, "ours")
    # the interpreter's exp2 and the tanh by exp2 round once more than torch's
    budget = {} if device == "cuda" else {"share": 3, "units": 4}
    assert_within_budget(ours, results(*given, "plain"), results(*given, "exact"), **budget)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_within_the_error_budget(reduction, level, device, dtype):
    config = dataclasses.replace(
        BASE,
        reduction=reduction,
        ratio_level=level,
        importance_sampling_clip_max=1.3,
        best=2,
        softcap=3.0,
        kl_weight=0.1,
    )
    check(device, dtype, config, {})


@pytest.mark.parametrize("negatives", ["in-batch", "catalog"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_items_within_the_error_budget(similarity, negatives, device, dtype):
    config = dataclasses.replace(
        BASE, similarity=similarity, item_negatives=negatives, estimator="rloo"
    )
    check(device, dtype, config, {})


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, pytest.param(WIDE, marks=pytest.mark.gpu)], ids=["small", "wide"]
)
def test_heads_within_the_error_budget(sizes, trainable, device, dtype):
    config = dataclasses.replace(BASE, temperature=0.8, softcap=3.0)
    check(device, dtype, config, sizes, trainable)


@pytest.mark.parametrize("trainable", [False, True])
def test_repeats_bit_for_bit(trainable, device, dtype):
    names = ("hidden", "weight", *NAMES[1:]) if trainable else NAMES
    with small_blocks(device):
        one, two = (results(device, dtype, BASE, {}, names, False, "ours") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("trainable", [False, True])
def test_everything_is_written(trainable, device, dtype):
    """New memory is full of NaN: what is read before it is written would show."""
    config = dataclasses.replace(BASE, softcap=3.0, kl_weight=0.1, entropy=True)
    names = ("hidden", "weight", *NAMES[1:]) if trainable else NAMES
    given = (device, dtype, config, {}, names, False, "ours")
    with small_blocks(device):
        plain = results(*given)
        torch.use_deterministic_algorithms(True)
        try:
            poisoned = results(*given)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("negatives", ["in-batch", "catalog"])
def test_compiles_in_one_graph(negatives, backend, device):
    case, stored, table = make(dtype=torch.bfloat16, **WIDE)
    case, stored = (
        {k: v.detach().to(device) for k, v in given.items()} for given in (case, stored)
    )
    for name in NAMES:
        case[name].requires_grad_()
    extra = {"item_table": table.to(device)} if negatives == "catalog" else {}
    config = dataclasses.replace(BASE, item_negatives=negatives, softcap=8.0, impl="triton")

    def run(case, stored, extra):
        return call(case, config, **stored, **extra)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    pairs = []
    for function in (compiled, run):
        loss = function(case, stored, extra)
        pairs.append([loss.loss.detach(), *gradients(case, loss)])
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
