"""recpo_loss: the torch path against the plain reference, and its invariants."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from _support.budget import assert_within_budget
from _support.loss_cases import BASE, GROUP, GROUPS, NAMES, WIDTH, call, gradients, make

from r2ec_kernels import RecPOLossConfig, grouped_advantage, linear_logprob
from r2ec_kernels.loss import config as config_module


@pytest.mark.parametrize("catalog", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant", "sum"])
def test_equals_the_reference(reduction, similarity, catalog):
    case, stored, table = make()
    extra = {"item_table": table} if catalog else {}
    for level, estimator, rest in itertools.product(
        ("token", "sequence"), ("grpo", "rloo"), ({}, {"softcap": 3.0, "kl_weight": 0.1})
    ):
        config = dataclasses.replace(
            BASE,
            reduction=reduction,
            similarity=similarity,
            item_negatives="catalog" if catalog else "in-batch",
            ratio_level=level,
            estimator=estimator,
            importance_sampling_mode=f"{level}_mask",
            importance_sampling_clip_max=1.3,
            best=2,
            **rest,
        )
        results = []
        for impl in ("torch", "reference"):
            loss = call(case, dataclasses.replace(config, impl=impl), **stored, **extra)
            results.append((loss, gradients(case, loss)))
        (ours, grads), (exact, exact_grads) = results
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        for a, b in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("catalog", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_gradcheck(similarity, catalog):
    case, stored, table = make()
    config = dataclasses.replace(
        BASE,
        similarity=similarity,
        epsilon=0.9,  # no kink near the sampled ratios
        epsilon_high=50.0,
        kl_weight=0.3,
        item_negatives="catalog" if catalog else "in-batch",
    )
    stored["old_log_prob"] = linear_logprob(*[case[k] for k in ("hidden", "weight", "targets")])
    stored["old_log_prob"] = stored["old_log_prob"].log_prob.detach() - 0.1
    case["weight"].requires_grad_()
    extra = {"item_table": table} if catalog else {}
    del stored["old_item_log_prob"]

    def function(hidden, weight, user_states, item_states):
        changed = dict(
            zip(
                ("hidden", "weight", *NAMES[1:]),
                (hidden, weight, user_states, item_states),
                strict=True,
            )
        )
        items = torch.full((12,), -1.0, dtype=torch.float64)
        return call(case | changed, config, **stored, old_item_log_prob=items, **extra).loss

    inputs = [case[k] for k in ("hidden", "weight", "user_states", "item_states")]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=similarity != "cosine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_within_the_error_budget(dtype, trainable):
    results = {}
    names = ("hidden", "weight", *NAMES[1:]) if trainable else NAMES
    for kind in ("exact", "plain", "ours"):
        case, stored, _ = make(dtype=dtype)
        if kind == "exact":
            case = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
            stored = {k: v.double() for k, v in stored.items()}
        case = {k: v.detach() for k, v in case.items()}
        for name in names:
            case[name].requires_grad_()
        impl = "torch" if kind == "ours" else "reference"
        loss = call(case, dataclasses.replace(BASE, softcap=3.0, impl=impl), **stored)
        results[kind] = [loss.loss.detach(), *gradients(case, loss, names)]
    assert_within_budget(*(results[kind] for kind in ("ours", "plain", "exact")))


def split(case, stored, groups):
    """The call of some groups alone; its candidates stay those of the whole step."""
    groups = torch.tensor(groups)
    rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
    place = torch.full((GROUPS * GROUP,), -1)
    place[rows] = torch.arange(rows.numel())
    tokens = torch.cat([(case["trajectory"] == r).nonzero()[:, 0] for r in rows])
    part = dict(case)
    part["hidden"] = case["hidden"][tokens]
    part["targets"] = case["targets"][tokens]
    part["trajectory"] = place[case["trajectory"][tokens]]
    part["rewards"] = case["rewards"][groups]
    part["user_states"] = case["user_states"][rows]
    part["item_targets"] = case["item_targets"][groups]
    own = {k: v[rows] if k == "old_item_log_prob" else v[tokens] for k, v in stored.items()}
    return part, own


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant", "sum"])
def test_accumulated_calls_add_up_to_one_call(reduction, level):
    case, stored, _ = make()
    config = dataclasses.replace(BASE, reduction=reduction, best=2, ratio_level=level)
    whole = call(case, config, **stored)
    expected = gradients(case, whole)
    total, sums = 0.0, [torch.zeros_like(case[n]) for n in NAMES]
    for groups in ([0], [2, 1]):
        part, own = split(case, stored, groups)
        steps = {"num_tokens": whole.num_tokens, "num_selected": GROUPS * 2}
        loss = call(part, config, **own, **steps)
        total += loss.loss.detach()
        for s, g in zip(sums, gradients(case, loss), strict=True):
            s += g
    torch.testing.assert_close(total, whole.loss.detach())
    for s, g in zip(sums, expected, strict=True):
        torch.testing.assert_close(s, g)


def test_order_of_groups_and_of_trajectories_does_not_matter():
    case, stored, _ = make()
    whole = call(case, BASE, **stored)
    part, own = split(case, stored, [2, 0, 1])
    moved = call(part, BASE, **own)
    torch.testing.assert_close(moved.loss, whole.loss)
    for a, b in zip(gradients(case, moved), gradients(case, whole), strict=True):
        torch.testing.assert_close(a, b)


def test_zero_advantage_rows_keep_their_log_prob_and_get_no_gradient():
    case, stored, _ = make()
    loss = call(case, BASE, **stored)
    hidden = gradients(case, loss)[0]
    tied = (case["trajectory"] // GROUP) == 1
    counted = case["targets"] != -100
    exact = linear_logprob(case["hidden"], case["weight"], case["targets"], impl="reference")
    torch.testing.assert_close(loss.log_prob, exact.log_prob.detach())
    assert loss.log_prob[tied & counted].all()
    assert not hidden[tied].any() and not hidden[~counted].any()
    assert hidden[~tied & counted].any(1).any()
    with_kl = call(case, dataclasses.replace(BASE, kl_weight=0.1), **stored)
    assert gradients(case, with_kl)[0][tied & counted].any(1).all()


def test_statistics_are_those_of_plain_arithmetic():
    case, stored, _ = make()
    config = dataclasses.replace(
        BASE, importance_sampling_clip_max=1.5, entropy=True, kl_weight=0.1
    )
    loss = call(case, config, **stored)
    counted = case["targets"] != -100
    log_prob, entropy = linear_logprob(
        case["hidden"], case["weight"], case["targets"], entropy=True, impl="reference"
    )
    ratio = (log_prob - stored["old_log_prob"]).exp()
    advantage = grouped_advantage(case["rewards"]).advantages.flatten()[case["trajectory"]]
    low = (ratio < 0.8) & (advantage < 0) & counted
    high = (ratio > 1.2) & (advantage > 0) & counted
    assert low.any() and high.any()
    correction = (stored["old_log_prob"] - stored["sampler_log_prob"]).exp().clamp(max=1.5)
    gap = stored["ref_log_prob"] - log_prob
    expected = {
        "num_tokens": counted.sum(),
        "clip_fraction_low": low[counted].double().mean(),
        "clip_fraction_high": high[counted].double().mean(),
        "clip_fraction": (low | high)[counted].double().mean(),
        "ratio": ratio[counted].mean(),
        "importance_ratio": correction[counted].mean(),
        "importance_ratio_min": correction[counted].min(),
        "importance_ratio_max": correction[counted].max(),
        "kl": (gap.exp() - gap - 1)[counted].mean(),
        "entropy": entropy[counted].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(loss, name), value.detach(), msg=name)
    for name, value in loss._asdict().items():
        assert isinstance(value, torch.Tensor) and value.requires_grad == (name == "loss"), name


def test_items_train_through_every_candidate():
    """The batch's items get gradient as targets and as negatives; the table gets none."""
    case, _, table = make()
    config = dataclasses.replace(BASE, item_negatives="catalog")
    table.requires_grad_()
    loss = call(case, config, item_table=table)
    users, items, missing = torch.autograd.grad(
        loss.loss, [case["user_states"], case["item_states"], table], allow_unused=True
    )
    assert (
        missing is None
        and users[loss.best.flatten() & (loss.advantages.flatten() != 0)].any(1).all()
    )
    assert items.any()
    # a catalog whose rows are the batch's items gives the in-batch softmax over distinct items
    distinct = {"item_ids": torch.arange(5), "item_targets": torch.tensor([2, 1, 3])}
    full = call(case | distinct, config, item_table=torch.randn(5, WIDTH, dtype=torch.float64))
    batch = call(case | distinct, BASE)
    torch.testing.assert_close(full.item_log_prob, batch.item_log_prob)


def test_no_tokens_at_all():
    case, _, _ = make()
    for name in ("hidden", "targets", "trajectory"):
        case[name] = case[name][:0].detach().requires_grad_(name == "hidden")
    loss = call(case, BASE)
    assert float(loss.token_loss) == 0 and torch.isfinite(loss.loss)
    assert gradients(case, loss)[0].shape == (0, WIDTH)


BAD = {
    "group size": ({"rewards": torch.rand(3, 5)}, ValueError, "user_states|trajectory"),
    "rewards shape": ({"rewards": torch.rand(12)}, ValueError, "rewards"),
    "trajectory": ({"trajectory": torch.full((32,), 12)}, ValueError, "trajectory"),
    "item targets": ({"item_targets": torch.tensor([0, 1, 5])}, ValueError, "item_targets"),
    "item width": ({"item_states": torch.rand(5, 7)}, ValueError, "item_states"),
    "item ids": ({"item_ids": torch.arange(4)}, ValueError, "item_ids"),
    "old": ({"old_log_prob": torch.rand(5)}, ValueError, "old_log_prob"),
    "old items": ({"old_item_log_prob": torch.rand(5)}, ValueError, "old_item_log_prob"),
    "table": ({"item_table": torch.rand(9, WIDTH)}, ValueError, "item_table"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, match = BAD[name]
    case, _, _ = make()
    with pytest.raises(error, match=match):
        call(case | changes, BASE)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reduction": "mean"}, "reduction"),
        ({"reduction": "constant", "max_completion_length": None}, "max_completion_length"),
        ({"estimator": "ppo"}, "estimator"),
        ({"similarity": "euclid"}, "similarity"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"temperature": 0.0}, "temperature"),
        ({"importance_sampling_mode": "word_mask"}, "importance_sampling_mode"),
        ({"importance_sampling_clip_max": 0.0}, "importance_sampling_clip_max"),
        ({"importance_sampling_clip_min": -0.1}, "importance_sampling_clip_min"),
        ({"importance_sampling_clip_min": 3.0}, "importance_sampling_clip_min: .* less than"),
        ({"best": 0}, "best"),
        ({"kl_weight": float("nan")}, "kl_weight"),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        RecPOLossConfig(**settings)


def test_settings_that_need_another_argument():
    case, _, _ = make()
    with pytest.raises(ValueError, match="ref_log_prob"):
        call(case, dataclasses.replace(BASE, kl_weight=0.1))
    with pytest.raises(ValueError, match="item_table"):
        call(case, dataclasses.replace(BASE, item_negatives="catalog"))
    with pytest.raises(ValueError, match="best"):
        call(case, dataclasses.replace(BASE, best=5))


def test_a_weight_that_changed_is_told_once(monkeypatch):
    monkeypatch.setattr(config_module, "_told", set())
    with pytest.warns(FutureWarning, match="'token': .* the item action is one more action"):
        RecPOLossConfig(reduction="token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RecPOLossConfig(reduction="token")
        RecPOLossConfig()  # the paper's weights, as they were
        RecPOLossConfig(reduction="sequence", item_weight=0)  # nothing of it changed
