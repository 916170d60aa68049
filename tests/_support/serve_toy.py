"""The server on the toy model, as a process: `python serve_toy.py LOG PORT [SECONDS_A_STEP]`."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch
from _support.serving import toy_service

from r2ec_fast.serve.http.app import create_app
from r2ec_fast.serve.http.guard import State
from r2ec_fast.serve.http.server import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    service = toy_service(Path(sys.argv[1]))
    if len(sys.argv) > 3:
        step, pause = service.worker._decoder.step, float(sys.argv[3])

        def slow():
            time.sleep(pause)
            return step()

        service.worker._decoder.step = slow
    state = State()
    try:
        run(
            create_app(service, state=state),
            state,
            host="127.0.0.1",
            port=int(sys.argv[2]),
            drain_seconds=20,
        )
    finally:
        service.close()
