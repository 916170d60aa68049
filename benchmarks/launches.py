"""How many device operations and host waits one public call costs on the Triton path.

    python benchmarks/launches.py [--ops search rank ...] [--batches 1 16 64 256] [--dry]
        [--json FILE]

Nothing is timed, and no GPU is needed: the calls run in Triton's interpreter, on small tables,
under a dispatch mode that counts. Counted are

- device operations: operators of torch that start work on a device, and launches of Triton
  kernels. Views and allocations start none. An operator counts as one, though some (``topk``,
  ``sort``) start several kernels;
- of them, launches of the project's own kernels;
- host waits: operations after which the host has to wait for the device, such as ``item``,
  ``tolist``, ``nonzero`` and selections by a mask.

``decode`` counts a token of the decoders for a toy Llama of two and of three layers: the difference
is what a layer costs.

With ``--dry`` the project's kernels are counted and not run, so that large batches take no longer
than small ones. The counts are the same: what a kernel computes can only change what is launched
after it by way of the host, and that would be a wait.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ.setdefault("R2EC_IMPL", "triton")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import r2ec_kernels
from r2ec_kernels import ItemIndex, _checks, ops

NUM_ITEMS, DIM, K, HISTORY = 2048, 64, 20, 20
BATCHES = (1, 16, 64, 256)
SCANS = ("none", "bf16", "int8")
GENERATIONS, TOP_K = 4, 50  # reasonings of a group; tokens among which one is drawn
TOKENS, NUM_WORDS = 2, 5000  # of a reasoning, and of the vocabulary: three blocks
PROMPT, ROOM = 12, 8  # tokens of a prompt and of a completion
STORED = ("old_log_prob", "sampler_log_prob", "ref_log_prob")

# what starts no work on a device: views, allocations, questions about a tensor
_FREE = frozenset(
    {
        *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "lift_fresh", "permute"),
        *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
        *("unbind", "unfold", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "empty"),
        *("empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_pinned"),
        *("sym_size", "sym_stride", "sym_numel", "promote_types"),
    }
)
_WAITS = frozenset(
    {
        *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique"),
        *("_unique2", "unique_consecutive", "unique_dim"),
    }
)
_BODIES = {
    "item_topk": ops._item_topk,
    "target_stats": ops._target_stats,
    "linear_logprob_forward": ops._logprob,
    "linear_logprob_backward": ops._logprob_backward,
    "catalog_lse": ops._catalog_lse,
}


@dataclass
class Cost:
    """What one call costs.

    Attributes:
        operations: device operations, kernel launches among them.
        launches: of the project's Triton kernels, by name.
        waits: host waits.
        names: every device operation by name.
    """

    operations: int = 0
    launches: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    names: Counter[str] = field(default_factory=Counter)


class _Counting(TorchDispatchMode):
    """Counts into ``cost``; an operator of the project is looked into."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "r2ec_kernels":
            with self:
                return _BODIES[func.overloadpacket.__name__](*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.count(name)
        if name in _WAITS or (name in ("index", "index_put", "index_put_") and _by_mask(args[1])):
            self.cost.waits += 1
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.cost.waits += 1
        return func(*args, **kwargs)

    def count(self, name: str) -> None:
        self.cost.operations += 1
        self.cost.names[name] += 1


def _by_mask(indices: list[torch.Tensor | None]) -> bool:
    return any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in indices)


@contextmanager
def counted(dry: bool = False) -> Iterator[Cost]:
    """The cost of what runs inside, on the CPU as if it were a GPU. dry: kernels are not run, and
    what they would write holds anything."""
    from triton.runtime import interpreter

    cost = Cost()
    mode = _Counting(cost)
    launch, tolist = interpreter.GridExecutor.__call__, torch.Tensor.tolist

    def launched(executor, *args, **kwargs):
        name = executor.fn.__name__.strip("_")
        mode.count(name)
        cost.launches[name] += 1
        if dry:
            return None
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(executor, *args, **kwargs)

    def waited(tensor: torch.Tensor):
        cost.waits += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return tolist(tensor)

    reads = _checks.reads_values
    _checks.reads_values = lambda value: False  # as on a GPU
    interpreter.GridExecutor.__call__, torch.Tensor.tolist = launched, waited
    try:
        with mode:
            yield cost
    finally:
        interpreter.GridExecutor.__call__, torch.Tensor.tolist = launch, tolist
        _checks.reads_values = reads


def _vectors(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator)


def _exclude(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(NUM_ITEMS, (batch, HISTORY), generator=generator)


def _targets(batch: int) -> torch.Tensor:
    return torch.arange(batch) * 31 % NUM_ITEMS


def search_calls() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Searches by name: a batch size makes a call."""
    items = _vectors(NUM_ITEMS, 0)

    def plain(batch: int, **settings: object) -> Callable[[], object]:
        queries = _vectors(batch, 1)
        return lambda: r2ec_kernels.item_topk(queries, items, K, **settings)

    def indexed(scan: str, **settings: object) -> Callable[[int], Callable[[], object]]:
        index = ItemIndex(items, scan=scan)

        def make(batch: int) -> Callable[[], object]:
            queries, exclude = _vectors(batch, 1), _exclude(batch)
            return lambda: index.search(queries, K, exclude=exclude, **settings)

        return make

    include = torch.arange(NUM_ITEMS) % 3 > 0
    return {
        "item_topk": plain,
        "item_topk, exclude": lambda batch: plain(batch, exclude=_exclude(batch)),
        "item_topk, include": lambda batch: plain(batch, include=include),
        "ItemIndex(int8).search, both lists": indexed("int8", include=include),
        **{
            f"ItemIndex({scan}).search, exclude": indexed(scan) for scan in ("none", "bf16", "int8")
        },
    }


def rank_calls() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Ranks and probabilities of targets by name."""
    items = _vectors(NUM_ITEMS, 0)
    index = ItemIndex(items, scan="none")

    def plain(batch: int) -> Callable[[], object]:
        queries, targets, exclude = _vectors(batch, 1), _targets(batch), _exclude(batch)
        return lambda: r2ec_kernels.target_stats(queries, items, targets, exclude=exclude)

    def indexed(batch: int) -> Callable[[], object]:
        queries, targets, exclude = _vectors(batch, 1), _targets(batch), _exclude(batch)
        return lambda: index.target_stats(queries, targets, exclude=exclude, use_scan=False)

    return {"target_stats": plain, "ItemIndex.target_stats": indexed}


def reward_calls() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Rewards and advantages by name; a batch is that many groups."""

    def make(batch: int) -> Callable[[], object]:
        rank = torch.arange(batch * GENERATIONS).view(batch, GENERATIONS) % 50 + 1
        log_prob = -rank.float()
        return lambda: r2ec_kernels.reward_and_advantage(rank, log_prob)

    return {"reward_and_advantage": make}


def loss_calls() -> dict[str, Callable[[int], Callable[[], object]]]:
    """recpo_loss with its backward by name; a batch is that many groups. Beside what is counted
    here, a larger call has three operations more for each further tile of tokens and block of the
    vocabulary: a product, ``update_kernel``, a product."""

    def make(batch: int, **settings: object) -> Callable[[], object]:
        rows = batch * GENERATIONS
        trajectory = torch.arange(rows).repeat_interleave(TOKENS)
        targets = torch.arange(rows * TOKENS) * 31 % NUM_WORDS
        states = [_vectors(n, seed).requires_grad_() for seed, n in enumerate((len(targets), rows))]
        items = _vectors(batch, 2).requires_grad_()
        arguments = (states[0], _vectors(NUM_WORDS, 3), targets, trajectory)
        arguments += (torch.rand(batch, GENERATIONS), states[1], items, torch.arange(batch))
        stored = {name: -torch.rand(len(targets)) for name in STORED}
        stored["old_item_log_prob"] = -torch.rand(rows)
        how = {"num_tokens": torch.tensor(10_000), "item_targets": torch.arange(batch)}
        config = r2ec_kernels.RecPOLossConfig(impl="triton", kl_weight=0.1, **settings)

        def call() -> None:
            loss = r2ec_kernels.recpo_loss(*arguments, **stored, **how, config=config).loss
            torch.autograd.grad(loss, (*states, items))

        return call

    sequence = {"ratio_level": "sequence", "importance_sampling_mode": "sequence_mask"}
    return {
        "recpo_loss": make,
        "recpo_loss, per sequence": lambda batch: make(batch, **sequence),
    }


def decode_calls() -> dict[str, Callable[[int], Callable[[], object]]]:
    """A token of every row by decoder, drawn and read; a batch is that many prompts of two
    lengths."""
    return {
        f"{name} decoder, {layers} layers": functools.partial(make, layers)
        for name, make in (("static", _static_token), ("shared", _shared_token))
        for layers in (2, 3)
    }


def _toy_llama(layers: int, batch: int):
    """A model, prompts, and the keys of their rows."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from workload import SIZES

    config = LlamaConfig(**SIZES["toy"][1] | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompts = [[5] * (PROMPT - i % 2) for i in range(batch)]
    return model, prompts, torch.arange(batch * GENERATIONS)


def _static_token(layers: int, batch: int) -> Callable[[], object]:
    from workload import small_tokenizer

    from r2ec_fast.packing.ragged import Ragged
    from r2ec_fast.rollout.job import Job, RowEnds
    from r2ec_fast.rollout.marker import MarkerStop
    from r2ec_fast.rollout.sampling import SamplingParams
    from r2ec_fast.rollout.static.decoder import StaticDecoder
    from r2ec_fast.rollout.static.slots import Slots

    model, prompts, keys = _toy_llama(layers, batch)
    decoder = StaticDecoder(model)
    ends = RowEnds(MarkerStop(small_tokenizer(["<answer>"]), "<answer>"), [1], [0])
    job = Job(
        Ragged.of(prompts, "prompts"),
        keys,
        GENERATIONS,
        ROOM,
        ROOM,
        SamplingParams(top_k=TOP_K),
        ends,
    )
    with torch.no_grad(), decoder.session():
        logits = decoder.start(prompts, GENERATIONS, ROOM)
        slots = Slots(decoder, keys, job, [])
        slots.draw(logits)

    def token() -> None:
        with torch.no_grad(), decoder.session():
            slots.step()

    return token


def _shared_token(layers: int, batch: int) -> Callable[[], object]:
    from r2ec_fast.rollout.sampling import SamplingParams, sample_tokens
    from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder

    model, prompts, keys = _toy_llama(layers, batch)
    decoder = SharedPromptDecoder(model)
    with torch.no_grad(), decoder.session():
        logits = decoder.start(prompts, GENERATIONS, ROOM)

    def token() -> None:
        with torch.no_grad(), decoder.session():
            drawn = sample_tokens(logits, keys, 0, SamplingParams(top_k=TOP_K))
            drawn.log_prob.tolist()
            decoder.step(torch.tensor(drawn.tokens.tolist()), None)

    return token


CALLS = {
    "search": search_calls,
    "rank": rank_calls,
    "reward": reward_calls,
    "loss": loss_calls,
    "decode": decode_calls,
}


def measure(make: Callable[[int], Callable[[], object]], batch: int, dry: bool = False) -> Cost:
    """The cost of a second call: the first may make what later ones keep."""
    call = make(batch)
    with counted(dry):
        call()
    with counted(dry) as cost:
        call()
    return cost


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dry", action="store_true", help="count kernels without running them")
    parser.add_argument("--json", type=Path, help="also write every operation's count here")
    parser.add_argument("--names", action="store_true", help="print the operations by name")
    options = parser.parse_args(arguments)
    print(f"N = {NUM_ITEMS}, d = {DIM}, k = {K}; device operations (own kernels) + host waits")
    print(f"{'call':36}" + "".join(f"{f'B = {batch}':>16}" for batch in options.batches))
    rows = []
    for name in options.ops:
        for call, make in CALLS[name]().items():
            cells = []
            for batch in options.batches:
                cost = measure(make, batch, options.dry)
                own = sum(cost.launches.values())
                cells.append(f"{cost.operations} ({own}) + {cost.waits}")
                counts = {"names": dict(cost.names), "launches": dict(cost.launches)}
                counts |= {"operations": cost.operations, "waits": cost.waits}
                rows.append({"call": call, "batch": batch, **counts})
                if options.names:
                    print(call, batch, dict(cost.names), file=sys.stderr)
            print(f"{call:36}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
