"""A user's state from a vLLM server that has the tokens before it in its cache, or has not.

    python benchmarks/vllm_states.py --url http://127.0.0.1:8000 [--requests 12] [--json FILE]

The server extracts states: docs/guides/rollout.md says how to start it. For each request a new
prompt of random tokens: the server writes a reasoning, then is asked for the state behind it, by
one token, twice: with the cache salt of the reasoning, so that prompt and reasoning are found in
its prefix cache, and with another salt, so that none of it is. The two take turns in being first.
Medians; ``cached`` counts the tokens that the server says it found
(``--enable-prompt-tokens-details``).
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine

from r2ec_fast.rollout.vllm.states import StateFiles
from r2ec_fast.serve.engines.vllm_client import VLLMClient
from r2ec_fast.serve.jobs import EngineUnavailable

COMPLETIONS = "/v1/completions"


class Server:
    """One vLLM server, and the files of states that it leaves."""

    def __init__(self, url: str) -> None:
        self.client, self.files = VLLMClient(url), StateFiles()
        self.model = self.client.get("/v1/models")["data"][0]["id"]

    def ask(self, tokens: list[int], limit: int, salt: str) -> tuple[float, dict[str, Any]]:
        """Seconds of a request, its state read where it is of one token, and the answer."""
        body = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": limit,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        id_ = self.files.new_id()
        began = time.perf_counter()
        answer = self.client.post(COMPLETIONS, body, id_=id_)
        if limit == 1:
            self.files.read(answer, len(tokens))
        seconds = time.perf_counter() - began
        self.files.discard(id_, answer)
        return seconds, answer


def cached(answer: dict[str, Any]) -> int | None:
    """Tokens of the prompt that the server found in its cache; None: it does not say."""
    return (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")


def measure(server: Server, settings: argparse.Namespace) -> dict[str, Any]:
    """Medians in ms over all requests but the first."""
    source = random.Random(settings.seed)
    seconds: dict[str, list[float]] = {"reasoning": [], "known": [], "unknown": []}
    found: dict[str, list[int | None]] = {"known": [], "unknown": []}
    for number in range(settings.requests + 1):
        prompt = [source.randrange(100, settings.vocabulary) for _ in range(settings.prompt)]
        salt = f"{source.random()}"
        taken, answer = server.ask(prompt, settings.tokens, salt)
        tokens = [*prompt, *answer["choices"][0]["token_ids"]]
        times = {"reasoning": taken}
        names = ["known", "unknown"] if number % 2 else ["unknown", "known"]
        for name in names:
            own = salt if name == "known" else f"{source.random()}"
            times[name], answer = server.ask(tokens, 1, own)
            if number:
                found[name].append(cached(answer))
        for name, value in times.items():
            if number:  # the first request warms up
                seconds[name].append(value)
    ms = {name: round(statistics.median(of) * 1e3, 1) for name, of in seconds.items()}
    ratio = statistics.median(
        b / a for a, b in zip(seconds["known"], seconds["unknown"], strict=True)
    )
    return {
        "ms": ms,
        "unknown_to_known": round(ratio, 2),
        "cached": found,
        "machine": asdict(machine.describe("cpu", rates=False)),
    }


def main() -> int:
    """0; 2 where no server answers or it extracts no states."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a reasoning")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="ids are taken below it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    try:
        server = Server(settings.url)
        with contextlib.closing(server.files):
            found = measure(server, settings)
    except (EngineUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(found, indent=1)
    print(text)
    if settings.json:
        settings.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
