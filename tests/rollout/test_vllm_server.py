"""VLLMServerEngine against a stand-in HTTP server, and (mark vllm) a real one that is killed."""

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from _support.rollout_cases import EOS, PIECES, random_prompts
from _support.toy import toy_dataset, toy_model
from _support.vllm_stand_in import stand_in

from r2ec_fast.eval.ranking import server_engine, transformers_engine, user_states
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout import RolloutServerError, VLLMServerEngine, score_rollouts

MARKER = "b>"
A, B, CLOSE = (1 + PIECES.index(piece) for piece in ("a", "b", ">"))
ARGUMENTS = {"user_keys": [7, 8], "num_generations": 2, "max_completion_length": 3}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        adapter = {"id": "policy-7", "parent": "served"}  # of a run before
        return self._answer(200, {"data": [adapter, {"id": "served", "parent": None}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, body))
        if self.path in self.server.broken:
            return self._answer(500, {"error": "no memory left"})
        if self.path == "/v1/load_lora_adapter":
            files = sorted(f.name for f in Path(body["lora_path"]).iterdir())
            self.server.adapters[body["lora_name"]] = files
        if self.path != "/v1/completions":
            return self._answer(200, {})
        if not 0.0 <= body["temperature"] <= 2.0:  # as vLLM's server does
            return self._answer(400, {"error": "temperature must be in [0, 2]"})
        if body["top_k"] == 1:
            rows = [([A], [self.server.top_one])]
        else:
            first = body["prompt"][0]
            rows = [([first, B, CLOSE], [-1.0, -2.0, -3.0]), ([A, EOS], [-0.25, -0.5])]
        choices = [
            {"index": i, "token_ids": ids, "logprobs": {"token_logprobs": log_probs}}
            for i, (ids, log_probs) in enumerate(rows)
        ]
        return self._answer(200, {"choices": choices[::-1]})

    def _answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.broken, server.adapters, server.top_one = [], set(), {}, 0.0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_completions_become_rows_in_the_order_of_the_prompts(server, tokenizer):
    engine = VLLMServerEngine(server.url, "base", tokenizer, MARKER, concurrency=2)
    server.calls.clear()
    out = engine.generate([[A], [B, A]], **ARGUMENTS, temperature=1.5)
    marker = tokenizer.encode(MARKER)
    assert [out.row(r).tolist() for r in range(4)] == [
        [A, B, CLOSE],
        [A, *marker],
        [B, B, CLOSE],
        [A, *marker],
    ]
    assert out.finish_reason == ["answer", "eos"] * 2
    np.testing.assert_allclose(out.log_prob[:4], [-1, -2, -3, -0.25])
    bodies = {body["prompt"][0]: body for _, body in server.calls}
    assert bodies[A]["seed"] != bodies[B]["seed"]
    assert {(b["model"], b["n"], b["temperature"], b["max_tokens"]) for b in bodies.values()} == {
        ("base", 2, 1.5, 3)
    }


def test_without_a_name_the_base_model_is_the_servers(server, tokenizer):
    engine = VLLMServerEngine(server.url, None, tokenizer, MARKER)
    assert engine.model == "served" and server.calls[-1][1]["model"] == "served"


def test_each_step_loads_a_new_adapter_and_drops_the_old(server, tokenizer, toy_policy):
    engine = VLLMServerEngine(server.url, "base", tokenizer, MARKER, policy=toy_policy[1])
    server.calls.clear()
    for step in range(2):
        engine.generate([[A], [B]], **ARGUMENTS, step=step)
    order = [(p.rsplit("/")[-1], b.get("lora_name", b.get("model"))) for p, b in server.calls]
    assert order == [
        ("load_lora_adapter", "policy-1"),
        ("completions", "policy-1"),
        ("completions", "policy-1"),
        ("load_lora_adapter", "policy-2"),
        ("unload_lora_adapter", "policy-1"),
        ("completions", "policy-2"),
        ("completions", "policy-2"),
    ]
    assert "adapter_model.safetensors" in server.adapters["policy-2"]
    folders = [b["lora_path"] for p, b in server.calls if p == "/v1/load_lora_adapter"]
    assert [os.path.exists(folder) for folder in folders] == [False, True]


def test_a_server_with_other_log_probs_is_refused(server, tokenizer):
    server.top_one = -1.2
    with pytest.raises(ValueError, match="must run with --logprobs-mode processed_logprobs"):
        VLLMServerEngine(server.url, "base", tokenizer, MARKER)


def test_failures_name_the_server_and_the_way_on(server, tokenizer):
    engine = VLLMServerEngine(server.url, "base", tokenizer, MARKER)
    server.broken.add("/v1/completions")
    with pytest.raises(RolloutServerError, match="/v1/completions answered 500.*no memory left"):
        engine.generate([[A], [B]], **ARGUMENTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RolloutServerError, match=f":{port} does not answer.*vllm serve MODEL"):
        VLLMServerEngine(f"http://127.0.0.1:{port}", "base", tokenizer, MARKER)


@pytest.mark.parametrize("kind", ["extracts", "extracts another layer", "extracts none"])
def test_states_are_those_of_the_model(tmp_path, caplog, kind):
    caplog.set_level(logging.INFO)
    data, model = toy_dataset(), toy_model(dtype=torch.float32)
    model.add_lora(r=2)
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    builder = model.eval().prompt_builder(data.data.catalog)
    prompts = PromptAssembler(builder).example_rows(data, data.test)
    with stand_in(model) as server:
        server.takes_adapters = True
        server.folder = None if kind == "extracts none" else tmp_path
        if kind == "extracts another layer":
            states = server.states
            server.states = lambda tokens: (states(tokens)[0].roll(1, -1), states(tokens)[1])
        engine = server_engine(model, builder, server.url, max_tokens=4096)
        server.calls.clear()
        limit = {"max_completion_length": 5}
        with mock.patch.object(model, "encode_rows", wraps=model.encode_rows) as second_pass:
            found = user_states(model, builder, prompts, engine=engine, **limit)
        assert second_pass.called is (kind != "extracts")
        assert len(server.bodies()) == len(prompts) * (1 if server.folder is None else 2) + (
            server.folder is None
        )
    own = transformers_engine(model, builder)
    expected = user_states(model, builder, prompts, engine=own, **limit)
    assert found.finish_reason == expected.finish_reason
    np.testing.assert_array_equal(found.reasoning.values, expected.reasoning.values)
    torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=1e-4)
    assert ("states are computed by the model here" in caplog.text) is (kind != "extracts")
    del engine
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def real(toy_policy, tokenizer):
    pytest.importorskip("vllm")
    folder, policy = toy_policy
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "toy", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url + "/health", process, seconds=600)
        yield url, R2ecModel(policy, tokenizer), process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"no answer from {url}; the server's exit code is {process.poll()}")


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_real_server_follows_the_adapter_and_its_death_is_an_error(real, tokenizer):
    url, model, process = real
    engine = VLLMServerEngine(url, "toy", tokenizer, MARKER, policy=model.backbone)
    prompts = random_prompts([9, 4, 13])
    arguments = {"user_keys": [1, 2, 3], "num_generations": 4, "max_completion_length": 12}
    for step in range(2):
        out = engine.generate(prompts, **arguments, temperature=1.5, step=step)
        exact = score_rollouts(model, prompts, out, temperature=1.5)
        assert np.abs(out.log_prob - exact).max() < 1e-3
        with model.backbone.disable_adapter():
            without = score_rollouts(model, prompts, out, temperature=1.5)
        assert np.abs(out.log_prob - without).max() > 0.05
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(RolloutServerError, match="does not answer"):
        engine.generate(prompts, **arguments)
