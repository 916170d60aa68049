"""The RecPO token loss beside TRL's and Liger's, over growing vocabularies; ranks on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import item_head
import loss_peers
import torch
from harness import Case, Entry, Wrong, relative_error, require
from machine import compute_dtype
from options import Options

from r2ec_kernels import target_stats

PRODUCT = "cuBLAS"  # hidden @ weight.T once: the unit of the others


def entries(options: Options) -> Iterator[Entry]:
    """The token loss with a frozen head, its bare product on a GPU; on a CPU exact rank and
    log-probability too, which a GPU has among its kernels."""
    if options.tiny:
        shapes = [loss_peers.Shape(64, vocab, 32) for vocab in (500, 1000, 2000)]
        stats = [(2000, 32, 4)]
    elif options.device == "cuda":
        sizes = ((152_064, 2304), (152_064, 1024), (256_000, 2304), (49_152, 576), (32_000, 1024))
        shapes = [loss_peers.Shape(8192, vocab, width) for vocab, width in sizes]
        stats = []
    else:
        shapes = [loss_peers.Shape(512, v, 576) for v in (32_000, 49_152, 152_064, 256_000)]
        stats = [(100_000, 576, batch) for batch in (1, 16, 64, 256)]
    methods = loss_peers.SAME_LOSS + ((PRODUCT,) if options.device == "cuda" else ())
    for shape in shapes:
        size = {"T": shape.tokens, "V": shape.vocab, "d": shape.width}
        build = functools.partial(_loss_cases, methods, options.device, shape)
        how = {"versus": "TRL chunked log-prob", "section": "loss"}
        yield Entry("losses", "token loss, frozen head", size, methods, build, **how)
    for count, dim, batch in stats:
        size = {"N": count, "d": dim, "B": batch}
        build = functools.partial(_stats_cases, options.device, count, dim, batch)
        pair = ("target_stats", "materialised scores")
        yield Entry("losses", "rank and log-prob", size, pair, build, pair[1], "ranks")


def _loss_cases(methods: Sequence[str], device: str, shape: loss_peers.Shape) -> list[Case]:
    data = loss_peers.Data(shape, device, compute_dtype(device))
    rows = min(64, shape.tokens)
    exact = functools.cache(lambda: loss_peers.exact(data, rows))
    limit = 2e-2 if device == "cuda" else 1e-4
    # two products of T x V x d; the head is read once in each
    flops = 2.0 * shape.tokens * shape.vocab * shape.width
    moved = float(data.weight.nbytes)

    def check(found: tuple[torch.Tensor, ...]) -> float:
        right_loss, right_hidden = exact()
        loss_error = abs(float(found[0]) - right_loss) / abs(right_loss)
        hidden_error = relative_error(found[1][:rows], right_hidden)
        return require(max(loss_error, hidden_error), limit, "loss and gradient")

    case = functools.partial(Case, work=shape.tokens, unit="tokens")
    made = [
        case(
            name,
            functools.partial(loss_peers.step, data, loss_peers.PEERS[name]),
            check,
            moved=2 * moved,
            flops=2 * flops,
        )
        for name in methods
        if name != PRODUCT
    ]
    if PRODUCT in methods:
        product = functools.partial(torch.mm, data.hidden, data.weight.T)
        made.append(case(PRODUCT, product, lambda _: None, moved=moved, flops=flops))
    return made


def _stats_cases(device: str, count: int, dim: int, batch: int) -> list[Case]:
    items = item_head.table(device, count, dim)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, count, (batch,), generator=generator).to(device)
    queries = torch.randn(batch, dim, generator=generator).to(items) + 0.1 * items[targets]
    part = slice(0, 16)
    right = target_stats(queries[part], items, targets[part], impl="reference")

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        scores = (queries @ items.T).float()
        own = scores.gather(1, targets[:, None])
        return 1 + (scores > own).sum(1), own[:, 0] - scores.logsumexp(1)

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> float:
        if not torch.equal(found[0][part], right.rank):
            raise Wrong("ranks differ from the reference implementation")
        error = float((found[1][part] - right.log_prob).abs().max())
        return require(error, 1e-3, "log-probability")

    moved, flops = float(items.nbytes), 2.0 * batch * count * dim
    numbers = (moved, flops, batch, "queries")
    return [
        Case("target_stats", lambda: target_stats(queries, items, targets), check, *numbers),
        # a rank by rounded scores may be off by a near-tie
        Case("materialised scores", plain, lambda _: None, *numbers),
    ]
