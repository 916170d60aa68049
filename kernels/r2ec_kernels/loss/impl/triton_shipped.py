"""Configurations of the loss's kernels that ship, and their budgets."""

from typing import Any

from . import triton as launcher
from .triton_item_kernels import project_kernel, softmax_kernel
from .triton_kernels import token_kernel, total_kernel, trajectory_kernel

# of ``aot --budget``: instructions of a kernel in its smallest and its largest configuration (of
# ``trajectory_kernel`` those of its loop). What the code holds on sm_90, 4% above
_BUDGET = {
    "trajectory_kernel": (2458, 2458),
    "token_kernel": (725, 1635),
    "total_kernel": (926, 1405),
    "softmax_kernel": (761, 1143),
    "project_kernel": (347, 360),
}
_INTEGERS = ("target_ptr", "trajectory_ptr", "count_ptr", "tokens_ptr", "selected_ptr")
_FLOATS = (
    *("tokens", "selected", "per_selected", "length", "clip_low", "clip_high", "low", "high"),
    *("kl_weight", "item_weight", "inverse_temperature"),
)
_COLUMNS, _ITEMS, _PROGRAMS = 2304, 1024, 64  # that the figures are of


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation: of the objective's many
    settings those that compute least and most."""
    found = [_trajectories()]
    for most in (False, True):
        found += [*_objective(most), _softmax(most)]
    return [*found, *(_projection(kind) for kind in ("fp32", "bf16", "fp16"))]


def _trajectories() -> dict[str, Any]:
    constants = dict.fromkeys(("HAS_OLD", "HAS_SAMPLER", "MASK"), True)
    blocks = {"BLOCK_R": launcher.BLOCK_R, "BLOCK_T": launcher.BLOCK_SUM}
    work: dict[str, Any] = {
        "sizes": "a step of tokens",
        "bytes": 28 * launcher.BLOCK_SUM,
        "flops": 0,
    }
    return _aot(trajectory_kernel, constants | blocks, True, work)


def _objective(most: bool) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {"TOKENS_LOCAL": False, "REDUCTION": "sequence" if most else "sum"}
    shared |= dict.fromkeys(("TOKENS_ON_DEVICE", "SELECTED_ON_DEVICE"), True)
    flags = ("MASK", "HAS_SUMS", "HAS_SAMPLER", "HAS_REF", "HAS_ENTROPY")
    shared |= dict.fromkeys(flags, most)
    tokens, rows = launcher.BLOCK_T, launcher.BLOCK_P
    token = {"SEQUENCE_RATIO": most, "SEQUENCE_CORRECTION": False, "HAS_OLD": True}
    work: dict[str, Any] = {
        "bytes": tokens * (60 if most else 32),
        "flops": 20 * tokens,
        "straight": True,
    }
    work |= {"sizes": f"T={tokens}"}
    total: dict[str, Any] = {
        "SEQUENCE_CORRECTION": most,
        "HAS_OLD_ITEM": most,
        "BLOCK_P": rows,
        "BLOCK_R": rows,
    }
    sums: dict[str, Any] = {
        "bytes": 40 * _PROGRAMS + 21 * rows,
        "flops": 20 * rows,
        "straight": True,
    }
    sums |= {"sizes": f"R={rows} programs={_PROGRAMS}"}
    return [
        _aot(token_kernel, shared | token | {"BLOCK_T": tokens}, most, work),
        _aot(total_kernel, shared | total, most, sums),
    ]


def _softmax(cosine: bool) -> dict[str, Any]:
    constants: dict[str, Any] = {"COSINE": cosine, "BLOCK_M": launcher.BLOCK_M}
    work: dict[str, Any] = {
        "bytes": 4 * cosine * _COLUMNS + 20 * _ITEMS,
        "flops": 20 * _ITEMS,
        "straight": True,
    }
    work |= {"sizes": f"M={_ITEMS} d={_COLUMNS}"}
    return _aot(softmax_kernel, constants | {"BLOCK_D": launcher.BLOCK_D}, cosine, work)


def _projection(kind: str) -> dict[str, Any]:
    size = 4 if kind == "fp32" else 2
    work: dict[str, Any] = {"bytes": _COLUMNS * (8 + size), "flops": 6 * _COLUMNS, "straight": True}
    work |= {"sizes": f"d={_COLUMNS}"}
    case = _aot(project_kernel, {"BLOCK_D": launcher.BLOCK_D}, size == 2, work)
    case["signature"]["out_ptr"] = f"*{kind}"
    return case


def _aot(
    kernel: Any, constants: dict[str, Any], most: bool, work: dict[str, Any]
) -> dict[str, Any]:
    name = kernel.fn.__name__
    kinds = dict.fromkeys(_INTEGERS, "*i64") | dict.fromkeys(_FLOATS, "fp32")
    kinds |= {"item_id_ptr": "*i64", "item_target_ptr": "*i64", "best_ptr": "*i8"}
    signature = {}
    for argument in kernel.arg_names:
        kind = "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else kinds.get(argument, kind)
    return {
        "name": f"loss.{name}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constants,
        "num_warps": 4,
        "num_stages": 1,
        "uses_tensor_cores": False,
        "work": work,
        "budget": {"loop": _BUDGET[name][most]},
    }
