"""The rows of an index: tensors of one length that grow, move and are overwritten together."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._checks import MAX_ITEMS
from .._dispatch import means_triton
from .._scan.blocks import whole_groups
from . import fine
from .fbgemm import BLOCK, PackedCodes
from .quantize import Limits, ScanCopy, encode, mean_row

_SEED = 20240607  # of the row permutation
ROW_MULTIPLE = 16  # columns of a row that Triton's kernels read: loads of 16 bytes, and TMA


@dataclass(frozen=True)
class State:
    """What a storage holds, replaced as a whole.

    Attributes:
        kinds: of the copies kept.
        fields: tensors of ``capacity`` rows, of which the first ``size`` are live: rows [d], ids,
            norm and those of ``quantize.encode`` and ``fine.refine``, prefixed by the copy's kind
            ("int8.code"). On the Triton path zero columns lie behind ``rows``, up to a multiple of
            ROW_MULTIPLE.
        packed: the codes of an "fp16" copy, which are no tensor.
        place: int64, the row of an id; -1 once removed.
        size: live rows.
        limits: of each copy, made when first asked for.
    """

    kinds: tuple[str, ...]
    fields: dict[str, torch.Tensor]
    packed: PackedCodes | None
    place: torch.Tensor
    size: int
    limits: dict[str, Limits] = field(default_factory=dict)


class Undo:
    """How to get back to a state while its tensors are being overwritten.

    Attributes:
        state: what was there before.
        saved: (tensor, rows of it, what they held).
        packed: whether the packed codes may be half written; they are made again of the rows.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.packed = False

    def save(self, tensor: torch.Tensor, at: torch.Tensor) -> None:
        self.saved.append((tensor, at, tensor[at]))


class Storage:
    """Rows in a random order, their ids, norms and codes (``State``).

    A random order makes every block alike, whatever order the items came in.

    A change is whole or not at all, whatever is raised in it, KeyboardInterrupt included. What can
    be made aside is; then the new state takes the old one's place in one assignment. Rows that are
    overwritten where they are have been saved before, O(n d) of them (``Undo``), and are put back
    by ``repair``: at once, and, should that be interrupted too, before the next use.
    """

    def __init__(self, similarity: str, kinds: tuple[str, ...]) -> None:
        self.similarity = similarity
        self.mean = torch.empty(0)
        self._state = State(kinds, {}, None, torch.empty(0, dtype=torch.int64), 0)
        self._undo: Undo | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the copies kept."""
        return self._state.kinds

    @property
    def fields(self) -> dict[str, torch.Tensor]:
        """See ``State``."""
        return self._state.fields

    @property
    def place(self) -> torch.Tensor:
        """See ``State``."""
        return self._state.place

    @property
    def size(self) -> int:
        """Live rows."""
        return self._state.size

    def build(self, items: torch.Tensor) -> None:
        """Take a table [N, d]; item i gets id i."""
        count = items.shape[0]
        generator = torch.Generator().manual_seed(_SEED)
        order = torch.randperm(count, generator=generator).to(items.device)
        self.mean = mean_row(items, self.similarity).float().double()
        fields, width = self._allocate(items, count)
        packed = None if width is None else PackedCodes(width)
        place = torch.empty(count, dtype=torch.int64, device=items.device)
        place[order] = torch.arange(count, device=items.device)
        for start in range(0, count, BLOCK):
            ids = order[start : start + BLOCK]
            at = torch.arange(start, start + ids.numel(), device=items.device)
            made, code = self._encoded(items[ids], ids)
            for name, tensor in made.items():
                fields[name][at] = tensor
            if packed is not None and code is not None:
                packed.write(at, code)
        self._state = replace(self._state, fields=fields, packed=packed, place=place, size=count)

    def write(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite the rows of live ids."""
        state = self._state
        at = state.place[ids]
        undo = Undo(state)
        for tensor in state.fields.values():
            undo.save(tensor, at)
        codes = []
        with _Undoing(self, undo):
            for start in range(0, ids.numel(), BLOCK):
                part = slice(start, start + BLOCK)
                made, code = self._encoded(rows[part], ids[part])
                codes.append(code)
                for name, tensor in made.items():
                    state.fields[name][at[part]] = tensor
            self._write_packed(undo, at, codes)
            self._commit(replace(state, limits={}))

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows [n, d] at the end; returns their new ids."""
        state, count = self._state, rows.shape[0]
        first = state.place.numel()
        if first + count > MAX_ITEMS:
            raise ValueError(f"rows: an index numbers at most {MAX_ITEMS} items")
        fields = state.fields
        capacity = fields["ids"].shape[0]
        if state.size + count > capacity:
            larger = max(state.size + count, capacity + capacity // 2)
            fields, _ = self._allocate(rows, larger)
            for name, tensor in state.fields.items():
                fields[name][: state.size] = tensor[: state.size]
        ids = torch.arange(first, first + count, device=state.place.device)
        at = torch.arange(state.size, state.size + count, device=state.place.device)
        place = torch.cat([state.place, at])
        codes = []
        for start in range(0, count, BLOCK):  # rows behind the live ones: nobody reads them yet
            part = slice(start, start + BLOCK)
            made, code = self._encoded(rows[part], ids[part])
            codes.append(code)
            for name, tensor in made.items():
                fields[name][at[part]] = tensor
        undo = Undo(state)
        with _Undoing(self, undo):
            self._write_packed(undo, at, codes)
            size = state.size + count
            self._commit(replace(state, fields=fields, place=place, size=size, limits={}))
        return ids

    def remove(self, ids: torch.Tensor) -> None:
        """Drop live, distinct ids; rows from the end fill their places."""
        state = self._state
        kept = state.size - ids.numel()
        gone = state.place[ids]
        leaving = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        leaving[gone[gone >= kept] - kept] = True
        source = (~leaving).nonzero()[:, 0] + kept
        target = gone[gone < kept]
        moved = state.fields["ids"][source]
        undo = Undo(state)
        for tensor in state.fields.values():
            undo.save(tensor, target)
        undo.save(state.place, torch.cat([moved, ids]))
        packed = state.packed
        codes = torch.empty(0) if packed is None else packed.read(source)
        with _Undoing(self, undo):
            for tensor in state.fields.values():
                tensor[target] = tensor[source]
            state.place[moved] = target
            state.place[ids] = -1
            if packed is not None:
                undo.packed = True
                packed.write(target, codes)
                packed.truncate(kept)
            self._commit(replace(state, size=kept, limits={}))

    def rename(self, ids: torch.Tensor, next_id: int) -> None:
        """Give item i of a fresh index the id ``ids[i]``; the next new id is ``next_id``."""
        place = torch.full((next_id,), -1, dtype=torch.int64, device=ids.device)
        place[ids] = self.place
        live = self.live("ids")
        live.copy_(ids[live])
        self._state = replace(self._state, place=place)

    def keep_fine(self) -> None:
        """Keep a "fine" copy from now on, beside the int8 copy."""
        state = self._state
        if fine.KIND in state.kinds:
            return
        capacity = state.fields["ids"].shape[0]

        def refine(part: slice) -> dict[str, torch.Tensor]:
            names = ("code", "scale")
            coarse = {name: state.fields[f"{fine.COARSE_KIND}.{name}"][part] for name in names}
            return fine.refine(state.fields["rows"][part], coarse, self.similarity, self.mean)

        added = {
            f"{fine.KIND}.{name}": tensor.new_empty(capacity, *tensor.shape[1:])
            for name, tensor in refine(slice(0, 0)).items()
        }
        for start in range(0, state.size, BLOCK):
            part = slice(start, min(start + BLOCK, state.size))
            for name, tensor in refine(part).items():
                added[f"{fine.KIND}.{name}"][part] = tensor
        kinds = (*state.kinds, fine.KIND)
        self._commit(replace(state, kinds=kinds, fields=state.fields | added, limits={}))

    def repair(self) -> None:
        """Go back to the state before a change that did not end. May be interrupted and repeated;
        while anything is left to undo nobody else may use the storage."""
        undo = self._undo
        if undo is not None:
            with torch.inference_mode(False):  # what it makes can be written anywhere
                self._go_back(undo)

    def _go_back(self, undo: Undo) -> None:
        for tensor, at, held in undo.saved:
            tensor[at] = held
        state = undo.state
        if undo.packed and state.packed is not None:
            packed = PackedCodes(state.packed.width)
            for start in range(0, state.size, BLOCK):
                at = torch.arange(start, min(start + BLOCK, state.size))
                _, code = self._encoded(state.fields["rows"][at], at)
                assert code is not None  # packed codes are kept
                packed.write(at, code)
            state = replace(state, packed=packed)
        self._state = state
        self._undo = None

    def _commit(self, state: State) -> None:
        """The end of a change: from the second assignment on it counts."""
        self._state = state
        self._undo = None

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

    def aligned_rows(self) -> torch.Tensor:
        """The live rows with the zero columns behind them: [size, >= d]."""
        rows = self.live("rows")
        return rows.as_strided((self.size, rows.stride(0)), rows.stride())

    def codes(self, kind: str) -> torch.Tensor | PackedCodes:
        """The codes of a copy: live rows, and rows without meaning up to a whole group."""
        if kind == "fp16" and self._state.packed is not None:
            return self._state.packed
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
        """Of the live rows of a copy, or ("none") of the rows; kept until the next change."""
        known = self._state.limits
        if kind not in known:
            if kind == "none":
                rows, norms = self.live("rows"), self.live("norm")
                known[kind] = Limits.of_rows(rows, norms, self.similarity)
            else:
                known[kind] = Limits.of(self.fine_copy() if kind == fine.KIND else self.copy(kind))
        return known[kind]

    def _allocate(
        self, like: torch.Tensor, capacity: int
    ) -> tuple[dict[str, torch.Tensor], int | None]:
        """Fields of ``capacity`` rows, and the width of packed codes where there are some."""
        capacity = whole_groups(capacity)
        example, code = self._encoded(like[:0], self.place[:0].to(like.device))
        fields = {"rows": _empty_rows(example.pop("rows"), capacity)}
        fields |= {
            name: torch.empty(capacity, *tensor.shape[1:], dtype=tensor.dtype, device=like.device)
            for name, tensor in example.items()
        }
        return fields, None if code is None else code.shape[1]

    def _write_packed(self, undo: Undo, at: torch.Tensor, codes: list[torch.Tensor | None]) -> None:
        """Set the packed codes of rows, given by blocks of BLOCK."""
        packed = self._state.packed
        if packed is None:
            return
        undo.packed = True
        for number, code in enumerate(codes):
            if code is not None:
                packed.write(at[number * BLOCK : (number + 1) * BLOCK], code)

    def _encoded(
        self, rows: torch.Tensor, ids: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The fields of rows, and their packed codes."""
        fields = self._encode(rows, ids)
        return fields, fields.pop("fp16.code", None)

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


def _empty_rows(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Room for rows [capacity, d]; on the Triton path with zero columns behind them."""
    d = like.shape[1]
    behind = -d % ROW_MULTIPLE if means_triton(like.device) else 0
    rows = like.new_empty(capacity, d + behind)
    rows[:, d:] = 0
    return rows[:, :d]


class _Undoing:
    """``with`` it, a change of a storage's state either ends by ``Storage._commit`` or is undone.

    What cannot be undone now is undone before the next use, by ``Storage.repair``.
    """

    def __init__(self, storage: Storage, undo: Undo) -> None:
        self._storage, self._begun = storage, undo

    def __enter__(self) -> None:
        self._storage._undo = self._begun

    def __exit__(self, *raised: object) -> None:
        with suppress(Exception):  # what was raised first is what the caller hears
            self._storage.repair()
