"""target_stats on the tensor cores: one scan, and what makes it exact, without a host decision.

    prepare   queries in the scan's type, and their bounds     (``_scan.triton_queries``)
    origin    the targets' scores                              (``triton_exact``)
    stats     ranks, near-ties and log-sum-exps of all rows    (``triton_scan``)
    compare, merge, every, finish: the exact end               (``triton_exact``)

Memory above the inputs: 12 bytes a query and split, and 4 for each of a query's ``ROOM`` near-ties.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..._exact.included import as_mask
from ..._exact.table import Table
from ..._numbers import UNIT
from ..._scan.triton_exclusions import Exclusions, pairs_by_tile
from ..._scan.triton_queries import DeviceQueries, prepare_on_device
from . import triton_exact as exact
from . import triton_scan
from .triton_scan import Tile, scan_unit, stats_kernel, tile_for

PROGRAMS = 528  # of the scan, about: four a multiprocessor
# programs that compare near-ties, and splits of all rows for a query that needs them; Triton's
# interpreter runs one after the other
COMPARING, EVERY_SPLITS = (1, 2) if triton.knobs.runtime.interpret else (1056, 64)
ROOM = 2048  # near-ties of a query; more for few queries
MOST_ROOM = 1 << 20  # near-ties of a batch, where that is more
BLOCK_ITEMS = BLOCK_QUERIES = None  # of a tile; None: those of ``triton_scan.TILES``
BLOCK_SIZES = ("BLOCK_ITEMS", "BLOCK_QUERIES", "PROGRAMS", "ROOM", "MOST_ROOM")  # for tests
SCORED_TILE = 4096  # columns of the rows that a program scores at once
EVERY_TILE = 1024  # the same, where there is more to remember
_MAX_ROWS = 32
BLOCK_EXCLUDED = 64
BLOCK_SPLITS = 128


@dataclass(frozen=True)
class Norms:
    """The rows' norms float32 [N], and the largest [3] as a scan reads it (``index.quantize``)."""

    rows: torch.Tensor
    limits: torch.Tensor


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    excluded: Exclusions | None,
    include: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) over a plain table.

    target_rows: [B, d], the targets' rows where some are foreign (``table_stats``).
    """
    items = items if items.stride(1) == 1 else items.contiguous()
    allowed = None if include is None else as_mask(include, items.shape[0])
    table = Table(items, allowed=allowed)
    scoring = similarity, temperature
    return table_stats(queries, table, targets, *scoring, excluded, None, target_rows=target_rows)


def table_stats(
    queries: torch.Tensor,
    table: Table,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    excluded: Exclusions | None,
    norms: Norms | None,
    place: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of ``targets`` int64 [B] in a table.

    Args:
        norms: of the rows; None: taken by the scan.
        place: int64, the row of each id; an id without one (-1, or beyond) has rank -1 and NaN.
            None: targets and exclusions are rows.
        target_rows: [B, d], the targets' rows, in the table's type, where some are foreign: they
            are no rows of the table and stand at -1, before all of them, or at N, behind them.
            Without ``place`` and ids only. None: the table's.
    """
    rows, batch = table.rows, queries.shape[0]
    rank = torch.empty(batch, dtype=torch.int64, device=rows.device)
    log_prob = torch.empty(batch, dtype=torch.float32, device=rows.device)
    if not batch:
        return rank, log_prob
    query = prepare_on_device(
        queries,
        similarity,
        temperature,
        rows.dtype,
        width=rows.shape[1],
        low=rows.dtype != torch.float32,
    )
    call = _Call(query, table, excluded, norms, place, target_rows)
    call.find_origin(targets)
    if similarity != "l2":
        call.scan()
        call.merge(rank, log_prob)
    call.search_every(rank, log_prob)
    return rank, log_prob


class _Call:
    """One batch against one table, and what its kernels hand to each other."""

    def __init__(
        self,
        query: DeviceQueries,
        table: Table,
        excluded: Exclusions | None,
        norms: Norms | None,
        place: torch.Tensor | None,
        target_rows: torch.Tensor | None,
    ) -> None:
        self.query, self.table = query, table
        self.excluded, self.norms, self.place = excluded, norms, place
        self.target_rows = None if target_rows is None else target_rows.contiguous()
        batch, device = len(query), table.rows.device
        self.allowed = None if table.allowed is None else table.allowed.view(torch.int8)
        self.target, self.origin, self.logit = torch.empty(3, batch, device=device)
        self.moved = torch.empty(batch, dtype=torch.float64, device=device)
        self.targets = torch.empty(batch, dtype=torch.int64, device=device)  # rows
        # int64: near-ties that are ahead; then int32: near-ties, and states
        zeros = torch.zeros(2 * batch + 1, dtype=torch.int64, device=device)
        self.wins = zeros[:batch]
        self.near, self.state = zeros[batch:].view(torch.int32).tensor_split([batch])
        width = triton.next_power_of_2(max(1, query.original.shape[1]))
        self.width = {"WIDTH": width, "LEVELS": width.bit_length() - 1}
        self.tile_rows = rows_of_tile(width, SCORED_TILE)
        self.warps = 4 if width <= SCORED_TILE else 8 if width <= 2 * SCORED_TILE else 16

    def _shared(self) -> dict[str, Any]:
        """The arguments of the kernels that score rows canonically."""
        query, rows = self.query, self.table.rows
        return {
            "q_ptr": query.original,
            "x_ptr": rows,
            "targets_ptr": self.targets,
            "target_ptr": self.target,
            "d": query.original.shape[1],
            "stride_q": query.original.stride(0),
            "stride_x": rows.stride(0),
            "temperature": query.temperature_bits,
            **self.width,
            "SIMILARITY": query.similarity,
            "num_warps": self.warps,
            "enable_fp_fusion": False,  # a squared difference is rounded before it is added
        }

    def find_origin(self, wanted: torch.Tensor) -> None:
        exact.origin_kernel[(len(self.query),)](
            wanted_ptr=wanted.contiguous(),
            place_ptr=self.place,
            num_places=0 if self.place is None else self.place.numel(),
            HAS_PLACE=self.place is not None,
            own_ptr=self.target_rows,
            HAS_OWN=self.target_rows is not None,
            origin_ptr=self.origin,
            logit_ptr=self.logit,
            moved_ptr=self.moved,
            state_ptr=self.state,
            **self._shared(),
        )

    def scan(self) -> None:
        query, rows = self.query, self.table.rows
        (count, d), batch, device = rows.shape, len(query), rows.device
        tile = self._tile()
        row_tiles, query_tiles = triton.cdiv(count, tile.block_n), triton.cdiv(batch, tile.block_m)
        pairs = pairs_by_tile(
            self.excluded,
            batch,
            tile_rows=tile.block_n,
            tile_queries=tile.block_m,
            row_tiles=row_tiles,
            place=self.place,
            targets=self.targets,
        )
        splits = max(1, min(row_tiles, PROGRAMS // query_tiles))
        per_split = triton.cdiv(row_tiles, splits)
        self.splits = triton.cdiv(row_tiles, per_split)
        self.ahead = torch.empty(self.splits, batch, dtype=torch.int32, device=device)
        self.m, self.l = torch.empty(2, self.splits, batch, device=device)
        self.room = max(ROOM, MOST_ROOM // batch)
        near_row = torch.empty(batch, self.room, dtype=torch.int32, device=device)
        interpreted = triton.knobs.runtime.interpret
        tf32 = rows.dtype == torch.float32 and not interpreted and not torch.version.hip
        stats_kernel[(query_tiles, self.splits)](
            x_ptr=rows,
            q_ptr=query.operand,
            low_ptr=query.low,
            norm_ptr=None if self.norms is None else self.norms.rows,
            bounds_ptr=query.bounds,
            limits_ptr=None if self.norms is None else self.norms.limits,
            origin_ptr=self.origin,
            logit_ptr=self.logit,
            pair_ptr=pairs.keys,
            pair_start_ptr=pairs.start,
            allowed_ptr=self.allowed,
            ahead_ptr=self.ahead,
            m_ptr=self.m,
            l_ptr=self.l,
            near_ptr=self.near,
            near_row_ptr=near_row,
            state_ptr=self.state,
            num_items=count,
            num_queries=batch,
            d=d,
            tiles_per_split=per_split,
            room=self.room,
            stride_x=rows.stride(0),
            stride_q=query.operand.stride(0),
            unit=scan_unit(query, rows, tile.block_d),
            origin_unit=6 * UNIT,
            COSINE=query.similarity == "cosine",
            TAKE_NORM=self.norms is None,
            HAS_LOW=query.low is not None,
            HAS_ALLOWED=self.allowed is not None,
            PRECISION="tf32x3" if tf32 else "ieee",
            WIDEN=interpreted,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        parts = max(1, min(COMPARING // batch, triton.cdiv(self.room, self.tile_rows)))
        exact.compare_kernel[(batch, parts)](
            ids_ptr=self.table.ids,
            near_ptr=self.near,
            near_row_ptr=near_row,
            wins_ptr=self.wins,
            room=self.room,
            ROWS=self.tile_rows,
            HAS_IDS=self.table.ids is not None,
            **self._shared(),
        )

    def merge(self, rank: torch.Tensor, log_prob: torch.Tensor) -> None:
        batch = len(self.query)
        exact.merge_kernel[(batch,)](
            ahead_ptr=self.ahead,
            m_ptr=self.m,
            l_ptr=self.l,
            wins_ptr=self.wins,
            target_ptr=self.target,
            moved_ptr=self.moved,
            state_ptr=self.state,
            rank_ptr=rank,
            log_prob_ptr=log_prob,
            near_ptr=self.near,
            room=self.room,
            num_queries=batch,
            num_splits=self.splits,
            BLOCK_S=BLOCK_SPLITS,
            num_warps=4,
        )

    def search_every(self, rank: torch.Tensor, log_prob: torch.Tensor) -> None:
        batch, count, device = len(self.query), len(self.table), rank.device
        tile_rows = rows_of_tile(self.width["WIDTH"], EVERY_TILE)
        splits = min(EVERY_SPLITS, triton.cdiv(count, tile_rows))
        counts = torch.empty(batch, splits, 4, dtype=torch.int64, device=device)
        sums = torch.empty(batch, splits, 2, dtype=torch.float64, device=device)
        excluded = self.excluded
        exact.every_kernel[(batch, splits)](
            ids_ptr=self.table.ids,
            exclude_ptr=None if excluded is None else excluded.ids,
            exclude_start_ptr=None if excluded is None else excluded.start,
            allowed_ptr=self.allowed,
            state_ptr=self.state,
            counts_ptr=counts,
            sums_ptr=sums,
            num_items=count,
            rows_per_split=triton.cdiv(count, splits),
            ROWS=tile_rows,
            HAS_IDS=self.table.ids is not None,
            HAS_EXCLUDE=excluded is not None,
            HAS_ALLOWED=self.allowed is not None,
            BLOCK_E=BLOCK_EXCLUDED,
            **self._shared() | {"num_warps": max(self.warps, every_warps(self.width["WIDTH"]))},
        )
        exact.finish_kernel[(batch,)](
            counts_ptr=counts,
            sums_ptr=sums,
            targets_ptr=self.targets,
            num_items=count,
            HAS_OWN=self.target_rows is not None,
            target_ptr=self.target,
            state_ptr=self.state,
            rank_ptr=rank,
            log_prob_ptr=log_prob,
            num_splits=splits,
            BLOCK_S=triton.next_power_of_2(EVERY_SPLITS),
            num_warps=1,
        )

    def _tile(self) -> Tile:
        tile = tile_for(len(self.query), self.table.rows)
        return Tile(
            BLOCK_QUERIES or tile.block_m,
            BLOCK_ITEMS or tile.block_n,
            tile.block_d,
            tile.num_warps,
            tile.num_stages,
        )


def rows_of_tile(width: int, columns: int) -> int:
    """Rows of ``width`` columns that a program scores at once, of about ``columns`` in all."""
    return min(_MAX_ROWS, max(1, columns // width))


def every_warps(width: int) -> int:
    """Of ``every_kernel``, so that registers hold a row of so many columns."""
    return 8 if width >= 1024 else 4


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    from . import triton_shipped

    return [*triton_scan.aot_configs(), *triton_shipped.aot_configs()]
