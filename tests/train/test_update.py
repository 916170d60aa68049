"""One optimiser step of RecPO against the equations, and its traps (docs/method.md)."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.config import RecPOConfig
from r2ec_fast.packing import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout import Rollouts, TransformersEngine
from r2ec_fast.train import update as update_module
from r2ec_fast.train.batches import Candidates, Experience, UpdateStats, UserBatch
from r2ec_fast.train.update import PolicyUpdate

G = 3
# transformers computes norms in float32 whatever the type of the model
FLOAT32_INSIDE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def step():
    """Model with a table, four users, their rollouts and the tokens of their targets."""
    model, data = toy_model(), toy_dataset()
    builder = model.prompt_builder(data.data.catalog)
    model.set_items(model.encode_items(data.data.catalog))
    examples = data.train[np.array([0, 3, 6, 9])]
    users = UserBatch(
        prompts=PromptAssembler(builder).example_rows(data, examples),
        targets=data.target(examples),
        exclude=Ragged.of(data.exclude(examples)),
        keys=[0, 3, 6, 9],
    )
    engine = TransformersEngine(model.backbone, model.tokenizer, marker_ids=builder.marker_ids)
    rollouts = engine.generate(
        users.prompts,
        user_keys=users.keys,
        num_generations=G,
        max_completion_length=7,
        temperature=1.5,
        top_k=50,
        seed=1,
        step=1,
    )
    rows = {int(i): builder.item_ids(int(i)) for i in users.targets}
    return model, users, rollouts, rows


def config(**changes) -> RecPOConfig:
    settings = {
        "num_generations": G,
        "temperature": 1.5,
        "use_lora": False,
        "max_completion_length": 7,
        "reward_ndcg_k": 16,
    }
    return RecPOConfig(**{**settings, **changes})


def gradients(model, experiences, rows, cfg):
    model.zero_grad()
    stats = PolicyUpdate(model, cfg).recpo(experiences, rows)
    return stats, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def state_of(model, row):
    out = model.language_model(torch.tensor([row]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0]


def by_hand(model, users, rollouts, rows, cfg, used):
    """Loss of the step and its rewards, one trajectory at a time, as docs/method.md#recpo has them.

    The advantages are those of the `used` rewards: where a group's rewards hardly differ, dividing
    by their deviation would show the last bit of each.
    """
    ids = sorted(rows)
    items = torch.stack([state_of(model, rows[i])[-1] for i in ids])
    table = model.index.items.double()
    table[ids] = items.detach()
    unit = torch.nn.functional.normalize
    losses, rewards = [], torch.zeros(len(users.targets), G)
    token_terms, item_terms = [], []
    for b, target in enumerate(users.targets.tolist()):
        seen = set(users.exclude[b].tolist()) - {target}
        for g in range(G):
            r = b * G + g
            own = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
            row = [*users.prompts[b], *rollouts.values[own].tolist()]
            states = state_of(model, row)
            h = states[-1]
            scores = unit(table, dim=1) @ unit(h, dim=0) / model.temperature
            kept = [v for v in range(len(table)) if v not in seen]
            rank = 1 + sum(
                bool(scores[v] > scores[target] or (scores[v] == scores[target] and v < target))
                for v in kept
            )
            probability = torch.softmax(scores[kept], 0)[kept.index(target)].item()
            ndcg = 1 / math.log2(rank + 1) if rank <= cfg.reward_ndcg_k else 0.0
            beta = cfg.reward_softmax_weight
            rewards[b, g] = beta * probability + (1 - beta) * ndcg
            logits = states[len(users.prompts[b]) - 1 : -1] @ model.lm_head_weight.T
            log_p = (logits / cfg.temperature).log_softmax(-1)
            at = torch.from_numpy(rollouts.values[own])
            log_prob = log_p[torch.arange(len(at)), at]
            old = torch.from_numpy(rollouts.log_prob[own])
            sampled = torch.from_numpy(rollouts.sampled[own])
            token_terms.append((log_prob - old)[sampled].exp())
            in_batch = (unit(items, dim=1) @ unit(h, dim=0) / model.temperature).log_softmax(0)
            item_terms.append(in_batch[ids.index(target)])
    used = used.double()
    deviation = used.std(1, keepdim=True) + 1e-8
    advantages = (used - used.mean(1, keepdim=True)) / deviation
    best = advantages.argmax(1)
    trajectories = len(users.targets) * G
    for r, (ratio, log_p) in enumerate(zip(token_terms, item_terms, strict=True)):
        a = advantages[r // G, r % G].item()
        clipped = ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon_high)
        losses.append(-torch.minimum(ratio * a, clipped * a).sum() / trajectories)
        if best[r // G] == r % G:
            item_ratio = (log_p - log_p.detach()).exp()
            losses.append(-item_ratio * a / trajectories)
    return sum(losses), rewards


def test_step_equals_the_equations(step):
    model, users, rollouts, rows = step
    cfg = config()
    experience = Experience.of(users, rollouts, model.device)
    stats, got = gradients(model, [experience], rows, cfg)
    expected, rewards = by_hand(model, users, rollouts, rows, cfg, experience.rewards)
    model.zero_grad()
    expected.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(experience.rewards, rewards, rtol=1e-5, atol=1e-6)
    assert rewards.std() > 0.01
    loss = stats["token_loss"] + stats["item_loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    # the head of these toys is tied: its own gradient is frozen in training, leave it out
    for name in want:
        if "embed" not in name:
            torch.testing.assert_close(got[name], want[name], **FLOAT32_INSIDE)


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_micro_batches_do_not_change_the_gradient(step, budget):
    model, users, rollouts, rows = step
    whole = Experience.of(users, rollouts, model.device)
    _, want = gradients(model, [whole], rows, config())
    parts = Experience.of(users, rollouts, model.device)
    _, got = gradients(model, [parts], rows, config(max_tokens_per_microbatch=budget))
    for name in want:
        torch.testing.assert_close(got[name], want[name], **FLOAT32_INSIDE)


def test_order_of_users_does_not_matter(step):
    model, users, rollouts, rows = step
    _, want = gradients(model, [Experience.of(users, rollouts, model.device)], rows, config())
    turned = [2, 0, 3, 1]
    trajectories = [b * G + g for b in turned for g in range(G)]
    pieces = [slice(rollouts.offsets[r], rollouts.offsets[r + 1]) for r in trajectories]
    lengths = [piece.stop - piece.start for piece in pieces]
    again = type(rollouts)(
        values=np.concatenate([rollouts.values[p] for p in pieces]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sampled=np.concatenate([rollouts.sampled[p] for p in pieces]),
        log_prob=np.concatenate([rollouts.log_prob[p] for p in pieces]),
        finish_reason=[rollouts.finish_reason[r] for r in trajectories],
    )
    permuted = users.select(np.array(turned))
    assert permuted.keys == [6, 0, 9, 3]
    _, got = gradients(model, [Experience.of(permuted, again, model.device)], rows, config())
    for name in want:
        torch.testing.assert_close(got[name], want[name], **FLOAT32_INSIDE)


@pytest.mark.parametrize("fresh_targets", [False, True])
def test_rewards_come_from_rows_of_one_age(step, fresh_targets):
    # trap 11: the reference code writes the fresh rows after the rewards, the paper before; here
    # the step's rows leave the table alone, or enter it first. The old rows are negated ones, which
    # rank every target last.
    model, users, rollouts, rows = step
    cfg = config(fresh_targets=fresh_targets)
    fresh = Experience.of(users, rollouts, model.device)
    gradients(model, [fresh], rows, cfg)
    table = model.index.items.clone()
    ids = torch.tensor(sorted(rows))
    table[ids] = -table[ids]
    model.set_items(table)
    old = Experience.of(users, rollouts, model.device)
    gradients(model, [old], rows, cfg)
    if fresh_targets:
        assert torch.equal(old.rank, fresh.rank) and torch.equal(old.rewards, fresh.rewards)
    else:
        assert torch.equal(model.index.items, table)
        assert (old.rank >= fresh.rank).all() and old.rank.sum() > fresh.rank.sum()


def test_stored_log_probabilities_let_the_clip_act(step):
    # trap 5: with old = current the ratio stays 1 in every iteration
    model, users, rollouts, rows = step
    experience = Experience.of(users, rollouts, model.device)
    cfg = config(num_iterations=2)
    update = PolicyUpdate(model, cfg)
    first = update.recpo([experience], rows)
    assert first["clip_ratio/region_mean"] == 0
    assert first["sampling/log_prob_difference"] < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 2 * parameter.grad / parameter.grad.norm()
    rewards = experience.rewards.clone()
    second = update.recpo([experience], rows)
    assert second["clip_ratio/region_mean"] > 0.1
    assert torch.equal(experience.rewards, rewards)


@pytest.mark.parametrize(("most", "factor"), [(None, math.exp(0.3)), (1.2, 1.2)])
def test_a_sampler_with_other_numerics_is_corrected(step, most, factor):
    model, users, rollouts, rows = step
    plain, _ = gradients(model, [Experience.of(users, rollouts, model.device)], rows, config())
    other = replace(rollouts, sampler_log_prob=rollouts.log_prob - np.float32(0.3))
    experience = Experience.of(users, other, model.device)
    stats, _ = gradients(model, [experience], rows, config(vllm_importance_sampling_clip_max=most))
    assert abs(plain["token_loss"]) > 1e-3
    assert stats["token_loss"] == pytest.approx(factor * plain["token_loss"], rel=1e-4)
    assert stats["item_loss"] == pytest.approx(plain["item_loss"])
    for name in ("min", "mean", "max"):
        found = stats[f"sampling/importance_sampling_ratio/{name}"]
        assert found == pytest.approx(factor, rel=1e-4), name


def test_statistics_keep_the_extremes_of_micro_batches():
    stats = UpdateStats()
    for low, high in ((0.5, 2.0), (-0.25, 1.0), (0.75, 3.0)):
        stats.add("sum", torch.tensor(1.0))
        stats.bound("low", torch.tensor(low), largest=False)
        stats.bound("high", torch.tensor(high), largest=True)
    assert stats.totals() == {"sum": 3.0, "low": -0.25, "high": 3.0}


def test_bnpo_is_the_mean_over_accumulation_steps(step):
    # TRL's: each accumulation step of a process divides by its own tokens
    model, users, rollouts, rows = step
    cfg = config(loss_type="bnpo", max_tokens_per_microbatch=1)
    parts = [part(users, rollouts, of) for of in ((0, 1), (1, 4))]
    assert len({len(own.values) for _, own in parts}) == 2
    dapo = config(loss_type="dapo")
    alone = [gradients(model, [Experience.of(*own, model.device)], rows, dapo) for own in parts]
    both = [Experience.of(*own, model.device) for own in parts]
    stats, got = gradients(model, both, rows, cfg)
    for term in ("token_loss", "item_loss"):
        want = sum(found[term] for found, _ in alone) / 2
        assert stats[term] == pytest.approx(want, rel=1e-4, abs=1e-6)
    for name in got:
        want = (alone[0][1][name] + alone[1][1][name]) / 2
        torch.testing.assert_close(got[name], want, **FLOAT32_INSIDE)
    whole, _ = gradients(model, both, rows, dapo)
    assert abs(whole["token_loss"] - stats["token_loss"]) > 1e-4


def part(users, rollouts, of):
    """Users of[0] to of[1] and their rollouts."""
    first, last = of
    bounds = rollouts.offsets[first * G : last * G + 1]
    own = slice(bounds[0], bounds[-1])
    some = UserBatch(
        users.prompts[first:last],
        users.targets[first:last],
        users.exclude[first:last],
        users.keys[first:last],
    )
    return some, Rollouts(
        values=rollouts.values[own],
        offsets=bounds - bounds[0],
        sampled=rollouts.sampled[own],
        log_prob=rollouts.log_prob[own],
        finish_reason=rollouts.finish_reason[first * G : last * G],
    )


def test_impl_reaches_the_loss_and_the_reference(step, monkeypatch):
    model, users, rollouts, rows = step
    _, want = gradients(model, [Experience.of(users, rollouts, model.device)], rows, config())
    used = []
    linear_logprob = update_module.linear_logprob

    def spied(*args, impl, **settings):
        used.append(impl)
        return linear_logprob(*args, impl=impl, **settings)

    monkeypatch.setattr(update_module, "linear_logprob", spied)
    monkeypatch.setattr(model.backbone, "disable_adapter", nullcontext, raising=False)
    cfg = config(impl="reference", beta=0.1)
    experience = Experience.of(users, rollouts, model.device)
    update = PolicyUpdate(model, cfg)
    model.zero_grad()
    update.recpo([experience], rows)
    assert used and set(used) == {"reference"}
    assert update.loss_config.impl == "reference"
    # the reference is here the policy itself: the KL term's gradient is zero
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], **FLOAT32_INSIDE)


def test_contrastive_is_the_softmax_cross_entropy(step):
    model, users, _, rows = step
    marker = [60, 61]
    prompts = [[*p, *marker] for p in users.prompts]
    ids = sorted(rows)
    model.zero_grad()
    unit = torch.nn.functional.normalize
    items = unit(torch.stack([state_of(model, rows[i])[-1] for i in ids]), dim=1)
    states = unit(torch.stack([state_of(model, p)[-1] for p in prompts]), dim=1)
    target = torch.tensor([ids.index(t) for t in users.targets])
    expected = torch.nn.functional.cross_entropy(states @ items.T / model.temperature, target)
    expected.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    stats = PolicyUpdate(model, config(objective="contrastive")).contrastive([users], rows, marker)
    assert stats["loss"] == pytest.approx(expected.item())
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], **FLOAT32_INSIDE)


def test_equal_targets_are_one_candidate(step):
    # trap 7
    model, _, _, rows = step
    candidates = Candidates(model, rows, 1000)
    twice = np.array([sorted(rows)[1]] * 2)
    assert candidates.rows_of(twice).tolist() == [1, 1]
    assert len(candidates.ids) == len(set(candidates.ids.tolist()))


def test_same_step_same_bits_on_two_threads():
    # the prompt's last state predicts a token of every completion: its gradient is a sum whose
    # order must not depend on the threads
    generations, length = 256, 8
    model, data = toy_model(dtype=torch.float32), toy_dataset()
    builder = model.prompt_builder(data.data.catalog)
    model.set_items(model.encode_items(data.data.catalog))
    example = data.train[np.array([1])]
    user, position = int(example.user[0]), int(example.position[0])
    users = UserBatch(
        Ragged.of([builder.user_ids(data.history(user, position, 3))]),
        data.target(example),
        Ragged.of(data.exclude(example)),
        [1],
    )
    values = np.random.default_rng(0).integers(4, 400, generations * length)
    rollouts = Rollouts(
        values=values,
        offsets=np.arange(generations + 1) * length,
        sampled=np.ones(len(values), bool),
        log_prob=np.full(len(values), -6.0, np.float32),
        finish_reason=["length"] * generations,
    )
    target = int(users.targets[0])
    rows = {target: builder.item_ids(target), 0: builder.item_ids(0)}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(4):
            experience = Experience.of(users, rollouts, model.device)
            found.append(gradients(model, [experience], rows, config(num_generations=generations)))
    finally:
        torch.set_num_threads(before)
    for _, again in found[1:]:
        assert all(torch.equal(again[name], value) for name, value in found[0][1].items())


def test_the_pulls_of_tokens_and_item_action_are_those_on_a_shared_gain(step):
    # the definition: one vector multiplies every last hidden state, and is differentiated
    model, users, rollouts, rows = step
    experience = Experience.of(users, rollouts, model.device)
    stats, _ = gradients(model, [experience], rows, config(max_tokens_per_microbatch=200))
    forward, gain = model.language_model.model.norm.forward, None

    def gained(states):
        return forward(states) * gain

    model.language_model.model.norm.forward = gained
    try:
        norms = {}
        for name, weight in (("both", 1.0), ("tokens", 0.0)):
            gain = torch.ones(model.hidden_size, dtype=torch.float64, requires_grad=True)
            again = Experience.of(users, rollouts, model.device)
            gradients(model, [again], rows, config(item_weight=weight))
            norms[name] = gain.grad
    finally:
        model.language_model.model.norm.forward = forward
    tokens, item = norms["tokens"].norm().item(), (norms["both"] - norms["tokens"]).norm().item()
    assert stats["grad_norm/tokens"] == pytest.approx(tokens, rel=1e-3)
    assert stats["grad_norm/item_action"] == pytest.approx(item, rel=1e-3)
    assert stats["grad_norm/item_to_tokens"] == pytest.approx(item / tokens, rel=1e-3)
    heavy, _ = gradients(
        model, [Experience.of(users, rollouts, model.device)], rows, config(item_weight=50.0)
    )
    assert heavy["grad_norm/item_to_tokens"] == pytest.approx(50 * item / tokens, rel=1e-3)
