"""What is measured of reasonings, in a world where every rank is known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _support.planted import (
    FILLER,
    PlantedEngine,
    name,
    planted,
    rank_by_hand,
    ranks_by_hand,
)
from _support.toy import toy_dataset, toy_model

from r2ec_fast.config import RecPOConfig
from r2ec_fast.eval.ranking import rank_examples, states_after, transformers_engine
from r2ec_fast.eval.reasoning import Groups, ReasoningProbe, other_users, paired_ndcg
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler

CONFIG = {"num_generations": 3, "max_completion_length": 8, "seed": 5}


def ndcg(ranks) -> np.ndarray:
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0)


def standard_error(values: np.ndarray) -> float:
    """Of the mean, where every example has a user of its own."""
    return values.std(ddof=1) / math.sqrt(len(values))


# ---- ranks after given reasonings ---------------------------------------------------------------


def test_the_item_named_last_decides_the_rank():
    model, assembler, data = planted()
    marker = assembler.builder.marker_ids
    named = np.arange(12) % 5
    rows = Ragged.of([name(item, before=item) for item in named]).append(marker)
    ranks, _ = rank_examples(model, assembler, data, data.valid, reasonings=rows)
    assert ranks.tolist() == ranks_by_hand(data, data.valid, named).tolist()
    direct, _ = rank_examples(model, assembler, data, data.valid)
    fillers = Ragged.of([[FILLER] * 4] * 12).append(marker)
    after_fillers, _ = rank_examples(model, assembler, data, data.valid, reasonings=fillers)
    assert after_fillers.tolist() == direct.tolist()
    assert direct.tolist() == ranks_by_hand(data, data.valid, [-1] * 12).tolist()


def test_only_the_included_items_are_ranked_besides_the_target():
    model, assembler, data = planted()
    targets, seen = data.target(data.valid), Ragged.of(data.exclude(data.valid))
    include = np.array([12, 3, 0, 5, 3])
    # the state of direct mode: item 0 is first, and then the others by id
    by_hand = [
        1 + sum(item < target for item in {0, 3, 5, 12} - set(own.tolist()))
        for target, own in zip(targets, seen, strict=True)
    ]
    assert len(set(by_hand)) > 1
    mask = np.isin(np.arange(16), include)
    for given in (include, torch.from_numpy(mask)):
        ranks, _ = rank_examples(model, assembler, data, data.valid, include=given, batch_size=5)
        assert ranks.tolist() == by_hand
    alone, log_prob = rank_examples(model, assembler, data, data.valid, include=include[:0])
    assert (alone == 1).all() and (log_prob == 0).all()
    best = model.top_items(torch.eye(16, model.hidden_size)[:2], 2, include=include)
    assert best.indices.tolist() == [[0, 3], [0, 3]]


@pytest.mark.parametrize("batch_size", [5, 64])
def test_several_reasonings_an_example_are_ranked_in_their_order(batch_size):
    model, assembler, data = planted()
    named = np.random.default_rng(0).integers(0, 16, (12, 3))
    rows = [name(item, before=2 * x + g) for x in range(12) for g, item in enumerate(named[x])]
    rows = Ragged.of(rows).append(assembler.builder.marker_ids)
    ranks, log_prob = rank_examples(
        model, assembler, data, data.valid, reasonings=rows, batch_size=batch_size, max_tokens=150
    )
    by_hand = [ranks_by_hand(data, data.valid, named[:, g]) for g in range(3)]
    assert ranks.reshape(12, 3).tolist() == np.stack(by_hand, 1).tolist()
    # the target named: score 1, and 0 for the 12 others that are not in the history of 3
    right = (named == data.target(data.valid)[:, None]).ravel()
    assert right.any()
    np.testing.assert_allclose(log_prob[right], math.log(math.e / (math.e + 12)), rtol=1e-6)


@pytest.mark.parametrize("group", [1, 3])
def test_states_after_reasonings_are_those_of_the_whole_rows(group):
    model, data = toy_model(), toy_dataset()
    builder = model.prompt_builder(data.data.catalog)
    prompts = PromptAssembler(builder).example_rows(data, data.valid)
    rng = np.random.default_rng(1)
    rows = [rng.integers(100, 250, rng.integers(1, 7)) for _ in range(12 * group)]
    reasonings = Ragged.of(rows).append(builder.marker_ids)
    repeated = prompts.select(np.arange(12).repeat(group))
    whole = model.encode_rows(repeated.join(reasonings))
    for max_tokens in (200, 8192):  # one prompt with its reasonings a pass, or many
        found = states_after(model, prompts, reasonings, max_tokens=max_tokens)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_the_reasonings_of_an_engine_give_the_ranks_that_it_gives():
    model, data = toy_model(), toy_dataset()
    model.set_items(model.encode_items(data.data.catalog))
    builder = model.prompt_builder(data.data.catalog)
    assembler, engine = PromptAssembler(builder), transformers_engine(model, builder)
    config = RecPOConfig(**CONFIG)
    probe = ReasoningProbe(model, assembler, data, engine, config)
    written = probe.greedy(data.valid)
    engine_ranks = rank_examples(
        model, assembler, data, data.valid, engine=engine, max_completion_length=8
    )
    given_ranks = rank_examples(model, assembler, data, data.valid, reasonings=written)
    assert given_ranks[0].tolist() == engine_ranks[0].tolist()
    np.testing.assert_allclose(given_ranks[1], engine_ranks[1], rtol=1e-5)


def test_reasonings_that_do_not_fit_are_refused():
    model, assembler, data = planted()
    marker = assembler.builder.marker_ids
    rows = Ragged.of([name(1)] * 12)

    def rank(**arguments):
        rank_examples(model, assembler, data, data.valid, **arguments)

    with pytest.raises(ValueError, match="rows that end with the marker '<answer>' .* got row 0"):
        rank(reasonings=rows)
    with pytest.raises(ValueError, match="rows that end with the marker .* got row 11"):
        rank(reasonings=Ragged.stack([rows.append(marker)[:11], Ragged.of([[]])]))
    with pytest.raises(ValueError, match="for each of 12 prompts, got 13 rows"):
        rank(reasonings=Ragged.of([name(1)] * 13).append(marker))
    with pytest.raises(ValueError, match="for each of 12 prompts, got 0 rows"):
        rank(reasonings=Ragged.of([]))
    engine = PlantedEngine(marker, {}, {})
    with pytest.raises(ValueError, match="reasonings: expected none beside an engine"):
        rank(reasonings=rows.append(marker), engine=engine)


# ---- the swap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 7, [1, 1], [3, 1, 2], [4, 3, 1], [2, 2, 2, 2, 1]])
def test_everybody_gets_the_reasoning_of_another_user(sizes):
    users = np.repeat(np.arange(len(sizes)) * 10, sizes)
    users = np.random.default_rng(3).permutation(users)
    seen = set()
    for seed in range(20):
        others = other_users(users, seed)
        assert sorted(others.tolist()) == list(range(len(users)))
        assert (users[others] != users).all()
        assert (other_users(users, seed) == others).all()
        seen.add(tuple(others.tolist()))
    assert len(seen) > 1 or len(users) == 2


def test_a_user_with_most_of_the_examples_cannot_swap():
    assert other_users(np.array([1, 1, 1, 2, 3]), 0) is None
    assert other_users(np.array([1]), 0) is None
    assert other_users(np.array([1, 1, 2, 3]), 0) is not None


# ---- figures ------------------------------------------------------------------------------------


def probe_of(engine_rows, *, reads=True, cut=(), **changes):
    """A probe of the planted world; ``engine_rows`` gives greedy and sampled rows from the
    targets."""
    model, assembler, data = planted(reads=reads)
    greedy, sampled = engine_rows(data.target(data.valid))
    engine = PlantedEngine(assembler.builder.marker_ids, greedy, sampled, cut)
    config = RecPOConfig(**{**CONFIG, **changes})
    return ReasoningProbe(model, assembler, data, engine, config), engine, data


def names_the_target(targets):
    """Greedy: every user's own target, but for the first three users, who name item 9. Sampled: the
    target, item 9 and a filler; the last four users name item 9 three times."""
    greedy = {x: name(9 if x < 3 else t, before=x) for x, t in enumerate(targets)}
    sampled = {x: [name(t), name(9, before=1), [FILLER] * 3] for x, t in enumerate(targets)}
    sampled |= {x: [name(9)] * 3 for x in range(8, 12)}
    return greedy, sampled


def test_figures_by_hand():
    probe, engine, data = probe_of(names_the_target, cut=[(0, 1), (5, 1), (5, 2)])
    figures = probe.figures(data.valid)
    targets, examples = data.target(data.valid), data.valid

    direct = ranks_by_hand(data, examples, [-1] * 12)
    named = [9 if x < 3 else t for x, t in enumerate(targets)]
    own = ranks_by_hand(data, examples, named)
    others = other_users(examples.user, CONFIG["seed"])
    swapped = ranks_by_hand(data, examples, np.array(named)[others])
    assert (own[3:] == 1).all() and (swapped != own).any()
    assert figures["examples"] == 12
    assert figures["direct_hit_rate@1"] == (direct == 1).mean() > 0
    assert figures["direct_ndcg@10"] == pytest.approx(ndcg(direct).mean())
    assert figures["reasoned_ndcg@10"] == pytest.approx(ndcg(own).mean())
    for key, other in (("reasoned_minus_direct", direct), ("own_minus_swapped", swapped)):
        gaps = ndcg(own) - ndcg(other)
        assert figures[f"{key}_ndcg@10"] == pytest.approx(gaps.mean())
        assert figures[f"{key}_ndcg@10/se"] == pytest.approx(standard_error(gaps))

    # ranks after the target, item 9, nothing named; the last four users name item 9 three times
    nine = ranks_by_hand(data, examples, [9] * 12)
    ranks = np.stack([np.ones(12, int), nine, direct], 1)
    ranks[8:] = nine[8:, None]
    assert figures["num_generations"] == 3
    assert figures["best_beats_direct"] == (ranks.min(1) < direct).mean()
    assert 0 < figures["best_beats_direct"] < 1
    tied = np.array([len(set(row)) == 1 for row in ranks])
    assert figures["frac_reward_zero_std"] == tied.mean() > 0
    assert figures["ended_ratio"] == pytest.approx(33 / 36)
    assert figures["clipped_ratio"] == pytest.approx(3 / 36)
    marker = 5
    lengths = np.array([[1, 2, 3]] * 8 + [[1, 1, 1]] * 4) + marker
    assert figures["mean_length"] == pytest.approx(lengths.mean())
    # as a step of training samples, with noise that no training step has
    assert engine.calls[-1] == {
        "num_generations": 3,
        "greedy": False,
        "max_completion_length": 8,
        "temperature": 1.5,
        "top_k": 200,
        "seed": 5,
        "step": 0,
    }


def test_rewards_by_hand():
    probe, _, data = probe_of(names_the_target, reward_softmax_weight=0.25, reward_ndcg_k=4)
    groups = probe.groups(data.valid)
    x = 4  # names its target; item 9, which it has not seen; nothing
    target, seen = int(data.target(data.valid)[x]), Ragged.of(data.exclude(data.valid))[x]
    assert 9 not in seen and target not in (0, 9)
    gains = []
    for named in (target, 9, 0):
        rank = rank_by_hand(named, target, seen)
        open_ = [i for i in range(16) if i not in seen]
        scores = [math.exp(float(i == named)) for i in open_]
        probability = scores[open_.index(target)] / sum(scores)
        gain = 1 / math.log2(rank + 1) if rank <= 4 else 0.0
        gains.append(0.25 * probability + 0.75 * gain)
    np.testing.assert_allclose(groups.reward[x], gains, rtol=1e-6)
    figures = groups.figures()
    assert figures["reward_std"] == pytest.approx(groups.reward.astype(float).std(1, ddof=1).mean())
    assert figures["reward"] == pytest.approx(groups.reward.mean())


def test_an_item_head_that_ignores_the_reasoning_is_found_out():
    probe, _, data = probe_of(names_the_target, reads=False)
    figures = probe.figures(data.valid)
    for key in ("reasoned_minus_direct", "own_minus_swapped"):
        assert figures[f"{key}_ndcg@10"] == 0.0
        assert figures[f"{key}_ndcg@10/se"] == 0.0
    assert figures["best_beats_direct"] == 0.0
    assert figures["frac_reward_zero_std"] == 1.0
    assert figures["reward_std"] == 0.0


def test_parts_of_the_sample_make_the_whole():
    probe, _, data = probe_of(names_the_target, cut=[(0, 1)])
    whole = probe.groups(data.valid)
    cuts = [np.arange(0), np.arange(0, 7), np.arange(7, 12)]
    parts = [probe.groups(data.valid[keys], keys) for keys in cuts]
    again = Groups.stack(parts)
    for field in ("direct", "rank", "reward", "tokens", "finish_reason"):
        assert getattr(whole, field).tolist() == getattr(again, field).tolist()
    assert again.rank.dtype == np.int64 and len(parts[0].rank) == 0


def test_one_reasoning_a_group_leaves_nothing_to_choose():
    probe, _, data = probe_of(
        lambda targets: ({}, {x: [name(t)] for x, t in enumerate(targets)}), num_generations=1
    )
    figures = probe.groups(data.valid).figures()
    assert figures["frac_reward_zero_std"] == 1.0 and figures["reward_std"] == 0.0


def test_paired_ndcg_counts_users_as_independent():
    # ndcg@10: 1, 1/2 against 0, 1/2 for one user, 1 against 1 for the other
    found = paired_ndcg("a_minus_b", [1, 3, 1], [11, 3, 1], ["u", "u", "v"])
    assert found["a_minus_b_ndcg@10"] == pytest.approx(1 / 3)
    # sums of the users' deviations: 2/3 - 1/3 = 1/3 and -1/3
    assert found["a_minus_b_ndcg@10/se"] == pytest.approx(math.sqrt(2 * 2 / 9) / 3)
    assert len(found) == 2


def test_a_batch_of_no_examples_is_refused():
    model, assembler, data = planted()
    engine = PlantedEngine(assembler.builder.marker_ids, {}, {})
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        ReasoningProbe(model, assembler, data, engine, RecPOConfig(**CONFIG), batch_size=0)
