"""RecPO: rollouts -> rewards -> advantages -> loss -> gradient (docs/method.md#one-step).

No equation is written here: ranks, rewards, advantages and the loss are r2ec_kernels' functions.
What this module adds is the flow of a step over packed micro-batches:

1. the step's target items are encoded with gradient (``fresh_targets``: and enter the table);
2. every micro-batch is run forward once; h_T is scored against the table for the reward, and the
   same pass carries the gradient of tokens and item action;
3. the gradient that the micro-batches leave on the candidates goes through their encoding once.

The counts that the loss divides by are those of the whole step and all processes, so micro-batches,
accumulation and processes change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.model.hf_compat import eval_mode
from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.train import distributed
from r2ec_fast.train.action_gradients import ITEM, TOKENS, ActionGradients
from r2ec_fast.train.batches import (
    Candidates,
    Experience,
    ItemRows,
    UpdateStats,
    UserBatch,
)
from r2ec_fast.train.fault_tolerance import TokenBudget, together
from r2ec_fast.train.fsdp import is_sharded
from r2ec_kernels import (
    RecPOLoss,
    RecPOLossConfig,
    linear_logprob,
    recpo_loss,
    reward_and_advantage,
)

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.model.r2ec import R2ecModel

SMALLER_GROUP = (
    "a group of {tokens} tokens does not fit alone; lower num_generations, max_completion_length "
    "or the prompts' window, or set gradient_checkpointing"
)


class PolicyUpdate:
    """Gradients of one optimiser step, for both objectives."""

    def __init__(self, model: R2ecModel, config: RecPOConfig) -> None:
        self.model = model
        self.config = config
        self.budget = TokenBudget(config.max_tokens_per_microbatch)
        self.sharded = is_sharded(model)
        self.loss_config: RecPOLossConfig = config.loss_config(
            similarity=model.similarity,
            item_temperature=model.temperature,
            softcap=model.softcap,
            logit_scale=model.logit_scale,
        )

    def recpo(self, experiences: Sequence[Experience], item_rows: ItemRows) -> dict:
        """Accumulate the gradient of one optimiser step of RecPO; returns its statistics.

        ``experiences``: one an accumulation step; ``item_rows``: the tokens of every distinct
        target of the step, of all processes; ``fresh_targets`` writes their rows into the table.
        Where memory runs out on any process, the call is done again with smaller micro-batches on
        all.

        Raises StepOutOfMemory where a group does not fit alone.
        """
        scored = [experience.scored for experience in experiences]

        def reset() -> None:
            self.model.zero_grad(set_to_none=True)
            for experience, before in zip(experiences, scored, strict=True):
                experience.scored = before

        return self._within_memory(lambda: self._recpo(experiences, item_rows), reset)

    def _recpo(self, experiences: Sequence[Experience], item_rows: ItemRows) -> dict:
        candidates = self._candidates(item_rows)
        targets = [np.int64((e.rollouts.targets != -100).sum()) for e in experiences]
        users = sum(len(e.users.targets) for e in experiences)
        counts = distributed.sum_(
            torch.tensor([int(sum(targets)), users], device=self.model.device)
        )
        num_tokens, num_selected = [counts[0]] * len(targets), counts[1] * self.config.relabel_topk
        if self.config.loss_type == "bnpo":  # a mean over means, one an accumulation step
            steps = len(targets) * distributed.world()[1]
            num_tokens = [counts.new_tensor(max(int(n), 1) * steps) for n in targets]
        stats = UpdateStats()
        pulls = ActionGradients(candidates.leaf.shape[1], self.model.device)
        batches = [
            (e, batch, n)
            for e, n in zip(experiences, num_tokens, strict=True)
            for batch in self._pack(e)
        ]
        idle = self._idle_passes(len(batches))
        with together("micro-batches", linked=self.sharded) as section:
            for experience, batch, count in batches:
                section.smallest = _smallest(len(batch.groups), batch.input_ids.numel())
                self._micro_batch(experience, batch, candidates, count, num_selected, stats, pulls)
            for _ in range(idle):
                self._idle_pass(reference=self.config.beta > 0)
        for experience in experiences:
            experience.scored = True
        pulls.add(ITEM, candidates.gradient(), candidates.leaf)
        candidates.backward()
        return stats.totals() | pulls.norms() | {"counted_tokens": float(counts[0])}

    def contrastive(
        self, users: Sequence[UserBatch], item_rows: ItemRows, marker: list[int]
    ) -> dict:
        """Accumulate the gradient of one step of the direct objective: -log p(target in batch).

        It is recpo_loss of one trajectory a group, without tokens: its advantage is 1 and its
        ratio 1, so that the item action's gradient is that of the softmax cross-entropy. Where
        memory runs out it acts as :meth:`recpo` does.
        """
        return self._within_memory(
            lambda: self._contrastive(users, item_rows, marker),
            lambda: self.model.zero_grad(set_to_none=True),
        )

    def _contrastive(
        self, users: Sequence[UserBatch], item_rows: ItemRows, marker: list[int]
    ) -> dict:
        candidates = self._candidates(item_rows)
        total = distributed.sum_(
            torch.tensor(sum(len(u.targets) for u in users), device=self.model.device)
        )
        stats = UpdateStats()

        def record(log_prob: torch.Tensor) -> None:
            stats.add("loss", -log_prob.mean(), float(len(log_prob)))
            stats.add("in_batch_probability", log_prob.exp().mean(), float(len(log_prob)))

        self._direct(users, marker, candidates, total, record)
        candidates.backward()
        return stats.totals()

    def _direct(
        self,
        users: Sequence[UserBatch],
        marker: list[int],
        candidates: Candidates,
        total: torch.Tensor,
        record: Callable[[torch.Tensor], None],
        weight: float = 1.0,
    ) -> None:
        """Add the gradient of ``weight`` times the targets' mean cross-entropy, read out after each
        prompt and the marker; ``total``: users of the step and all processes. ``record`` gets the
        targets' log-probabilities, [n] a part."""
        rows = [batch.prompts.append(marker) for batch in users]
        parts = [
            (own[part], batch.targets[part])
            for own, batch in zip(rows, users, strict=True)
            for part in own.parts(self.budget.tokens)
        ]
        idle = self._idle_passes(len(parts))
        with together("micro-batches", linked=self.sharded) as section:
            for own, targets in parts:
                section.smallest = _smallest(len(own), len(own[0]))
                states = self.model.read_out(own, max_tokens=self.budget.tokens)
                out = self._item_loss(states, candidates, targets, total)
                (weight * out.loss).backward()
                record(out.item_log_prob[:, 0].detach())
            for _ in range(idle):
                self._idle_pass(reference=False)

    @torch.no_grad()
    def score(self, experience: Experience) -> None:
        """Fill the rewards and ranks of ``experience`` by a pass without gradient or dropout."""
        for groups, states in self.read_outs(experience):
            self._score(experience, groups, states)

    @torch.no_grad()
    def read_outs(self, experience: Experience) -> list[tuple[np.ndarray, torch.Tensor]]:
        """The user states of every reasoning, by a pass without gradient or dropout: for each
        micro-batch its users, int64 [n], and states [n * G, d]."""
        with eval_mode(self.model):
            return [
                (batch.groups.numpy(), self.model(batch)[batch.readout.to(self.model.device)])
                for batch in self._pack(experience)
            ]

    def rewards(
        self, experience: Experience, read_outs: list[tuple[np.ndarray, torch.Tensor]]
    ) -> torch.Tensor:
        """Rewards [B, G] of ``read_outs`` against the table as it is; ``experience`` is left."""
        found = torch.zeros_like(experience.rewards)
        for groups, states in read_outs:
            found[torch.from_numpy(groups).to(found.device)] = self._rewards_of(
                experience.users, groups, states
            )[0].to(found.dtype)
        return found

    # ---- parts of a step ------------------------------------------------------------------------

    def _within_memory(self, attempt: Callable[[], dict], reset: Callable[[], None]) -> dict:
        stats, retries = self.budget.spend(attempt, reset)
        return stats | {"memory/token_budget": self.budget.tokens, "memory/oom_retries": retries}

    def _idle_passes(self, own: int) -> int:
        """Passes this process must add, so that with sharded weights all do as many."""
        return distributed.most(own) - own if self.sharded else 0

    def _idle_pass(self, *, reference: bool) -> None:
        """Take part in another process's pass, and add nothing to the gradient."""
        state = self.model.read_out([[0]])
        if reference:
            with torch.no_grad():
                self.model.read_out([[0]])
        (state.sum() * 0).backward()

    def _candidates(self, item_rows: ItemRows) -> Candidates:
        candidates = Candidates(self.model, item_rows, self.budget.tokens)
        if self.config.fresh_targets and self.model.index is not None:
            self.model.write_items(candidates.ids, candidates.leaf.detach())
        return candidates

    def _pack(self, experience: Experience) -> list[PackedBatch]:
        rollouts = experience.rollouts
        return pack_histories(
            experience.users.prompts,
            rollouts.tokens,
            num_generations=experience.rewards.shape[1],
            max_tokens=self.budget.tokens,
            completion_targets=rollouts.targets,
            oversize="alone",
        )

    def _micro_batch(
        self, experience, batch, candidates, num_tokens, num_selected, stats, pulls
    ) -> None:
        model, groups = self.model, batch.groups.numpy()
        hidden = model(batch)
        batch = batch.to(model.device)
        states = hidden[batch.readout]
        # not hidden[...]: its gradient adds a repeated row's parts in any order
        predicting = hidden.index_select(0, batch.predict_from)
        pulls.watch(TOKENS, predicting)
        pulls.watch(ITEM, states)
        if not experience.scored:
            self._score(experience, groups, states.detach())
        rows = batch.groups
        beta, source = self.config.beta, batch.source.cpu()
        rollouts = experience.rollouts
        old = torch.from_numpy(rollouts.log_prob)[source].to(model.device)
        sampler = rollouts.sampler_log_prob
        if sampler is not None:
            sampler = torch.from_numpy(sampler)[source].to(model.device)
        out = recpo_loss(
            predicting,
            model.lm_head_weight,
            batch.targets,
            batch.trajectory,
            experience.rewards[rows],
            states,
            candidates.leaf,
            candidates.ids,
            item_targets=candidates.rows_of(experience.users.targets[groups]),
            bias=model.lm_head_bias,
            old_log_prob=old,
            old_item_log_prob=experience.old_item_log_prob[rows] if experience.scored else None,
            sampler_log_prob=sampler,
            ref_log_prob=self._reference_log_prob(batch) if beta else None,
            item_table=model.item_table if self.config.item_negatives == "catalog" else None,
            num_tokens=num_tokens,
            num_selected=num_selected,
            config=self.loss_config,
        )
        out.loss.backward()
        if not experience.scored:
            experience.old_item_log_prob[rows] = out.item_log_prob.detach().float()
        self._record(out, experience, rows, batch, old, stats)

    def _score(self, experience: Experience, groups: np.ndarray, states: torch.Tensor) -> None:
        """Keep the reward and rank of each reasoning against the whole table."""
        rewards, rank = self._rewards_of(experience.users, groups, states)
        rows = torch.from_numpy(groups).to(states.device)
        experience.rewards[rows] = rewards.to(experience.rewards.dtype)
        experience.rank[rows] = rank

    def _rewards_of(
        self, users: UserBatch, groups: np.ndarray, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards and ranks [n, G] of the states [n * G, d] of the users ``groups``."""
        generations = len(states) // len(groups)
        targets = torch.from_numpy(users.targets[groups]).repeat_interleave(generations)
        found = self.model.target_stats(
            states,
            targets.to(states.device),
            exclude=users.exclude.select(np.repeat(groups, generations)).tensors(),
        )
        rank = found.rank.view(-1, generations)
        rewarded = reward_and_advantage(
            rank,
            found.log_prob.view(-1, generations),
            softmax_weight=self.config.reward_softmax_weight,
            ndcg_k=self.config.reward_ndcg_k,
        )
        return rewarded.rewards, rank

    @torch.no_grad()
    def _reference_log_prob(self, batch: PackedBatch) -> torch.Tensor:
        model = self.model
        disabled = getattr(model.backbone, "disable_adapter", None)
        if disabled is None:
            raise ValueError("beta: the reference is the backbone without adapters; use_lora")
        with disabled() if disabled is not None else nullcontext():
            hidden = model(batch)
        return linear_logprob(
            hidden.index_select(0, batch.predict_from),
            model.lm_head_weight,
            batch.targets,
            bias=model.lm_head_bias,
            softcap=model.softcap,
            temperature=self.loss_config.temperature,
            impl=self.config.impl,
        ).log_prob

    def _item_loss(self, states, candidates, targets, total) -> RecPOLoss:
        device = states.device
        return recpo_loss(
            states.new_zeros((0, states.shape[1])),
            self.model.lm_head_weight,
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.ones((len(targets), 1), device=device),
            states,
            candidates.leaf,
            candidates.ids,
            item_targets=candidates.rows_of(targets),
            item_table=self.model.item_table if self.config.item_negatives == "catalog" else None,
            num_selected=total,
            # one trajectory a group: "sum" is the mean over users
            config=replace(self.loss_config, reduction="sum", best=1, item_weight=1.0),
        )

    def _record(self, out: RecPOLoss, experience, rows, batch, old, stats: UpdateStats) -> None:
        rewards, users = experience.rewards[rows], float(len(rows))
        tokens = out.num_tokens.double()
        counted = batch.targets != -100
        spread = rewards.amax(1) - rewards.amin(1)
        stats.add("token_loss", out.token_loss)
        stats.add("item_loss", out.item_loss)
        stats.add("reward", rewards.mean(), users)
        stats.add(
            "reward_std", rewards.std(1).mean() if rewards.shape[1] > 1 else spread.mean(), users
        )
        stats.add("frac_reward_zero_std", (spread == 0).double().mean(), users)
        stats.add("rank", experience.rank[rows].double().mean(), users)
        stats.add("item_log_prob", out.item_log_prob.mean(), users)
        stats.add("clip_ratio/low_mean", out.clip_fraction_low, tokens)
        stats.add("clip_ratio/high_mean", out.clip_fraction_high, tokens)
        stats.add("clip_ratio/region_mean", out.clip_fraction, tokens)
        stats.add("clip_ratio/item_mean", out.item_clip_fraction, users)
        gap = ((out.log_prob - old) * counted).abs()
        stats.add("sampling/log_prob_difference", gap.sum() / tokens.clamp(min=1), tokens)
        stats.add("log_prob", (out.log_prob * counted).sum() / tokens.clamp(min=1), tokens)
        self._record_correction(out, stats)
        for name in ("kl", "entropy"):
            value = getattr(out, name)
            if value is not None:
                stats.add(name, value, tokens)

    def _record_correction(self, out: RecPOLoss, stats: UpdateStats) -> None:
        """What the correction for the sampler's numerics did, under TRL's keys."""
        least, mean, most = out.importance_ratio_min, out.importance_ratio, out.importance_ratio_max
        if least is None or mean is None or most is None:
            return
        of_tokens = self.loss_config.importance_sampling_mode.startswith("token")
        key = "sampling/importance_sampling_ratio"
        stats.add(
            f"{key}/mean", mean, out.num_tokens if of_tokens else float(out.advantages.numel())
        )
        stats.bound(f"{key}/min", least, largest=False)
        stats.bound(f"{key}/max", most, largest=True)


def _smallest(groups: int, tokens: int) -> str | None:
    return SMALLER_GROUP.format(tokens=tokens) if groups == 1 else None
