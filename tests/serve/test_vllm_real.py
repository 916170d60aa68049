"""The service with a real vLLM server, which loads the adapter and extracts states."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from _support.serving import DATA
from _support.toy import toy_model

from r2ec_fast.eval.ranking import server_engine, transformers_engine, user_states
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout import VLLMServerEngine
from r2ec_fast.serve.jobs import EngineUnavailable
from r2ec_fast.serve.service import Request, Service

PYTHON = os.environ.get("R2EC_TEST_VLLM", sys.executable)
SUPPORT = Path(__file__).parents[1] / "_support"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 512}
EXTRACTION = """{"method": "extract_hidden_states", "num_speculative_tokens": 1,
 "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [3]}}}"""
CONNECTOR = """{"kv_connector": "%s", "kv_role": "kv_producer"%s,
 "kv_connector_extra_config": {"shared_storage_path": "%s"}}"""


def recommender(lora: bool):
    model = toy_model(dtype=torch.float32, scale=4.0, **SIZES).eval()
    if lora:
        torch.manual_seed(1)
        model.add_lora(r=8)
        with torch.no_grad():
            for name, weight in model.backbone.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(URL, process, folder of states)"""
    if "R2EC_TEST_VLLM" not in os.environ and find_spec("vllm") is None:
        pytest.skip("needs vLLM here, or R2EC_TEST_VLLM: the python of an environment with it")
    folder, states = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("states")
    base = recommender(lora=False)
    base.backbone.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    cuda = torch.cuda.is_available()
    kind = "ExampleHiddenStatesConnector" if cuda else "HiddenStatesOnCPU"
    module = "" if cuda else ', "kv_connector_module_path": "hidden_states_on_cpu"'
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-batched-tokens", "1024", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8"]
    command += ["--no-enable-chunked-prefill", "--speculative-config", EXTRACTION]
    command += ["--kv-transfer-config", CONNECTOR % (kind, module, states)]
    changes = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    changes |= {"PYTHONPATH": str(SUPPORT / "vllm_cpu"), "VLLM_NO_USAGE_STATS": "1"}
    log = states.with_name("vllm.log").open("w")
    process = subprocess.Popen(
        command, env=os.environ | changes, start_new_session=True, stdout=log, stderr=log
    )
    try:
        _wait(url + "/health", process, seconds=600)
        yield url, process, states
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _wait(url: str, process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"no answer from {url}; the server's exit code is {process.poll()}")


def check_evaluation(url: str) -> None:
    """An evaluation against the server needs no second pass."""
    model = recommender(lora=True)
    builder = model.prompt_builder(DATA.data.catalog)
    prompts = PromptAssembler(builder).example_rows(DATA, DATA.test)
    # the check samples with top-k, at which vLLM's CPU build fails while it extracts (0.32)
    with mock.patch.object(VLLMServerEngine, "_check_mode"):
        engine = server_engine(model, builder, url, max_tokens=4096)
    with mock.patch.object(model, "encode_rows") as second_pass:
        found = user_states(model, builder, prompts, engine=engine, max_completion_length=8)
    assert not second_pass.called
    own = transformers_engine(model, builder)
    expected = user_states(model, builder, prompts, engine=own, max_completion_length=8)
    assert found.finish_reason == expected.finish_reason
    assert found.reasoning.values.tolist() == expected.reasoning.values.tolist()
    torch.testing.assert_close(found.states, expected.states, atol=1e-3, rtol=1e-3)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_real_server_writes_and_reads_what_the_model_does(real):
    url, process, states = real
    settings = {"data": DATA, "cache_entries": 0}
    catalog = DATA.data.catalog
    with pytest.raises(ValueError, match="serves other weights than model"):
        other = toy_model(dtype=torch.float32, seed=5, scale=4.0, **SIZES).eval()
        Service(other, catalog, engine=f"vllm:{url}", **settings)
    service = Service(recommender(lora=True), catalog, engine=f"vllm:{url}", **settings)
    own = Service(recommender(lora=True), catalog, **settings)
    assert service._writer.extracts and service._writer._served.startswith("r2ec-")
    asked = [
        Request(user_id=f"u{user}", k=5, max_reasoning_tokens=length)
        for user in range(12)
        for length in (5, 24)
    ]
    jobs = [service.submit(request) for request in asked]
    for request, job in zip(asked, jobs, strict=True):
        found, expected = job.future.result(timeout=300), own.submit(request).future.result()
        for name in ("reasoning", "finish_reason", "completion_tokens"):
            assert getattr(found.user, name) == getattr(expected.user, name), request
        torch.testing.assert_close(found.user.state, expected.user.state, atol=1e-3, rtol=1e-3)
        assert found.found.ids == expected.found.ids
    pieces: list[str] = []
    streamed = service.submit(asked[1], pieces.append).future.result(timeout=300)
    assert "".join(pieces).strip() == streamed.user.reasoning
    check_evaluation(url)
    given_up = service.submit(Request(user_id="u3", max_reasoning_tokens=250))
    while service.worker.running == 0:
        time.sleep(0.01)
    given_up.future.cancel()
    while service.worker.running:
        time.sleep(0.01)
    time.sleep(2.5)  # what a given-up request leaves is looked for again after 2 s
    service.submit(asked[0]).future.result(timeout=300)
    left = service.submit(asked[0])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(EngineUnavailable):
        left.future.result(timeout=300)
    service.close()
    own.close()
    gc.collect()  # the evaluation's engine, with what it left
    assert not list(states.iterdir())
