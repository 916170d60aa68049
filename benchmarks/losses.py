"""The RecPO token loss on a language-model head: time, memory and error beside the field's.

    python benchmarks/losses.py --set cpu --out results/losses        # about 10 minutes on 2 cores
    python benchmarks/losses.py --set gpu --out results/losses
    python benchmarks/losses.py --only catalog,stats

Every implementation computes the clipped GRPO loss of T tokens at temperature 1.5 (METHOD's
setting) and the gradient of the hidden states (and of the head, where it trains). "units" is the
time divided by that of one bare product hidden @ weight.T, 2 T d V operations, timed in the same
process. Bytes: the head is read twice, 2 V d; logits, where they are stored, are written and read
at least three times, 3 T V. Errors are relative to float64, on the first 64 tokens. Peak memory is
above the inputs. A peer that cannot run is a row with its reason.
"""

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import synchronize, with_peak

from r2ec_kernels import ItemIndex, RecPOLossConfig, linear_logprob, recpo_loss, target_stats

TEMPERATURE = 1.5
GROUP = 4
TRL_CHUNK = 32768  # the block of the vocabulary TRL's trainers use
COLUMNS = (
    "kind", "peer", "T", "V", "d", "head", "softcap", "zero_share", "device", "median_ms",
    "p20_ms", "p80_ms", "units", "peak_MiB", "loss_error", "hidden_error", "weight_error",
    "times_ours", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocab: int
    width: int
    frozen: bool = True
    softcap: float | None = None
    zero_share: float = 0.0  # of the groups: their rewards tie


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


def tie(rewards: torch.Tensor, share: float) -> torch.Tensor:
    """Rewards [B, G] of which this share of the groups are equal: no advantage, no gradient."""
    rewards = rewards.clone()
    rewards[: round(share * rewards.shape[0])] = 0.5
    return rewards


class Data:
    """Inputs of one shape."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        tokens, vocab, width = shape.tokens, shape.vocab, shape.width

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        self.hidden = randn(tokens, width).to(device, dtype)
        self.weight = (randn(vocab, width) / width**0.5).to(device, dtype)
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
        self.rows = GROUP * max(1, tokens // 128)
        per_row = -(-tokens // self.rows)
        self.trajectory = (torch.arange(tokens) // per_row).to(device)
        rewards = torch.rand(self.rows // GROUP, GROUP, generator=generator).to(device)
        self.rewards = tie(rewards, shape.zero_share)
        centred = self.rewards - self.rewards.mean(1, keepdim=True)
        advantage = (centred / (self.rewards.std(1, keepdim=True) + 1e-8)).flatten()
        self.advantage = advantage[self.trajectory]
        self.old = (-2.0 - randn(tokens).abs()).to(device) - torch.log(torch.tensor(vocab / 8.0))
        self.users = randn(self.rows, 64).to(device)
        self.items = randn(self.rows // GROUP, 64).to(device)

    def loss(self, log_prob: torch.Tensor) -> torch.Tensor:
        """The clipped loss in plain torch, for peers that give log-probabilities."""
        ratio = (log_prob - self.old.to(log_prob.dtype)).exp()
        advantage = self.advantage.to(log_prob.dtype)
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -clipped.mean()


def ours(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    config = RecPOLossConfig(temperature=TEMPERATURE, softcap=data.shape.softcap, item_weight=0.0)
    return recpo_loss(
        hidden,
        weight,
        data.targets,
        data.trajectory,
        data.rewards,
        data.users,
        data.items,
        torch.arange(data.items.shape[0], device=data.items.device),
        old_log_prob=data.old,
        config=config,
    ).loss


def ours_log_prob(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    head = {"temperature": TEMPERATURE, "softcap": data.shape.softcap}
    return data.loss(linear_logprob(hidden, weight, data.targets, **head).log_prob)


def materialised(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    if data.shape.softcap:
        logits = data.shape.softcap * torch.tanh(logits / data.shape.softcap)
    log_p = torch.log_softmax(logits / TEMPERATURE, -1)
    return data.loss(log_p.gather(1, data.targets[:, None])[:, 0])


def compiled(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden.device.type != "cuda":
        raise RuntimeError("run on GPUs only: minutes of compilation per shape on a CPU")
    return torch.compile(materialised)(data, hidden, weight)


def trl(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(
        hidden, weight, None, data.targets, TEMPERATURE, TRL_CHUNK, data.shape.softcap, 1.0, ()
    )
    return data.loss(out[0])


def liger_grpo(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if data.shape.softcap:
        raise RuntimeError("has no soft-cap")
    rows, per_row = data.rows, data.shape.tokens // data.rows
    if rows * per_row != data.shape.tokens:
        raise RuntimeError("takes padded rows only: T is not a multiple of the rows")
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        loss_type="bnpo",
        temperature=TEMPERATURE,
        chunk_size=rows,
    )
    return loss(
        hidden.view(rows, per_row, -1),
        weight,
        data.targets.view(rows, per_row),
        torch.ones(rows, per_row, device=hidden.device),
        data.advantage.view(rows, per_row)[:, 0],
        old_per_token_logps=data.old.view(rows, per_row),
    )[0]


def liger_cross_entropy(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=data.shape.softcap)
    return loss(weight, hidden, data.targets)


def cut_cross_entropy(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        hidden / TEMPERATURE, weight, data.targets, softcap=data.shape.softcap, reduction="none"
    )
    return data.loss(-nll)


PEERS: dict[str, Callable[[Data, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "recpo_loss": ours,
    "linear_logprob": ours_log_prob,
    "TRL chunked log-prob": trl,
    "Liger GRPO": liger_grpo,
    "materialised logits": materialised,
    "torch.compile": compiled,
    "Liger fused linear CE": liger_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
}


def timed(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Peak memory of one run above what was held before it, in MiB."""
    return with_peak(run, device)[2]


def exact(data: Data, rows: int) -> tuple[float, torch.Tensor]:
    """Loss of all tokens and hidden gradient of the first rows, in float64, 64 rows at a time."""
    total, grads = 0.0, []
    weight = data.weight.double()
    for start in range(0, data.shape.tokens, 64):
        hidden = data.hidden[start : start + 64].double().requires_grad_(start < rows)
        logits = hidden @ weight.T
        if data.shape.softcap:
            logits = data.shape.softcap * torch.tanh(logits / data.shape.softcap)
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        part = slice(start, start + 64)
        log_prob = log_p.gather(1, data.targets[part, None])[:, 0]
        ratio = (log_prob - data.old[part].double()).exp()
        advantage = data.advantage[part].double()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        loss = loss / data.shape.tokens
        total += float(loss.detach())
        if start < rows:
            grads.append(torch.autograd.grad(loss, hidden)[0])
    return total, torch.cat(grads)


def step(data: Data, peer: Callable) -> tuple[torch.Tensor, ...]:
    """(loss, gradient of hidden[, of weight])."""
    hidden = data.hidden.detach().requires_grad_()
    weight = data.weight.detach().requires_grad_(not data.shape.frozen)
    loss = peer(data, hidden, weight)
    leaves = [hidden] if data.shape.frozen else [hidden, weight]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def relative(value: torch.Tensor, right: torch.Tensor) -> float:
    return float((value.double() - right).norm() / right.norm().clamp(min=1e-300))


def measure(shape: Shape, device: str, repeats: int, peers: list[str]) -> list[dict]:
    """One row a peer."""
    data = Data(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    out = data.hidden.new_empty(shape.tokens, shape.vocab)
    unit = statistics.median(
        timed(lambda: torch.mm(data.hidden, data.weight.T, out=out), device, repeats)
    )
    out = None
    rows = []
    right = exact(data, 64)
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
    for name in peers:
        row = base | {"peer": name}
        try:
            result = step(data, PEERS[name])
            times = sorted(timed(lambda name=name: step(data, PEERS[name]), device, repeats))
            row |= {
                "median_ms": statistics.median(times),
                "p20_ms": times[len(times) // 5],
                "p80_ms": times[-1 - len(times) // 5],
                "units": statistics.median(times) / unit,
                "peak_MiB": peak_mib(lambda name=name: step(data, PEERS[name]), device),
            }
            if "CE" not in name:  # another loss
                row["loss_error"] = abs(float(result[0]) - right[0]) / abs(right[0])
                row["hidden_error"] = relative(result[1][:64], right[1])
        except (ImportError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        rows.append(row)
        gc.collect()
    ours_ms = rows[0].get("median_ms")
    for row in rows:
        if ours_ms and "median_ms" in row:
            row["times_ours"] = row["median_ms"] / ours_ms
    return rows


def measure_shares(device: str, repeats: int) -> list[dict]:
    """recpo_loss over the share of groups whose rewards tie, in turns."""
    shapes = [Shape(512, 152_064, 576, zero_share=share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    data = Data(shapes[0], device, torch.bfloat16 if device == "cuda" else torch.float32)
    rewards = [tie(data.rewards, shape.zero_share) for shape in shapes]

    def run(share: int) -> None:
        data.rewards = rewards[share]
        step(data, ours)

    times: list[list[float]] = [[] for _ in shapes]
    for _ in range(repeats):
        for share in range(len(shapes)):
            times[share] += timed(lambda share=share: run(share), device, 1)
    rows = []
    for shape, taken in zip(shapes, times, strict=True):
        taken.sort()
        rows.append(
            {
                "kind": "shares",
                "peer": "recpo_loss",
                "T": shape.tokens,
                "V": shape.vocab,
                "d": shape.width,
                "zero_share": shape.zero_share,
                "device": device,
                "median_ms": statistics.median(taken),
                "p20_ms": taken[len(taken) // 5],
                "p80_ms": taken[-1 - len(taken) // 5],
                "times_ours": statistics.median(taken) / statistics.median(times[0]),
            }
        )
    return rows


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
    rows = []
    for name, run in named.items():
        times = sorted(timed(run, device, repeats))
        rows.append(
            {
                "kind": kind,
                "peer": name,
                "T": batch,
                "V": count,
                "d": width,
                "device": device,
                "median_ms": statistics.median(times),
                "p20_ms": times[len(times) // 5],
                "p80_ms": times[-1 - len(times) // 5],
                "peak_MiB": peak_mib(run, device),
            }
        )
    for row in rows:
        row["times_ours"] = row["median_ms"] / rows[0]["median_ms"]
    return rows


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
    parser.add_argument("--repeats", type=int, default=3)
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
