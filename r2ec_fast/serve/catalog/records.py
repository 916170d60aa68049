"""Changes of items as records of the log (`write_ahead`), and what the log belongs to."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from r2ec_fast.data import Catalog
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.serve.catalog.write_ahead import Record

FORMAT = "r2ec-fast item changes 1"
_SAMPLED_ROWS = 64  # of a table, in its fingerprint

Fields = dict[str, Any]


def log_header(model: R2ecModel, catalog: Catalog) -> Record:
    """What a log of changes to this model's table of this catalog begins with."""
    assert model.index is not None
    count = len(model.index)
    places = sorted({i * max(count - 1, 0) // (_SAMPLED_ROWS - 1) for i in range(_SAMPLED_ROWS)})
    rows = model.index.rows(places if count else []).cpu().contiguous()
    table = hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()
    ids = hashlib.sha256(repr(catalog.ids.ids).encode()).hexdigest()
    return {"format": FORMAT, "items": count, "table": table, "catalog": ids}


def to_record(
    items: Sequence[tuple[Hashable, Fields]], rows: torch.Tensor | None, gone: Sequence[Hashable]
) -> Record:
    record: Record = {}
    if items:
        assert rows is not None
        data = rows.detach().cpu().contiguous()
        record["put"] = [{"id": key, "fields": fields} for key, fields in items]
        record["rows"] = base64.b64encode(data.view(torch.uint8).numpy().tobytes()).decode()
        record["dtype"] = str(data.dtype).removeprefix("torch.")
    if gone:
        record["delete"] = list(gone)
    return record


def of_record(
    record: Record,
) -> tuple[list[tuple[Hashable, Fields]], torch.Tensor | None, list[Hashable]]:
    items = [(put["id"], put["fields"]) for put in record.get("put", ())]
    rows = None
    if items:
        data = bytearray(base64.b64decode(record["rows"]))
        rows = torch.frombuffer(data, dtype=getattr(torch, record["dtype"])).view(len(items), -1)
    return items, rows, record.get("delete", [])
