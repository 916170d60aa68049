"""One HTML file about a run: its settings, curves, last numbers and reasonings. No network."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from r2ec_fast.eval.metrics import STDERR
from r2ec_fast.report.plots import read_json_lines, read_log
from r2ec_fast.train.checkpoint import STATE_FILE, checkpoints
from r2ec_fast.train.logger import METRICS_FILE, SAMPLES_FILE
from r2ec_fast.utils.atomic_files import write_whole

REPORT_FILE = "report.html"
SHOWN_SAMPLES = 24  # the newest

# title -> metrics drawn together; a panel without data is left out
PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "reward_std", "frac_reward_zero_std"),
    "loss": ("loss", "token_loss", "item_loss"),
    "token accuracy (share)": ("mean_token_accuracy",),
    "rank of the target": ("rank/p10", "rank/p50", "rank/p90"),
    "validation": ("eval_valid_ndcg@10", "eval_valid_hit_rate@10", "eval_valid_mrr@10"),
    "reasoned - direct (ndcg@10)": ("eval_valid_reasoned_minus_direct_ndcg@10",),
    "best of a group beats direct (share)": ("groups/best_beats_direct",),
    "reasoning length (tokens)": (
        "completions/min_length",
        "completions/mean_length",
        "completions/max_length",
    ),
    "how reasonings end (share)": ("completions/clipped_ratio", "completions/eos_ratio"),
    "clip ratios": ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    "entropy (nats)": ("entropy",),
    "KL to the backbone": ("kl",),
    "sampler's log-probability error": (
        "sampling/log_prob_difference",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    ),
    "correction of the sampler (ratio)": (
        "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/mean",
        "sampling/importance_sampling_ratio/max",
    ),
    "gradient norm": ("grad_norm", "grad_norm/tokens", "grad_norm/item_action"),
    "pull of the item action to that of the tokens": ("grad_norm/item_to_tokens",),
    "learning rate": ("learning_rate",),
    "age of the item table (steps)": ("item_table/max_age", "item_table/mean_age"),
    "reward that the table's age adds": ("reward/staleness_bias",),
    "seconds": ("step_time", "rollout_time"),
    "tokens a second": ("perf/tokens_per_second",),
    "peak memory (MiB)": ("perf/peak_memory_mib",),
    "micro-batch budget (tokens)": ("memory/token_budget",),
    "dynamic sampling (groups)": (
        "dynamic_sampling/resampled_groups",
        "dynamic_sampling/tied_groups",
    ),
}
RANKS_ON_A_LOG_AXIS = "rank of the target"
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.15rem .6rem;border-bottom:1px solid #ccc;"
    "text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".p{display:inline-block;width:22rem;margin:.3rem}.p img{width:100%}"
    "pre{white-space:pre-wrap;margin:0;font-size:13px}details{margin:.6rem 0}"
)


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``run_dir/report.html`` from the run's metrics.jsonl, samples.jsonl and settings.

    Returns its path. Raises FileNotFoundError where the directory holds no metrics.jsonl,
    ValueError where that is empty.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).is_file():
        raise FileNotFoundError(f"run_dir: {run_dir} holds no {METRICS_FILE}: not a training run")
    records = read_log(run_dir)
    if not records:
        raise ValueError(f"run_dir: {run_dir / METRICS_FILE} is empty: no step was logged yet")
    parts = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        f"<p>{len(records)} log lines, up to step {max(int(r['step']) for r in records)}.</p>",
        _validation_table(records),
        *(_panel(title, records, names) for title, names in PANELS.items()),
        _samples_table(_read_samples(run_dir / SAMPLES_FILE)),
        _settings_table(_settings(run_dir)),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(run_dir.resolve().name)}</title><style>{STYLE}</style>"
        f"{''.join(parts)}</html>\n"
    )
    path = run_dir / REPORT_FILE
    write_whole(path, page, "run_dir")
    return path


def _panel(title: str, records: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    curves = {n: [(r["step"], r[n]) for r in records if n in r] for n in names}
    curves = {n: points for n, points in curves.items() if points}
    if not curves:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        marker = "o" if len(points) < 20 else None
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
    axes.set(xlabel="step", title=title)
    if title == RANKS_ON_A_LOG_AXIS:
        axes.set_yscale("log")
    axes.legend(fontsize="x-small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    data = base64.b64encode(picture.getvalue()).decode()
    return f'<div class="p"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'


def _validation_table(records: Sequence[Mapping[str, float]]) -> str:
    rows = [r for r in records if any(k.startswith("eval_") for k in r)]
    if not rows:
        return ""
    names = [k for k in rows[-1] if k.startswith("eval_") and not k.endswith(STDERR)]
    head = "".join(f"<th>{escape(n.removeprefix('eval_valid_'))}</th>" for n in names)
    body = "".join(
        f'<tr><td class="n">{int(r["step"])}</td>'
        + "".join(f'<td class="n">{_number(r, n)}</td>' for n in names)
        + "</tr>"
        for r in rows
    )
    return f"<h2>Validation</h2><table><tr><th>step</th>{head}</tr>{body}</table><h2>Curves</h2>"


def _number(record: Mapping[str, float], name: str) -> str:
    if name not in record:
        return "–"
    error = record.get(f"{name}{STDERR}")
    shown = f"{record[name]:.4g}"
    return shown if error is None or error != error else f"{shown} ± {error:.2g}"


def _samples_table(samples: Sequence[Mapping]) -> str:
    if not samples:
        return ""
    body = "".join(
        f'<tr><td class="n">{s["step"]}</td><td>{escape(s["target"])}</td>'
        f'<td class="n">{s["rank"]}</td><td class="n">{s["reward"]:.4g}</td>'
        f"<td>{escape(s['finish_reason'])}</td><td><pre>{escape(s['completion'])}</pre>"
        f"<details><summary>prompt</summary><pre>{escape(s['prompt'])}</pre></details></td></tr>"
        for s in samples[: -SHOWN_SAMPLES - 1 : -1]
    )
    heads = ("step", "target", "rank", "reward", "end", "reasoning")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<h2>Reasonings, newest first</h2><table><tr>{head}</tr>{body}</table>"


def _settings_table(settings: Mapping[str, object]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in settings.items()
    )
    return f"<details><summary>Settings</summary><table>{rows}</table></details>"


def _settings(run_dir: Path) -> dict:
    for directory in (*reversed(checkpoints(run_dir)), run_dir / "best"):
        if (directory / STATE_FILE).is_file():
            return json.loads((directory / STATE_FILE).read_text())["config"]
    return {}


def _read_samples(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return read_json_lines(path)
