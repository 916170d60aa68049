"""The coarse scan of a search by torch, for sizes at which the interpreter's products are too slow.

``stand_in`` takes the place of ``topk.scan.group_best``, the one step whose work grows with the
table. It multiplies the same codes with the same rounded queries (the operand is float32, bfloat16
or float16 as the kernel's is), accumulates in float32, and leaves what the kernel leaves: the two
best scores of every group, packed with the place of the best. The kernels that make lists of them,
rescore the listed rows and search where a list overflowed run as they are, in larger tiles: an
operation of the interpreter costs the same for any tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def stand_in(scanned, operand, group, pair_row, pair_of):
    """``scan.group_best`` by torch."""
    from r2ec_kernels.topk.impl.triton.groups import LOWEST, GroupBest

    codes = scanned.codes[:, : operand.shape[1]]
    count = codes.shape[0]
    scores = torch.empty(operand.shape[0], count)
    for start in range(0, count, 8192):
        part = slice(start, start + 8192)
        scores[:, part] = operand.float() @ codes[part].float().T
        if scanned.mul is not None:
            scores[:, part] *= scanned.mul[part]
        if scanned.sub is not None:
            scores[:, part] -= scanned.sub[part]
    norms = scanned.norms
    if norms is None and scanned.takes_norms:
        norms = torch.linalg.vector_norm(codes, dim=1, dtype=torch.float32)
    if scanned.by_norm == "cosine":
        scores /= norms
    elif scanned.by_norm == "l2":
        scores -= 0.5 * norms * norms
    limits = scanned.limits
    if limits is None:
        limits = torch.stack([torch.zeros(()), torch.zeros(()), norms.max()])
    if scanned.direction is not None:
        *_, middle = direction = scanned.direction
        for start in range(0, count, 8192):
            rows = codes[start : start + 8192].float()
            if scanned.by_norm == "cosine":
                rows = rows / norms[start : start + 8192, None]
            scores[:, start : start + 8192] += rows @ direction[:-1] - middle
            far = torch.linalg.vector_norm(rows - middle * direction[:-1], dim=1).max()
            limits[0] = torch.maximum(limits[0], far * 1.01)
    bits = scores.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = (bits & -group) | (torch.arange(count) % group).int()
    bits = torch.nn.functional.pad(bits, (0, -count % group), value=LOWEST.value)
    best = bits.view(operand.shape[0], -1, group).topk(2, dim=2).values
    return GroupBest(best[..., 0].contiguous(), best[..., 1].contiguous(), limits, group)


def use_stand_in(monkeypatch, d: int) -> None:
    """For tables of d columns."""
    from r2ec_kernels.topk.impl.triton import rescore, topk

    monkeypatch.setattr(topk, "group_best", stand_in)
    # 256 rows a tile; an eighth, not more than a group has, where a list overflowed
    monkeypatch.setattr(rescore, "_MAX_ROWS", 256)
    monkeypatch.setattr(rescore, "_TILE", 256 << (d - 1).bit_length())


@dataclass(frozen=True)
class Listed:
    """How many rows a search listed of each query, int64 [B], and what its lists hold."""

    rows: torch.Tensor
    capacity: int


def count_lists(monkeypatch, batch: int) -> list[Listed]:
    """Searches with the lists of a batch of ``batch`` queries, and no rescoring: what they
    listed. Their results are nothing."""
    from r2ec_kernels.topk.impl.triton import candidates, rescore, topk

    found: list[Listed] = []
    capacity_of = candidates.capacity_of

    def as_of_a_batch(count, k, group, _, coded):
        return capacity_of(count, k, group, batch, coded)

    def counted(query, table, lists, best, group, k, excluded):
        singles, wholes = lists.count.long().unbind(1)
        found.append(Listed(singles + wholes * group, lists.capacity))
        return torch.zeros(len(query), lists.capacity, dtype=torch.int64)

    monkeypatch.setattr(topk, "group_best", stand_in)
    monkeypatch.setattr(candidates, "capacity_of", as_of_a_batch)
    monkeypatch.setattr(rescore, "listed_keys", counted)
    return found
