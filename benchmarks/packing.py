"""Packing speed beside its peers, and the update step on shared, repeated and padded prompts.

    python benchmarks/packing.py pack [--rows 1000 10000 100000] [--csv FILE] [--png FILE]
    python benchmarks/packing.py update [--model PATH] [--prompt 1000] [--completion 300] [-G 4]
    python benchmarks/packing.py assemble --model PATH --titles FILE
    python benchmarks/packing.py feed [--model PATH] [--histories 10000] [--items 10000]

`pack`: every packer gets the same rows (log-normal lengths, median 90 tokens) in the form it likes
best and fills batches of at most 8192 tokens. fill = real tokens / (batches x 8192), or / cells of
the padded grid. TRL's packer returns packed ids and row lengths; ours also positions, sequence
bounds, sequence numbers and read-outs. A row is printed only after the output was checked.

`update`: forward and backward of one policy step, a frozen head and LoRA adapters, log-probs of the
completion tokens alone in every form. The padded form is transformers' own SDPA forward. Peak
memory is of the process, above the loaded model.

`assemble`: prompts from token segments beside tokenising each whole text.

`feed`: from a data set to packed batches, as the direct objective's trainer goes: prompts of 15 to
20 events, the marker behind each, batches of the default budget. Beside it the same through Python
lists. Runs of both take turns. Segments are made before the clock starts.
"""

from __future__ import annotations

import argparse
import csv
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.packing.packer import PackedBatch, pack_histories

if TYPE_CHECKING:
    import pyarrow as pa

    from r2ec_fast.data import Examples, RecDataset

BUDGET = 8192
PYTHON_ROWS = 100_000  # packers that loop over rows or tokens in Python are not run on more


def median(run: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the seconds of `repeats` runs; results are dropped."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
        del result
    low, high = np.percentile(seconds, [20, 80])
    return statistics.median(seconds), float(low), float(high)


# ---- packers: each takes the rows in its own form and returns (batches, tokens it holds) ---------


def python_packer(rows: Sequence[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Best-fit decreasing with a sorted list, batches built as Python lists."""
    from bisect import bisect_left, insort

    open_bins: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        at = bisect_left(open_bins, (len(rows[i]), -1))
        if at == len(open_bins):
            space, b = BUDGET, len(bins)
            bins.append([])
        else:
            space, b = open_bins.pop(at)
        bins[b].append(i)
        if space > len(rows[i]):
            insort(open_bins, (space - len(rows[i]), b))
    out = []
    for members in bins:
        ids, positions, bounds = [], [], [0]
        for i in members:
            ids += rows[i]
            positions += range(len(rows[i]))
            bounds.append(len(ids))
        out.append(
            {
                "input_ids": torch.tensor([ids]),
                "position_ids": torch.tensor([positions]),
                "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
            }
        )
    return out


def in_order(lengths: np.ndarray, cost: Callable[[int, int], int]) -> Iterator[slice]:
    """Consecutive rows while `cost(count, longest or total)` stays within the budget."""
    start, total, longest = 0, 0, 0
    for i, n in enumerate(lengths.tolist()):
        if i > start and cost(i + 1 - start, max(longest, n), total + n) > BUDGET:
            yield slice(start, i)
            start, total, longest = i, 0, 0
        total, longest = total + n, max(longest, n)
    yield slice(start, len(lengths))


def packers(values: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[str, Callable, Callable]]:
    """(name, run, (batches, real tokens, grid cells) of its result)."""
    lengths = np.diff(offsets)
    count = len(lengths)

    def ours(threads: int, backend: str = "cpp") -> Callable[[], list[PackedBatch]]:
        return lambda: pack_histories(
            (values, offsets), max_tokens=BUDGET, threads=threads, backend=backend
        )

    def of_ours(out: list[PackedBatch]) -> tuple[int, int, int]:
        return len(out), sum(b.num_tokens for b in out), len(out) * BUDGET

    yield "r2ec_fast, 1 thread", ours(1), of_ours
    yield "r2ec_fast, 2 threads", ours(2), of_ours
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
    table = pa.table({"input_ids": array})

    def of_trl(out: pa.Table) -> tuple[int, int, int]:
        return len(out), len(out["input_ids"].chunks[0].values), len(out) * BUDGET

    yield "TRL bfd", lambda: _pack_bfd(table, BUDGET), of_trl
    if count > PYTHON_ROWS:
        return
    yield "numpy", ours(1, "numpy"), of_ours
    rows = [row.tolist() for row in np.split(values, offsets[1:-1])]

    def of_dicts(out: list[dict]) -> tuple[int, int, int]:
        tokens = sum(b["input_ids"].numel() for b in out)
        return len(out), tokens, len(out) * BUDGET

    yield "plain Python", lambda: python_packer(rows), of_dicts
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    features = [{"input_ids": row} for row in rows]
    flat = list(in_order(lengths, lambda rows, longest, total: total))
    yield (
        "DataCollatorWithFlattening",
        lambda: [collator(features[part], return_tensors="pt") for part in flat],
        of_dicts,
    )
    tensors = [torch.tensor(row) for row in rows]
    grid = list(in_order(lengths, lambda rows, longest, total: rows * longest))

    def of_padded(out: list[torch.Tensor]) -> tuple[int, int, int]:
        return len(out), int(lengths.sum()), sum(t.numel() for t in out)

    yield (
        "padded",
        lambda: [torch.nn.utils.rnn.pad_sequence(tensors[p], batch_first=True) for p in grid],
        of_padded,
    )


def bench_pack(row_counts: Sequence[int]) -> Iterator[dict[str, object]]:
    for count in row_counts:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(4.5, 0.7, count).astype(np.int64), 1, 2048)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = rng.integers(0, 49_152, offsets[-1], dtype=np.int32)
        peer, results = None, []
        for name, run, describe in packers(values, offsets):
            started = time.perf_counter()
            out = run()
            first = time.perf_counter() - started
            batches, tokens, cells = describe(out)
            if tokens != offsets[-1]:
                raise SystemExit(f"{name} lost tokens: {tokens} of {offsets[-1]}")
            del out
            repeats = 7 if first < 0.5 else 3
            seconds, low, high = median(run, repeats) if first < 8 else (first, first, first)
            peer = seconds if name == "TRL bfd" else peer
            results.append(
                {
                    "rows": count,
                    "packer": name,
                    "median_ms": seconds * 1e3,
                    "p20_ms": low * 1e3,
                    "p80_ms": high * 1e3,
                    "rows_per_s": count / seconds,
                    "Mtok_per_s": tokens / seconds / 1e6,
                    "fill": tokens / cells,
                    "batches": batches,
                }
            )
        for result in results:
            result["vs_TRL"] = peer / (result["median_ms"] / 1e3) if peer else float("nan")
            yield result


# ---- the update step ----------------------------------------------------------------------------


def load_model(path: str | None):
    import transformers

    from r2ec_fast.model.r2ec import R2ecModel

    torch.manual_seed(0)
    if path is not None:
        model = R2ecModel.from_pretrained(path, dtype=torch.float32)
    else:  # the size of SmolLM2-135M
        config = transformers.LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            max_position_embeddings=8192, rope_theta=100_000.0,
        )  # fmt: skip
        backbone = transformers.AutoModelForCausalLM.from_config(config)
        model = R2ecModel(backbone, tokenizer=None)
    model.add_lora(r=4)
    with torch.no_grad():  # adapters start at zero; a step with them at work is the honest one
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def make_group(prompt: int, completion: int, generations: int, spread: float):
    rng = np.random.default_rng(0)
    sizes = np.linspace(1 - spread, 1 + spread, generations) * completion
    sizes = np.maximum(1, sizes.round().astype(int))
    prompts = [rng.integers(10, 49_000, prompt)]
    return prompts, [rng.integers(10, 49_000, n) for n in sizes]


def update_step(model, prompts, completions, form: str) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(tokens computed, log-probs of the completion tokens, one adapter's gradient)."""
    from r2ec_kernels import linear_logprob

    if form == "padded":
        rows = [np.concatenate([prompts[0], c]) for c in completions]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        model.language_model.set_attn_implementation("sdpa")
        decoder = model.language_model.get_decoder()
        hidden = decoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
        start = len(prompts[0]) - 1
        states = torch.cat([hidden[i, start : start + len(c)] for i, c in enumerate(completions)])
        targets = torch.from_numpy(np.concatenate(completions))
        tokens = ids.numel()
    else:
        [batch] = pack_histories(
            prompts, completions, max_tokens=10**6, share_prompts=form == "shared"
        )
        states = model(batch)[batch.predict_from]
        targets, tokens = batch.targets, batch.num_tokens
    log_prob = linear_logprob(states, model.lm_head_weight.detach(), targets).log_prob
    log_prob.mean().backward()
    named = dict(model.named_parameters())
    gradient = next(p for n, p in named.items() if "layers.0." in n and "v_proj.lora_A" in n).grad
    return tokens, log_prob.detach(), gradient.clone()


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_form(path: str | None, form: str, shape: tuple, repeats: int, queue) -> None:
    """One form in a process of its own, so that its peak memory is its own."""
    model = load_model(path)
    group = make_group(*shape)
    before, seconds = status_bytes("VmRSS"), []
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        tokens, log_prob, gradient = update_step(model, *group, form)
        seconds.append(time.perf_counter() - started)
    peak = status_bytes("VmHWM") - before
    queue.put((tokens, seconds, peak, log_prob.numpy(), gradient.numpy()))


def bench_update(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    shape = (arguments.prompt, arguments.completion, arguments.G, arguments.spread)
    context = multiprocessing.get_context("spawn")
    reference, repeated = None, None
    for form in ("packed", "shared", "padded"):
        queue = context.SimpleQueue()
        process = context.Process(
            target=run_form, args=(arguments.model, form, shape, arguments.repeats, queue)
        )
        process.start()
        tokens, seconds, peak, log_prob, gradient = queue.get()
        process.join()
        reference = (log_prob, gradient) if reference is None else reference
        errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in
                  zip((log_prob, gradient), reference, strict=True)]  # fmt: skip
        if max(errors) > 1e-3:
            raise SystemExit(f"{form} computes something else: relative errors {errors}")
        time_of_step = min(seconds)
        repeated = time_of_step if form == "packed" else repeated
        yield {
            "P": shape[0],
            "R": shape[1],
            "G": shape[2],
            "spread": shape[3],
            "form": {"packed": "repeated, packed"}.get(form, form),
            "tokens": tokens,
            "step_s": time_of_step,
            "peak_MiB": peak / 2**20,
            "log_prob_error": errors[0],
            "gradient_error": errors[1],
            "vs_repeated": repeated / time_of_step,
        }


# ---- prompts from segments ----------------------------------------------------------------------


def bench_assemble(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    import polars as pl
    from transformers import AutoTokenizer

    from r2ec_fast.data import Catalog, History, IdMap
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.prompts.segments import PromptAssembler

    titles = Path(arguments.titles).read_text(encoding="utf-8").splitlines()
    titles = [title for title in titles if title.strip()]
    catalog = Catalog(IdMap(range(len(titles))), pl.DataFrame({"title": titles}))
    builder = PromptBuilder(AutoTokenizer.from_pretrained(arguments.model), catalog)
    started = time.perf_counter()
    assembler = PromptAssembler(builder)
    made = time.perf_counter() - started
    rng = np.random.default_rng(0)
    histories = [
        History(
            items=rng.integers(0, len(titles), 20),
            timestamps=np.sort(rng.integers(0, 10**8, 20)),
            ratings=(rng.integers(2, 11, 20) / 2).astype(np.float32),
            target_time=10**8,
        )
        for _ in range(arguments.histories)
    ]
    started = time.perf_counter()
    assembler.history_rows(histories)
    first = time.perf_counter() - started
    expected = [builder.user_ids(h) for h in histories]
    rows = assembler.history_rows(histories)
    if [row.tolist() for row in rows] != expected:
        raise SystemExit("assembled ids differ from the whole texts")
    for name, run in (
        ("segments", lambda: assembler.history_rows(histories)),
        ("whole texts", lambda: [builder.user_ids(h) for h in histories]),
    ):
        seconds, low, high = median(run, 3)
        yield {
            "items": len(titles),
            "prompts": len(histories),
            "path": name,
            "median_ms": seconds * 1e3,
            "p20_ms": low * 1e3,
            "p80_ms": high * 1e3,
            "prompts_per_s": len(histories) / seconds,
            "Mtok_per_s": len(rows.values) / seconds / 1e6,
            "setup_s": made + first if name == "segments" else 0.0,
        }


# ---- from a data set to packed batches ----------------------------------------------------------


def feed_data(histories: int, items: int) -> tuple[RecDataset, Examples]:
    """Made-up events of `histories` users, 16 to 41 each; every user's last event is an example."""
    import polars as pl
    from workload import generate_titles

    from r2ec_fast.data import Catalog, Examples, IdMap, InteractionData, LoadReport, RecDataset

    rng = np.random.default_rng(0)
    counts = rng.integers(16, 42, histories)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    titles = generate_titles(items)[:items]
    data = InteractionData(
        users=IdMap(range(histories)),
        catalog=Catalog(IdMap(range(items)), pl.DataFrame({"title": titles})),
        offsets=offsets,
        item=rng.integers(0, items, offsets[-1]),
        timestamp=np.sort(rng.integers(0, 10**8, offsets[-1])),
        rating=rng.integers(1, 6, offsets[-1]).astype(np.float32),
        report=LoadReport(),
    )
    examples = Examples(np.arange(histories), counts - 1)
    return RecDataset(data, examples, examples[:0], examples[:0]), examples


def bench_feed(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    from transformers import AutoTokenizer
    from workload import small_tokenizer

    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.prompts.segments import PromptAssembler

    dataset, examples = feed_data(arguments.histories, arguments.items)
    catalog = dataset.data.catalog
    if arguments.model is None:
        tokenizer = small_tokenizer(catalog.titles)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    builder = PromptBuilder(tokenizer, catalog)
    assembler = PromptAssembler(builder)
    options = {"max_tokens": RecPOConfig().max_tokens_per_microbatch, "oversize": "alone"}

    def rows() -> list[PackedBatch]:
        prompts = assembler.example_rows(dataset, examples)
        return pack_histories(prompts.append(builder.marker_ids), **options)

    def lists() -> list[PackedBatch]:
        prompts = [row.tolist() for row in assembler.example_rows(dataset, examples)]
        return pack_histories([[*p, *builder.marker_ids] for p in prompts], **options)

    found = rows()
    for ours, theirs in zip(found, lists(), strict=True):
        if not torch.equal(ours.input_ids, theirs.input_ids):
            raise SystemExit("the rows of both paths differ")
    tokens = sum(batch.num_tokens for batch in found)
    seconds: dict[str, list[float]] = {"rows": [], "lists": []}
    for _ in range(arguments.repeats):
        for name, run in (("rows", rows), ("lists", lists)):
            seconds[name].append(median(run, 1)[0])
    peer = statistics.median(seconds["lists"])
    for name, of_path in seconds.items():
        middle = statistics.median(of_path)
        low, high = np.percentile(of_path, [20, 80])
        yield {
            "histories": len(examples),
            "path": name,
            "tokens": tokens,
            "batches": len(found),
            "median_s": middle,
            "p20_s": float(low),
            "p80_s": float(high),
            "Mtok_per_s": tokens / middle / 1e6,
            "vs_lists": peer / middle,
        }


# ---- output -------------------------------------------------------------------------------------


def show(result: dict[str, object], header: bool) -> None:
    cells = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in result.items()
    }
    widths = [max(len(name), 12) for name in cells]
    widths = [
        28 if name in ("packer", "form") else w for name, w in zip(cells, widths, strict=True)
    ]
    if header:
        print(" ".join(name.ljust(w) for name, w in zip(cells, widths, strict=True)))
    print(" ".join(c.ljust(w) for c, w in zip(cells.values(), widths, strict=True)), flush=True)


def write_csv(path: str, results: Sequence[dict[str, object]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def write_png(path: str, results: Sequence[dict[str, object]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(r["packer"] for r in results):
        points = [(r["rows"], r["Mtok_per_s"]) for r in results if r["packer"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="million tokens a second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack")
    pack.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    pack.add_argument("--png")
    update = commands.add_parser("update")
    update.add_argument(
        "--model", help="directory of a model; default: random, SmolLM2-135M's size"
    )
    update.add_argument("--prompt", type=int, default=1000)
    update.add_argument("--completion", type=int, default=300)
    update.add_argument("-G", type=int, default=4)
    update.add_argument("--spread", type=float, default=0.0, help="completions of R*(1-s)..R*(1+s)")
    update.add_argument("--repeats", type=int, default=2)
    assemble = commands.add_parser("assemble")
    assemble.add_argument("--model", required=True)
    assemble.add_argument("--titles", required=True, help="a text file, one title a line")
    assemble.add_argument("--histories", type=int, default=5000)
    feed = commands.add_parser("feed")
    feed.add_argument("--model", help="its tokenizer; default: a small one made from the titles")
    feed.add_argument("--histories", type=int, default=10_000)
    feed.add_argument("--items", type=int, default=10_000)
    feed.add_argument("--repeats", type=int, default=9)
    for command in (pack, update, assemble, feed):
        command.add_argument("--csv")
    arguments = parser.parse_args()
    results = []
    benches = {"update": bench_update, "assemble": bench_assemble, "feed": bench_feed}
    benches["pack"] = lambda a: bench_pack(a.rows)
    for result in benches[arguments.command](arguments):
        show(result, header=not results)
        results.append(result)
    if arguments.csv:
        write_csv(arguments.csv, results)
    if getattr(arguments, "png", None):
        write_png(arguments.png, results)


if __name__ == "__main__":
    main()
