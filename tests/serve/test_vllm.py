"""The service whose reasonings a vLLM server writes, here a stand-in for it."""

from __future__ import annotations

import copy
import logging
import os
import socket
import time

import pytest
import torch
from _support.serving import DATA, client_of, events, toy_service
from _support.toy import toy_model
from _support.vllm_stand_in import stand_in

from r2ec_fast.serve.jobs import DeadlineExceeded, EngineUnavailable
from r2ec_fast.serve.service import Request, Service, _end_of_text

USERS = [f"u{n}" for n in range(6)]


@pytest.fixture
def server():
    with stand_in(toy_model(dtype=torch.float32).eval()) as server:
        yield server


@pytest.fixture(params=["states of the server", "states of the model"])
def any_server(request, server, tmp_path):
    if request.param == "states of the server":
        server.folder = tmp_path
    return server


@pytest.fixture
def service_of():
    made = []

    def make(server, slots=64, **settings):
        service = toy_service(engine=f"vllm:{server.url}", **settings)
        service._writer.slots = slots
        made.append(service)
        server.calls.clear()
        return service

    yield make
    for service in made:
        service.close()


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def answer(service, **request):
    return service.submit(Request(**request)).future.result(timeout=60)


def test_answers_are_those_of_the_model(any_server, service_of, caplog):
    caplog.set_level(logging.INFO)
    service, own = service_of(any_server), toy_service()
    asked = [Request(user_id=user, k=5, max_reasoning_tokens=3 + n) for n, user in enumerate(USERS)]
    jobs = [service.submit(request) for request in asked]
    for request, job in zip(asked, jobs, strict=True):
        found, expected = job.future.result(timeout=60), own.submit(request).future.result()
        assert found.user.reasoning == expected.user.reasoning
        assert found.user.finish_reason == expected.user.finish_reason
        assert found.user.completion_tokens == expected.user.completion_tokens
        torch.testing.assert_close(found.user.state, expected.user.state, atol=1e-4, rtol=1e-4)
        assert found.found.ids == expected.found.ids
        assert all(seconds >= 0 for seconds in found.seconds.values())
    extracts = any_server.folder is not None
    assert len(any_server.bodies()) == len(USERS) * (2 if extracts else 1)
    (said,) = [r.message for r in caplog.records if r.message.startswith("states are read by")]
    assert ("by the vLLM server" in said) is extracts
    count = len(any_server.calls)
    assert answer(service, user_id="u0", k=5, max_reasoning_tokens=3).cached
    assert answer(service, user_id="u0", reasoned=False).user.reasoning is None
    assert len(any_server.calls) == count
    service.close()
    own.close()
    assert not extracts or not os.listdir(any_server.folder)


def test_a_reasoning_ends_where_the_decoder_ends_it(any_server, service_of):
    service = service_of(any_server, cache_entries=0)
    marker, (eos,) = service._builder.marker_ids, _end_of_text(service.model)
    word = service.model.tokenizer.encode("tea", add_special_tokens=False)
    cases = {
        "answer": ([*word, *marker, *word], len(word) + len(marker), [*word, *marker]),
        "eos": ([*word, eos, *word], len(word), [*word, *marker]),
        "length": (word * 9, 9, [*(word * 9)[:9], *marker]),
    }
    for reason, (script, count, read) in cases.items():
        any_server.script = lambda prompt, script=script: [*script, *script]
        for on_text in (None, lambda text: None):
            job = service.submit(Request(user_id="u1", max_reasoning_tokens=9), on_text)
            user = job.future.result(timeout=60).user
            assert (user.finish_reason, user.completion_tokens) == (reason, count)
            assert service.model.prompts.emb_token not in user.reasoning
            rows = [[*job.prompt.tolist(), *read]]
            expected = service.model.encode_rows(rows, prefix=service.worker._prefix)[0]
            torch.testing.assert_close(user.state, expected, atol=1e-4, rtol=1e-4)


def test_a_stream_adds_up_to_the_reasoning(any_server, service_of):
    service = service_of(any_server, cache_entries=0)
    text = f"tea, then a mug < {service.model.prompts.emb_token} no more"
    script = service.model.tokenizer.encode(text, add_special_tokens=False)
    any_server.script = lambda prompt: script
    body = {"history": ["i4", "i5"], "k": 3, "max_reasoning_tokens": len(script)}
    with client_of(service) as client:
        whole = client.post("/v1/recommend", json=body).json()
        found = events(client.post("/v1/recommend", json=body | {"stream": True}).text)
    pieces = [data["text"] for name, data in found if name == "reasoning"]
    assert len(pieces) > 1 and "".join(pieces).strip() == whole["reasoning"]
    assert whole["reasoning"] == "tea, then a mug <" and whole["finish_reason"] == "answer"
    assert found[-2][0] == "items" and found[-2][1]["items"] == whole["items"]
    service.close()
    assert any_server.folder is None or not os.listdir(any_server.folder)


def test_errors_of_the_server_are_told(server, service_of):
    service = service_of(server, cache_entries=0)
    body = {"history": ["i1"], "max_reasoning_tokens": 4}
    with client_of(service) as client:
        server.broken.add("/v1/completions")
        told = client.post("/v1/recommend", json=body)
        assert told.status_code == 503 and told.headers["retry-after"]
        assert "answered 500: " in told.json()["detail"]
        assert "no memory left" in told.json()["detail"]
        name, problem = events(client.post("/v1/recommend", json=body | {"stream": True}).text)[-2]
        assert name == "error" and problem["status"] == 503
        server.broken.clear()
        assert client.post("/v1/recommend", json=body).status_code == 200
        server.shutdown()
        server.server_close()
        told = client.post("/v1/recommend", json=body)
        assert told.status_code == 503 and "does not answer" in told.json()["detail"]
        direct = client.post("/v1/recommend", json=body | {"mode": "direct"})
        assert direct.status_code == 200


def test_a_server_that_stops_short_is_told(server, service_of):
    service = service_of(server)
    server.tokens = lambda body: iter([(5, -1.0, "abort")])
    with pytest.raises(EngineUnavailable, match=r"ended a reasoning \(abort\) after 1 of 6 tokens"):
        answer(service, user_id="u1", max_reasoning_tokens=6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_given_up_ends_at_the_server(server, service_of, stream):
    service = service_of(server, slots=1)
    server.pause = 0.02
    on_text = (lambda text: None) if stream else None
    cancelled = service.submit(Request(user_id="u0", max_reasoning_tokens=256), on_text)
    wait_for(lambda: server.calls)
    cancelled.future.cancel()
    wait_for(lambda: server.left == [cancelled.prompt.tolist()])
    late = Request(user_id="u1", max_reasoning_tokens=256, timeout=0.2)
    with pytest.raises(DeadlineExceeded):
        service.submit(late, on_text).future.result(timeout=10)
    wait_for(lambda: len(server.left) == 2)
    wait_for(lambda: service.worker.running == 0)
    server.pause = 0.0
    assert answer(service, user_id="u2", max_reasoning_tokens=4).user.completion_tokens == 4


def test_requests_are_at_the_server_together_and_no_more_than_that(server, service_of):
    service = service_of(server, slots=3)
    server.pause = 0.02
    jobs = [service.submit(Request(user_id=user, max_reasoning_tokens=8)) for user in USERS]
    wait_for(lambda: service.worker.running == 3)
    assert service.worker.waiting == 3
    direct = answer(service, user_id="u0", reasoned=False)
    assert direct.user.finish_reason == "direct" and not all(job.over for job in jobs)
    service.worker.close()  # answers what waits
    assert all(job.future.result(timeout=0).user.completion_tokens == 8 for job in jobs)
    assert server.most == 3 and not service.worker.alive


def test_states_that_cannot_be_read_are_read_by_the_model(server, service_of, tmp_path, caplog):
    server.folder = tmp_path
    service, own = service_of(server), toy_service()
    assert service._writer.extracts
    read = service._writer._files.read

    def gone(found, tokens):
        os.remove(found["kv_transfer_params"]["hidden_states_path"])
        return read(found, tokens)

    service._writer._files.read = gone
    found = answer(service, user_id="u3", max_reasoning_tokens=5)
    expected = answer(own, user_id="u3", max_reasoning_tokens=5)
    torch.testing.assert_close(found.user.state, expected.user.state, atol=1e-4, rtol=1e-4)
    assert "a state is read by the model here" in caplog.text
    own.close()


def test_other_weights_are_refused(server):
    server.model = toy_model(dtype=torch.float32, seed=1).eval()
    with pytest.raises(ValueError, match="engine: the server at .* serves other weights"):
        toy_service(engine=f"vllm:{server.url}")


def test_states_of_another_layer_are_not_used(server, service_of, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server.folder = tmp_path
    states = server.states
    server.states = lambda tokens: (states(tokens)[0].roll(1, -1), states(tokens)[1])
    service = service_of(server)
    assert not service._writer.extracts and "differs (cosine" in caplog.text


def test_the_adapter_is_loaded_and_taken_out_again(server):
    model = toy_model(dtype=torch.float32).eval()
    model.add_lora(r=2)
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.eval()
    server.takes_adapters = True
    # whether the server has them merged or loaded, it writes what the model does
    server.model = copy.deepcopy(model)
    service = Service(model, DATA.data.catalog, data=DATA, engine=f"vllm:{server.url}")
    (load,) = [body for path, body in server.calls if path == "/v1/load_lora_adapter"]
    assert load["lora_name"] == service._writer._served
    assert {body["model"] for body in server.bodies()} == {load["lora_name"]}
    assert os.path.exists(os.path.join(load["lora_path"], "adapter_model.safetensors"))
    service.close()
    assert server.calls[-1] == ("/v1/unload_lora_adapter", {"lora_name": load["lora_name"]})
    assert not os.path.exists(load["lora_path"])
    server.takes_adapters = False
    service = Service(model, DATA.data.catalog, data=DATA, engine=f"vllm:{server.url}")
    assert service._writer._served == "served"
    service.close()
    server.model = toy_model(dtype=torch.float32).eval()
    with pytest.raises(ValueError, match="serves other weights than model"):
        Service(model, DATA.data.catalog, data=DATA, engine=f"vllm:{server.url}")


def test_a_server_that_is_away_and_engines_that_are_none():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EngineUnavailable, match="does not answer"):
            toy_service(engine=f"vllm:{url}")
    for engine in ("tgi:x", "vllm", "vllm:"):
        with pytest.raises(ValueError, match="engine: expected transformers or vllm:URL"):
            toy_service(engine=engine)
    with pytest.raises(ValueError, match="engine: expected vllm:http://HOST:PORT"):
        toy_service(engine="vllm:localhost")
