"""Exact top-K over an item table, beside its peers: time, floor, memory, recall.

    python benchmarks/item_head.py --out results/item_head            # the CPU table
    python benchmarks/item_head.py --shapes 64,200000,1024,10 --peers torch,faiss

All methods of a shape run in one process, in turn; a turn of short calls is one that is not timed,
so that each finds the caches as a busy server's search does, and one that is. ``floor`` is the
larger of reading the float32 table once at the bandwidth, and of the product at the float32 rate,
that this machine reaches in the same run. Peaks are bytes that one call allocates through torch
above its inputs; FAISS and usearch allocate outside torch, so theirs are not known.
"""

import argparse
import csv
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import compute_dtype, torch_peak_mib

from r2ec_kernels import ItemIndex, item_topk

Search = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
SHORT = 0.02  # seconds: of a call whose table may lie in a cache
COLUMNS = (
    "batch", "items", "dim", "k", "method", "ms", "p20", "p80", "gb_s", "gflop_s", "floor_ms",
    "of_floor", "peak_mib", "recall", "candidates_per_k", "scan", "vs_torch", "vs_faiss",
)  # fmt: skip


def torch_search(items: torch.Tensor) -> Search:
    return lambda queries, k: tuple((queries @ items.T).topk(k, dim=1))


def compiled_search(items: torch.Tensor) -> Search:
    run = torch.compile(lambda queries, table, k: tuple((queries @ table.T).topk(k, dim=1)))
    return lambda queries, k: run(queries, items, k)


def faiss_search(items: torch.Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())
    return lambda queries, k: tuple(map(torch.from_numpy, index.search(queries.numpy(), k)))


def usearch_search(items: torch.Tensor) -> Search:
    from usearch.index import MetricKind, search

    def run(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = search(
            items.numpy(),
            queries.numpy(),
            k,
            MetricKind.IP,
            exact=True,
            threads=torch.get_num_threads(),
        )
        keys = torch.from_numpy(found.keys.astype("int64")).view(queries.shape[0], -1)
        return -torch.from_numpy(found.distances).view_as(keys), keys

    return run


def plain_search(items: torch.Tensor) -> Search:
    return lambda queries, k: item_topk(queries, items, k)


def index_search(scan: str) -> Callable[[torch.Tensor], Search]:
    def build(items: torch.Tensor) -> Search:
        index = ItemIndex(items, scan=scan)

        def run(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            return index.search(queries, k)

        run.index = index
        return run

    return build


METHODS: dict[str, Callable[[torch.Tensor], Search]] = {
    "torch": torch_search,
    "compile": compiled_search,
    "faiss": faiss_search,
    "usearch": usearch_search,
    "item_topk": plain_search,
    "index none": index_search("none"),
    "index fp16": index_search("fp16"),
    "index bf16": index_search("bf16"),
    "index int8": index_search("int8"),
    "index auto": index_search("auto"),
}


def vectors(count: int, dim: int, seed: int, embeddings: torch.Tensor | None) -> torch.Tensor:
    if embeddings is not None:
        return embeddings[:count].contiguous()
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=1)
def table(device: str, count: int, dim: int) -> torch.Tensor:
    """Random items [count, dim] in the type that the suites compute in on ``device``."""
    return vectors(count, dim, 0, None).to(device, compute_dtype(device))


def machine(items: torch.Tensor) -> tuple[float, float]:
    """(bytes a second of a matrix-vector product, FLOP a second of a square product)."""
    vector, square = items[0].clone(), torch.randn(2048, 2048)
    read = min(timed(lambda: torch.mv(items, vector)) for _ in range(5))
    multiply = min(timed(lambda: square @ square) for _ in range(5))
    return items.nbytes / read, 2 * 2048**3 / multiply


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(
    items: torch.Tensor,
    searches: dict[str, Search],
    batch: int,
    k: int,
    seconds: float,
    near: bool,
) -> list[dict[str, object]]:
    """Time every method on one batch; ``near``: queries are rows with noise, not noise alone."""
    count, dim = items.shape
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(batch, dim, generator=generator)
    if near:
        chosen = torch.randint(0, count, (batch,), generator=generator)
        queries = items[chosen] + 0.1 * items.std() * queries
    bandwidth, rate = machine(items)
    floor = max(items.nbytes / bandwidth, 2 * batch * count * dim / rate)
    exact = (queries.double() @ items.double().T).topk(k, dim=1).indices if batch <= 16 else None
    samples: dict[str, list[float]] = {name: [] for name in searches}
    for search in searches.values():
        search(queries, k)
        search(queries, k)
    begin = time.perf_counter()
    while (
        time.perf_counter() - begin < seconds * len(searches) or min(map(len, samples.values())) < 3
    ):
        for name, search in searches.items():
            if samples[name] and samples[name][-1] < SHORT:
                search(queries, k)  # brings its own table back into the caches
            samples[name].append(timed(lambda search=search: search(queries, k)))
    rows = []
    for name, search in searches.items():
        times = sorted(samples[name])
        median = statistics.median(times)
        found = search(queries, k)[1]
        stats = search.index.last_search if hasattr(search, "index") else None
        recall = None
        if exact is not None:
            hits = (found[:, :, None] == exact[:, None]).any(2).float().mean()
            recall = round(float(hits), 5)
        foreign = name in ("faiss", "usearch")
        rows.append(
            {
                "batch": batch,
                "items": count,
                "dim": dim,
                "k": k,
                "method": name,
                "ms": round(median * 1e3, 4),
                "p20": round(times[len(times) // 5] * 1e3, 2),
                "p80": round(times[len(times) * 4 // 5] * 1e3, 2),
                "gb_s": round(items.nbytes / median / 1e9, 1),
                "gflop_s": round(2 * batch * count * dim / median / 1e9, 1),
                "floor_ms": round(floor * 1e3, 2),
                "of_floor": round(floor / median, 2),
                "peak_mib": None if foreign else round(peak(search, queries, k), 2),
                "recall": recall,
                "candidates_per_k": round(stats.candidates_per_k, 2) if stats else None,
                "scan": stats.scan if stats else None,
            }
        )
    by_name = {row["method"]: row["ms"] for row in rows}
    for row in rows:
        for peer in ("torch", "faiss"):
            row[f"vs_{peer}"] = round(by_name[peer] / row["ms"], 2) if peer in by_name else None
    return rows


def peak(search: Search, queries: torch.Tensor, k: int) -> float:
    return torch_peak_mib(lambda: search(queries, k))


def show(row: dict[str, object], header: bool) -> None:
    widths = {name: max(len(name), 7) for name in COLUMNS} | {"method": 11, "scan": 12}
    if header:
        print("  ".join(name.rjust(widths[name]) for name in COLUMNS))
    cells = ("-" if row[name] is None else str(row[name]) for name in COLUMNS)
    print("  ".join(c.rjust(widths[n]) for c, n in zip(cells, COLUMNS, strict=True)), flush=True)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["batch"], r["items"], r["dim"], r["k"]) for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(max(6, 1.4 * len(shapes)), 4))
    for i, method in enumerate(methods):
        chosen = {
            (r["batch"], r["items"], r["dim"], r["k"]): r for r in rows if r["method"] == method
        }
        heights = [chosen[s]["ms"] if s in chosen else 0 for s in shapes]
        places = [j + i / (len(methods) + 1) for j in range(len(shapes))]
        axes.bar(places, heights, 1 / (len(methods) + 1), label=method)
    axes.set_xticks([j + 0.4 for j in range(len(shapes))])
    axes.set_xticklabels(["B={} N={}\nd={} K={}".format(*s) for s in shapes], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("ms (median)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", help="batch,items,dim,k; default: the grid below")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--tables", default="200000x1024,100000x576", help="items x dim")
    parser.add_argument("--ks", default="10,100")
    parser.add_argument("--peers", default="torch,faiss,item_topk,index none,index auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="a method and shape")
    parser.add_argument("--embeddings", type=Path, help="safetensors file with one [N, d] table")
    parser.add_argument("--out", type=Path, help="writes OUT.csv and OUT.png")
    chosen = parser.parse_args()
    embeddings = None
    if chosen.embeddings:
        from safetensors.torch import load_file

        embeddings = next(iter(load_file(chosen.embeddings).values())).float()
    if chosen.shapes:
        shapes = [tuple(map(int, shape.split(","))) for shape in chosen.shapes]
    else:
        tables = [tuple(map(int, table.split("x"))) for table in chosen.tables.split(",")]
        batches, ks = (list(map(int, v.split(","))) for v in (chosen.batches, chosen.ks))
        shapes = [(b, n, d, k) for (n, d), b, k in itertools.product(tables, batches, ks)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)
    rows: list[dict[str, object]] = []
    for (count, dim), group in itertools.groupby(shapes, key=lambda shape: shape[1:3]):
        items = vectors(count, dim, 0, embeddings)
        searches = {name: METHODS[name](items) for name in chosen.peers.split(",")}
        for batch, _, _, k in group:
            for row in measure(items, searches, batch, k, chosen.seconds, embeddings is not None):
                show(row, header=not rows)
                rows.append(row)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{chosen.out}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, Path(f"{chosen.out}.png"))


if __name__ == "__main__":
    main()
