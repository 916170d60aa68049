"""Error bounds of the products over codes."""

import pytest
import torch

from r2ec_kernels._scan.blocks import Buffer
from r2ec_kernels.index.products import PRODUCTS

TO_BF16 = [p for products in PRODUCTS.values() for p in products if p.rounding]


@pytest.mark.parametrize("batch", [1, 3, 16, 70])
@pytest.mark.parametrize("dim", [64, 128, 320])
@pytest.mark.parametrize("product", TO_BF16, ids=lambda product: product.name)
def test_a_product_rounds_finished_sums_only(product, dim, batch):
    # the halves of a sum cancel: had a partial sum been rounded, the result would be far off
    generator = torch.Generator().manual_seed(dim + batch)
    half = torch.randint(-127, 128, (4096, dim // 2), generator=generator)
    codes = torch.cat([half, -half], 1)
    codes[:, 0] += half[:, 0].sign()  # what is left of it
    codes = codes.clamp(-127, 127).to(torch.int8 if "int8" in product.name else torch.bfloat16)
    query = torch.randn(batch, dim // 2, generator=generator).repeat(1, 2).double()
    operand = product.prepare(query)
    found = product.run(codes, 0, len(codes), operand, Buffer(codes.device)).double()
    used = operand.value.double()
    exact = codes.double() @ used.T
    size = torch.linalg.vector_norm(codes.double(), dim=1)[:, None] * used.norm(dim=1)
    allowed = product.rounding * found.abs() + (dim + 4) * product.addition * size
    assert ((found - exact).abs() <= allowed).all()
