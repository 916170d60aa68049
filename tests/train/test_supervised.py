"""One step on given reasonings against plain torch, and what must not change its gradient."""

import json

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model, toy_reasonings
from _support.training import lines, one_thread, run, same, toy_trainer

from r2ec_fast import R2ecModel, RecPOConfig, RecPOTrainer
from r2ec_fast.data import Attribute, Reasonings, ReasoningTemplates
from r2ec_fast.packing import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.train.batches import UserBatch
from r2ec_fast.train.checkpoint import CheckpointError
from r2ec_fast.train.supervised import SupervisedUpdate, pack_written, written_rows

MATCHED = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """transformers computes norms, and eager attention its softmax, in float32 in any case."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm(x, weight, eps):
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: norm(x, self.weight, self.variance_epsilon)
    )
    functional, softmax = torch.nn.functional, torch.nn.functional.softmax
    monkeypatch.setattr(functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    monkeypatch.setattr(
        Gemma2RMSNorm, "forward", lambda self, x: norm(x, 1 + self.weight, self.eps)
    )


def step_of(model, records=(0, 5, 9, 30, 24)):
    """Users, written rows and candidates of a step; record 24 is another text of example 0."""
    data = toy_dataset()
    builder = model.prompt_builder(data.data.catalog)
    reasonings = toy_reasonings(data)
    chosen = np.array(records)
    examples = reasonings.examples[chosen]
    users = UserBatch(
        prompts=PromptAssembler(builder).example_rows(data, examples),
        targets=reasonings.items[chosen],
        exclude=Ragged.of(data.exclude(examples)),
        keys=list(records),
    )
    rows = {int(i): builder.item_ids(int(i)) for i in (*users.targets, 3)}  # 3: a negative alone
    return users, written_rows(builder, reasonings, 99).select(chosen), rows, builder.marker_ids


def config(**changes) -> RecPOConfig:
    return RecPOConfig(objective="reasoning_sft", use_lora=False, **changes)


def gradients(model) -> dict:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain(model, users, written, rows, item_weight, direct_weight, marker):
    """Token, item and direct loss, one sequence at a time, with full logits."""
    language, unit = model.language_model, torch.nn.functional.normalize

    def run(row):
        out = language(torch.tensor([row]), output_hidden_states=True, use_cache=False)
        return out.logits[0], out.hidden_states[-1][0]

    ids = sorted(rows)
    items = unit(torch.stack([run(list(map(int, rows[i])))[1][-1] for i in ids]), dim=1)
    tokens, item_terms, direct_terms = [], [], []

    def item_term(state, item):
        scores = items @ unit(state, dim=0) / model.temperature
        return torch.nn.functional.cross_entropy(scores, torch.tensor(ids.index(item)))

    for prompt, text, item in zip(users.prompts, written, users.targets.tolist(), strict=True):
        logits, states = run([*prompt.tolist(), *text.tolist()])
        predicted = logits[len(prompt) - 1 : -1]
        tokens.append(
            torch.nn.functional.cross_entropy(predicted, torch.tensor(text), reduction="none")
        )
        item_terms.append(item_term(states[-1], item))
        direct_terms.append(item_term(run([*prompt.tolist(), *marker])[1][-1], item))
    token_loss, item_loss = torch.cat(tokens).mean(), torch.stack(item_terms).mean()
    direct_loss = torch.stack(direct_terms).mean()
    (token_loss + item_weight * item_loss + direct_weight * direct_loss).backward()
    return token_loss.item(), item_loss.item(), direct_loss.item()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("gemma2", {}),  # soft-capped logits
    ],
)
@pytest.mark.parametrize(
    ("item_weight", "direct_weight"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.4)]
)
def test_step_equals_plain_torch(kind, settings, item_weight, direct_weight):
    model = toy_model(kind, **settings)
    users, written, rows, marker = step_of(model)
    weights = {"item_weight": item_weight, "direct_weight": direct_weight}
    token_loss, item_loss, direct_loss = plain(
        model, users, written, rows, **weights, marker=marker
    )
    want = gradients(model)
    model.zero_grad()
    update = SupervisedUpdate(model, config(**weights, log_entropy=True))
    stats = update.reasoning_sft([users], [written], rows, marker)
    got = gradients(model)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **MATCHED)
    assert max(g.abs().max() for g in want.values()) > 1e-3
    assert stats["token_loss"] == pytest.approx(token_loss, abs=1e-10)
    assert stats["counted_tokens"] == len(written.values)
    whole = token_loss + item_weight * item_loss + direct_weight * direct_loss
    assert stats["loss"] == pytest.approx(whole, abs=1e-10)
    for name, weight, loss in (
        ("item_loss", item_weight, item_loss),
        ("direct_loss", direct_weight, direct_loss),
    ):
        assert stats.get(name) == (pytest.approx(loss, abs=1e-10) if weight else None)


def test_accuracy_and_entropy_are_those_of_the_logits():
    model = toy_model()
    users, written, rows, marker = step_of(model)
    right, entropy = [], []
    with torch.no_grad():
        for prompt, text in zip(users.prompts, written, strict=True):
            ids = torch.tensor([[*prompt.tolist(), *text.tolist()]])
            logits = model.language_model(ids).logits[0, len(prompt) - 1 : -1]
            right.append(logits.argmax(-1) == torch.tensor(text))
            entropy.append(torch.distributions.Categorical(logits=logits).entropy())
    update = SupervisedUpdate(model, config(item_weight=0.0, log_entropy=True))
    stats = update.reasoning_sft([users], [written], {}, marker)
    assert stats["mean_token_accuracy"] == pytest.approx(torch.cat(right).double().mean().item())
    assert stats["entropy"] == pytest.approx(torch.cat(entropy).mean().item())


@pytest.mark.parametrize("budget", [1, 150, 300])
@pytest.mark.parametrize("parts", [1, 5])
def test_micro_batches_and_accumulation_change_nothing(budget, parts):
    model = toy_model()
    users, written, rows, marker = step_of(model)
    whole = SupervisedUpdate(model, config(direct_weight=0.5))
    want_stats = whole.reasoning_sft([users], [written], rows, marker)
    want = gradients(model)
    model.zero_grad()
    size = len(written) // parts
    places = [np.arange(first, first + size) for first in range(0, len(written), size)]
    update = SupervisedUpdate(model, config(direct_weight=0.5, max_tokens_per_microbatch=budget))
    stats = update.reasoning_sft(
        [users.select(p) for p in places], [written.select(p) for p in places], rows, marker
    )
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-12)
    for name in (
        *("loss", "token_loss", "item_loss", "direct_loss"),
        *("mean_token_accuracy", "in_batch_probability"),
    ):
        assert stats[name] == pytest.approx(want_stats[name], abs=1e-12)


def test_the_common_instruction_is_laid_out_once():
    model = toy_model()
    users, written, *_ = step_of(model)
    (batch,) = (batch for batch, _ in pack_written(users.prompts, written, 10_000))
    alone = sum(len(p) + len(w) for p, w in zip(users.prompts, written, strict=True))
    shared = alone - batch.input_ids.numel()
    assert shared % (len(written) - 1) == 0 and shared // (len(written) - 1) >= 10
    # one prompt for all: several texts of one example
    same_prompt = users.prompts.select(np.array([1, 1]))
    (batch,) = (batch for batch, _ in pack_written(same_prompt, written[:2], 10_000))
    assert batch.input_ids.numel() == len(same_prompt[0]) + len(written[:2].values)


@pytest.mark.parametrize("budget", [1, 12, 99])
def test_prompts_that_share_nothing_are_packed_whole(budget):
    prompts, written = Ragged.of([[5, 6], [7, 6, 5], [8]]), Ragged.of([[1, 2], [3], [4, 9, 1]])
    found, records = [], []
    for batch, own in pack_written(prompts, written, budget):
        records += own.tolist()
        counted = batch.targets != -100
        found += batch.targets[counted].tolist()
        for readout, record in zip(batch.readout.tolist(), own.tolist(), strict=True):
            assert batch.input_ids[0, readout] == written[record][-1]
    assert sorted(records) == [0, 1, 2]
    assert found == [token for record in records for token in written[record].tolist()]


def test_language_alone_encodes_no_item(tmp_path, monkeypatch):
    encoded = []
    read_out = R2ecModel.read_out

    def spied(self, *arguments, **settings):
        encoded.append(self)
        return read_out(self, *arguments, **settings)

    trainer = toy_trainer(
        *(tmp_path, "reasoning_sft"), item_weight=0.0, direct_weight=0.0, refresh_steps=1
    )
    monkeypatch.setattr(R2ecModel, "read_out", spied)
    with monkeypatch.context() as patch:  # evaluations have to
        patch.setattr(RecPOTrainer, "_validate", lambda self: False)
        patch.setattr(RecPOTrainer, "_finish", lambda self: {})
        trainer.train()
    assert not encoded and trainer.step == 4
    assert "item_loss" not in lines(tmp_path)[0]


def test_a_run_learns_texts_and_items(tmp_path):
    changes = {"max_steps": 120, "eval_steps": 0, "save_steps": 0, "use_lora": False}
    changes |= {"train_embeddings": True, "per_device_train_batch_size": 12, "learning_rate": 5e-3}
    run(tmp_path, "reasoning_sft", **changes)
    records = [r for r in lines(tmp_path) if "loss" in r]
    for name in ("token_loss", "item_loss"):
        assert records[-1][name] < records[0][name] / 2, name
    assert records[-1]["mean_token_accuracy"] > 0.5 > records[0]["mean_token_accuracy"]
    assert {"grad_norm", "counted_tokens", "in_batch_probability"} <= records[0].keys()
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 12 / first["step_time"] == pytest.approx(first["perf/examples_per_second"])
    # it is evaluated with reasonings, as RecPO will use it
    assert RecPOConfig(objective="reasoning_sft").reasons


def test_an_epoch_draws_every_record_once(tmp_path):
    trainer = toy_trainer(tmp_path, "reasoning_sft", max_steps=-1)
    records = len(toy_reasonings(toy_dataset()))
    assert trainer.max_steps == records / 4 == 12
    drawn = [k for step in range(1, 13) for k in trainer.examples.batch(step, 0).keys]
    assert sorted(drawn) == list(range(records))
    batch = trainer.examples.batch(1, 0)
    given = toy_reasonings(toy_dataset())
    assert batch.targets.tolist() == given.items[batch.keys].tolist()


def test_a_file_of_reasonings_is_as_good(tmp_path):
    data = toy_dataset()
    toy_reasonings(data).write(tmp_path / "r.jsonl", data)
    _, want = run(tmp_path / "given", "reasoning_sft", max_steps=1, eval_steps=0)
    settings = toy_trainer(tmp_path / "x", "reasoning_sft", max_steps=1, eval_steps=0).config
    settings.output_dir, settings.reasonings = str(tmp_path / "file"), str(tmp_path / "r.jsonl")
    with one_thread():
        trainer = RecPOTrainer(toy_model(), data, settings)
        trainer.train()
    same(want, {n: p.detach() for n, p in trainer.parameters.items()}, rtol=0, atol=0)


def test_templates_of_the_settings_are_as_good(tmp_path):
    data = toy_dataset()
    templates = ReasoningTemplates(
        ["{last.colour}, then {target.thing}", "{shared.colour}: {target.colour}"],
        attributes={"colour": Attribute("title", r"^\w+"), "thing": Attribute("title", r"\w+$")},
        order="random",
    )
    changes = {"max_steps": 2, "eval_steps": 0, "max_completion_length": 40, "seed": 3}
    changes |= {"objective": "reasoning_sft", "learning_rate": 1e-2}
    config = RecPOConfig(output_dir=str(tmp_path / "a"), reasonings=templates, **changes)
    assert RecPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    given = templates.fill(data, 3)
    runs = [
        RecPOTrainer(toy_model(), data, config),
        RecPOTrainer(
            *(toy_model(), data, RecPOConfig(output_dir=str(tmp_path / "b"), **changes)),
            reasonings=given,
        ),
    ]
    for trainer in runs:
        trainer.train()
    first, second = ({n: p.detach() for n, p in t.parameters.items()} for t in runs)
    same(first, second, rtol=0, atol=0)


def test_tables_train_only_where_asked_for(tmp_path):
    changes = {"max_steps": 1, "eval_steps": 0, "use_lora": False}
    _, parameters = run(tmp_path / "a", "reasoning_sft", **changes)
    assert not any("embed" in name for name in parameters)
    _, parameters = run(tmp_path / "b", "reasoning_sft", **changes, train_embeddings=True)
    assert any("embed" in name for name in parameters)
    with pytest.raises(ValueError, match="train_embeddings: needs use_lora false"):
        RecPOConfig(train_embeddings=True)
    with pytest.raises(CheckpointError, match="train_embeddings: .*True.*False"):
        more = {**changes, "max_steps": 2, "resume_from_checkpoint": "latest"}
        run(tmp_path / "b", "reasoning_sft", **more)


def test_reasonings_that_cannot_train_are_refused(tmp_path):
    data, given = toy_dataset(), toy_reasonings(toy_dataset())
    settings = {"output_dir": str(tmp_path), "use_lora": False}
    sft = RecPOConfig(**settings, objective="reasoning_sft", max_completion_length=16)
    with pytest.raises(ValueError, match="reasonings: objective .* got neither"):
        RecPOTrainer(toy_model(), data, sft)
    both = RecPOConfig(**settings, objective="reasoning_sft", reasonings="r.jsonl")
    with pytest.raises(ValueError, match="reasonings: objective .* got both"):
        RecPOTrainer(toy_model(), data, both, reasonings=given)
    with pytest.raises(ValueError, match="only for objective 'reasoning_sft', got 'recpo'"):
        RecPOTrainer(toy_model(), data, RecPOConfig(**settings), reasonings=given)
    leak = Reasonings(data.test, ("x",) * 12, data.target(data.test))
    with pytest.raises(ValueError, match="record 0: position: 4 of user 'u0' is not in the train"):
        RecPOTrainer(toy_model(), data, sft, reasonings=leak)
    with pytest.raises(FileNotFoundError, match="reasonings: no file nowhere.jsonl"):
        none = RecPOConfig(**settings, objective="reasoning_sft", reasonings="nowhere.jsonl")
        RecPOTrainer(toy_model(), data, none)


def test_texts_are_tokens_and_a_marker():
    model, data = toy_model(), toy_dataset()
    builder = model.prompt_builder(data.data.catalog)

    def rows(*texts, limit=40):
        examples = data.train[np.zeros(len(texts), np.int64)]
        return written_rows(builder, Reasonings.of(data, examples, texts), limit)

    first, second = rows("red mug", "a <|im_end|> b")
    assert model.tokenizer.decode(first.tolist()) == "red mug<answer>"
    assert first.tolist()[-len(builder.marker_ids) :] == builder.marker_ids
    assert model.tokenizer.eos_token_id not in second.tolist()
    size = len(first)
    assert len(rows("red mug", limit=size)) == 1
    message = f"2 of 3 have more than max_completion_length .{size - 1}. tokens.*has 21"
    with pytest.raises(ValueError, match=message):
        rows("red mug", "x", "an ever so long text", limit=size - 1)
    with pytest.raises(ValueError, match="1 of 2 hold the marker '<answer>'.*'no <answer> here'"):
        rows("red mug", "no <answer> here")
