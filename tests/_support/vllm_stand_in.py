"""A vLLM server of a toy model in this process: greedy tokens, streams, stops, extracted states."""

from __future__ import annotations

import copy
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r2ec_fast.model.r2ec import R2ecModel


class StandIn(ThreadingHTTPServer):
    """Attributes to set:

    model: whose tokens it writes; ``script``: called with the prompt, writes them in its place.
    folder: where it writes states; None: it extracts none.
    broken: paths that answer 500; ``takes_adapters``: whether /v1/load_lora_adapter works.
    pause: seconds before a token.

    ``calls`` are (path, body); ``left``: prompts whose client went away; ``most``: most requests
    together.
    """

    daemon_threads = True

    def __init__(self, model: R2ecModel) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = copy.deepcopy(model)
        self.script: Callable[[list[int]], list[int]] | None = None
        self.folder: Path | None = None
        self.broken: set[str] = set()
        self.takes_adapters = False
        self.pause = 0.0
        self.calls: list[tuple[str, Any]] = []
        self.left: list[list[int]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> list[Any]:
        return [body for path, body in self.calls if path == "/v1/completions"]

    @torch.no_grad()
    def states(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Before the final norm [T, d], and the last token's logits."""
        seen = []
        norm = self.model._decoder.norm
        hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
        with self.lock:
            logits = self.model.language_model(torch.tensor([tokens])).logits[0, -1]
            hook.remove()
        return seen[-1], logits

    def tokens(self, body: Any) -> Iterator[tuple[int, float, str | None]]:
        """Token, log-probability and what ended the text after it."""
        given, text = body["prompt"], ""
        script = None if self.script is None else self.script(given)
        written: list[int] = []
        for place in range(body["max_tokens"]):
            time.sleep(self.pause)
            log_probs = self.states([*given, *written])[1].log_softmax(-1)
            token = int(log_probs.argmax()) if script is None else script[place]
            written.append(token)
            text = self.model.tokenizer.decode(written, skip_special_tokens=False)
            end = "length" if place + 1 == body["max_tokens"] else None
            stops = token in body.get("stop_token_ids", ())
            if stops or any(stop in text for stop in body.get("stop", ())):
                end = "stop"
            # of one token that is kept the probability is 1, as processed_logprobs count
            yield token, 0.0 if body["top_k"] == 1 else float(log_probs[token]), end
            if end:
                return


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer(200, {"data": [{"id": "served", "parent": None}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls.append((self.path, body))
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        try:
            self._posted(body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.append(body["prompt"])
        finally:
            self.server.busy -= 1

    def _posted(self, body: Any) -> None:
        if self.path in self.server.broken:
            return self._answer(500, {"error": "no memory left"})
        if self.path != "/v1/completions":
            fine = self.server.takes_adapters
            return self._answer(200 if fine else 404, "Success" if fine else {"error": "no LoRA"})
        if body.get("stream"):
            return self._stream(body)
        tokens, log_probs, end = [], [], None
        for token, log_prob, end in self.server.tokens(body):  # noqa: B007
            self._check_client()
            tokens.append(token)
            log_probs.append(log_prob)
        choice = {"index": 0, "token_ids": tokens, "finish_reason": end}
        choice["logprobs"] = {"token_logprobs": log_probs}
        answer: dict[str, Any] = {"choices": [choice]}
        if (path := self._write_states(body)) is not None:
            answer["kv_transfer_params"] = {"hidden_states_path": path}
        return self._answer(200, answer)

    def _stream(self, body: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token, _, end in self.server.tokens(body):
            self._check_client()
            choice = {"index": 0, "token_ids": [token], "finish_reason": end}
            self._event(json.dumps({"choices": [choice]}))
        self._write_states(body)
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _write_states(self, body: Any) -> str | None:
        if self.server.folder is None:
            return None
        path = str(self.server.folder / f"cmpl-{self.headers['X-Request-Id']}-0.safetensors")
        states = self.server.states(body["prompt"])[0]
        Path(path + ".lock").touch()
        tensors = {"hidden_states": states[:, None].contiguous()}
        save_file(tensors | {"token_ids": torch.tensor(body["prompt"])}, path)
        return path

    def _check_client(self) -> None:
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(
            1, socket.MSG_PEEK
        ):
            raise BrokenPipeError

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def stand_in(model: R2ecModel) -> Iterator[StandIn]:
    """A server that runs meanwhile."""
    with StandIn(model) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
