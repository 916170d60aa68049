"""The server that one would write first: each request by itself, on transformers alone.

    python benchmarks/plain_server.py --model DIR --port 8001

What ``benchmarks/serving.py`` compares with. It reads the directory that a training run exported:
prompts are the same, the reasoning is ``generate``, the state one more pass over prompt and
reasoning, the search a product with the whole table and ``topk``. A lock lets one request at a time
use the model, because a model runs one pass at a time on the same cores.
"""

from __future__ import annotations

import argparse
import threading
import time

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from transformers import StoppingCriteria, StoppingCriteriaList

from r2ec_fast.data import History
from r2ec_fast.serve.recommender import load_recommender


class _MarkerWritten(StoppingCriteria):
    def __init__(self, tokenizer, marker: str, start: int) -> None:
        self.tokenizer, self.marker, self.start = tokenizer, marker, start

    def __call__(self, input_ids, scores, **_) -> bool:
        return self.marker in self.tokenizer.decode(input_ids[0, self.start :][-16:])


def create_app(directory: str) -> FastAPI:
    model, catalog = load_recommender(directory)
    builder = model.prompt_builder(catalog)
    language_model, tokenizer = model.language_model, model.tokenizer
    table = torch.nn.functional.normalize(model.item_table.float(), dim=1)
    place = {str(item): row for row, item in enumerate(catalog.ids.ids)}
    titles, lock, app = catalog.titles, threading.Lock(), FastAPI()

    @torch.no_grad()
    def answer(body: dict) -> dict:
        items = [place[str(item)] for item in body["history"]]
        prompt = builder.user_ids(History(np.array(items)))
        row, text = torch.tensor([prompt]), None
        if body.get("mode", "reasoned") == "reasoned":
            stop = _MarkerWritten(tokenizer, model.prompts.emb_token, len(prompt))
            row = language_model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=body["max_reasoning_tokens"],
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=0,
            )
            text = tokenizer.decode(row[0, len(prompt) :])
        if text is None or model.prompts.emb_token not in text:
            row = torch.cat([row, torch.tensor([builder.marker_ids])], 1)
        state = language_model.get_decoder()(row).last_hidden_state[:, -1]
        scores = torch.nn.functional.normalize(state.float(), dim=1) @ table.T / model.temperature
        scores[0, items] = -torch.inf
        best = scores.topk(body.get("k", 10))
        found = zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True)
        return {
            "items": [
                {"item_id": catalog.ids.ids[i], "title": titles[i], "score": s} for i, s in found
            ],
            "reasoning": text,
        }

    @app.get("/health/ready")
    def ready() -> dict:
        return {"ready": True}

    @app.post("/v1/recommend")
    def recommend(body: dict) -> dict:
        begun = time.monotonic()
        with lock:
            found = answer(body)
        return found | {"seconds": time.monotonic() - begun}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8001)
    options = parser.parse_args()
    uvicorn.run(create_app(options.model), port=options.port, log_level="warning")
