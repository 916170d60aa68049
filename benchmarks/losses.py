"""The RecPO token loss on a language-model head: time, memory and error beside the field's.

    python benchmarks/losses.py --set cpu --out results/losses        # about 10 minutes on 2 cores
    python benchmarks/losses.py --set gpu --out results/losses
    python benchmarks/losses.py --only catalog,stats

Every implementation computes the clipped GRPO loss of T tokens at temperature 1.5 (the paper's
setting) and the gradient of the hidden states (and of the head, where it trains). All take turns,
with one bare product hidden @ weight.T, 2 T d V operations: "units" is the time divided by its.
Bytes: the head is read twice, 2 V d; logits, where they are stored, are written and read at least
three times, 3 T V. Errors are relative to float64, on the first 64 tokens. Peak memory is above the
inputs. A peer that cannot run is a row with its reason.
"""

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import relative_error
from loss_peers import PEERS, Data, Shape, exact, ours, step, tie
from machine import synchronize, with_peak

from r2ec_kernels import ItemIndex, linear_logprob, target_stats

_PRODUCT = "one bare product"
COLUMNS = (
    "kind", "peer", "T", "V", "d", "head", "softcap", "zero_share", "device", "median_ms",
    "p20_ms", "p80_ms", "units", "peak_MiB", "loss_error", "hidden_error", "weight_error",
    "times_ours", "reason",
)  # fmt: skip

CPU_SHAPES = [
    Shape(512, 32_000, 576),
    Shape(512, 49_152, 576),
    Shape(512, 152_064, 576),
    Shape(512, 256_000, 576),
    Shape(512, 152_064, 576, softcap=30.0),
    Shape(512, 152_064, 576, zero_share=0.25),
    Shape(512, 152_064, 576, zero_share=0.75),
    Shape(512, 49_152, 1024),
    Shape(512, 32_000, 2304),
    Shape(2048, 49_152, 576),
    Shape(500, 50_257, 700),  # no table shows it
    Shape(512, 49_152, 576, frozen=False),
]
GPU_SHAPES = [
    Shape(tokens, vocab, width, frozen, softcap)
    for tokens in (512, 2048, 8192)
    for vocab in (32_000, 49_152, 152_064, 256_000)
    for width in (576, 1024, 2304)
    for frozen, softcap in ((True, None), (True, 30.0), (False, None))
] + [Shape(8192, 152_064, 1024, zero_share=share) for share in (0.25, 0.75)]


def in_turns(
    runs: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every run, sorted: each once in every round, so that all meet one machine.
    Runs are warm."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: sorted(taken) for name, taken in times.items()}


def spread(times: list[float]) -> dict[str, float]:
    """The columns of sorted times."""
    return {
        "median_ms": statistics.median(times),
        "p20_ms": times[len(times) // 5],
        "p80_ms": times[-1 - len(times) // 5],
    }


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Peak memory of one run above what was held before it, in MiB."""
    return with_peak(run, device)[2]


def measure(shape: Shape, device: str, repeats: int, peers: list[str]) -> list[dict]:
    """One row a peer."""
    data = Data(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    right = exact(data, 64)
    rows = {name: _checked(data, name, right) for name in peers}
    runs = {
        name: partial(step, data, PEERS[name]) for name, row in rows.items() if "reason" not in row
    }
    out = data.hidden.new_empty(shape.tokens, shape.vocab)
    product = partial(torch.mm, data.hidden, data.weight.T, out=out)
    product()
    times = in_turns({**runs, _PRODUCT: product}, device, repeats)
    unit = statistics.median(times[_PRODUCT])
    out = product = None
    for name, run in runs.items():
        rows[name] |= spread(times[name])
        rows[name] |= {
            "units": statistics.median(times[name]) / unit,
            "times_ours": statistics.median(times[name])
            / statistics.median(times[next(iter(runs))]),
            "peak_MiB": peak_mib(run, device),
        }
        gc.collect()
    base = {
        "kind": "loss",
        "T": shape.tokens,
        "V": shape.vocab,
        "d": shape.width,
        "head": "frozen" if shape.frozen else "trainable",
        "softcap": shape.softcap or "",
        "zero_share": shape.zero_share,
        "device": device,
    }
    return [base | {"peer": name} | row for name, row in rows.items()]


def _checked(data: Data, name: str, right: tuple) -> dict:
    """The errors of a peer's first run, or why there is none."""
    try:
        result = step(data, PEERS[name])
        if "CE" in name:  # another loss
            return {}
        return {
            "loss_error": abs(float(result[0]) - right[0]) / abs(right[0]),
            "hidden_error": relative_error(result[1][:64], right[1]),
        }
    except (ImportError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        return {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def measure_shares(device: str, repeats: int) -> list[dict]:
    """recpo_loss over the share of groups whose rewards tie, in turns."""
    shapes = [Shape(512, 152_064, 576, zero_share=share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    data = Data(shapes[0], device, torch.bfloat16 if device == "cuda" else torch.float32)
    rewards = [tie(data.rewards, shape.zero_share) for shape in shapes]

    def run(share: int) -> None:
        data.rewards = rewards[share]
        step(data, ours)

    run(0)
    runs = {str(shape.zero_share): partial(run, i) for i, shape in enumerate(shapes)}
    times = list(in_turns(runs, device, repeats).values())
    return [
        {
            "kind": "shares",
            "peer": "recpo_loss",
            "T": shape.tokens,
            "V": shape.vocab,
            "d": shape.width,
            "zero_share": shape.zero_share,
            "device": device,
            **spread(taken),
            "times_ours": statistics.median(taken) / statistics.median(times[0]),
        }
        for shape, taken in zip(shapes, times, strict=True)
    ]


def measure_stats(device: str, repeats: int) -> list[dict]:
    """target_stats beside scores, count and logsumexp of a materialised [B, N]; cosine at 0.02."""
    rows = []
    for count, width in ((200_000, 1024), (100_000, 576)):
        generator = torch.Generator().manual_seed(0)
        items = torch.nn.functional.normalize(torch.randn(count, width, generator=generator))
        items = items.to(device)
        how = {"similarity": "cosine", "temperature": 0.02}
        index = ItemIndex(items, **how)
        for batch in (1, 16, 64, 256):
            noise = torch.nn.functional.normalize(torch.randn(batch, width, generator=generator))
            targets = torch.randint(0, count, (batch,), generator=generator).to(device)
            # a model that has learned something
            queries = torch.nn.functional.normalize(noise.to(device) + 0.1 * items[targets])

            def plain(queries=queries, items=items, targets=targets) -> object:
                scores = queries @ items.T / 0.02
                own = scores.gather(1, targets[:, None])
                return 1 + (scores > own).sum(1), own[:, 0] - scores.logsumexp(1)

            def fast(queries=queries, items=items, targets=targets, how=how) -> object:
                return target_stats(queries, items, targets, **how)

            def indexed(queries=queries, index=index, targets=targets) -> object:
                return index.target_stats(queries, targets)

            named = {
                "ItemIndex.target_stats": indexed,
                "target_stats": fast,
                "materialised scores": plain,
            }
            rows += _rows("stats", named, batch, count, width, device, repeats)
            right = fast()
            got = indexed()
            assert torch.equal(got.rank, right.rank)
            assert (got.log_prob - right.log_prob).abs().max() < 1e-3
    return rows


def measure_catalog(device: str, repeats: int) -> list[dict]:
    """The full-catalog softmax of the item head, forward and backward."""
    count, width, batch = 1_000_000, 576, 64
    generator = torch.Generator().manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(count, width, generator=generator))
    items = items.to(device)
    targets = torch.randint(0, count, (batch,), generator=generator).to(device)
    start = torch.nn.functional.normalize(items[targets] + 0.02 * torch.randn(batch, width))

    def fast() -> object:
        users = start.detach().requires_grad_()
        log_prob = linear_logprob(users, items, targets, temperature=0.02).log_prob
        return torch.autograd.grad(-log_prob.mean(), users)

    def plain() -> object:
        users = start.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(users @ items.T / 0.02, targets)
        return torch.autograd.grad(loss, users)

    named = {"linear_logprob": fast, "materialised scores": plain}
    return _rows("catalog", named, batch, count, width, device, repeats)


def _rows(
    kind: str,
    named: dict[str, Callable[[], object]],
    batch: int,
    count: int,
    width: int,
    device: str,
    repeats: int,
) -> list[dict]:
    for run in named.values():
        run()
    times = in_turns(named, device, repeats)
    first = statistics.median(next(iter(times.values())))
    return [
        {
            "kind": kind,
            "peer": name,
            "T": batch,
            "V": count,
            "d": width,
            "device": device,
            **spread(times[name]),
            "peak_MiB": peak_mib(run, device),
            "times_ours": statistics.median(times[name]) / first,
        }
        for name, run in named.items()
    ]


def show(row: dict) -> str:
    """One line of the table on the screen."""
    shape = f"T={row['T']} V={row['V']} d={row['d']}"
    extra = " ".join(
        str(row[k]) for k in ("head", "softcap", "zero_share") if row.get(k) not in (None, "", 0.0)
    )
    if "reason" in row:
        return f"{shape} {extra} | {row['peer']} | {row['reason']}"
    numbers = [
        f"{row['median_ms']:.1f} ms [{row['p20_ms']:.1f}-{row['p80_ms']:.1f}]",
        f"{row['units']:.2f} units" if "units" in row else "",
        f"{row['peak_MiB']:.1f} MiB" if "peak_MiB" in row else "",
        f"errors {row['loss_error']:.1e} {row['hidden_error']:.1e}" if "loss_error" in row else "",
        f"x{row['times_ours']:.2f}",
    ]
    return f"{shape} {extra} | {row['peer']} | " + " | ".join(n for n in numbers if n)


def plot(rows: list[dict], path: Path) -> None:
    """Time in units and memory of every peer over the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed_rows = [r for r in rows if r["kind"] == "loss" and "median_ms" in r]
    if not timed_rows:
        return
    figure, axes = plt.subplots(2, 1, figsize=(10, 8), sharex=True)
    keys = ("T", "V", "d", "head", "softcap", "zero_share")
    labels = list(dict.fromkeys(tuple(r[k] for k in keys) for r in timed_rows))
    for peer in PEERS:
        own = {tuple(r[k] for k in keys): r for r in timed_rows if r["peer"] == peer}
        places = [i for i, label in enumerate(labels) if label in own]
        if places:
            units = [own[labels[i]]["units"] for i in places]
            memory = [max(own[labels[i]]["peak_MiB"], 0.1) for i in places]
            axes[0].plot(places, units, "o", label=peer)
            axes[1].plot(places, memory, "o", label=peer)
    axes[0].set_ylabel("time / one product")
    axes[1].set_ylabel("peak MiB above the inputs")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    names = [" ".join(str(x) for x in label if x not in ("", 0.0, "frozen")) for label in labels]
    axes[1].set_xticks(range(len(labels)), names, rotation=60, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder of losses.csv and losses.png")
    parser.add_argument("--only", default="loss,shares,stats,catalog", help="kinds, by commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers of the loss, by commas")
    parser.add_argument("--shapes", default="", help="numbers of the set's shapes, by commas")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if args.set == "gpu" else "cpu"
    kinds, rows = args.only.split(","), []
    shapes = GPU_SHAPES if args.set == "gpu" else CPU_SHAPES
    if args.shapes:
        shapes = [shapes[int(i)] for i in args.shapes.split(",")]
    if "loss" in kinds:
        for shape in shapes:
            new = measure(shape, device, args.repeats, args.peers.split(","))
            rows += new
            for row in new:
                print(show(row), flush=True)
    others = {"shares": measure_shares, "stats": measure_stats, "catalog": measure_catalog}
    for kind, function in others.items():
        if kind in kinds:
            new = function(device, args.repeats)
            rows += new
            for row in new:
                print(show(row), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "losses.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, args.out / "losses.png")


if __name__ == "__main__":
    main()
