"""Canonical scores inside Triton kernels: the bits of the definition, for every width."""

import pytest
import torch

from r2ec_kernels import item_topk
from r2ec_kernels._exact.scores import _defining_scores

INTERPRETED_TYPES = ("float32",)
# every way in which halvings meet odd widths, and powers of two, where nothing waits
WIDTHS = (*range(1, 34), 63, 64, 65, 100, 127, 129, 255)


def cancelling(count: int, d: int, seed: int) -> torch.Tensor:
    """Rows of small numbers and of large ones, of which many cancel in a product with a like row:
    what is left depends on the order of a float64 sum."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, d, generator=generator)
    large = torch.randint(-1, 2, (count, d), generator=generator) * 2.0**28
    return torch.where(torch.arange(d) % 3 == 0, values, large)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_every_width_adds_in_the_canonical_order(similarity, device):
    for d in WIDTHS:
        queries, items = cancelling(2, d, d).to(device), cancelling(48, d, 100 + d).to(device)
        want = _defining_scores(queries.double()[:, None], items.double(), similarity, 0.37)
        found = item_topk(
            queries, items, 48, similarity=similarity, temperature=0.37, impl="triton"
        )
        want = want.gather(1, found.indices) + 0.0
        assert torch.equal(found.scores, want), d


def test_the_order_matters_for_these_numbers():
    """Else the test above could not fail."""
    changed = 0
    for d in WIDTHS:
        query, items = cancelling(1, d, d).double(), cancelling(48, d, 100 + d).double()
        in_order = _defining_scores(query, items, "dot", 1.0)
        changed += int((in_order != (query * items).cumsum(1)[:, -1].float()).sum())
    assert changed > 20
