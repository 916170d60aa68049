"""Compile every shipped kernel configuration without a GPU: ``python -m r2ec_kernels.aot``.

Prints one row a target, kernel and configuration: registers, spilled bytes, shared memory,
tensor-core instructions, and the programs a multiprocessor holds. Exit status 1 on a spill, on
shared memory or registers beyond the chip, or where a kernel that should use tensor cores does not.

With ``--budget`` a row counts the machine code instead, and predicts the share of the card's floor
that it can reach (``budget``); a configuration that breaks its budget fails too.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import budget, sass

# Op packages whose ``impl.triton`` module has ``aot_configs()``, a list of dictionaries:
#   name: "op.kernel"; kernel: the triton.jit function; signature: Triton types of its arguments;
#   constexprs: compile-time values; num_warps; num_stages;
#   most_registers (optional): by the names of chips, of a thread, where the compiler is told;
#   uses_tensor_cores: whether it must contain tensor-core instructions;
#   aligned (optional): names of integer arguments that are multiples of 16;
#   backend (optional): "cuda" or "hip", where it ships; both if absent;
#   targets (optional): names of the ``CHIPS`` where it ships; all if absent;
#   work (optional): what a tile needs, the keyword arguments of ``budget.Work``;
#   budget (optional): what its code must hold on sm_90, keys of ``budget.LIMITS``.
OPS = ("topk", "rank", "advantage", "logprob", "loss")


@dataclass(frozen=True)
class Chip:
    """Limits of one target: a multiprocessor or compute unit."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes a program may use
    shared_total: int  # bytes of all its programs
    registers: int  # 32-bit registers
    threads: int
    mma: str  # pattern of its tensor-core instructions


CHIPS = (
    Chip("sm_80", "cuda", 80, 32, 166912, 167936, 65536, 2048, r"\bmma\.sync"),
    Chip("sm_90", "cuda", 90, 32, 232448, 233472, 65536, 2048, r"wgmma\.mma_async|\bmma\.sync"),
    Chip("sm_100", "cuda", 100, 32, 232448, 233472, 65536, 2048, r"tcgen05\.mma|\bmma\.sync"),
    Chip("gfx942", "hip", "gfx942", 64, 65536, 65536, 131072, 2048, r"v_mfma"),
)


@dataclass
class Result:
    """What the compiler made of a configuration."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    mma: int = 0
    programs: int = 0
    cubin: bytes | None = None  # of NVIDIA's targets
    problems: list[str] = field(default_factory=list)


def configurations() -> list[dict[str, Any]]:
    """Every shipped configuration of every kernel of every op."""
    found = []
    for op in OPS:
        name = f"{__package__}.{op}.impl.triton"
        if importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).aot_configs()
    return found


def compile_for(chip: Chip, case: dict[str, Any]) -> Result:
    """Compile one configuration for one chip and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, warps = case["kernel"], case["num_warps"]
    aligned = {name for name, kind in case["signature"].items() if kind.startswith("*")}
    aligned |= set(case.get("aligned", ()))
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)
    }
    source = ASTSource(kernel, case["signature"], constexprs=case["constexprs"], attrs=attributes)
    options = {"num_warps": warps, "num_stages": case["num_stages"]}
    if limit := case.get("most_registers", {}).get(chip.name):
        options["maxnreg"] = limit
    result = Result()
    try:
        target = GPUTarget(chip.backend, chip.arch, chip.warp)
        built = triton.compile(source, target=target, options=options)
    except Exception as error:
        result.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return result
    result.shared = built.metadata.shared
    text = built.asm["ptx"] if chip.backend == "cuda" else built.asm["amdgcn"]
    result.mma = len(re.findall(chip.mma, text))
    result.cubin = built.asm.get("cubin")
    usage = _amd_usage(text) if result.cubin is None else _cubin_usage(result.cubin)
    result.registers, result.spills = usage
    threads = warps * chip.warp
    limits = [chip.threads // threads, chip.registers // max(1, result.registers * threads)]
    if result.shared:
        limits.append(chip.shared_total // (result.shared + 1024))
    result.programs = min(limits)
    if result.spills:
        result.problems.append(f"spills {result.spills} bytes")
    if result.shared > chip.shared:
        result.problems.append(f"shared memory {result.shared} > {chip.shared}")
    if result.programs == 0:
        result.problems.append("does not fit a multiprocessor")
    if case["uses_tensor_cores"] and not result.mma:
        result.problems.append("no tensor-core instruction")
    return result


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) from cuobjdump, which Triton ships."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", text))
    # STACK counts local arrays and spills; LOCAL spills of the entry function.
    return int(usage["REG"]), int(usage.get("LOCAL", 0)) + int(usage.get("STACK", 0))


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, scratch bytes) from the code object's metadata."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    accumulators = re.search(r"\.agpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if scratch is None:
        raise RuntimeError("the code object does not name its scratch memory")
    total = int(registers[1]) if registers else 0
    return max(total, int(accumulators[1]) if accumulators else 0), int(scratch[1])


def describe(case: dict[str, Any]) -> str:
    """The types and sizes that tell configurations of one kernel apart."""
    kinds = (re.match(r"(?:\*|tensordesc<)(i8|bf16|fp16)\b", t) for t in case["signature"].values())
    types = sorted({kind[1] for kind in kinds if kind})
    constants = case["constexprs"].items()
    sizes = [f"{name.lower()}={value}" for name, value in constants if type(value) is int]
    flags = [name.lower() for name, value in constants if value is True]
    if "stride_x" in case["signature"] and "stride_x" not in case.get("aligned", ("stride_x",)):
        flags.append("unaligned")
    return " ".join([*(types or ["fp32"]), *sizes, *flags, f"warps={case['num_warps']}"])


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the tables, return the exit status."""
    every = configurations()
    chosen, chips = _parse(arguments, every)
    tables: dict[str, list[tuple[str, ...]]] = {}
    records: list[dict[str, Any]] = []
    failed = False
    for chip in chips:
        for case in every:
            if case.get("backend", chip.backend) != chip.backend:
                continue
            if chip.name not in case.get("targets", (chip.name,)):
                continue
            if chosen.op and chosen.op not in case["name"]:
                continue
            result = compile_for(chip, case)
            if chosen.budget:
                head, numbers = _budget(chip, case, result, records)
            else:
                head, numbers = ("regs", "spill", "shared", "mma", "progs"), _usage(result)
            failed |= bool(result.problems)
            rows = tables.setdefault(
                chip.name if chosen.budget else "",
                [("target", "op", "configuration", *head, "verdict")],
            )
            verdict = "; ".join(result.problems) or "ok"
            rows.append((chip.name, case["name"], describe(case), *numbers, verdict))
    for rows in tables.values():
        sys.stdout.write(_aligned(rows))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(records, indent=1) + "\n")
    return int(failed)


def _parse(
    arguments: list[str] | None, every: list[dict[str, Any]]
) -> tuple[argparse.Namespace, list[Chip]]:
    """The command line, and the targets it asks for."""
    parser = argparse.ArgumentParser(prog="python -m r2ec_kernels.aot", description=__doc__)
    parser.add_argument("--target", choices=[chip.name for chip in CHIPS], action="append")
    parser.add_argument("--op", help="only ops whose name contains this")
    parser.add_argument(
        "--budget",
        action="store_true",
        help="count the instructions of NVIDIA targets and hold them against the budgets",
    )
    parser.add_argument("--json", metavar="FILE", help="with --budget: write every figure there")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    if chosen.op and not any(chosen.op in case["name"] for case in every):
        names = ", ".join(sorted({case["name"] for case in every}))
        parser.error(f"--op: no configuration contains {chosen.op!r}; there are {names}")
    chips = [chip for chip in CHIPS if not chosen.target or chip.name in chosen.target]
    if chosen.json and not chosen.budget:
        parser.error("--json needs --budget")
    if chosen.budget:
        for chip in chips:
            if chip.backend != "cuda":
                sys.stderr.write(f"{chip.name}: left out, the budget is for NVIDIA targets only\n")
        chips = [chip for chip in chips if chip.backend == "cuda"]
        if not chips:
            parser.error("--budget reads NVIDIA machine code; it has no other target")
        try:
            sass.nvdisasm()
        except FileNotFoundError as error:
            parser.error(f"--budget: {error}")
    return chosen, chips


def _usage(result: Result) -> tuple[str, ...]:
    numbers = (result.registers, result.spills, result.shared, result.mma, result.programs)
    return tuple(map(str, numbers))


def _budget(
    chip: Chip, case: dict[str, Any], result: Result, records: list[dict[str, Any]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Header and cells of a row of the budget's table; adds what is broken to the problems."""
    report = None
    if result.cubin is not None:
        try:
            report = budget.measure(chip.name, case, result.cubin, result.registers)
            result.problems += [f"over budget: {text}" for text in report.broken]
        except (ValueError, RuntimeError) as error:
            result.problems.append(f"not judged: {error}")
    record: dict[str, Any] = {
        "target": chip.name,
        "op": case["name"],
        "configuration": describe(case),
    }
    record |= {"num_warps": case["num_warps"], "budget": case.get("budget", {})}
    record |= {"registers": result.registers, "spills": result.spills, "programs": result.programs}
    if report is not None:
        record |= asdict(report)
    records.append(record | {"problems": result.problems})
    numbers = (str(result.registers), str(result.spills))
    return (
        ("regs", "spill", *budget.header(chip.name)),
        (*numbers, *budget.cells(chip.name, report)),
    )


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
