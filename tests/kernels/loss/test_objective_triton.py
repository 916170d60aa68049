"""The objective's Triton kernels against the torch objective: on a GPU and in the interpreter."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from _support.budget import assert_within_budget
from _support.loss_cases import BASE

from r2ec_kernels._block_sizes import block_sizes
from r2ec_kernels.loss import function
from r2ec_kernels.loss.config import IMPORTANCE_SAMPLING_MODES, REDUCTIONS
from r2ec_kernels.loss.impl import item_action, objective, reference
from r2ec_kernels.loss.impl.common import Actions, StepCounts, StoredLogProbs

INTERPRETED_TYPES = ("float32", "bfloat16")  # of the stored log-probabilities; no products here
GROUP, ROWS, TOKENS = 4, 12, 43
NAMES = ("old", "sampler", "ref")


def small_blocks(device):
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.loss.impl import triton as implementation

    sizes = {"BLOCK_T": 16, "BLOCK_R": 8, "BLOCK_SUM": 32, "BLOCK_P": 8, "BLOCK_M": 4}
    return block_sizes(implementation, **sizes, BLOCK_D=8)


def make(device, dtype, tokens=TOKENS, rows=ROWS):
    """(leaves, what is stored), all values exact in ``dtype``. Tokens of a trajectory stand apart,
    trajectory 5 has none, every ninth token is not counted, the sampler lacks one number."""
    generator = torch.Generator().manual_seed(tokens + rows)

    def logs(num, scale):
        return (-scale * torch.rand(num, generator=generator)).to(dtype).float().to(device)

    trajectory = torch.randint(0, max(rows, 1), (tokens,), generator=generator)
    trajectory[trajectory == 5] = 4
    targets = torch.randint(0, 9, (tokens,), generator=generator)
    targets[::9] = -100
    log_prob, item_log_prob = logs(tokens, 1.0), logs(rows, 3.0)
    log_prob[(targets < 0).to(device)] = 0
    stored = {name: logs(tokens, 1.0) for name in NAMES}
    if tokens > 1:
        stored["sampler"][1] = torch.nan
    values = {
        "log_prob": log_prob,
        "item_log_prob": item_log_prob,
        "entropy": logs(tokens, -3.0).masked_fill((targets < 0).to(device), 0),
        "targets": targets.to(device),
        "trajectory": trajectory.to(device),
        "advantages": torch.randn(rows, generator=generator).to(device),
        "best": (torch.arange(rows) % GROUP == 1).to(device),
        "old_items": logs(rows, 3.0),
    }
    return values, stored


def run(implementation, values, stored, config, counts, given, number, dtype):
    """Everything that an implementation gives, computed in ``number``."""

    def cast(value, kind):
        return value.to(kind) if value.is_floating_point() else value

    leaves = [values[name].to(number).requires_grad_() for name in ("log_prob", "item_log_prob")]
    kind = dtype if number == torch.float32 else number  # stored values are exact in both
    kept = [cast(stored[name], kind) if name in given else None for name in NAMES]
    old = cast(values["old_items"], kind) if "old_items" in given else None
    actions = Actions(
        values["targets"],
        values["trajectory"],
        cast(values["advantages"], number),
        values["best"],
        old,
        StoredLogProbs(*kept),
    )
    entropy = values["entropy"].to(number) if config.entropy else None
    loss, found = implementation(leaves[0], entropy, leaves[1], actions, counts, config)
    numbers = [value.to(number) for value in found if value is not None]
    return [loss.detach(), *numbers, *torch.autograd.grad(loss * 1.5, leaves)]


def check(device, dtype, config, given, counts=None, **sizes):
    counts = counts or StepCounts(None, None, GROUP)
    values, stored = make(device, dtype, **sizes)
    rest = (values, stored, config, counts, given)
    with small_blocks(device):
        ours = run(function.objective, *rest, torch.float32, dtype)
    plain = run(objective.objective, *rest, torch.float32, dtype)
    exact = run(objective.objective, *rest, torch.float64, dtype)
    # the losses are sums of terms of both signs
    assert_within_budget(ours, plain, exact, share=3.0, units=16.0)
    return ours


@pytest.mark.parametrize("mode", [None, *IMPORTANCE_SAMPLING_MODES])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_setting_within_the_error_budget(reduction, level, mode, device, dtype):
    config = dataclasses.replace(
        BASE,
        reduction=reduction,
        ratio_level=level,
        importance_sampling_mode=mode or "token_truncate",
        importance_sampling_clip_min=0.7,
        importance_sampling_clip_max=1.6,
        item_weight=0.7,
        epsilon_high=0.28,
    )
    sampler = () if mode is None else ("sampler",)
    old = ("old", "old_items")
    for kl_weight, given in (
        (0.0, ()),
        (0.0, ("ref", *old)),
        (0.3, ("ref",)),
        (0.3, ("ref", *old)),
    ):
        settings = dataclasses.replace(config, kl_weight=kl_weight, entropy="old" in given)
        check(device, dtype, settings, (*sampler, *given))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_counts_of_the_step(reduction, device, dtype):
    config = dataclasses.replace(BASE, reduction=reduction, best=2)
    on_device = [torch.tensor(n, device=device) for n in (300, 24)]
    results = [
        check(device, dtype, config, NAMES, StepCounts(*counts, GROUP))
        for counts in ((300, 24), on_device, (torch.tensor(300.0), torch.tensor(24)))
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    zero = check(device, dtype, config, NAMES, StepCounts(0, torch.tensor(0), GROUP))
    assert all(torch.isfinite(value).all() for value in zero)


@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_MODES)
@pytest.mark.parametrize(("tokens", "rows"), [(0, 4), (0, 0), (1, 1), (17, 5)])
def test_few_or_none(tokens, rows, mode, device, dtype):
    for reduction, level in itertools.product(REDUCTIONS, ("token", "sequence")):
        config = dataclasses.replace(
            BASE, reduction=reduction, ratio_level=level, importance_sampling_mode=mode
        )
        counts = StepCounts(None, None, 1)
        check(device, dtype, config, NAMES, counts, tokens=tokens, rows=rows)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_many_tokens(level, device, dtype):
    config = dataclasses.replace(BASE, reduction="sequence", ratio_level=level, entropy=True)
    check(device, dtype, config, (*NAMES, "old_items"), tokens=300_001, rows=2000)


def test_a_log_probability_that_is_not_finite_shows(device, dtype):
    values, stored = make(device, dtype)
    values["log_prob"][1] = torch.nan
    rest = (values, stored, BASE, StepCounts(None, None, GROUP), ("old",))
    with small_blocks(device):
        loss, *_, grad, _ = run(function.objective, *rest, torch.float32, dtype)
    assert loss.isnan() and grad[1].isnan() and not grad[2:].isnan().any()


def states(device, dtype, users, group, items, width):
    generator = torch.Generator().manual_seed(items)

    def randn(rows):
        scale = torch.exp2(torch.randint(-6, 6, (rows, 1), generator=generator).float())
        return (torch.randn(rows, width, generator=generator) * scale).to(device, dtype)

    found = {"user_states": randn(users * group), "item_states": randn(items)}
    found["user_states"][-1] = found["item_states"][-1] = 0
    ids = torch.randint(0, max(items - 2, 1), (items,), generator=generator)
    targets = torch.randint(0, items, (users,), generator=generator)
    targets[-1] = items - 1
    return found, ids.to(device), targets.to(device)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize(
    "sizes",
    [(3, 4, 5, 8), (1, 1, 1, 3), (2, 3, 13, 37)]
    + [pytest.param((64, 8, 1500, 2304), marks=pytest.mark.gpu)],
)
def test_item_actions_within_the_error_budget(similarity, sizes, device, dtype):
    found, ids, targets = states(device, dtype, *sizes)
    # dot products up to 2^12 would leave no candidate beside the first
    temperature = 0.5 if similarity == "cosine" else 500.0
    config = dataclasses.replace(BASE, similarity=similarity, item_temperature=temperature)
    pull = torch.randn(sizes[0] * sizes[1], generator=torch.Generator().manual_seed(1)).to(device)

    def results(implementation, kind):
        leaves = [value.to(kind).requires_grad_() for value in found.values()]
        with small_blocks(device):
            log_prob = implementation(*leaves, ids, targets, None, config)
        return [log_prob.detach(), *torch.autograd.grad(log_prob, leaves, pull.to(log_prob.dtype))]

    exact = results(reference.item_log_prob, torch.float64)
    plain = results(item_action.item_log_prob, dtype)
    ours = results(function.item_log_prob, dtype)
    assert_within_budget(ours, plain, exact, units=4.0)


def test_item_actions_need_no_gradient_of_one_side(device, dtype):
    found, ids, targets = states(device, dtype, 2, 3, 7, 12)
    for side in found:
        leaves = {name: value.clone() for name, value in found.items()}
        leaves[side].requires_grad_()
        with small_blocks(device):
            log_prob = function.item_log_prob(*leaves.values(), ids, targets, None, BASE)
        (grad,) = torch.autograd.grad(log_prob.sum(), [leaves[side]])
        assert grad.dtype == dtype and grad.any()
