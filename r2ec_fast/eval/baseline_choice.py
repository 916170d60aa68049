"""Which baselines an evaluation runs: names, settings, and what must be installed for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from r2ec_fast.eval.baselines import COUNTING, Baseline
from r2ec_fast.eval.sequence_baselines import (
    ESASRec,
    ESASRecSettings,
    SASRec,
    SASRecSettings,
    SASRecText,
)
from r2ec_fast.eval.trained_baselines import (
    ALS,
    BPR,
    ALSSettings,
    BPRSettings,
    VectorBaseline,
)

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset

LIBRARY: dict[str, tuple[type[VectorBaseline], type]] = {
    kind.name: (kind, settings)
    for kind, settings in (
        (ALS, ALSSettings),
        (BPR, BPRSettings),
        (SASRec, SASRecSettings),
        (ESASRec, ESASRecSettings),
        (SASRecText, SASRecSettings),
    )
}
NAMES = (*COUNTING, *LIBRARY)


def chosen_baselines(choice: bool | str | Sequence[str]) -> list[str]:
    """The names that a setting means: true or "counting", "all", false or "none", or names, as a
    list or separated by commas. ValueError for an unknown name."""
    groups = {"counting": list(COUNTING), "all": list(NAMES), "none": []}
    if isinstance(choice, bool):
        choice = "counting" if choice else "none"
    if isinstance(choice, str):
        if choice in groups:
            return groups[choice]
        choice = [name.strip() for name in choice.split(",")]
    for name in choice:
        if name not in NAMES:
            raise ValueError(
                f"baselines: expected {', '.join(groups)}, or any of {', '.join(NAMES)}, "
                f"got {name!r}"
            )
    return list(dict.fromkeys(choice))


def checked_settings(
    names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of each library's baseline among `names`, the given ones over the defaults.

    Raises ValueError for settings of a baseline that has none, or for an unknown one, TypeError for
    one of another type, and ImportError where a library is missing. Settings of a baseline that is
    not among them are left aside, so that one file serves several choices.
    """
    if strange := [name for name in settings if name not in LIBRARY]:
        raise ValueError(
            f"baseline_settings: expected settings of any of {', '.join(LIBRARY)}, "
            f"got {strange[0]!r}"
        )
    out = {}
    for name in names:
        if name not in LIBRARY:
            continue
        kind, of_kind = LIBRARY[name]
        given, defaults = settings.get(name, {}), dataclasses.asdict(of_kind())
        for key, value in given.items():
            if key not in defaults:
                raise ValueError(
                    f"baseline_settings: expected any of {', '.join(defaults)} for {name}, "
                    f"got {key!r}"
                )
            wanted = (int, float) if isinstance(defaults[key], float) else type(defaults[key])
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise TypeError(
                    f"baseline_settings: {name}.{key}: expected a value like {defaults[key]!r}, "
                    f"got {value!r}"
                )
        kind.check_installed()
        out[name] = of_kind(**given)
    return out


def fitted_baselines(
    dataset: RecDataset, names: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[Baseline]:
    """The named baselines, each fitted on the training events when its turn comes; `settings` as
    `checked_settings` gives them."""
    for name in names:
        if name in COUNTING:
            yield COUNTING[name](dataset)
        else:
            yield LIBRARY[name][0](dataset, settings[name])


def fits_table(fitted: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of what was fitted: name -> its `fit_seconds`,
    `fit_cpu_seconds` and `settings`."""
    lines = ["| baseline | fit seconds | of a CPU | settings |", "|---|---:|---:|---|"]
    for name, fit in fitted.items():
        settings = ", ".join(f"{key} {value}" for key, value in fit["settings"].items())
        times = f"{fit['fit_seconds']:.1f} | {fit['fit_cpu_seconds']:.1f}"
        lines.append(f"| {name} | {times} | {settings or '–'} |")
    return "\n".join(lines)
