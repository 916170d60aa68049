"""The configurations of the scan kernel that ship, with their work and instruction budgets."""

import itertools
from typing import Any

import torch
import triton

from .launch import Launch, candidates
from .triton_kernels import GROUPS, group_best_kernel

# Of ``aot --budget``, on sm_90: columns of the table that shares are predicted for; instructions of
# the loop by (bytes of a number, BLOCK_M), and of the epilogue, its shuffles and its accesses to
# shared memory by (BLOCK_M, GROUP). What the code holds, 3 to 5% above: tightened as it improves.
_AOT_WIDTH = 1024
_LOOP_BUDGET = {(1, 16): 410, (1, 64): 820, (1, 128): 248}
_LOOP_BUDGET |= {(2, 16): 110, (2, 32): 114, (2, 64): 124, (2, 128): 96}
_LOOP_BUDGET |= {(4, 16): 323, (4, 64): 545, (4, 128): 432}
_EPILOGUE_BUDGET = {(16, 32): (830, 52, 50), (16, 128): (735, 29, 31)}
_EPILOGUE_BUDGET |= {(32, 32): (860, 104, 92), (32, 128): (670, 54, 50)}
_EPILOGUE_BUDGET |= {(64, 32): (1700, 208, 175), (64, 128): (1290, 108, 92)}
_EPILOGUE_BUDGET |= {(128, 32): (1640, 208, 171), (128, 128): (1565, 225, 169)}


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ``launch`` ships, in the form that ``r2ec_kernels.aot`` reads."""
    types = {
        torch.int8: ("*i8", "*bf16"),
        torch.bfloat16: ("*bf16", "*bf16"),
        torch.float16: ("*fp16", "*fp16"),
        torch.float32: ("*fp32", "*fp32"),
    }
    found = []
    for (dtype, given), backend in itertools.product(types.items(), ("cuda", "hip")):
        for batch, group, flags in itertools.product((16, 64, 1024), GROUPS, _flags(dtype)):
            for config in candidates(batch, dtype.itemsize, backend, flags["TAKE_NORM"]):
                case = _case(config, group, dtype, given, flags)
                case |= {"backend": backend, "work": _work(config, group, batch, dtype.itemsize)}
                if not flags["TAKE_NORM"]:
                    case["budget"] = _budget(config, group, dtype.itemsize)
                found.append(case)
    return found


def _flags(dtype: torch.dtype) -> list[dict[str, Any]]:
    """What the kernel does to scores: of codes, and of rows with and without known norms."""
    codes = {"HAS_MUL": True, "HAS_SUB": True, "BY_NORM": "none", "TAKE_NORM": False}
    rows = {"HAS_MUL": False, "HAS_SUB": False, "BY_NORM": "cosine", "TAKE_NORM": False}
    if dtype == torch.int8:
        return [codes | {"HAS_PAIRS": True}]
    return [rows | {"TAKE_NORM": taken, "HAS_PAIRS": True} for taken in (False, True)]


def _case(
    config: Launch, group: int, dtype: torch.dtype, given: tuple[str, str], flags: dict[str, Any]
) -> dict[str, Any]:
    types = {"x_ptr": given[0], "q_ptr": given[1], "first_ptr": "*i32", "second_ptr": "*i32"}
    types |= dict.fromkeys(("mul_ptr", "sub_ptr", "norm_ptr", "tile_norm_ptr"), "*fp32")
    types |= dict.fromkeys(("pair_ptr", "pair_start_ptr"), "*i64")
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": group,
        "EVEN_K": True,
        **flags,
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


def _budget(config: Launch, group: int, itemsize: int) -> dict[str, Any]:
    """What the code of a configuration must hold; nothing for one that has no numbers yet."""
    if (itemsize, config.block_m) not in _LOOP_BUDGET:
        return {}
    epilogue, shuffles, shared = _EPILOGUE_BUDGET[config.block_m, group]
    return {
        "loop": _LOOP_BUDGET[itemsize, config.block_m],
        "epilogue_per_1024_scores": epilogue * 1024 / (config.block_m * config.block_n),
        "epilogue_shuffles": shuffles,
        "epilogue_shared": shared,
        "load_bits": 64 if itemsize == 1 else 128,
        "wgmma": True,
    }
