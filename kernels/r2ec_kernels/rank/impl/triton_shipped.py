"""Configurations of the kernels of ``triton_exact`` that ship, and their budgets."""

from typing import Any

import triton

from . import triton as launcher
from . import triton_exact as exact

# Of ``aot --budget``, on sm_90: all instructions, by kernel, type and columns. What the code holds,
# 3 to 5% above.
_BUDGET = {
    ("rank.origin", "bf16", 128): 461,
    ("rank.origin", "bf16", 1000): 602,
    ("rank.origin", "bf16", 4096): 1160,
    ("rank.origin", "fp32", 1000): 550,
    ("rank.origin", "fp16", 1000): 465,
    ("rank.compare", "bf16", 128): 6160,
    ("rank.compare", "bf16", 1000): 1362,
    ("rank.compare", "bf16", 4096): 1214,
    ("rank.compare", "fp32", 1000): 990,
    ("rank.compare", "fp16", 1000): 837,
    ("rank.every", "bf16", 128): 2560,
    ("rank.every", "bf16", 1000): 870,
    ("rank.every", "bf16", 4096): 1494,
    ("rank.every", "fp32", 1000): 714,
    ("rank.every", "fp16", 1000): 687,
}


def aot_configs() -> list[dict[str, Any]]:
    """Of the kernels of ``triton_exact``, for ahead-of-time compilation."""
    kinds = {"temperature": "i64", "moved_ptr": "*fp64", "sums_ptr": "*fp64"}
    for name in (
        "wanted",
        "place",
        "targets",
        "ids",
        "exclude",
        "exclude_start",
        "counts",
        "wins",
        "rank",
    ):
        kinds[f"{name}_ptr"] = "*i64"
    kinds["allowed_ptr"] = "*i8"
    for name in ("state", "ahead", "near", "near_row"):
        kinds[f"{name}_ptr"] = "*i32"
    names = ("HAS_IDS", "HAS_PLACE", "HAS_EXCLUDE", "HAS_ALLOWED")
    flags = {**dict.fromkeys(names, True), "HAS_OWN": False, "BLOCK_E": launcher.BLOCK_EXCLUDED}
    block = {"BLOCK_S": launcher.BLOCK_SPLITS}
    found = [_case(exact.merge_kernel, kinds, block, 4, 12 * launcher.BLOCK_SPLITS)]
    block = {"BLOCK_S": triton.next_power_of_2(launcher.EVERY_SPLITS)}
    for own in (False, True):
        named = block | {"HAS_OWN": own}
        # two counts and a sum a split
        found.append(_case(exact.finish_kernel, kinds, named, 1, 24 * launcher.EVERY_SPLITS))
        found[-1]["budget"] = {"loop": 620 if own else 550}
    for kind, similarity, d in (
        *(("bf16", "cosine", d) for d in (128, 1000, 4096)),
        ("fp32", "l2", 1000),
        ("fp16", "dot", 1000),
    ):
        width = triton.next_power_of_2(d)
        sizes = {"WIDTH": width, "LEVELS": width.bit_length() - 1, "SIMILARITY": similarity}
        types = kinds | dict.fromkeys(("q_ptr", "x_ptr", "own_ptr"), f"*{kind}")
        named = sizes | {"HAS_OWN": True, "HAS_PLACE": False}
        moved = 2 * d * (4 if kind == "fp32" else 2)
        found.append(_case(exact.origin_kernel, types, named, 4, moved, d))
        found[-1]["budget"] = {"loop": _BUDGET["rank.origin", kind, d]}
        for kernel in (exact.origin_kernel, exact.compare_kernel, exact.every_kernel):
            columns = launcher.EVERY_TILE if kernel is exact.every_kernel else launcher.SCORED_TILE
            rows = {"ROWS": launcher.rows_of_tile(width, columns), **flags}
            named = {n: v for n, v in (sizes | rows).items() if n in kernel.arg_names}
            # the target and the query, or one pass over a tile of rows
            moved = named.get("ROWS", 2) * d * (4 if kind == "fp32" else 2)
            warps = launcher.every_warps(width) if kernel is exact.every_kernel else 4
            found.append(_case(kernel, types, named, warps, moved, d))
            key = found[-1]["name"], kind, d
            found[-1]["budget"] = {"loop": _BUDGET[key]}
    return found


def _case(
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    moved: int,
    d: int | None = None,
) -> dict[str, Any]:
    """moved: bytes of a pass."""
    signature = {}
    for name in kernel.arg_names:
        kind = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kinds.get(name, kind)
    return {
        "name": f"rank.{kernel.fn.__name__.removesuffix('_kernel')}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constants,
        "num_warps": warps,
        "num_stages": 1,
        "uses_tensor_cores": False,
        "work": {
            "sizes": "a query" if d is None else f"d={d}",
            "bytes": moved,
            "flops": 0,
            "straight": True,
        },
        "budget": {} if d is not None else {"loop": 600},
    }
