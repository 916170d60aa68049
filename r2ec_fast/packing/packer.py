"""Ragged token rows -> padding-free batches: the front of the C++ packer (csrc/).

A batch is one row of concatenated sequences in the names Hugging Face models read. Where the G
reasonings of one user train together, their prompt is laid out once and every completion attends
to it through `kv_index`. docs/guides/packing.md draws the layouts.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r2ec_fast.packing import reference
from r2ec_fast.packing.ragged import Ragged, common_prefix
from r2ec_fast.packing.request import Request

_BUILD_HINT = (
    "the C++ extension r2ec_fast._packing was not built; packing runs in numpy, many times slower. "
    "Build it with `pip install -e .` (needs a C++17 compiler), or in a checkout with "
    "`python setup.py build_ext --inplace`"
)


@dataclass
class PackedBatch:
    """T tokens of S sequences in one row, no padding between them.

    Tensors (int64 where no type is named), M completion tokens, R read-outs, b groups:
      input_ids, position_ids [1, T]; cu_seq_lens_q, cu_seq_lens_k [S+1] int32;
      seq_idx [1, T] int32: the sequence of each token.
      kv_index [cu_seq_lens_k[-1]]: the row of this batch whose key and value serve each key slot;
        None = identity. The keys of a completion are its prompt's rows, then its own; causal,
        aligned bottom right.
      predict_from, targets, trajectory, source [M]: for each completion token the row whose state
        predicts it, its id (-100 = not counted), its reasoning 0..b*G-1 within this batch, and its
        index in completions.values.
      readout [R]: the last row of each completion (trajectory order); without completions, of each
        row.
      labels [1, T] or None: next-token labels as transformers reads them (the model shifts them).
      groups [b]: original index of each group (without completions: row), in layout order.
    max_length_q, max_length_k: the longest sequence. num_tokens: T without the padded tail, which
    is one extra sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    seq_idx: torch.Tensor
    kv_index: torch.Tensor | None
    predict_from: torch.Tensor
    targets: torch.Tensor
    trajectory: torch.Tensor
    readout: torch.Tensor
    labels: torch.Tensor | None
    groups: torch.Tensor
    source: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`; pinned memory is copied without waiting."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def pack_histories(
    prompts: Any,
    completions: Any = None,
    *,
    num_generations: int | None = None,
    max_tokens: int,
    completion_targets: Any = None,
    share_prompts: bool = True,
    readout: bool = True,
    labels: bool = False,
    pad_to_multiple_of: int | None = None,
    oversize: str = "error",
    threads: int = 1,
    backend: str = "auto",
) -> list[PackedBatch]:
    """Pack ragged token rows into batches of at most `max_tokens` tokens, best-fit decreasing.

    Without completions every row of `prompts` is a sequence of its own. With completions, group i
    is prompt i and its `num_generations` completions, rows i*G .. i*G+G-1, and is never split over
    two batches. share_prompts lays the prompt out once (P + sum R tokens); otherwise, and for
    G = 1, each completion follows its own copy. The result is the same for any number of threads.

    Args:
        prompts, completions: rows as `Ragged.of` takes them; an empty row is an error.
        num_generations: G; default: completions / prompts.
        max_tokens: token budget of a batch, the padded tail included.
        completion_targets: i64 [E], what each completion token is trained on; -100 = not counted
            (an appended marker). Default: the token itself.
        readout: list the position of each read-out state.
        labels: also write next-token labels; only where every sequence stands alone.
        pad_to_multiple_of: T becomes a multiple of it through one extra sequence of zeros.
        oversize: a group over the budget is an "error", or a batch "alone".
        threads: C++ threads that write the batches.
        backend: "auto" (C++, or numpy with one warning if that was not built), "cpp", "numpy".

    Raises:
        TypeError, ValueError: naming the argument and the row.
    """
    request = Request.checked(
        prompts,
        completions,
        num_generations=num_generations,
        max_tokens=max_tokens,
        completion_targets=completion_targets,
        share_prompts=share_prompts,
        readout=readout,
        labels=labels,
        pad_to_multiple_of=pad_to_multiple_of,
        oversize=oversize,
        threads=threads,
    )
    if backend not in ("auto", "cpp", "numpy"):
        raise ValueError(f'backend must be "auto", "cpp" or "numpy", got {backend!r}')
    if backend == "numpy" or (backend == "auto" and _extension() is None):
        return [_from_numpy(f, request.pin_memory) for f in reference.pack(request)]
    return _pack_cpp(request)


@functools.cache
def _extension() -> Any | None:
    """The C++ extension; None, after one warning, where it was not built."""
    try:
        return importlib.import_module("r2ec_fast._packing")
    except ModuleNotFoundError:
        warnings.warn(_BUILD_HINT, RuntimeWarning, stacklevel=3)
        return None


def _plan(request: Request) -> Any:
    try:
        extension = importlib.import_module("r2ec_fast._packing")
    except ModuleNotFoundError as error:
        raise RuntimeError(f'backend="cpp": {_BUILD_HINT}') from error
    prompts, completions = request.prompts, request.completions
    return extension.Plan(
        prompts.offsets,
        len(prompts.values),
        None if completions is None else completions.offsets,
        0 if completions is None else len(completions.values),
        0 if completions is None else request.num_generations,
        request.max_tokens,
        request.pad_to_multiple_of,
        request.share_prompts,
        request.oversize == "alone",
    )


_ARENAS = {  # field: (what it has an entry for, dtype)
    "input_ids": ("tokens", torch.int64),
    "position_ids": ("tokens", torch.int64),
    "seq_idx": ("tokens", torch.int32),
    "labels": ("tokens", torch.int64),
    "cu_seq_lens_q": ("cumulative", torch.int32),
    "cu_seq_lens_k": ("cumulative", torch.int32),
    "kv_index": ("keys", torch.int64),
    "predict_from": ("predicted", torch.int64),
    "targets": ("predicted", torch.int64),
    "trajectory": ("predicted", torch.int64),
    "source": ("predicted", torch.int64),
    "readout": ("readouts", torch.int64),
}


def _pack_cpp(request: Request) -> list[PackedBatch]:
    """Every field of all batches is one allocation, which the batches are views of."""
    plan = _plan(request)
    starts = plan.starts
    sizes = {name: np.diff(at).tolist() for name, at in starts.items()}
    sizes["cumulative"] = (np.diff(starts["sequences"]) + 1).tolist()
    left_out = {"labels": not request.labels, "readout": not request.readout}
    left_out["kv_index"] = not request.share_prompts
    arenas = {
        name: _allocate(sum(sizes[per]), dtype, request.pin_memory)
        for name, (per, dtype) in _ARENAS.items()
        if not left_out.get(name)
    }
    plan.fill(
        request.prompts.values,
        np.zeros(0, np.int64) if request.completions is None else request.completions.values,
        request.targets,
        {name: arena.numpy() for name, arena in arenas.items()},
        request.threads,
    )
    columns: dict[str, Sequence] = {
        "kv_index": [None] * plan.num_batches,
        "labels": [None] * plan.num_batches,
        "readout": [torch.empty(0, dtype=torch.int64)] * plan.num_batches,
        "groups": torch.from_numpy(plan.groups).split(sizes["groups"]),
        "num_tokens": plan.num_tokens,
        "max_length_q": plan.max_length_q,
        "max_length_k": plan.max_length_k,
    }
    for name, arena in arenas.items():
        as_row = name in ("input_ids", "position_ids", "seq_idx", "labels")
        columns[name] = (arena[None] if as_row else arena).split(sizes[_ARENAS[name][0]], dim=-1)
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return [PackedBatch(*row) for row in zip(*(columns[name] for name in names), strict=True)]


def _allocate(size: int, dtype: torch.dtype, pin: bool) -> torch.Tensor:
    if pin and size:
        return torch.empty(size, dtype=dtype, pin_memory=True)
    # numpy asks the kernel for huge pages, torch.empty does not; page faults are most of the time.
    return torch.from_numpy(np.empty(size, np.int32 if dtype == torch.int32 else np.int64))


def _from_numpy(fields: dict[str, Any], pin: bool) -> PackedBatch:
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            fields[name] = tensor.pin_memory() if pin else tensor
    return PackedBatch(**fields)


def pack_readouts(
    rows: Ragged, max_tokens: int, known: int = 0, least: int = 0
) -> Iterator[tuple[PackedBatch, np.ndarray]]:
    """Packed batches of ``rows``, of which only the last token's state is wanted, and the row that
    each read-out belongs to. What all rows begin with is laid out once a batch: they are packed as
    completions of it.

    The first sequence of each batch begins with the ``known`` tokens that all rows begin with.
    Where there are any, a batch has at least ``least`` tokens behind them: it may end with
    read-outs that belong to no row.
    """
    # every row keeps a token of its own
    prefix = known or min(common_prefix(rows), int(rows.lengths.min()) - 1)
    if not known and (len(rows) < 2 or prefix <= 0):
        for batch in pack_histories(rows, max_tokens=max_tokens, oversize="alone"):
            yield batch, batch.groups.numpy()
        return
    shared, tails = [rows[0][:prefix]], rows.tail(prefix)
    for part in tails.parts(max(max_tokens - prefix, 1)):
        own, tokens = tails[part], int(tails.lengths[part].sum())
        if tokens < least:  # the last row again and again
            copies = -(-(least - tokens) // int(own.lengths[-1]))
            own = own.select([*range(len(own)), *[len(own) - 1] * copies])
        (batch,) = pack_histories(
            shared,
            own,
            num_generations=len(own),
            max_tokens=max_tokens,
            oversize="alone",
        )
        yield batch, np.arange(part.start, part.stop)
