"""RecBole's full-sort evaluation on r2ec_kernels (docs/guides/use-elsewhere.md).

    pip install "numpy<2" recbole && python examples/recbole_evaluation.py

Trains BPR for a few epochs on generated interactions and evaluates it twice: by RecBole's trainer,
which stores the scores of all items for a batch, and by the exact ranks of the targets.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.model.general_recommender import BPR
from recbole.trainer import Trainer

from r2ec_fast.eval.metrics import ranking_metrics
from r2ec_kernels import target_stats

USERS, ITEMS, EVENTS, KS = 80, 150, 12, (5, 10, 20)


def exact_metrics(model: BPR, data: FullSortEvalDataLoader, ks=KS) -> dict[str, float]:
    items, ranks = model.item_embedding.weight, []
    include = torch.arange(1, len(items))  # item 0 is padding
    for users, (rows, seen), _, targets in data:  # leave-one-out: one target a user
        queries = model.user_embedding(users["user_id"])
        counts = torch.bincount(rows, minlength=len(users))
        exclude = (seen, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        ranks.append(target_stats(queries, items, targets, exclude=exclude, include=include).rank)
    return ranking_metrics(torch.cat(ranks), ks=ks)


def write_interactions(folder: Path) -> None:
    """Atomic files of users who stay within one of five groups of items."""
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(USERS):
        near = rng.permutation(ITEMS // 5)[: EVENTS - 3] * 5 + user % 5
        items = np.unique(np.concatenate([near, rng.integers(0, ITEMS, 3)]))
        lines += [f"u{user}\ti{item}\t{t}" for t, item in enumerate(rng.permutation(items))]
    (folder / "toy").mkdir()
    (folder / "toy" / "toy.inter").write_text("\n".join(lines) + "\n")


def settings(folder: Path) -> dict:
    return {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "checkpoint_dir": str(folder / "saved"),
        "use_gpu": False,
        "epochs": 30,
        "show_progress": False,
        "eval_args": {
            "split": {"LS": "valid_and_test"},  # the last two events of each user
            "group_by": "user",
            "order": "TO",
            "mode": "full",
        },
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": list(KS),
        "metric_decimal_place": 12,
    }


def evaluate_both() -> tuple[dict[str, float], dict[str, float]]:
    """(RecBole's metrics, ours) of one trained model on the test events."""
    # RecBole writes its logs into the working directory
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_interactions(Path(name))
        config = Config(model="BPR", dataset="toy", config_dict=settings(Path(name)))
        train, _, test = data_preparation(config, create_dataset(config))
        model = BPR(config, train.dataset)
        trainer = Trainer(config, model)
        trainer.fit(train, saved=False, verbose=False, show_progress=False)
        return trainer.evaluate(test, load_best_model=False), exact_metrics(model, test)


def main() -> None:
    theirs, ours = evaluate_both()
    for name, metric in (("hit", "hit_rate"), ("ndcg", "ndcg"), ("mrr", "mrr")):
        for k in KS:
            pair = f"RecBole {theirs[f'{name}@{k}']:.9f}, r2ec {ours[f'{metric}@{k}']:.9f}"
            sys.stdout.write(f"{metric}@{k}: {pair}\n")


if __name__ == "__main__":
    main()
