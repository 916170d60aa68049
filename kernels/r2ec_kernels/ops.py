"""torch.library schemas and fakes. Implementations are imported when an op first runs."""

import torch

LIBRARY = torch.library.Library("r2ec_kernels", "DEF")

# ---- search ------------------------------------------------------------------------------------

LIBRARY.define(
    "item_topk(Tensor queries, Tensor items, SymInt k, str similarity, float temperature, "
    "Tensor? exclude, Tensor? exclude_offsets, str impl) -> (Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "item_topk", "CompositeExplicitAutograd")
def _item_topk(queries, items, k, similarity, temperature, exclude, exclude_offsets, impl):
    from .search.run import item_topk

    pair = exclude if exclude_offsets is None else (exclude, exclude_offsets)
    return item_topk(queries, items, k, similarity, temperature, pair, impl)


@torch.library.register_fake("r2ec_kernels::item_topk", lib=LIBRARY)
def _item_topk_fake(queries, items, k, similarity, temperature, exclude, exclude_offsets, impl):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(
        shape, dtype=torch.int64
    )


# ---- reward and policy -------------------------------------------------------------------------
