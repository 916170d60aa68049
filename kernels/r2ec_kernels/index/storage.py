"""The rows of an index: tensors of one length that grow, move and are overwritten together."""

from typing import Any

import torch

from .._checks import MAX_ITEMS
from .._scan.blocks import whole_groups
from . import fine
from .fbgemm import BLOCK, PackedCodes
from .quantize import Limits, ScanCopy, encode, mean_row

_SEED = 20240607  # of the row permutation


class Storage:
    """Rows in a random order, their ids, norms and codes.

    ``fields`` holds tensors of ``capacity`` rows, of which the first ``size`` are live: rows [d],
    ids, norm and those of ``quantize.encode`` and ``fine.refine``, prefixed by the copy's kind
    ("int8.code"). A random order makes every block alike, whatever order the items came in.
    ``place[id]`` is the row of an id, -1 once removed. The codes of an "fp16" copy are no tensor:
    they are in ``packed``.
    """

    def __init__(self, similarity: str, kinds: tuple[str, ...]) -> None:
        self.similarity, self.kinds = similarity, kinds
        self.fields: dict[str, torch.Tensor] = {}
        self.packed: PackedCodes | None = None
        self._limits: dict[str, Limits] = {}
        self.size = 0
        self.place = torch.empty(0, dtype=torch.int64)
        self.mean = torch.empty(0)

    def build(self, items: torch.Tensor) -> None:
        """Take a table [N, d]; item i gets id i."""
        count = items.shape[0]
        generator = torch.Generator().manual_seed(_SEED)
        order = torch.randperm(count, generator=generator).to(items.device)
        self.mean = mean_row(items, self.similarity).float().double()
        self.fields = self._allocate(items, count)
        self.place = torch.empty(count, dtype=torch.int64, device=items.device)
        self.place[order] = torch.arange(count, device=items.device)
        for start in range(0, count, BLOCK):
            ids = order[start : start + BLOCK]
            at = torch.arange(start, start + ids.numel(), device=items.device)
            self._assign(at, items[ids], ids)
        self.size = count

    def write(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite the rows of live ids."""
        for start in range(0, ids.numel(), BLOCK):
            part = ids[start : start + BLOCK]
            self._assign(self.place[part], rows[start : start + BLOCK], part)

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows [n, d] at the end; returns their new ids."""
        first, count = self.place.numel(), rows.shape[0]
        if first + count > MAX_ITEMS:
            raise ValueError(f"rows: an index numbers at most {MAX_ITEMS} items")
        capacity = self.fields["ids"].shape[0]
        if self.size + count > capacity:
            larger = self._allocate(rows, max(self.size + count, capacity + capacity // 2))
            for name, tensor in self.fields.items():
                larger[name][: self.size] = tensor[: self.size]
            self.fields = larger
        ids = torch.arange(first, first + count, device=self.place.device)
        at = torch.arange(self.size, self.size + count, device=self.place.device)
        self.place = torch.cat([self.place, at])
        self.size += count
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            self._assign(at[part], rows[part], ids[part])
        return ids

    def remove(self, ids: torch.Tensor) -> None:
        """Drop live, distinct ids; rows from the end fill their places."""
        self._limits = {}
        kept = self.size - ids.numel()
        gone = self.place[ids]
        leaving = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        leaving[gone[gone >= kept] - kept] = True
        source = (~leaving).nonzero()[:, 0] + kept
        target = gone[gone < kept]
        for tensor in self.fields.values():
            tensor[target] = tensor[source]
        if self.packed is not None:
            self.packed.write(target, self.packed.read(source))
            self.packed.truncate(kept)
        self.place[self.fields["ids"][target]] = target
        self.place[ids] = -1
        self.size = kept

    def rename(self, ids: torch.Tensor, next_id: int) -> None:
        """Give item i of a fresh index the id ``ids[i]``; the next new id is ``next_id``."""
        place = torch.full((next_id,), -1, dtype=torch.int64, device=ids.device)
        place[ids] = self.place
        self.place = place
        live = self.live("ids")
        live.copy_(ids[live])

    def keep_fine(self) -> None:
        """Keep a "fine" copy from now on, beside the int8 copy."""
        if fine.KIND in self.kinds:
            return
        self.kinds = (*self.kinds, fine.KIND)
        capacity = self.fields["ids"].shape[0]
        for name, tensor in self._encode(self.live("rows")[:0], self.live("ids")[:0]).items():
            if name.startswith(fine.KIND + "."):
                self.fields[name] = tensor.new_empty(capacity, *tensor.shape[1:])
        for start in range(0, self.size, BLOCK):
            part = slice(start, min(start + BLOCK, self.size))
            names = ("code", "scale")
            coarse = {name: self.fields[f"{fine.COARSE_KIND}.{name}"][part] for name in names}
            made = fine.refine(self.fields["rows"][part], coarse, self.similarity, self.mean)
            for name, tensor in made.items():
                self.fields[f"{fine.KIND}.{name}"][part] = tensor

    @property
    def width(self) -> int:
        """d."""
        return self.fields["rows"].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.fields["rows"].device

    def live(self, name: str) -> torch.Tensor:
        """The live part of a field."""
        return self.fields[name][: self.size]

    def codes(self, kind: str) -> torch.Tensor | PackedCodes:
        """The codes of a copy: live rows, and rows without meaning up to a whole group."""
        if kind == "fp16" and self.packed is not None:
            return self.packed
        return self.fields[f"{kind}.code"][: whole_groups(self.size)]

    def copy(self, kind: str) -> ScanCopy[Any]:
        """The live rows of a copy; its codes are what ``products.PRODUCTS[kind]`` multiply."""
        names = ("scale", "residual", "size", "half", "bounded")
        picked = {name: self.live(f"{kind}.{name}") for name in names}
        return ScanCopy(codes=self.codes(kind), norm=self.live("norm"), **picked)

    def fine_copy(self) -> fine.FineCopy:
        """The live rows of the int8 copy with the second codes (``keep_fine``)."""
        coarse = self.copy(fine.COARSE_KIND)
        return fine.FineCopy(
            codes=coarse.codes,
            scale=coarse.scale,
            residual=self.live(f"{fine.KIND}.residual"),
            size=self.live(f"{fine.KIND}.size"),
            half=coarse.half,
            bounded=coarse.bounded,
            norm=coarse.norm,
            low=self.fields[f"{fine.KIND}.code"][: whole_groups(self.size)],
        )

    def limits(self, kind: str) -> Limits:
        """Of the live rows of a copy; kept until the next change."""
        if kind not in self._limits:
            copy = self.fine_copy() if kind == fine.KIND else self.copy(kind)
            self._limits[kind] = Limits.of(copy)
        return self._limits[kind]

    def _allocate(self, like: torch.Tensor, capacity: int) -> dict[str, torch.Tensor]:
        capacity = whole_groups(capacity)
        example = self._encode(like[:0], self.place[:0].to(like.device))
        code = example.pop("fp16.code", None)
        if code is not None and self.packed is None:
            self.packed = PackedCodes(code.shape[1])
        return {
            name: torch.empty(capacity, *tensor.shape[1:], dtype=tensor.dtype, device=like.device)
            for name, tensor in example.items()
        }

    def _assign(self, at: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> None:
        self._limits = {}
        fields = self._encode(rows, ids)
        code = fields.pop("fp16.code", None)
        if code is not None and self.packed is not None:
            self.packed.write(at, code)
        for name, tensor in fields.items():
            self.fields[name][at] = tensor

    def _encode(self, rows: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        norm = torch.linalg.vector_norm(rows.double(), dim=1).float()
        fields = {"rows": rows, "ids": ids, "norm": norm}
        made: dict[str, dict[str, torch.Tensor]] = {}
        for kind in self.kinds:
            if kind == fine.KIND:  # after the int8 copy
                made[kind] = fine.refine(rows, made[fine.COARSE_KIND], self.similarity, self.mean)
            else:
                made[kind] = encode(rows, kind, self.similarity, self.mean)
            fields |= {f"{kind}.{name}": tensor for name, tensor in made[kind].items()}
        return fields
