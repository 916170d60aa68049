"""Instruction budgets: what a compiled kernel should reach, from its machine code alone.

``python -m r2ec_kernels.aot --budget`` counts a kernel's instructions (``sass``) and predicts the
time of a tile: all passes of the main loop that make it, and what stands around them.

    floor of a tile     = max(bytes / the SM's share of the bandwidth,
                              FLOPs / the SM's share of the dense bfloat16 rate)
    predicted time      = max(bytes / the SM's share of the bandwidth,
                              tensor-core cycles, issue cycles)
    share of the floor  = floor / predicted time

- Bytes and FLOPs of a tile are the configuration's (``Work``): what must cross the memory bus and
  what the algorithm multiplies, not what the code happens to do.
- Tensor-core cycles: the FLOPs of the product instructions in the loop, TF32 at half the rate of
  bfloat16 and 8-bit types at twice. Three products for one (float32 in parts) count three times.
- Issue cycles: instructions of a warp x warps / 4. A multiprocessor (SM) issues 4 warp-instructions
  a cycle, whichever programs they come from.
- The clock is the one at which the card's dense rate is quoted.

The prediction is an upper bound on the share: memory, products and other instructions overlap
perfectly. Latency, bank conflicts, slow instructions (MUFU, FP64), traffic between the caches, and
programs that do not fill the card are left out. ``alone`` is the share where a tile's loop and the
rest of it do not overlap, each bound by its own slowest: what one program a multiprocessor gets
without warps that work ahead. A kernel that reads what an earlier one left in cache can be faster
than its floor.

A configuration may carry a budget, numbers that its code must hold (``LIMITS``). Budgets are
ratchets of the target ``BUDGET_TARGET``: what the code holds today with a margin, tightened when it
gets better.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from . import sass

BUDGET_TARGET = "sm_90"
ISSUED = 4  # warp-instructions a cycle and multiprocessor
# Keys of a configuration's "budget": most, least, or the value itself. Counts are of one warp.
LIMITS = {
    "registers": "most",
    "loop": "most",
    "epilogue": "most",
    "epilogue_per_1024_scores": "most",
    "epilogue_shuffles": "most",
    "epilogue_shared": "most",
    "load_bits": "least",  # of the narrowest load from global memory in the loop
    "product_flops": "most",  # in the loop, in bfloat16's time
    "wgmma": "equal",
    "tma": "equal",
}


@dataclass(frozen=True)
class Card:
    """A card as its maker quotes it.

    Attributes:
        bandwidth: bytes a second from memory.
        flops: dense bfloat16 FLOPs a second.
        multiprocessors: of the card.
        tensor: dense bfloat16 FLOPs a cycle and multiprocessor.
    """

    name: str
    bandwidth: float
    flops: float
    multiprocessors: int
    tensor: int

    @property
    def clock(self) -> float:
        """Cycles a second at the quoted rate."""
        return self.flops / (self.multiprocessors * self.tensor)


CARDS = {
    "sm_80": (Card("A100 SXM", 2.039e12, 312e12, 108, 2048),),
    "sm_90": (
        Card("H100 SXM", 3.35e12, 989e12, 132, 4096),
        Card("H200", 4.8e12, 989e12, 132, 4096),
    ),
    "sm_100": (Card("B200", 8e12, 2250e12, 148, 8192),),
}


@dataclass(frozen=True)
class Work:
    """What a tile needs: the "work" entry of a configuration.

    Attributes:
        bytes: from and to memory, of one loop step; a tile that others take from cache in parts.
        flops: of one loop step.
        steps: passes of the loop, of a tile.
        scores: of a tile; 0 where the kernel has none.
        tile_bytes: from and to memory outside the loop, of a tile.
        straight: whether the main work stands outside loops; the whole kernel is then one step.
        sizes: the sizes that the figures are of, "B=16 d=1024".
    """

    bytes: float
    flops: float
    steps: float = 1
    scores: int = 0
    tile_bytes: float = 0
    straight: bool = False
    sizes: str = ""


@dataclass(frozen=True)
class Counts:
    """What a listing holds; numbers of instructions are those that one warp runs.

    Attributes:
        before, loop, epilogue, after: instructions of each of ``sass.Regions``.
        epilogue_shuffles: SHFL in the epilogue.
        epilogue_shared: LDS, LDSM, STS and STSM in the epilogue.
        loads: loads from global memory in the loop, by name and width.
        products: tensor-core instructions in the loop, by opcode.
        product_flops: their FLOPs for the whole program, in bfloat16's time; None where the
            opcode does not say (tcgen05).
        wgmma: whether warpgroup products are in the loop.
        tma: whether the tensor memory accelerator loads, anywhere.
        persistent: whether a program works on several tiles.
    """

    before: int
    loop: int
    epilogue: int
    after: int
    epilogue_shuffles: int
    epilogue_shared: int
    loads: dict[str, int]
    products: dict[str, int]
    product_flops: float | None
    wgmma: bool
    tma: bool
    persistent: bool
    load_bits: int  # of the narrowest; 0 without loads


@dataclass(frozen=True)
class Prediction:
    """A tile on one card. Cycles and seconds of one multiprocessor; shares of 1."""

    card: str
    floor_seconds: float
    memory_cycles: float
    tensor_cycles: float
    issue_cycles: float
    share: float
    alone: float
    bound: str  # what takes longest: "memory", "tensor" or "issue"


@dataclass(frozen=True)
class Report:
    """Counts of one configuration, its predictions, and what of its budget is broken."""

    counts: Counts
    work: Work | None
    per_1024_scores: float | None
    predictions: tuple[Prediction, ...]
    broken: tuple[str, ...]


def count(text: str, warps: int, straight: bool = False) -> Counts:
    """Count the kernel in a listing of nvdisasm; ``warps`` of a program.

    Raises:
        ValueError: as ``sass.read`` and ``sass.blocks``.
    """
    listing = sass.read(text)
    parts = sass.regions(listing, straight)
    epilogue = Counter(line.name for line in parts.epilogue)
    loads = [line for line in parts.loop if sass.load_bits(line)]
    products = [line for line in parts.loop if sass.is_product(line)]
    return Counts(
        before=len(parts.before),
        loop=len(parts.loop),
        epilogue=len(parts.epilogue),
        after=len(parts.after),
        epilogue_shuffles=epilogue["SHFL"],
        epilogue_shared=sum(epilogue[name] for name in ("LDS", "LDSM", "STS", "STSM")),
        loads=dict(Counter(map(sass.load_name, loads))),
        products=dict(Counter(line.opcode for line in products)),
        product_flops=_product_flops(products, warps),
        wgmma=any(sass.WGMMA.match(line.opcode) for line in products),
        tma=any(line.name == "UTMALDG" for line in listing.instructions),
        persistent=parts.persistent,
        load_bits=min(map(sass.load_bits, loads), default=0),
    )


def _product_flops(products: list[sass.Instruction], warps: int) -> float | None:
    total = 0.0
    for line in products:
        flops = sass.tensor_flops(line)
        if not flops:
            return None  # tcgen05
        groups = warps / 4 if sass.WGMMA.match(line.opcode) else warps
        total += flops * groups / _rate(line.opcode)
    return total


def _rate(opcode: str) -> float:
    """A type's rate on tensor cores beside bfloat16's."""
    kinds = set(opcode.split("."))
    if kinds & {"S8", "U8", "E4M3", "E5M2"}:
        return 2.0
    return 0.5 if "TF32" in kinds else 1 / 16 if "F64" in kinds or opcode[0] == "D" else 1.0


def predict(card: Card, counts: Counts, work: Work, warps: int) -> Prediction:
    """The model of this module's docstring for one tile on one multiprocessor."""
    rest = counts.epilogue + (0 if counts.persistent else counts.before + counts.after)
    bytes_a_cycle = card.bandwidth / card.multiprocessors / card.clock
    products = work.flops if counts.product_flops is None else counts.product_flops
    loop = (
        work.steps * work.bytes / bytes_a_cycle,
        work.steps * products / card.tensor,
        work.steps * counts.loop * warps / ISSUED,
    )
    outside = (work.tile_bytes / bytes_a_cycle, 0.0, rest * warps / ISSUED)
    memory, tensor, issue = (a + b for a, b in zip(loop, outside, strict=True))
    cycles = {"memory": memory, "tensor": tensor, "issue": issue}
    floor = max(memory, work.steps * work.flops / card.tensor)
    return Prediction(
        card=card.name,
        floor_seconds=floor / card.clock,
        memory_cycles=memory,
        tensor_cycles=tensor,
        issue_cycles=issue,
        share=floor / max(cycles.values()),
        alone=floor / (max(loop) + max(outside)),
        bound=max(cycles, key=cycles.__getitem__),
    )


def measure(target: str, case: dict[str, Any], cubin: bytes, registers: int) -> Report:
    """Disassemble and judge one compiled configuration of ``aot_configs()``.

    ``target``: "sm_80", "sm_90" or "sm_100". ``registers``: of a thread.

    Raises:
        FileNotFoundError: nvdisasm is missing.
        TypeError: a "work" entry with unknown keys.
        ValueError: a "budget" entry with unknown keys, or a listing that is not understood.
    """
    work = Work(**case["work"]) if "work" in case else None
    warps = case["num_warps"]
    counts = count(sass.disassemble(cubin), warps, work is not None and work.straight)
    per_1024: float | None = None
    predictions: tuple[Prediction, ...] = ()
    if work is not None:
        predictions = tuple(predict(card, counts, work, warps) for card in CARDS[target])
        if work.scores and counts.epilogue:
            per_1024 = counts.epilogue * 1024 / work.scores
    measured = {"registers": registers, "epilogue_per_1024_scores": per_1024, **asdict(counts)}
    wanted = case.get("budget", {})
    broken = broken_limits(wanted, measured) if target == BUDGET_TARGET else []
    return Report(counts, work, per_1024, predictions, tuple(broken))


def broken_limits(budget: dict[str, float], measured: dict[str, Any]) -> list[str]:
    """What of a budget is not held, in words; empty if all of it is.

    Raises:
        ValueError: a key that is not in ``LIMITS``; a count a score without scores or an epilogue.
    """
    found = []
    for name, limit in budget.items():
        if name not in LIMITS:
            raise ValueError(f"budget: unknown key {name!r}; there are {', '.join(LIMITS)}")
        value = measured[name]
        if value is None:
            raise ValueError(f"budget: {name} needs an epilogue, and scores in the work entry")
        kind = LIMITS[name]
        if kind == "most" and value > limit:
            found.append(f"{name} {value:.4g} > {limit:.4g}")
        elif kind == "least" and value < limit:
            found.append(f"{name} {value:.4g} < {limit:.4g}")
        elif kind == "equal" and value != limit:
            found.append(f"{name} is {value}, not {limit}")
    return found


def header(target: str) -> tuple[str, ...]:
    """Names of the columns of ``cells``."""
    names = ["before", "loop", "epilogue", "/1024", "shfl", "shared", "loads in the loop"]
    names += ["products in the loop", "tma", "sizes", "step bytes", "step FLOPs", "bound"]
    for card in CARDS[target]:
        names += [f"{card.name} floor us", "share", "alone"]
    return tuple(names)


def cells(target: str, report: Report | None) -> tuple[str, ...]:
    """A report as the cells of a table; "-" where something is not known."""
    if report is None:
        return ("-",) * len(header(target))
    counts, work = report.counts, report.work
    texts = [str(counts.before), str(counts.loop)]
    if counts.epilogue:
        scores = report.per_1024_scores
        texts += [str(counts.epilogue), "-" if scores is None else f"{scores:.3g}"]
        texts += [str(counts.epilogue_shuffles), str(counts.epilogue_shared)]
    else:
        texts += ["-"] * 4
    texts += [_listed(counts.loads), _listed(counts.products), "yes" if counts.tma else "no"]
    if work is None:
        return (*texts, *("-",) * (len(header(target)) - len(texts)))
    texts += [work.sizes or "-", f"{work.bytes:.0f}", f"{work.flops:.0f}"]
    texts.append(report.predictions[0].bound)
    for tile in report.predictions:
        texts += [f"{tile.floor_seconds * 1e6:.3g}", f"{tile.share:.0%}", f"{tile.alone:.0%}"]
    return tuple(texts)


def _listed(counts: dict[str, int]) -> str:
    return " + ".join(f"{number} {name}" for name, number in counts.items()) or "-"
