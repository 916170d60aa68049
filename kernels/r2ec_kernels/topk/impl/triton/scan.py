"""The coarse scan of a search: which of its kernels runs, and what all of them need."""

from functools import partial

import torch
import triton

from ...._scan.triton_exclusions import Exclusions, TilePairs, pairs_by_tile
from .factors import limits_of, row_factors
from .groups import GroupBest, Scanned, num_groups
from .launch import Launch, choose
from .product import run_product
from .tiles import run_tiles
from .wide import run_wide


def group_best(
    scanned: Scanned,
    operand: torch.Tensor,
    group: int,
    excluded: Exclusions | None = None,
    place: torch.Tensor | None = None,
) -> GroupBest:
    """The two best scores of every group of rows, for each query of ``operand`` [B, d].

    place: int64, the row of each excluded id; None: ids are rows.
    """
    codes = scanned.codes
    config = choose(
        operand.shape[0],
        codes.element_size(),
        operand.shape[1],
        codes.device,
        lambda config: triton.testing.do_bench(partial(_scan, scanned, operand, group, config)),
        scanned.takes_norms,
    )
    pairs = None
    if excluded is not None:
        pairs = pairs_by_tile(
            excluded,
            operand.shape[0],
            tile_rows=config.block_n,
            tile_queries=config.block_m,
            row_tiles=triton.cdiv(codes.shape[0], config.block_n),
            place=place,
        )
    return _scan(scanned, operand, group, config, pairs)


def _scan(
    scanned: Scanned,
    operand: torch.Tensor,
    group: int,
    config: Launch,
    pairs: TilePairs | None = None,
) -> GroupBest:
    """Scan with one configuration."""
    (batch, d), codes = operand.shape, scanned.codes
    count, device = codes.shape[0], codes.device
    span = group if config.kind == "tiles" else config.block_n
    groups = num_groups(count, group, span)
    first = torch.empty(batch, groups, dtype=torch.int32, device=device)
    second = torch.empty_like(first)
    if config.kind == "tiles":
        norms = None
        if scanned.takes_norms:
            row_tiles = triton.cdiv(count, config.block_n)
            norms = torch.zeros(3, row_tiles, dtype=torch.float32, device=device)
        run_tiles(scanned, operand, group, first, second, norms, pairs, config)
        return GroupBest(first, second, limits_of(scanned, norms), span)
    factors = row_factors(scanned, d, config.block_n)
    run = run_wide if config.kind == "fused" else run_product
    run(codes, operand, group, first, second, factors, pairs, config)
    return GroupBest(first, second, factors.limits, span)
