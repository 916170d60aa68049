"""One checked call of pack_histories: what the C++ packer and the numpy one both read."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r2ec_fast.packing.ragged import Ragged, integers

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """Rows without an empty one, and the options of `pack_histories`.

    targets: int64 [values of completions] or None. num_generations: G, 1 without completions.
    share_prompts: only where G > 1. pad_to_multiple_of: 1 = no tail. pin_memory: of the outputs.
    """

    prompts: Ragged
    completions: Ragged | None
    targets: np.ndarray | None
    num_generations: int
    max_tokens: int
    share_prompts: bool
    readout: bool
    labels: bool
    pad_to_multiple_of: int
    oversize: str
    threads: int
    pin_memory: bool

    @classmethod
    def checked(
        cls,
        prompts: Any,
        completions: Any,
        *,
        num_generations: int | None,
        max_tokens: int,
        completion_targets: Any,
        share_prompts: bool,
        readout: bool,
        labels: bool,
        pad_to_multiple_of: int | None,
        oversize: str,
        threads: int,
    ) -> Request:
        """The arguments of `pack_histories`, checked and normalised.

        Raises:
            TypeError, ValueError: naming the argument and the row.
        """
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        _check_size("max_tokens", max_tokens)
        _check_size("pad_to_multiple_of", multiple)
        _check_size("threads", threads)
        if multiple > max_tokens:
            raise ValueError(
                f"pad_to_multiple_of ({multiple}) must not exceed max_tokens ({max_tokens})"
            )
        if oversize not in ("error", "alone"):
            raise ValueError(f'oversize must be "error" or "alone", got {oversize!r}')
        prompt_rows = _rows(prompts, "prompts")
        completion_rows, targets, generations = None, None, 1
        if completions is not None:
            completion_rows = _rows(completions, "completions")
            generations = _generations(len(prompt_rows), len(completion_rows), num_generations)
            targets = _targets(completion_targets, len(completion_rows.values))
        elif num_generations is not None or completion_targets is not None:
            raise ValueError("num_generations and completion_targets need completions, got None")
        # a group of one has nothing to share: prompt and completion are one plain sequence
        share = share_prompts and generations > 1
        if labels and share:
            raise ValueError("labels need sequences that stand alone; pass share_prompts=False")
        return cls(
            prompt_rows, completion_rows, targets, generations, int(max_tokens), share, readout,
            labels, int(multiple), oversize, int(threads), _can_pin(),
        )  # fmt: skip


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= INT32_MAX:
        raise ValueError(f"{name} must be in 1..{INT32_MAX}, got {value}")


def _rows(rows: Any, name: str) -> Ragged:
    rows = Ragged.of(rows, name)
    for row in np.flatnonzero(rows.lengths == 0)[:1]:
        raise ValueError(f"{name}: row {row} is empty; every row needs at least one token")
    return rows


def _generations(prompts: int, completions: int, given: int | None) -> int:
    expected = given if given is not None else (completions // prompts if prompts else 1)
    if not 1 <= expected <= INT32_MAX or completions != prompts * expected:
        raise ValueError(
            f"completions must have num_generations rows for each of the {prompts} prompts, got "
            f"{completions} rows and num_generations={given}"
        )
    return int(expected)


def _targets(given: Any, num_tokens: int) -> np.ndarray | None:
    if given is None:
        return None
    targets = integers(given, "completion_targets").astype(np.int64, copy=False)
    if len(targets) != num_tokens:
        raise ValueError(
            f"completion_targets must have one entry for each of the {num_tokens} "
            f"completion tokens, got {len(targets)}"
        )
    return targets


def _can_pin() -> bool:
    # a forked data-loader worker must not touch CUDA
    return multiprocessing.parent_process() is None and torch.cuda.is_available()
