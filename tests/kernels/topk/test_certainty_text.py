"""Exact search of encoded titles, rows that lie as a language model's do: no list overflows.

On a GPU the kernels run as they are. In the interpreter torch makes the scan's products
(``_support.scan_stand_in``).

Where the rows' mean is long, a query is long too, and the error bound of codes is its length times
what a code misses. int8 misses so much of 576 columns, or where cosine divides the length out, that
a list of all rows would hardly be longer; bf16 does for one of 16 queries of hashed titles by
cosine, 576 columns. Those cases are not here.
"""

import functools

import pytest
import torch
from _support.encoded_titles import (
    SHARED_COSINE,
    hashed,
    model_folder,
    model_states,
    parts_of,
    titles,
)
from _support.scan_stand_in import count_lists, use_stand_in
from _support.search_cases import assert_same

from r2ec_kernels import ItemIndex, item_topk

pytestmark = pytest.mark.real_data
SCANS = ("none", "bf16", "int8")
NUM_STATES = 12_800


@pytest.fixture(autouse=True)
def on_the_triton_path(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")


@pytest.fixture(autouse=True)
def is_stored(request):
    """Skips here too, not only in the interpreter's process."""
    titles()
    if request.node.callspec.params.get("encoding", "").startswith("model"):
        model_folder()


@functools.cache
def encoded(encoding: str, device: str) -> torch.Tensor:
    """Rows in random order."""
    kind, size = encoding.split()
    if kind == "model":
        rows = model_states(titles(), int(size), device)
    elif kind == "titles":
        rows = hashed(list(dict.fromkeys(titles())), int(size))
    else:
        rows = hashed(parts_of(titles(), 100_000), int(size))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    return rows[order.to(rows.device)].to(device)


def split(encoding: str, device: str, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = encoded(encoding, device)
    return rows[:queries].contiguous(), rows[queries:].contiguous()


def test_two_rows_are_as_alike_as_said(device):
    for encoding in ("titles 128", "titles 576"):
        rows = torch.nn.functional.normalize(encoded(encoding, device)[:2000])
        assert abs((rows @ rows.T).mean().item() - SHARED_COSINE) < 0.01
        assert (rows[1:] * rows[:-1]).sum(1).std() > 0.002  # and they are not all alike


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    *(("titles 128", "dot", scan) for scan in SCANS),
    *(("titles 128", "cosine", scan) for scan in SCANS[:2]),
    *(slow("titles 576", "dot", scan) for scan in SCANS[:2]),
    slow("titles 576", "cosine", "none"),
    *(slow(f"model {NUM_STATES}", "dot", scan) for scan in SCANS[:2]),
    *(slow(f"model {NUM_STATES}", "cosine", scan) for scan in SCANS[:2]),
]


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize(("encoding", "similarity", "scan"), CASES)
def test_titles(encoding, similarity, scan, k, device, monkeypatch):
    queries, rows = split(encoding, device, 3 if device == "cpu" else 200)
    if device == "cpu":
        use_stand_in(monkeypatch, rows.shape[1])
    index = ItemIndex(rows, scan=scan, similarity=similarity)
    found = index.search(queries, k)
    assert index.last_search.dense_rows == 0, index.last_search
    assert_same(found, item_topk(queries, rows, k, similarity=similarity, impl="reference"))


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize(("encoding", "similarity", "scan"), CASES)
def test_lists_of_a_large_batch_have_room(encoding, similarity, scan, k, device, monkeypatch):
    queries, rows = split(encoding, device, 16)
    index = ItemIndex(rows, scan=scan, similarity=similarity)
    lists = count_lists(monkeypatch, batch=1024)
    index.search(queries, k)
    assert (lists[0].rows <= lists[0].capacity).all(), lists


@pytest.mark.slow
@pytest.mark.parametrize(
    ("similarity", "scan"), [*(("dot", scan) for scan in SCANS), ("cosine", "none")]
)
def test_a_thousand_parts_of_titles(similarity, scan, device, monkeypatch):
    """All rows are listed where k is above N / 64: 100,000 parts of titles are enough for 1,000."""
    queries, rows = split("parts 128", device, 3 if device == "cpu" else 200)
    if device == "cpu":
        use_stand_in(monkeypatch, rows.shape[1])
    index = ItemIndex(rows, scan=scan, similarity=similarity)
    found = index.search(queries, 1000)
    assert index.last_search.dense_rows == 0, index.last_search
    assert_same(found, item_topk(queries, rows, 1000, similarity=similarity, impl="torch"))
