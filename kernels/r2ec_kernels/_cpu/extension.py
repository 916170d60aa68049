"""The compiled coarse scans of ``kernels/csrc``: on a CPU, scores are filtered where they are
made.

They replace the torch operations that follow every block of products (about 25 a block), multiply
int8 codes with a few queries at the speed at which memory brings them, and float32 rows by the
AMX tiles of CPUs that have them. Without the extension, and on other devices, torch does the
same: results are equal, time differs. ``R2EC_CPU`` and ``use_cpu`` choose what they run as.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .._exact.bounds import Queries
from .._numbers import HUGE

try:
    from . import _native  # type: ignore[attr-defined]  # compiled; it has no stubs
except ImportError:  # built without it: R2EC_BUILD_EXTENSION=0, or no compiler
    _native = None

_CODE_BATCH, _CODE_BATCH_AMX = 16, 64  # queries up to which int8 codes are worth multiplying here
_cpu = os.environ.get("R2EC_CPU", "")  # "": the best that this one can; "none": torch
_FLOAT_BATCH, _FLOAT_BATCH_AMX = 8, 1024  # the same of float32 rows
LOW_PARTS = 254  # of a step of an int8 code: the steps of a second one (kLowParts in C++)
_KINDS: list[str] = [] if _native is None else _native.cpu_kinds()
_ROUNDING = 2.0**-22  # of a bound's own arithmetic, relative to the score


def available(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be scanned by compiled code."""
    return device.type == "cpu" and _native is not None and _cpu != "none"


def cpu_kind() -> str | None:
    """What the compiled scans run as: "amx", "avx512", "avx2" or "portable"; None without them."""
    return None if _native is None or _cpu == "none" else _cpu or _KINDS[0]


def cpu_kinds() -> list[str]:
    """What they can run as on this CPU, the best first, and "none": torch does the work."""
    return [*_KINDS, "none"]


@contextmanager
def use_cpu(kind: str) -> Iterator[None]:
    """Run as one of ``cpu_kinds()``, whatever ``R2EC_CPU`` says. For tests and measurements; in all
    threads.

    Raises:
        ValueError: this CPU is of another kind.
    """
    global _cpu
    before, _cpu = _cpu, _checked("kind", kind)
    try:
        yield
    finally:
        _cpu = before


def _checked(source: str, kind: str) -> str:
    if kind not in cpu_kinds():
        raise ValueError(f"{source}: expected one of {', '.join(cpu_kinds())}, got {kind!r}")
    return kind


if _cpu:
    _checked("R2EC_CPU", _cpu)


class Codes(NamedTuple):
    """Rows as int8 codes and queries for them: raw scores are scale * step * code . query - half.

    codes: int8 [num_rows or more, d], d a multiple of 64; scale, half: float32 [num_rows], or None:
    1 and 0; bounded: bool [num_rows], or None: all; others are excluded. queries: int16 [B, d],
    so small that no product leaves int32; step: float32 [B]; error: float32 [B], bound of the raw
    scores' errors.
    """

    codes: torch.Tensor
    num_rows: int
    scale: torch.Tensor | None
    half: torch.Tensor | None
    bounded: torch.Tensor | None
    queries: torch.Tensor
    step: torch.Tensor
    error: torch.Tensor

    def arrays(self) -> Any:
        codes, num_rows, *others = self
        return _native.CodeArrays(_array(codes), num_rows, *map(_array, others))


class Collector:
    """The rows that may still be among the k best of each query, filled by scans of a table."""

    def __init__(self, batch: int, k: int, limit: int, excluded: torch.Tensor) -> None:
        """limit: candidates of a query beyond which it is given up; excluded: int64 [E], row *
        batch + query of pairs that are not wanted, in any order."""
        pairs = (excluded.sort().values if excluded.numel() else excluded).numpy()
        self._scan = _native.TopkScan(batch, k, limit, torch.get_num_threads(), pairs, _cpu)

    def add_codes(self, codes: Codes) -> None:
        """Offer the raw scores of all rows."""
        self._scan.scan_codes(codes.arrays(), _ROUNDING)

    def add_rows(self, rows: torch.Tensor, query: Queries) -> torch.Tensor:
        """Offer the raw scores (``bounds``) of rows [N, d] that ``fits``.

        Returns the rows int64 [M] whose norms leave a score unbounded, in any order.
        """
        return torch.from_numpy(self._scan.scan_floats(_float_arrays(rows, query)))

    def add_products(
        self,
        products: torch.Tensor,
        start: int,
        num_rows: int,
        scale: torch.Tensor | None,
        half: torch.Tensor | None,
        error: torch.Tensor,
        relative: float,
    ) -> None:
        """Offer the raw scores product * scale - half of rows start..start+num_rows-1.

        Args:
            products: float32 or bfloat16 [num_rows or more, B], or float32 with rows side by side.
            scale, half: float32 [num_rows], or None: 1 and 0.
            error: float32 [B], and relative: errors are at most error + relative |product scale|.
        """
        if products.dtype == torch.bfloat16:
            products = products.view(torch.uint16)
        own = map(_array, (scale, half, error))
        self._scan.scan_products(_array(products), start, num_rows, *own, relative + _ROUNDING)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Candidate rows int64 [B, C], -1 behind the last; queries given up, bool [B]; how many
        scores met a threshold."""
        rows, failed, met = self._scan.finish()
        return torch.from_numpy(rows), torch.from_numpy(failed), met


def row_search(
    rows: torch.Tensor,
    queries: torch.Tensor,
    similarity: str,
    temperature: float,
    k: int,
    limit: int,
    excluded: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> Any:
    """The compiled half of ``_scan.row_search.search``, for rows that it ``reads``."""
    arrays = map(_array, (rows, queries))
    settings = similarity, temperature, HUGE, k, limit
    left_out = map(_array, (excluded, offsets))
    return _native.RowSearch(*arrays, *settings, *left_out, torch.get_num_threads(), _cpu)


def reads(rows: torch.Tensor) -> bool:
    """Whether rows [N, d] are of the kind that compiled code reads."""
    side_by_side = rows.shape[-1] == 1 or rows.stride(-1) == 1
    return available(rows.device) and rows.dtype == torch.float32 and side_by_side


def multiplies_codes(device: torch.device, batch: int) -> bool:
    """Whether int8 codes on ``device`` may be multiplied here with ``batch`` queries; where there
    are more, matrix libraries are faster."""
    return available(device) and batch <= (_CODE_BATCH_AMX if cpu_kind() == "amx" else _CODE_BATCH)


def has_amx() -> bool:
    """Whether AMX tiles multiply int8 codes as fast as memory brings them, for many queries too."""
    return cpu_kind() == "amx"


def fits(rows: torch.Tensor, batch: int) -> bool:
    """Whether products of these rows with ``batch`` queries are made here, faster than by a matrix
    library: float32 with columns side by side, and few queries unless there are AMX tiles."""
    return reads(rows) and batch <= (_FLOAT_BATCH_AMX if cpu_kind() == "amx" else _FLOAT_BATCH)


class RankTargets(NamedTuple):
    """The targets of a batch, with which a scan compares scores, and what is excluded.

    raw: float64 [B], the targets' raw scores; rounded: the same in float32; logit: float32 [B],
    of a unit of raw score, in units of log 2; l: float64 [B], the targets' own terms of the sum;
    excluded: int64 [E], row * B + query of pairs that do not compete, the targets' among them.
    """

    raw: torch.Tensor
    rounded: torch.Tensor
    logit: torch.Tensor
    l: torch.Tensor
    excluded: torch.Tensor

    def arrays(self) -> Any:
        ordered = self._replace(excluded=self.excluded.sort().values)
        return _native.RankQueryArrays(*map(_array, ordered))


class Stats(NamedTuple):
    """What a scan finds of each query.

    m: float32 [B], the largest logit relative to the target's, in units of log 2, at least 0; l:
    float64 [B], the sum of 2^(logit - m); ahead: int64 [B], rows certainly ahead of the target;
    near_ties: int64 [M], row * B + query of pairs to re-score exactly. complete: False where some
    row's score could not be bounded, or near-ties are too many; nothing counts then. None of it
    depends on the number of threads.
    """

    complete: bool
    m: torch.Tensor
    l: torch.Tensor
    ahead: torch.Tensor
    near_ties: torch.Tensor


def stats(rows: torch.Tensor, query: Queries, targets: RankTargets, most_near: int) -> Stats:
    """One scan of rows [N, d] that ``fits``, for dot and cosine.

    most_near: near-ties beyond which it stops, a share of which each part of the table has.
    """
    arrays = _float_arrays(rows, query), targets.arrays()
    return _stats(_native.rank_stats(*arrays, most_near, torch.get_num_threads(), _cpu))


def code_stats(codes: Codes, low: torch.Tensor, targets: RankTargets, most_near: int) -> Stats:
    """The same over rows as two codes, scale * (code + low / ``LOW_PARTS``); low: int8, shaped as
    the codes."""
    arrays = codes.arrays(), _array(low), targets.arrays()
    return _stats(_native.code_rank_stats(*arrays, most_near, torch.get_num_threads(), _cpu))


def _stats(found: tuple) -> Stats:
    complete, *arrays = found
    return Stats(complete, *map(torch.from_numpy, arrays))


def multiply_codes(
    codes: torch.Tensor, queries: torch.Tensor, step: torch.Tensor, out: torch.Tensor
) -> None:
    """out float32 [B, n] = step * queries int16 [B, d] . codes int8 [n, d]; limits of their values
    as for ``Collector.add_codes``."""
    arrays = map(_array, (codes, queries, step, out))
    _native.multiply_codes(*arrays, torch.get_num_threads(), _cpu)


def pair_scores(
    queries: torch.Tensor,
    rows: torch.Tensor,
    of: torch.Tensor,
    at: torch.Tensor,
    similarity: str,
    temperature: float,
) -> torch.Tensor:
    """As ``_exact.scores.pair_scores``, for rows that it ``reads``."""
    scoring = _native.ScoringArrays(_array(rows), _array(queries.double()), similarity, temperature)
    found = _native.pair_scores(scoring, _array(of), _array(at), torch.get_num_threads())
    return torch.from_numpy(found)


def best_keys(
    query: Queries,
    rows: torch.Tensor,
    ids: torch.Tensor | None,
    candidates: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """The k largest order keys [B, k] of candidates int64 [B, C] (positions in ``rows``, -1 for
    none), for rows that it ``reads``; ``ids``: of each row, or None: its position."""
    scoring = _native.ScoringArrays(
        _array(rows), _array(query.original.double()), query.similarity, query.temperature
    )
    found = _native.best_keys(scoring, _array(ids), _array(candidates), k, torch.get_num_threads())
    return torch.from_numpy(found)


def _float_arrays(rows: torch.Tensor, query: Queries) -> Any:
    arrays = map(_array, (rows, query.scaled, query.norm, query.floor))
    return _native.FloatArrays(*arrays, query.similarity, HUGE)


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()
