"""The configurations of the scan's kernels that ship, with their work and instruction budgets."""

import itertools
from typing import Any

import torch
import triton

from .groups import GROUPS
from .launch import Launch, by_number, candidates
from .product import group_max_kernel
from .tiles import group_best_kernel
from .wide import MOST_REGISTERS, levels, wide_kernel

# Of ``aot --budget``, on sm_90: columns of the table that shares are predicted for; instructions of
# the loop by (bytes of a number, BLOCK_M), and of the epilogue, its shuffles and its accesses to
# shared memory by (BLOCK_M, GROUP). What the code holds, 3 to 5% above: tightened as it improves.
_AOT_WIDTH = 1024
_LOOP_BUDGET = {(1, 16): 410, (1, 64): 820}
_LOOP_BUDGET |= {(2, 16): 110, (2, 32): 114, (2, 64): 124}
_LOOP_BUDGET |= {(4, 16): 323, (4, 64): 545}
_EPILOGUE_BUDGET = {(16, 32): (830, 52, 50), (16, 128): (735, 29, 31)}
_EPILOGUE_BUDGET |= {(32, 32): (860, 104, 92), (32, 128): (670, 54, 50)}
_EPILOGUE_BUDGET |= {(64, 32): (1700, 208, 175), (64, 128): (1290, 108, 92)}
# The same where the kernel takes the norms, and what rows share.
_NORM_LOOP_BUDGET = {(2, 16): 490, (2, 32): 490, (2, 64): 500, (2, 128): 292}
_NORM_LOOP_BUDGET |= {(4, 16): 515, (4, 32): 590, (4, 128): 528}
_NORM_EPILOGUE_BUDGET = {(16, 32): (1435, 88, 64), (16, 128): (1350, 66, 46)}
_NORM_EPILOGUE_BUDGET |= {(32, 32): (1545, 140, 106), (32, 128): (1350, 91, 65)}
_NORM_EPILOGUE_BUDGET |= {(64, 32): (2250, 240, 188), (64, 128): (1860, 144, 106)}
_NORM_EPILOGUE_BUDGET |= {(128, 32): (1920, 234, 186), (128, 128): (1900, 250, 186)}
# Of the scan for many queries: the loop by bytes of a number; the epilogue of 1,024 scores, with
# factors and exclusions and without them; shuffles and accesses to shared memory by GROUP: those of
# the results, a few a tile.
_WIDE_LOOP = {1: 184, 2: 92, 4: 445}
_WIDE_EPILOGUE, _PLAIN_EPILOGUE = 60, 40
_OFF_EPILOGUE = 66  # some rows are switched off
_WIDE_MOVES = {32: (4, 0), 128: (8, 4)}
_TYPES = {
    torch.int8: ("i8", "bf16"),
    torch.bfloat16: ("bf16", "bf16"),
    torch.float16: ("fp16", "fp16"),
    torch.float32: ("fp32", "fp32"),
}


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ``launch`` ships, in the form that ``r2ec_kernels.aot`` reads."""
    found = []
    for dtype, backend in itertools.product(_TYPES, ("cuda", "hip")):
        size = dtype.itemsize
        for batch, group, flags in itertools.product((16, 64, 256), GROUPS, _flags(dtype)):
            for config in candidates(batch, size, backend, flags["TAKE_NORM"]):
                if config.kind != "tiles":
                    continue
                case = _case(config, group, dtype, flags)
                case |= {"backend": backend, "work": _work(config, group, batch, size)}
                case["budget"] = _budget(config, group, size, flags["TAKE_NORM"])
                found.append(case)
    return [*found, *_odd_configs(), *_wide_configs(), *_product_configs()]


def _odd_configs() -> list[dict[str, Any]]:
    """Of ``tiles``, for a d that is no multiple of 16: the rows of a plain table, loaded number by
    number, and those of an index, with zero columns behind."""
    found = []
    for dtype, batch, backend in itertools.product(
        (torch.bfloat16, torch.float32), (16, 64), ("cuda", "hip")
    ):
        taken, known = reversed(_flags(dtype))
        for flags in (taken, known):
            [config] = candidates(batch, dtype.itemsize, backend, flags["TAKE_NORM"])[:1]
            if flags is taken:
                config = by_number(config, dtype.itemsize)
            case = _case(config, GROUPS[0], dtype, flags)
            case["constexprs"] |= {"EVEN_K": False}
            case |= {"backend": backend, "work": _work(config, GROUPS[0], batch, dtype.itemsize)}
            if flags is taken:
                case["aligned"] = ()
            else:
                case["budget"] = {"load_bits": 128, "wgmma": True}
            found.append(case)
    return found


def _flags(dtype: torch.dtype) -> list[dict[str, Any]]:
    """What the kernel does to scores: of codes, and of rows with and without known norms."""
    codes = {"HAS_MUL": True, "HAS_SUB": True, "BY_NORM": "none", "TAKE_NORM": False}
    rows = {"HAS_MUL": False, "HAS_SUB": False, "BY_NORM": "cosine", "TAKE_NORM": False}
    if dtype == torch.int8:
        return [codes | {"HAS_PAIRS": True}]
    return [rows | {"TAKE_NORM": taken, "HAS_PAIRS": True} for taken in (False, True)]


def _case(config: Launch, group: int, dtype: torch.dtype, flags: dict[str, Any]) -> dict[str, Any]:
    rows, queries = _TYPES[dtype]
    types = {"x_ptr": f"*{rows}", "q_ptr": f"*{queries}"}
    types |= {"first_ptr": "*i32", "second_ptr": "*i32"}
    types |= dict.fromkeys(
        ("mul_ptr", "sub_ptr", "norm_ptr", "along_ptr", "tile_norm_ptr"), "*fp32"
    )
    types |= dict.fromkeys(("pair_ptr", "pair_start_ptr"), "*i64")
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": group,
        "EVEN_K": True,
        **flags,
        "HAS_ALONG": flags["TAKE_NORM"] and flags["BY_NORM"] != "l2",
        "PRECISION": "bf16x3" if dtype == torch.float32 else "ieee",
        "WIDEN": False,
    }
    names = group_best_kernel.arg_names
    return {
        "name": "topk.group_best",
        "kernel": group_best_kernel,
        "signature": {n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        "constexprs": constants,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "uses_tensor_cores": True,
        "aligned": ("stride_x", "stride_q", "d"),
    }


def _work(config: Launch, group: int, batch: int, itemsize: int) -> dict[str, Any]:
    """What a tile of ``aot_configs`` needs, for rows of ``_AOT_WIDTH`` columns."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    sharing = triton.cdiv(batch, block_m)  # tiles of queries; all but one find the items in cache
    return {
        "sizes": f"B={batch} d={_AOT_WIDTH}",
        "steps": _AOT_WIDTH // block_k,
        "bytes": block_n * block_k * itemsize / sharing,
        "flops": 2 * block_m * block_n * block_k,
        "scores": block_m * block_n,
        # mul and sub of an item, first and second of a group
        "tile_bytes": 8 * block_n / sharing + 8 * block_m * block_n / group,
    }


def _budget(config: Launch, group: int, itemsize: int, takes_norms: bool) -> dict[str, Any]:
    """What the code of a configuration must hold."""
    loops, epilogues = _LOOP_BUDGET, _EPILOGUE_BUDGET
    if takes_norms:
        loops, epilogues = _NORM_LOOP_BUDGET, _NORM_EPILOGUE_BUDGET
    epilogue, shuffles, shared = epilogues[config.block_m, group]
    return {
        "loop": loops[itemsize, config.block_m],
        "epilogue_per_1024_scores": epilogue * 1024 / (config.block_m * config.block_n),
        "epilogue_shuffles": shuffles,
        "epilogue_shared": shared,
        "load_bits": 64 if itemsize == 1 else 128,
        "wgmma": True,
    }


def _wide_configs() -> list[dict[str, Any]]:
    """Of ``wide``: by TMA where there is one; by pointers elsewhere, and for rows whose
    bytes are not a multiple of 16."""
    codes = {"HAS_MUL": True, "HAS_SUB": True, "HAS_PAIRS": True, "HAS_OFF": False}
    rows = codes | {"HAS_SUB": False}
    plain = dict.fromkeys(codes, False)
    found = []
    for dtype, group in itertools.product(_TYPES, GROUPS):
        flags = codes if dtype == torch.int8 else rows
        found.append(_wide_case(group, dtype, flags, "cuda", ("sm_90", "sm_100"), tma=True))
        found.append(_wide_case(group, dtype, flags, "cuda", ("sm_80",)))
        found.append(_wide_case(group, dtype, flags, "hip", ("gfx942",)))
        if dtype == torch.bfloat16:
            found.append(_wide_case(group, dtype, plain, "cuda", ("sm_90", "sm_100"), tma=True))
            # of a plain table, with what its rows share
            found.append(_wide_case(group, dtype, codes, "cuda", ("sm_90", "sm_100"), tma=True))
            some = codes | {"HAS_OFF": True}
            found.append(_wide_case(group, dtype, some, "cuda", ("sm_90", "sm_100"), tma=True))
    for dtype, given in itertools.product(
        (torch.bfloat16, torch.float32), (("cuda", ("sm_80", "sm_90")), ("hip", ("gfx942",)))
    ):
        found.append(_wide_case(GROUPS[0], dtype, rows, *given, aligned=False))
    return found


def _wide_case(
    group: int,
    dtype: torch.dtype,
    flags: dict[str, bool],
    backend: str,
    targets: tuple[str, ...],
    tma: bool = False,
    aligned: bool = True,
) -> dict[str, Any]:
    [config] = [c for c in candidates(1024, dtype.itemsize, backend) if c.kind == "fused"]
    if not aligned:
        config = by_number(config, dtype.itemsize)
    kinds = [f"*{kind}" for kind in _TYPES[dtype]]
    if tma:
        tiles = (config.block_n, config.block_k), (config.block_m, config.block_k)
        kinds = [
            f"tensordesc<{kind}[{rows}, {columns}]>"
            for kind, (rows, columns) in zip(_TYPES[dtype], tiles, strict=True)
        ]
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "LEVELS": levels(config.block_n),
        "GROUP": group,
        "TMA": tma,
        "EVEN_K": aligned,
        **flags,
        "PRECISION": "bf16x3" if dtype == torch.float32 else "ieee",
        "WIDEN": False,
    }
    case = _signed("topk.wide", wide_kernel, constants, {"x": kinds[0], "q": kinds[1]}, config)
    case |= {"backend": backend, "targets": targets, "uses_tensor_cores": True}
    case |= {"aligned": ("keep", *(("stride_x", "stride_q", "d") if aligned else ()))}
    case["work"] = _work(config, group, 1024, dtype.itemsize)
    if tma:
        limits = MOST_REGISTERS.items()
        size = dtype.itemsize
        case["most_registers"] = {name: most[size] for name, most in limits if size in most}
        shuffles, shared = _WIDE_MOVES[group]
        case["budget"] = {
            "registers": MOST_REGISTERS["sm_90"].get(size, 192),
            "loop": _WIDE_LOOP[dtype.itemsize],
            "epilogue_per_1024_scores": _epilogue(flags),
            "epilogue_shuffles": shuffles,
            "epilogue_shared": shared,
            "wgmma": True,
            "tma": True,
        }
    return case


def _epilogue(flags: dict[str, bool]) -> int:
    if flags.get("HAS_OFF"):
        return _OFF_EPILOGUE
    return _WIDE_EPILOGUE if any(flags.values()) else _PLAIN_EPILOGUE


def _product_configs() -> list[dict[str, Any]]:
    """Of ``product``'s kernel, which has one type: float32 products."""
    found = []
    for group in GROUPS:
        [config] = [c for c in candidates(1024, 2, "cuda") if c.kind == "cublas"]
        constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP": group}
        constants |= {"LEVELS": levels(config.block_n)}
        constants |= dict.fromkeys(("HAS_MUL", "HAS_SUB", "HAS_PAIRS"), True) | {"HAS_OFF": False}
        case = _signed("topk.group_max", group_max_kernel, constants, {"z_ptr": "*fp32"}, config)
        scores = config.block_m * config.block_n
        case["work"] = {
            "sizes": "B=1024",
            "bytes": 4 * scores + 8 * scores / group,  # the scores come from cache
            "flops": 0,
            "scores": scores,
            "straight": True,
        }
        case["budget"] = {"registers": 64, "loop": 715}
        found.append(case | {"aligned": ("stride_z", "keep"), "uses_tensor_cores": False})
    return found


def _signed(
    name: str, kernel: Any, constants: dict[str, Any], kinds: dict[str, str], config: Launch
) -> dict[str, Any]:
    kinds = kinds | {"first_ptr": "*i32", "second_ptr": "*i32"}
    kinds |= {"mul_ptr": "*fp32", "sub_ptr": "*fp32"}
    kinds |= {"pair_ptr": "*i64", "pair_start_ptr": "*i64"}
    return {
        "name": name,
        "kernel": kernel,
        "signature": {
            n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names
        },
        "constexprs": constants,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
