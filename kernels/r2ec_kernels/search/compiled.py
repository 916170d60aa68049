"""The compiled first passes of ``kernels/csrc``: on a CPU, scores are filtered where they are made.

They replace the torch operations that follow every block of products (about 25 a block) and multiply
int8 codes with a few queries at the speed at which memory brings them. Without the extension, and
on other devices, ``engine`` does the same in torch: results are equal, time differs.
"""

import torch

try:
    from .. import _first_pass
except ImportError:  # built without it: R2EC_BUILD_EXTENSION=0, or no compiler
    _first_pass = None

CODE_BATCH = 16  # queries up to which int8 codes may be multiplied here; more: a matrix library
FLOAT_BATCH = 8  # the same of float32 rows
_FLOAT_COLUMNS = 16  # queries of a float pass are padded to a multiple
_ROUNDING = 2.0**-22  # of a bound's own arithmetic, relative to the score


def available(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be scanned by compiled code."""
    return device.type == "cpu" and _first_pass is not None


def cpu_kind() -> str | None:
    """"avx512", "avx2" or "portable": what the compiled passes use; None without them."""
    return None if _first_pass is None else _first_pass.cpu_kind()


class Collector:
    """The rows that may still be among the k best of each query, filled by passes over a table."""

    def __init__(
        self, batch: int, k: int, limit: int, excluded: torch.Tensor, cpu: str = ""
    ) -> None:
        """limit: candidates of a query beyond which it is given up; excluded: int64 [E], row *
        batch + query of pairs that are not wanted, in any order; cpu: see ``cpu_kind``."""
        pairs = excluded.sort().values.numpy()
        self._collector = _first_pass.Collector(
            batch, k, limit, torch.get_num_threads(), pairs, cpu
        )

    def add_codes(
        self,
        codes: torch.Tensor,
        num_rows: int,
        scale: torch.Tensor | None,
        half: torch.Tensor | None,
        trusted: torch.Tensor | None,
        queries: torch.Tensor,
        step: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        """Offer the raw scores scale * step * code . query - half of all rows.

        Args:
            codes: int8 [num_rows or more, d], d a multiple of 64.
            scale, half: float32 [num_rows], or None: 1 and 0.
            trusted: bool [num_rows], or None: rows that are not are left out.
            queries: int16 [B, d], so small that no product leaves int32; step: float32 [B].
            error: float32 [B], bound of the raw scores' errors.
        """
        self._collector.codes(
            codes.numpy(),
            num_rows,
            *map(_array, (scale, half, trusted, queries, step, error)),
            _ROUNDING,
        )

    def add_rows(
        self,
        rows: torch.Tensor,
        queries: torch.Tensor,
        norm: torch.Tensor,
        floor: torch.Tensor,
        unit: float,
        similarity: str,
        huge: float,
    ) -> torch.Tensor:
        """Offer the raw scores (``bounds``) of float32 rows [N, d] with columns side by side.

        Returns the rows int64 [M] whose norms, outside 1/huge..huge, leave a score unbounded.
        """
        padded = torch.nn.functional.pad(queries, (0, -queries.shape[1] % _FLOAT_COLUMNS))
        doubtful = self._collector.floats(
            _array(rows), _array(padded), _array(norm), _array(floor), unit, similarity, huge
        )
        return torch.from_numpy(doubtful)

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
        self._collector.products(_array(products), start, num_rows, *own, relative + _ROUNDING)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Candidate rows int64 [B, C], -1 behind the last; queries given up, bool [B]; how many
        scores met a threshold."""
        rows, failed, opened = self._collector.finish()
        return torch.from_numpy(rows), torch.from_numpy(failed), opened


def multiply_codes(
    codes: torch.Tensor, queries: torch.Tensor, step: torch.Tensor, out: torch.Tensor
) -> None:
    """out [n, B] = step * codes int8 [n, d] . queries int16 [B, d]; see ``Collector.add_codes``."""
    arrays = map(_array, (codes, queries, step, out))
    _first_pass.multiply_codes(*arrays, torch.get_num_threads())


def _array(tensor: torch.Tensor | None):
    return None if tensor is None else tensor.detach().numpy()
