"""Rollout speed: the shared-prompt engine beside `generate(num_return_sequences=G)`.

    python benchmarks/rollout.py --model PATH --prompt-length 1000 --new-tokens 64 --generations 4 8

One prompt, G samples, every row runs the full length, temperature 1.5 and top-k 200 for both.
Before a time is printed the engine's log-probabilities are compared with a full forward pass. The
floor is one prefill plus, per step, the time needed to read the weights once, both timed here.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r2ec_fast.rollout import Rollouts, TransformersEngine

TEMPERATURE, TOP_K = 1.5, 200
NEVER = "\u0001\u0002\u0001"  # a marker no row writes: all rows have equal length
COLUMNS = (
    "prompt", "new", "G", "engine", "median_s", "p20_s", "p80_s",
    "new_tokens_per_s", "floor_s", "times_floor", "speedup_vs_generate", "max_log_prob_error",
)  # fmt: skip


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def floor_seconds(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> float:
    """One prefill plus `steps` readings of the weights, both measured."""
    prefill = min(timed(lambda: model(input_ids=ids, logits_to_keep=1), 3))
    weights = [p for p in model.parameters() if p.ndim == 2]
    read = min(timed(lambda: [w.sum() for w in weights], 3))
    return prefill + steps * read


def log_prob_error(model: PreTrainedModel, prompt: list[int], out: Rollouts) -> float:
    """Largest difference of two rows to one full forward pass over prompt + completion."""
    worst = 0.0
    for r in (0, len(out) - 1):
        part = slice(out.offsets[r], out.offsets[r + 1])
        row = torch.from_numpy(out.values[part])
        ids = torch.cat([torch.tensor(prompt), row])[None].to(model.device)
        logits = model(input_ids=ids, logits_to_keep=len(row) + 1).logits[0, :-1].cpu()
        expected = (logits.double() / TEMPERATURE).log_softmax(-1)
        expected = expected.gather(-1, row[:, None]).squeeze(-1)
        error = (expected - torch.from_numpy(out.log_prob[part]).double()).abs()
        worst = max(worst, error[torch.from_numpy(out.sampled[part])].max().item())
    return worst


def engine_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    samples: int,
    new: int,
    decoder: str,
) -> Callable[[], Rollouts]:
    engine = TransformersEngine(model, tokenizer, NEVER, eos_token_ids=[], decoder=decoder)
    return lambda: engine.generate(
        [prompt],
        user_keys=[0],
        num_generations=samples,
        max_completion_length=new,
        temperature=TEMPERATURE,
        top_k=TOP_K,
    )


def generate_run(
    model: PreTrainedModel, prompt: list[int], samples: int, new: int
) -> Callable[[], torch.Tensor]:
    ids = torch.tensor([prompt], device=model.device)
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        num_return_sequences=samples,
        max_new_tokens=new,
        min_new_tokens=new,
    )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompt = torch.randint(10, model.config.vocab_size - 10, (arguments.prompt_length,)).tolist()
    new = arguments.new_tokens
    floor = floor_seconds(model, torch.tensor([prompt]), new)
    for samples in arguments.generations:
        peer = None
        for name in ("generate", "plain", "shared"):
            error = float("nan")
            if name == "generate":
                run = generate_run(model, prompt, samples, new)
            else:
                run = engine_run(model, tokenizer, prompt, samples, new, name)
                error = log_prob_error(model, prompt, run())
                if not error < 1e-3:
                    raise SystemExit(f"{name}: log-probabilities are off by {error:.2g}")
            seconds = sorted(timed(run, arguments.repeats))
            median = statistics.median(seconds)
            peer = peer or median
            low, high = seconds[int(0.2 * len(seconds))], seconds[int(0.8 * len(seconds))]
            figures = (median, low, high, samples * new / median, floor, median / floor)
            figures = (*figures, peer / median)
            values = [len(prompt), new, samples, name, *(f"{x:.2f}" for x in figures)]
            yield dict(zip(COLUMNS, [*values, f"{error:.1e}"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Hugging Face causal LM")
    parser.add_argument("--prompt-length", type=int, default=1000, help="tokens (default 1000)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens a sample (default 64)")
    parser.add_argument("--generations", type=int, nargs="+", default=[4, 8], help="G values")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs each (default 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    writer.writeheader()
    with torch.no_grad():
        for row in measure(arguments):
            writer.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
