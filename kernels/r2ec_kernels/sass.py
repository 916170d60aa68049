"""Machine code of an NVIDIA kernel (SASS) as instructions, basic blocks and loops.

``disassemble`` runs nvdisasm, which Triton's wheel carries; ``read`` parses its listing;
``regions`` says which instructions are the main loop and which the epilogue. No GPU is needed.

How the parts are found. Control flow is that of the branches. A loop is a back edge: a branch to a
block that every path to the branch passes through; its body is every block that reaches the branch
without leaving through that block. The main loop is the innermost loop that holds tensor-core
products, else the one with many fused multiply-adds, else the one that loads the most bytes.

- A loop around the main loop (tiles of a persistent program): its other instructions are the
  epilogue, whether they stand before or after the main loop.
- No loop around it: the epilogue is what follows the main loop, to the end.
- A flattened loop, one that runs a tile's end under a condition inside the main loop: blocks that
  not every step passes are the epilogue, if they hold the stores to global memory; those with
  products or loads stay in the loop.
- Specialised warps: each kind has code of its own, and the parts are those of the warps that issue
  the products. On sm_100 these are not the warps of the epilogue, which is then not found.

Counts are of the listing: a loop inside the epilogue counts once, and a subroutine that is called
(the slow path of a division) does not count. BRA.DIV, the path of a warp whose threads have parted,
is not followed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# of tensor cores: Hopper's warpgroup products, the fifth generation's, and those of one warp
WGMMA = re.compile(r"(HGMMA|IGMMA|QGMMA|BGMMA)\b")
TCGEN05 = re.compile(r"UTC[A-Z]*MMA\b")
MMA = re.compile(r"(HMMA|IMMA|QMMA|DMMA)\b")
_FMA = re.compile(r"(FFMA2?|HFMA2|DFMA)\b")
_MANY_FMA = 16  # fewer in a loop are arithmetic on scores or addresses, not a product
_GLOBAL_LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG|LD)\b")
_GLOBAL_STORE = re.compile(r"(STG|UTMASTG|UTMAREDG|RED|REDG|ATOM|ATOMG|ST)\b")
_ENDS = ("EXIT", "RET", "KILL")
_JUMPS = ("BRA", "JMP", "BRX", "JMX", "BRXU")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)|(?<![-\w])(0x[0-9a-f]+)$")


@dataclass(frozen=True)
class Instruction:
    """One line: its address in bytes, its guard ("P0", "!UP1" or ""), opcode and operands."""

    address: int
    guard: str
    opcode: str  # "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers: "LDGSTS"."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in the order of their addresses, and the address of each label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    next: tuple[int, ...]


@dataclass(frozen=True)
class Regions:
    """A kernel's instructions by the part of a tile's work that they belong to.

    Attributes:
        before: ahead of the first tile.
        loop: the main loop, one pass.
        epilogue: once a tile, beside the main loop.
        after: behind the last tile of a persistent program.
        persistent: whether one program works on several tiles.
    """

    before: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]
    after: tuple[Instruction, ...]
    persistent: bool


def nvdisasm() -> str:
    """The path of nvdisasm.

    Raises:
        FileNotFoundError: it is missing; the message says what to install.
    """
    import triton

    try:
        return str(triton.knobs.nvidia.nvdisasm.path)
    except RuntimeError as error:
        raise FileNotFoundError(
            "nvdisasm not found: it ships in Triton's wheel for Linux (`pip install triton`, "
            "triton/backends/nvidia/bin); beside a Triton without it install NVIDIA's package "
            "cuda-nvdisasm and set TRITON_NVDISASM_PATH to its nvdisasm"
        ) from error


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing of a cubin.

    Raises:
        FileNotFoundError: nvdisasm is missing.
        RuntimeError: nvdisasm does not read this cubin.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # with its dataflow analysis, which names the targets of indirect jumps
        command = [nvdisasm(), "--print-code", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def read(text: str) -> Listing:
    """The kernel in a listing of nvdisasm; a listing without sections is one kernel.

    Raises:
        ValueError: not exactly one kernel, or no instruction in it.
    """
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)
    if len(sections) > 1:
        entries = [section for section in sections if "STO_CUDA_ENTRY" in section]
        if len(entries) != 1:
            raise ValueError(f"a listing of one kernel is needed, this one has {len(entries)}")
        [text] = entries
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            instructions.append(Instruction(address, found[2] or "", found[3], found[4]))
    if not instructions:
        raise ValueError("the listing has no instruction")
    return Listing(tuple(instructions), labels)


def blocks(listing: Listing) -> list[Block]:
    """Basic blocks in the order of their addresses; the first is the kernel's entry.

    Raises:
        ValueError: a jump whose targets the listing does not name.
    """
    lines = listing.instructions
    at = {line.address: i for i, line in enumerate(lines)}
    follows = [_follows(listing, at, i) for i in range(len(lines))]
    heads = {0} | {at[address] for address in listing.labels.values()}
    for i, after in enumerate(follows):
        if after != [i + 1]:
            heads |= {i + 1, *after}
    starts = sorted(head for head in heads if head < len(lines))
    number = {start: n for n, start in enumerate(starts)}
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        targets = dict.fromkeys(follows[end - 1])
        found.append(Block(lines[start:end], tuple(number[i] for i in targets if i < len(lines))))
    return found


def _follows(listing: Listing, at: dict[int, int], i: int) -> list[int]:
    """Places in the listing of what may run after instruction ``i``."""
    line = listing.instructions[i]
    always = line.guard in ("", "PT", "UPT")
    if line.name in _ENDS:
        return [] if always else [i + 1]
    if line.name == "BSYNC":  # goes on where the BSSY of its barrier says
        for earlier in reversed(listing.instructions[:i]):
            if earlier.name == "BSSY" and earlier.operands.split(",")[0] == line.operands:
                return [at[address] for address in _targets(listing, earlier)]
        return [i + 1]
    # a call of a label inside the kernel never returns: ptxas' way out of some loops
    local = line.name == "CALL" and "`(.L" in line.operands
    if not (local or line.name in _JUMPS) or line.opcode.startswith("BRA.DIV"):
        return [i + 1]
    targets = [at[address] for address in _targets(listing, line)]
    if not targets:
        raise ValueError(f"{line.opcode} {line.operands} at {line.address:#x} names no target")
    # "BRA.U UP0, `(.L_x_3)" has its condition among the operands
    always = always and not re.match(r"!?U?P\d", line.operands)
    return targets if always else [*targets, i + 1]


def _targets(listing: Listing, line: Instruction) -> list[int]:
    if "BRANCH_TARGETS" in line.operands:  # of an indirect jump: *"BRANCH_TARGETS .L_x_1,.L_x_2"*
        names = re.findall(r"\.L\w+", line.operands.split("BRANCH_TARGETS")[1])
        return [listing.labels[name] for name in names]
    found = _TARGET.search(line.operands)
    if found is None:
        return []
    return [listing.labels[found[1]] if found[1] else int(found[2], 16)]


@dataclass(frozen=True)
class Loop:
    """A loop's first block, the blocks whose branches close it, and all of its blocks."""

    head: int
    ends: frozenset[int]
    body: frozenset[int]


def loops(graph: list[Block]) -> list[Loop]:
    """Every loop that the entry reaches, those with one head as one; a trap that only jumps to
    itself is none."""
    above = _dominators(graph)
    before: dict[int, set[int]] = {i: set() for i in above}
    for i in above:
        for after in graph[i].next:
            before[after].add(i)
    ends: dict[int, set[int]] = {}
    for i in above:
        for after in graph[i].next:
            if after in above[i]:
                ends.setdefault(after, set()).add(i)
    found = []
    for head, closing in sorted(ends.items()):
        body, waiting = {head}, list(closing)
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting += before[i]
        if sum(len(graph[i].instructions) for i in body) > 1:
            found.append(Loop(head, frozenset(closing), frozenset(body)))
    return found


def _reachable(graph: list[Block], starts: Iterable[int]) -> set[int]:
    found, waiting = set(), list(starts)
    while waiting:
        i = waiting.pop()
        if i not in found:
            found.add(i)
            waiting += graph[i].next
    return found


def _dominators(graph: list[Block]) -> dict[int, set[int]]:
    """For every block that the entry reaches: the blocks that each path to it passes, with it."""
    reached = _reachable(graph, [0])
    before: dict[int, list[int]] = {i: [] for i in reached}
    for i in reached:
        for after in graph[i].next:
            before[after].append(i)
    above = {i: set(reached) for i in reached}
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = {i} | set.intersection(*(above[j] for j in before[i]))
            changed |= new != above[i]
            above[i] = new
    return above


def regions(listing: Listing, straight: bool = False) -> Regions:
    """A kernel's parts, as the module's docstring defines them.

    A kernel without a loop, or with ``straight`` (its loops are not its main work), is one step:
    everything is ``loop``, and the rest is empty.
    """
    graph = blocks(listing)
    reached = _reachable(graph, [0])
    found = loops(graph)
    main = None if straight else _main_loop(graph, found)
    if main is None:
        return Regions((), _of(graph, reached), (), (), False)
    sometimes = _tile_end(graph, main)
    step = main.body - sometimes
    around = [loop for loop in found if loop.body > main.body]
    if not around and not sometimes:
        after = _reachable(graph, _exits(graph, main)) - main.body
        before = reached - main.body - after
        return Regions(_of(graph, before), _of(graph, step), _of(graph, after), (), False)
    tile = min(around, key=lambda loop: len(loop.body), default=main)
    after = _reachable(graph, _exits(graph, tile)) - tile.body
    before = reached - tile.body - after
    return Regions(
        before=_of(graph, before),
        loop=_of(graph, step),
        epilogue=_of(graph, tile.body - step),
        after=_of(graph, after),
        persistent=True,
    )


def _of(graph: list[Block], numbers: Iterable[int]) -> tuple[Instruction, ...]:
    """The blocks' instructions; without the NOPs that fill cache lines behind the code."""
    lines = (line for i in sorted(numbers) for line in graph[i].instructions)
    return tuple(line for line in lines if line.name != "NOP")


def _exits(graph: list[Block], loop: Loop) -> set[int]:
    return {after for i in loop.body for after in graph[i].next} - loop.body


def _tile_end(graph: list[Block], loop: Loop) -> frozenset[int]:
    """The blocks of a flattened loop that run at the end of a tile; of any other loop, none."""
    above = _dominators(graph)
    every = frozenset.intersection(*(frozenset(above[end]) for end in loop.ends))
    # a warp chosen to issue products or copies does so under a condition too
    sometimes = frozenset(
        i
        for i in loop.body - every
        if not any(is_product(line) or load_bits(line) for line in graph[i].instructions)
    )
    stores = any(_GLOBAL_STORE.match(line.opcode) for line in _of(graph, sometimes))
    return sometimes if stores else frozenset()


def _main_loop(graph: list[Block], found: list[Loop]) -> Loop | None:
    """See the module's docstring; the larger count wins, then the earlier loop."""
    counts = [Counter[str]() for _ in found]
    for count, loop in zip(counts, found, strict=True):
        for line in _of(graph, loop.body):
            count["tensor"] += is_product(line)
            count["fma"] += bool(_FMA.match(line.opcode))
            count["bytes"] += load_bits(line) // 8
    for kind, least in (("tensor", 1), ("fma", _MANY_FMA), ("bytes", 1)):
        having = [i for i in range(len(found)) if counts[i][kind] >= least]
        innermost = [
            i for i in having if not any(found[j].body < found[i].body for j in having if j != i)
        ]
        if innermost:
            return found[max(innermost, key=lambda i: counts[i][kind])]
    return None


def is_product(line: Instruction) -> bool:
    """Whether the instruction multiplies on tensor cores."""
    return any(kind.match(line.opcode) for kind in (WGMMA, TCGEN05, MMA))


def tensor_flops(line: Instruction) -> int:
    """FLOPs of one tensor-core instruction (of a warpgroup for WGMMA, else of a warp).

    0 for other instructions and for those of tcgen05, whose shape is not part of the opcode.
    """
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", line.opcode):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * is_product(line)
    # "16816": 16 x 8 x 16
    if MMA.match(line.opcode) and (shape := re.search(r"\.(8|16)(8)(\d+)\b", line.opcode)):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def load_bits(line: Instruction) -> int:
    """Bits that a thread takes from global memory; of a TMA copy 128, the least it moves."""
    if not _GLOBAL_LOAD.match(line.opcode):
        return 0
    if line.name == "UTMALDG":
        return 128
    width = re.search(r"\.[US]?(8|16|32|64|128|256)\b", line.opcode)
    return int(width[1]) if width else 32


def load_name(line: Instruction) -> str:
    """A global load's opcode by its width alone: "LDG.U16", "LDG.32", "LDGSTS.128", "UTMALDG"."""
    if line.name == "UTMALDG":
        return line.name
    signed = re.search(r"\.([US](?:8|16))\b", line.opcode)
    return f"{line.name}.{signed[1] if signed else load_bits(line)}"
