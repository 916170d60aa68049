"""The runs of `reasoning.py`: what each trains, and the rows of the table that it gives.

A run gets the lab of its seed, the folder with the seed's warmed-up model, and the figures of the
runs it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import changed_loss
import numpy as np
from chain_lab import Curves, Lab, Metrics, Trained, layers_of_equal_cost
from changed_loss import Loss

from r2ec_fast import R2ecModel
from r2ec_fast.eval.baselines import counting_baselines
from r2ec_fast.eval.reasoning import other_users
from r2ec_fast.packing.ragged import Ragged

WARM = "warmup"  # the folder of the warmed-up model
FILLER = "."
Notes = dict[str, float]


@dataclass(frozen=True)
class Figures:
    """What a run found: ``rows`` of the table by name; for those that were trained after a warm-up,
    or without one, the CPU ``seconds`` of that; ``curves`` of the RecPO steps; and other numbers
    (``notes``)."""

    rows: dict[str, Metrics]
    seconds: dict[str, float] = field(default_factory=dict)
    curves: Curves | None = None
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    lab: Lab
    folder: Path
    done: Mapping[str, Figures]

    def warm_model(self) -> R2ecModel:
        return R2ecModel.from_pretrained(self.folder / WARM)


def counting(context: Context) -> Figures:
    """No language model: counting, and the best that any ranking can score."""
    lab = context.lab
    rows = {b.name: lab.metrics(b.ranks(lab.test)) for b in counting_baselines(lab.data)}
    return Figures(rows | {"best possible": lab.world.best_possible(lab.data, lab.test)})


def warm(context: Context) -> Figures:
    """The language warm-up; its model is kept."""
    lab = context.lab
    model, seconds = lab.warmed_up(lab.sizes.layers)
    model.save_pretrained(context.folder / WARM)
    rows, notes = _both_modes(lab, model, "warm-up only")
    return Figures(rows, notes=notes | {"warmup_seconds": seconds})


def recpo(context: Context) -> Figures:
    """The paper's objective; then other reasonings are put in the place of the model's own."""
    lab, name = context.lab, "RecPO"
    trained = lab.recpo(context.warm_model())
    model = trained.model
    own = lab.written(model)
    rows, notes = _both_modes(lab, model, name, own)
    others = other_users(lab.test.user, lab.seed)
    if others is not None:
        rows[f"{name}, another user's reasoning"] = lab.ranked(model, own.select(others))
    rows[f"{name}, fillers instead"] = lab.ranked(model, _fillers(lab, own))
    seconds = dict.fromkeys(rows, trained.seconds)
    return Figures(rows, seconds, trained.curves, notes | {"seconds": trained.seconds})


def _fillers(lab: Lab, written: Ragged) -> Ragged:
    """As many tokens as each of the ``written`` reasonings has, saying nothing, and the marker."""
    builder = lab.assembler.builder
    marker = builder.marker_ids
    (token,) = builder.tokenizer.encode(FILLER, add_special_tokens=False)
    lengths = np.maximum(written.lengths - len(marker), 0)
    return Ragged.of([[token] * n for n in lengths.tolist()]).append(marker)


def direct(context: Context) -> Figures:
    """The contrastive objective from the same warm-up, for as long as RecPO trained."""
    lab, row = context.lab, "direct, RecPO's time"
    wanted = context.done["recpo"].notes["seconds"]
    model, seconds, steps = lab.contrastive(context.warm_model, wanted)
    return Figures({row: lab.ranked(model)}, {row: seconds}, notes={"steps": steps})


def deeper(context: Context) -> Figures:
    """Direct mode of a deeper model, whose recommendation takes at least the operations of a
    reasoned one. It trains for the time of warm-up and RecPO together: on purchases alone, or on
    the same warm-up and then on purchases."""
    lab, base = context.lab, context.done["recpo"].notes
    layers = layers_of_equal_cost(
        context.warm_model(), lab.sizes.layers, base["prompt_tokens"], base["reasoning_tokens"]
    )
    total = context.done["warm-up"].notes["warmup_seconds"] + base["seconds"]
    notes: Notes = {"layers": layers, "total_seconds": total}
    fresh, warmed = (f"direct, deeper, {start}" for start in ("from scratch", "warmed up"))
    rows, seconds = {}, {}
    model, seconds[fresh], notes["steps"] = lab.contrastive(lambda: lab.new_model(layers), total)
    rows[fresh] = lab.ranked(model)
    model, spent = lab.warmed_up(layers)
    notes["warmup_seconds"] = spent
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model, seconds[warmed], notes["steps_warmed_up"] = lab.contrastive(
            lambda: R2ecModel.from_pretrained(folder), total - spent
        )
    rows[warmed] = lab.ranked(model)
    return Figures(rows, seconds, notes=notes)


def changed(name: str, change: Callable[[int], Loss]) -> Callable[[Context], Figures]:
    """RecPO with a changed loss, all else the same."""

    def run(context: Context) -> Figures:
        trained = context.lab.recpo(context.warm_model(), change)
        return _after(context.lab, trained, name)

    run.__doc__ = change.__doc__
    return run


def settings(name: str, **others: Any) -> Callable[[Context], Figures]:
    """RecPO with the paper's objective and ``others`` of its settings."""

    def run(context: Context) -> Figures:
        return _after(context.lab, context.lab.recpo(context.warm_model(), **others), name)

    return run


def best_of_group(context: Context) -> Figures:
    """No RecPO: the warmed-up model samples a group for each example, and one is chosen, by the
    model's own confidence or, as a bound that nobody can use, by the target."""
    lab = context.lab
    model, group = context.warm_model(), lab.sizes.generations
    written = lab.written(model, group)
    ranks = lab.ranks(model, written).reshape(-1, group)
    surest = lab.confidence(model, written).reshape(-1, group).argmax(1)
    chosen = ranks[np.arange(len(ranks)), surest]
    rows = {
        f"warm-up, best of {group} by its confidence": lab.metrics(chosen),
        f"warm-up, best of {group} by the target (oracle)": lab.metrics(ranks.min(1)),
    }
    of_chosen = written.select(np.arange(len(ranks)) * group + surest)
    share = lab.right(model, lab.test[np.arange(len(ranks)).repeat(group)], written)
    notes = {"right": share, "right_of_chosen": lab.right(model, lab.test, of_chosen)}
    return Figures(rows, notes=notes)


def more_steps(context: Context) -> Figures:
    """The warm-up shows chains of fewer steps than the rule has; then RecPO."""
    lab, name = context.lab, "one step more than shown"
    shown = [1 / lab.sizes.steps] * lab.sizes.steps  # 0 to steps - 1, each alike
    return _own_warm_up(lab, name, *lab.warmed_up(lab.sizes.layers, shown))


def short_warm_up(steps: int) -> Callable[[Context], Figures]:
    """A warm-up of so many steps on language instead of all; then RecPO."""

    def run(context: Context) -> Figures:
        lab, name = context.lab, f"warm-up of {steps} steps on language"
        sizes = dataclasses.replace(lab.sizes, warmup_steps=steps)
        return _own_warm_up(lab, name, *Lab(sizes, lab.seed).warmed_up(sizes.layers))

    return run


def _own_warm_up(lab: Lab, name: str, model: R2ecModel, spent: float) -> Figures:
    """Rows of ``model`` as it is and after RecPO; its warm-up took ``spent`` seconds."""
    rows, _ = _both_modes(lab, model, f"{name}, warm-up only")
    found = _after(lab, lab.recpo(model), name)
    notes = {**(found.notes or {}), "warmup_seconds": spent}
    return Figures(rows | found.rows, found.seconds, found.curves, notes)


def _after(lab: Lab, trained: Trained, name: str) -> Figures:
    rows, notes = _both_modes(lab, trained.model, name)
    return Figures(rows, dict.fromkeys(rows, trained.seconds), trained.curves, notes)


def _both_modes(
    lab: Lab, model: R2ecModel, name: str, own: Ragged | None = None
) -> tuple[dict[str, Metrics], Notes]:
    """Rows with a greedy reasoning (``own``, where it was written) and without; the share of right
    reasonings, and the mean tokens of prompt and reasoning."""
    own = lab.written(model) if own is None else own
    notes = {
        "right": lab.right(model, lab.test, own),
        "prompt_tokens": float(lab.prompts.lengths.mean()),
        "reasoning_tokens": float(own.lengths.mean()),
    }
    rows = {f"{name}, reasoned": lab.ranked(model, own), f"{name}, direct": lab.ranked(model)}
    return rows, notes


@dataclass(frozen=True)
class Run:
    do: Callable[[Context], Figures]
    needs: tuple[str, ...] = ("warm-up",)


# in the order of the table; a run comes after those it needs
RUNS = {
    "counting": Run(counting, ()),
    "warm-up": Run(warm, ()),
    "best-of-group": Run(best_of_group),
    "recpo": Run(recpo),
    "direct": Run(direct, ("warm-up", "recpo")),
    "deeper": Run(deeper, ("warm-up", "recpo")),
    "permuted": Run(changed("rewards permuted", changed_loss.permuted_rewards)),
    "no-token-gradient": Run(changed("no token gradient", changed_loss.no_token_gradient)),
    "old-item-weight": Run(
        changed("item weight of release 0.1", changed_loss.item_weight_of_release_0_1)
    ),
    "more-steps": Run(more_steps, ()),
}


# how much each setting matters: not among the controls, ask for them by name or by "settings"
SETTINGS = {
    "temperature-0.7": Run(settings("temperature 0.7", temperature=0.7)),
    "temperature-1.5": Run(settings("temperature 1.5", temperature=1.5)),
    "group-4": Run(
        settings("4 reasonings of 48 users", num_generations=4, per_device_train_batch_size=48)
    ),
    "group-16": Run(
        settings("16 reasonings of 12 users", num_generations=16, per_device_train_batch_size=12)
    ),
    "kl-0.04": Run(settings("KL term, beta 0.04", beta=0.04)),
    "kl-0.5": Run(settings("KL term, beta 0.5", beta=0.5)),
    "all-weights": Run(settings("all weights, no adapters", use_lora=False)),
    "rank-4": Run(settings("adapters of rank 4", lora_r=4, lora_alpha=8)),
    "refresh-25": Run(settings("refresh every 25 steps", refresh_steps=25)),
    "fresh-targets": Run(
        settings("fresh targets, refresh every 25 steps", refresh_steps=25, fresh_targets=True)
    ),
    "dapo": Run(settings('loss_type "dapo"', loss_type="dapo")),
    "grpo": Run(settings('loss_type "grpo"', loss_type="grpo")),
    "warm-up-160": Run(short_warm_up(160), ()),
    "warm-up-240": Run(short_warm_up(240), ()),
}


def every_run() -> dict[str, Run]:
    """The controls and the settings, in the order of the table."""
    return RUNS | SETTINGS


def with_needed(names: list[str]) -> list[str]:
    """The named runs and those they need, in the order of the table; "settings" names all of
    `SETTINGS`. ValueError names an unknown one."""
    if "settings" in names:
        names = [name for name in names if name != "settings"] + list(SETTINGS)
    known = every_run()
    for name in names:
        if name not in known:
            every = ", ".join([*known, "settings"])
            raise ValueError(f"runs: expected some of {every}, got {name!r}")
    wanted = {need for name in names for need in known[name].needs} | set(names)
    return [name for name in known if name in wanted]
