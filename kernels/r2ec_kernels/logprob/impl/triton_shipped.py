"""Configurations of the head's kernels that ship, and their budgets."""

from typing import Any

from . import triton as launcher
from .triton_kernels import finish_kernel, fused_kernel, grad_kernel, update_kernel

# of ``aot --budget``: instructions of the row kernels and, by BLOCK_D, of the fused kernel's loop,
# without and with a soft-cap. What the code holds on sm_90, 4% above; tightened as it improves
_ROW_BUDGET = {"update_kernel": (690, 785), "grad_kernel": (360, 460)}
_FUSED_BUDGET = {16: (416, 560), 32: (466, 688), 64: (556, 619), 128: (935, 843)}
_FINISH_BUDGET = {False: (744, 767), True: (1170, 1160)}  # without and with splits


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation."""
    flags: dict[str, Any] = {"HAS_BIAS": True, "BLOCK_N": launcher.BLOCK_COLUMNS}
    update = flags | {"ENTROPY": True, "JACOBIAN": True, "BLOCK_D": 1024}
    grad = flags | {"HAS_GRAD": True, "HAS_GRAD_ENTROPY": True}
    tile = {"HAS_BIAS": True, "PRECISION": "ieee", "BLOCK_N": launcher.FUSED_COLUMNS}
    found = []
    for compute in ("bf16", "fp16", "fp32"):
        fused = (False, True) if compute != "fp32" else (False,)
        for softcap in (False, True):
            cap = {"SOFTCAP": softcap}
            row = _row_work(4 if compute == "fp32" else 2)
            for kernel, constants in ((update_kernel, update), (grad_kernel, grad)):
                budget = {"loop": _ROW_BUDGET[kernel.fn.__name__][softcap]}
                case = _aot(kernel, compute, constants | cap, 8, 1, False)
                found.append(case | {"work": row, "budget": budget})
            found += [_finish(compute, softcap, split) for split in fused]
            for d in (16, 32, 64, launcher.FUSED_WIDTH) if compute != "fp32" else ():
                for small in (False, True):
                    rows, warps = launcher.fused_tile(d, softcap, small)
                    shape = tile | cap | {"BLOCK_M": rows, "BLOCK_D": d}
                    case = _aot(fused_kernel, compute, shape, warps, 2, True)
                    case["targets"] = ("sm_80",) if small else ("sm_90", "sm_100", "gfx942")
                    budget = {"loop": _FUSED_BUDGET[d][softcap], "epilogue_shuffles": 0}
                    budget["wgmma"] = not softcap
                    found.append(case | {"work": _fused_work(rows, d), "budget": budget})
    return found


def _finish(compute: str, softcap: bool, split: bool) -> dict[str, Any]:
    """The finishing kernel behind a library's products, or behind a fused kernel's splits."""
    splits, d = (launcher.FINISH_SPLITS, launcher.FUSED_WIDTH) if split else (1, 2304)
    constants: dict[str, Any] = {
        "SOFTCAP": softcap,
        "ENTROPY": not split,
        "JACOBIAN": True,
        "HAS_ROWS": True,
    }
    constants |= {"BLOCK_S": splits, "BLOCK_D": launcher.finish_width(d, splits)}
    work = {
        "sizes": f"d={d} splits={splits}",
        "bytes": 4 * d * (splits + 1) + d * (4 if compute == "fp32" else 2),
        "flops": 2 * d * splits,
        "straight": True,
    }
    budget = {"loop": _FINISH_BUDGET[split][softcap]}
    return _aot(finish_kernel, compute, constants, 4, 1, False) | {"work": work, "budget": budget}


def _row_work(itemsize: int) -> dict[str, Any]:
    """What a token's row of a block needs: its products read, a number written for each. The
    products are in cache, so that the floor, which is memory's, can be beaten."""
    return {
        "sizes": f"columns={launcher.BLOCK_COLUMNS}",
        "bytes": launcher.BLOCK_COLUMNS * (4 + itemsize),
        "flops": 10 * launcher.BLOCK_COLUMNS,
        "scores": launcher.BLOCK_COLUMNS,
        "straight": True,
    }


def _fused_work(block_m: int, d: int, tokens: int = 8192, vocab: int = 1 << 17) -> dict[str, Any]:
    """What a split of the vocabulary needs for a tile of tokens."""
    tiles = tokens // block_m  # run together: memory delivers a tile of the head once for all
    splits = max(1, launcher.FUSED_PROGRAMS // tiles)
    steps = vocab // splits // launcher.FUSED_COLUMNS
    return {
        "sizes": f"T={tokens} V={vocab}",
        "steps": steps,
        "bytes": launcher.FUSED_COLUMNS * (d + 1) * 2 / tiles,  # with the bias
        "flops": 4 * block_m * launcher.FUSED_COLUMNS * d,
        "scores": block_m * launcher.FUSED_COLUMNS * steps,
        # 16-bit states; float32 acc, m, l, picked
        "tile_bytes": block_m * (2 * d + 4 * (d + 3)),
    }


def _aot(
    kernel: Any, compute: str, constexprs: dict[str, Any], warps: int, stages: int, mma: bool
) -> dict[str, Any]:
    kinds = {"target_ptr": "*i64", "rows_ptr": "*i64"}
    kinds |= dict.fromkeys(("inner", "outer", "temperature"), "fp32")
    narrow = ("e_ptr", "dz_ptr", "hidden_ptr", "weight_ptr", "bias_ptr")
    signature = {}
    for name in kernel.arg_names:
        kind = f"*{compute}" if name in narrow else "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constexprs else kinds.get(name, kind)
    return {
        "name": f"logprob.{kernel.fn.__name__.strip('_')}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
        "uses_tensor_cores": mma,
    }
