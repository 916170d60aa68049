"""Ragged token rows -> padding-free batches: the front of the C++ packer (csrc/).

A batch is one row of concatenated sequences in the names Hugging Face models read. Where the G
reasonings of one user train together, their prompt is laid out once and every completion attends
to it through `kv_index`. docs/guides/packing.md draws the layouts.
"""

import dataclasses
import functools
import importlib
import multiprocessing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r2ec_fast.packing import reference as packing_reference
from r2ec_fast.packing.reference import INT32_MAX, Request, check_offsets

Rows = tuple[np.ndarray, np.ndarray]

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

    def model_inputs(self) -> dict[str, Any]:
        """Arguments for a transformers model; kv_index only where prompts are shared."""
        names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
        inputs = {name: getattr(self, name) for name in names}
        inputs |= {"max_length_q": self.max_length_q, "max_length_k": self.max_length_k}
        return inputs if self.kv_index is None else inputs | {"kv_index": self.kv_index}

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`; pinned memory is copied without waiting."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def to_rows(rows: Any, name: str = "rows") -> Rows:
    """Ragged rows as (values i64 or i32 [E], offsets i64 [R+1]), uncopied where the input allows.

    Takes a sequence of rows (lists, 1-D arrays or tensors), a pair (values, offsets) of numpy
    arrays, CPU tensors or anything with `__dlpack__`, an object with `.values()` and `.offsets()`
    (a jagged torch.nested tensor; a KeyedJaggedTensor, whose rows are key-major), or an Arrow list
    array.
    Raises TypeError or ValueError naming `name`; row lengths are checked when packing.
    """
    if isinstance(rows, tuple) and len(rows) == 2 and not isinstance(rows[0], list):
        values, offsets = rows
    elif type(rows).__module__.startswith("pyarrow"):
        values, offsets = _arrow_rows(rows, name)
    elif callable(getattr(rows, "values", None)) and callable(getattr(rows, "offsets", None)):
        if isinstance(rows, torch.Tensor) and rows.lengths() is not None:
            raise ValueError(f"{name}: a nested tensor with holes (lengths()) has no plain rows")
        values, offsets = rows.values(), rows.offsets()
    elif isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        lengths = [len(row) for row in rows]
        parts = [_integers(row, name) for row in rows]
        values = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
    else:
        raise TypeError(
            f"{name} must be a sequence of token rows, a pair (values, offsets), a jagged tensor "
            f"or an Arrow list array, got {type(rows).__name__}"
        )
    values = _integers(values, f"{name} values")
    offsets = _integers(offsets, f"{name} offsets").astype(np.int64, copy=False)
    return np.ascontiguousarray(values), np.ascontiguousarray(offsets)


def _integers(array: Any, name: str) -> np.ndarray:
    """A 1-D integer numpy array over the same memory where the type allows: int32 or int64."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"{name} must be in CPU memory, got a tensor on {array.device}")
        array = array.detach().numpy()
    elif hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
        array = np.from_dlpack(array)
    array = np.asarray(array)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise TypeError(f"{name} must hold integers of at most 63 bits, got {array.dtype}")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def _arrow_rows(array: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(array, "chunks"):
        array = array.combine_chunks()
    if not hasattr(array, "offsets") or array.null_count or array.values.null_count:
        raise TypeError(f"{name} must be an Arrow list array without nulls, got {array.type}")
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]


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
        prompts, completions: rows as `to_rows` takes them; an empty row is an error.
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
    request = _request(
        prompts, completions, num_generations, max_tokens, completion_targets, share_prompts,
        readout, labels, pad_to_multiple_of, oversize, threads,
    )  # fmt: skip
    if backend not in ("auto", "cpp", "numpy"):
        raise ValueError(f'backend must be "auto", "cpp" or "numpy", got {backend!r}')
    if backend == "numpy" or (backend == "auto" and _extension() is None):
        return [_from_numpy(f, request.pin_memory) for f in packing_reference.pack(request)]
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
    alone = request.completions is None
    return extension.Plan(
        request.prompts[1],
        len(request.prompts[0]),
        None if alone else request.completions[1],
        0 if alone else len(request.completions[0]),
        0 if alone else request.num_generations,
        request.max_tokens,
        request.pad_to_multiple_of,
        request.share_prompts and not alone,
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
    left_out["kv_index"] = not request.share_prompts or request.completions is None
    arenas = {
        name: _allocate(sum(sizes[per]), dtype, request.pin_memory)
        for name, (per, dtype) in _ARENAS.items()
        if not left_out.get(name)
    }
    plan.fill(
        request.prompts[0],
        np.zeros(0, np.int64) if request.completions is None else request.completions[0],
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
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }
    if pin:
        tensors = {
            name: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for name, value in tensors.items()
        }
    return PackedBatch(**tensors)


def _request(
    prompts: Any,
    completions: Any,
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
    """Check and normalise every argument of pack_histories."""
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    for name, value in (
        ("max_tokens", max_tokens),
        ("pad_to_multiple_of", multiple),
        ("threads", threads),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 1 <= value <= INT32_MAX:
            raise ValueError(f"{name} must be in 1..{INT32_MAX}, got {value}")
    if multiple > max_tokens:
        raise ValueError(
            f"pad_to_multiple_of ({multiple}) must not exceed max_tokens ({max_tokens})"
        )
    if oversize not in ("error", "alone"):
        raise ValueError(f'oversize must be "error" or "alone", got {oversize!r}')
    prompt_rows = to_rows(prompts, "prompts")
    check_offsets(prompt_rows[1], len(prompt_rows[0]), "prompts")
    completion_rows, targets, generations = None, None, 1
    if completions is None:
        if num_generations is not None or completion_targets is not None:
            raise ValueError("num_generations and completion_targets need completions, got None")
    else:
        completion_rows = to_rows(completions, "completions")
        check_offsets(completion_rows[1], len(completion_rows[0]), "completions")
        generations = _generations(len(prompt_rows[1]), len(completion_rows[1]), num_generations)
    if completion_targets is not None:
        targets = _integers(completion_targets, "completion_targets").astype(np.int64, copy=False)
        if len(targets) != len(completion_rows[0]):
            raise ValueError(
                f"completion_targets must have one entry for each of the {len(completion_rows[0])} "
                f"completion tokens, got {len(targets)}"
            )
    # A group of one has nothing to share: prompt and completion are one plain sequence.
    share = share_prompts and generations > 1
    if labels and share:
        raise ValueError("labels need sequences that stand alone; pass share_prompts=False")
    return Request(
        prompt_rows, completion_rows, targets, generations, int(max_tokens), share, readout, labels,
        int(multiple), oversize, int(threads), _can_pin(),
    )  # fmt: skip


def _can_pin() -> bool:
    # a forked data-loader worker must not touch CUDA
    return multiprocessing.parent_process() is None and torch.cuda.is_available()


def _generations(prompt_offsets: int, completion_offsets: int, given: int | None) -> int:
    prompts, completions = prompt_offsets - 1, completion_offsets - 1
    expected = given if given is not None else (completions // prompts if prompts else 1)
    if not 1 <= expected <= INT32_MAX or completions != prompts * expected:
        raise ValueError(
            f"completions must have num_generations rows for each of the {prompts} prompts, got "
            f"{completions} rows and num_generations={given}"
        )
    return int(expected)
