"""History packing in plain numpy: the oracle of the C++ packer, and its stand-in without a build.

Best-fit decreasing: groups are placed by falling token count (equal counts: lower index first),
each into the fullest batch that still has room (equally full: the batch opened first).
"""

import heapq
from bisect import bisect_left, insort

import numpy as np

from r2ec_fast.packing.request import INT32_MAX, Request

IGNORE = -100


def group_sizes(request: Request) -> list[tuple[int, int]]:
    """(query tokens, key tokens) of every group, as Python ints (no overflow)."""
    prompts = request.prompts.lengths.tolist()
    if request.completions is None:
        return [(p, p) for p in prompts]
    g = request.num_generations
    ends = request.completions.offsets[::g].tolist()
    sums = [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
    if request.share_prompts:
        return [(p + r, (g + 1) * p + r) for p, r in zip(prompts, sums, strict=True)]
    return [(g * p + r, g * p + r) for p, r in zip(prompts, sums, strict=True)]


def plan(request: Request) -> list[list[int]]:
    """Groups of every batch: batches in the order they were opened, groups rising inside one.

    Raises ValueError for a group over the budget (oversize="error") and for a batch whose
    sequence lengths do not fit into int32.
    """
    sizes = group_sizes(request)
    multiple = request.pad_to_multiple_of
    capacity = request.max_tokens // multiple * multiple
    batches: list[list[int]] = []
    spaces: list[int] = []  # sorted distinct free spaces
    by_space: dict[int, list[int]] = {}  # free space -> heap of batches
    for group in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        size = sizes[group][0]
        if size > capacity and request.oversize == "error":
            what = "row" if request.completions is None else "group"
            raise ValueError(
                f"{what} {group} has {size} tokens, more than the budget of {capacity}; raise "
                'max_tokens, shorten it, or pass oversize="alone"'
            )
        at = bisect_left(spaces, size)
        if at == len(spaces):
            batch, space = len(batches), capacity
            batches.append([])
        else:
            space = spaces[at]
            batch = heapq.heappop(by_space[space])
            if not by_space[space]:
                del by_space[space], spaces[at]
        batches[batch].append(group)
        left = space - size
        if left > 0:
            if left not in by_space:
                by_space[left] = []
                insort(spaces, left)
            heapq.heappush(by_space[left], batch)
    for groups in batches:
        groups.sort()
        tokens = sum(sizes[i][0] for i in groups)
        tail = -tokens % multiple
        keys = sum(sizes[i][1] for i in groups)
        if max(tokens, keys) > INT32_MAX - tail:
            raise ValueError(
                f"a batch would hold {tokens} tokens and {keys} keys; with the tail, sequence "
                "lengths must fit into int32"
            )
    return batches


def pack(request: Request) -> list[dict[str, np.ndarray | int | None]]:
    """The fields of every PackedBatch, numpy arrays of the shapes documented there."""
    return [_fill(request, groups) for groups in plan(request)]


def _fill(request: Request, groups: list[int]) -> dict[str, np.ndarray | int | None]:
    builder = _Builder()
    for local, group in enumerate(groups):
        prompt = request.prompts[group]
        if request.completions is None:
            builder.sequence(prompt, np.append(IGNORE, prompt[1:]))
            builder.readout.append([builder.length - 1])
            continue
        if request.share_prompts:
            shared = builder.sequence(prompt, np.full(len(prompt), IGNORE))
        values, offsets = request.completions.values, request.completions.offsets
        for g in range(request.num_generations):
            row = group * request.num_generations + g
            source = np.arange(offsets[row], offsets[row + 1])
            tokens = values[source]
            targets = tokens if request.targets is None else request.targets[source]
            if request.share_prompts:
                own = builder.sequence(tokens, targets, prefix=shared)
                predict_from = np.append(shared[-1], own[:-1])
            else:
                both = builder.sequence(
                    np.append(prompt, tokens), np.append(np.full(len(prompt), IGNORE), targets)
                )
                predict_from = both[len(prompt) - 1 : -1]
            builder.predict_from.append(predict_from)
            builder.targets.append(targets)
            builder.trajectory.append(np.full(len(tokens), local * request.num_generations + g))
            builder.source.append(source)
            builder.readout.append([builder.length - 1])
    num_tokens = builder.length
    tail = -num_tokens % request.pad_to_multiple_of
    if tail:
        builder.sequence(np.zeros(tail, np.int64), np.full(tail, IGNORE))
    return builder.fields() | {
        "kv_index": _cat(builder.kv_index) if request.share_prompts else None,
        "readout": _cat(builder.readout if request.readout else []),
        "labels": _cat(builder.labels)[None] if request.labels else None,
        "groups": np.array(groups, np.int64),
        "num_tokens": num_tokens,
    }


def _cat(parts: list, dtype: type = np.int64) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


class _Builder:
    def __init__(self) -> None:
        self.length = 0
        self.query_lengths: list[int] = []
        self.key_lengths: list[int] = []
        self.input_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.kv_index: list[np.ndarray] = []
        self.predict_from: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.trajectory: list[np.ndarray] = []
        self.source: list[np.ndarray] = []
        self.readout: list[list[int]] = []

    def sequence(
        self, tokens: np.ndarray, labels: np.ndarray, prefix: np.ndarray | None = None
    ) -> np.ndarray:
        """Append a sequence whose keys are rows `prefix` and its own; return its own rows."""
        own = np.arange(self.length, self.length + len(tokens))
        keys = own if prefix is None else np.append(prefix, own)
        self.input_ids.append(tokens)
        self.position_ids.append(np.arange(len(keys) - len(tokens), len(keys)))
        self.labels.append(labels)
        self.kv_index.append(keys)
        self.query_lengths.append(len(tokens))
        self.key_lengths.append(len(keys))
        self.length += len(tokens)
        return own

    def fields(self) -> dict[str, np.ndarray | int | None]:
        return {
            "input_ids": _cat(self.input_ids)[None],
            "position_ids": _cat(self.position_ids)[None],
            "cu_seq_lens_q": np.cumsum([0, *self.query_lengths]).astype(np.int32),
            "cu_seq_lens_k": np.cumsum([0, *self.key_lengths]).astype(np.int32),
            "max_length_q": max(self.query_lengths),
            "max_length_k": max(self.key_lengths),
            "seq_idx": np.repeat(np.arange(len(self.query_lengths)), self.query_lengths).astype(
                np.int32
            )[None],
            "predict_from": _cat(self.predict_from),
            "targets": _cat(self.targets),
            "trajectory": _cat(self.trajectory),
            "source": _cat(self.source),
        }
