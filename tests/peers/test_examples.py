"""The examples in other projects' trainers and evaluations, run: docs/guides/use-elsewhere.md."""

import importlib.util
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_kernels import ItemIndex, recpo_reward, target_stats

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "use-elsewhere.md").read_text()


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_shows_what_is_tested():
    """A block whose first line names a file is a part of that file."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", GUIDE, flags=re.S)
    named = {path for path, _ in blocks}
    assert named >= {str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py")}
    for path, code in blocks:
        assert code.strip() in textwrap.dedent((ROOT / path).read_text()), path


@pytest.fixture(scope="module")
def trl_grpo():
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    return load("examples/trl_grpo.py")


@pytest.mark.peers
def test_trl_trains_on_the_reward(trl_grpo):
    """Two steps log a reward in RecPO's range and move the weights."""
    history, moved = trl_grpo.train(steps=2)
    assert len(history) == 2 and all(0 < reward < 1 for reward in history)
    assert moved > 0


@pytest.mark.peers
def test_trl_raises_the_reward(trl_grpo):
    rewards, _ = trl_grpo.train(steps=20)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


@pytest.mark.peers
def test_the_reward_given_to_trl_by_hand(trl_grpo):
    """One completion at a time, without padding, by a sort of all scores."""
    tokenizer = trl_grpo.toy_tokenizer()
    reader = trl_grpo.toy_model(tokenizer)
    items = torch.nn.functional.normalize(torch.randn(16, 32), dim=1)
    prompts, completions = ["After red mug next", "After red mug next"], ["blue lamp", "green"]
    rewards = trl_grpo.catalog_reward(reader, tokenizer, items)(
        prompts=prompts, completions=completions, target=[3, 9], completion_ids=None
    )
    for prompt, completion, target, reward in zip(
        prompts, completions, [3, 9], rewards, strict=True
    ):
        ids = tokenizer(f"{prompt} {completion} <answer>", return_tensors="pt").input_ids
        assert ids.shape == (1, 5 + len(completion.split()))
        with torch.no_grad():
            state = reader.model(input_ids=ids).last_hidden_state[0, -1]
        scores = torch.nn.functional.normalize(state, dim=0) @ items.T / 0.1
        rank = 1 + int((scores > scores[target]).sum())
        expected = 0.05 * scores.softmax(0)[target] + 0.95 / np.log2(rank + 1)
        assert reward == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model, catalog = toy_model(dtype=torch.float32), toy_dataset().data.catalog
    model.index = ItemIndex(model.encode_items(catalog), similarity="cosine", temperature=0.1)
    model.save_pretrained(path, catalog=catalog)
    return path, model


def expected_score(model, text: str, target: int) -> float:
    ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = model.backbone(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    found = target_stats(
        hidden[:, -1], model.index.items, [target], similarity="cosine", temperature=0.1
    )
    return float(recpo_reward(*found))


@pytest.mark.peers
def test_verl_calls_the_reward(saved_model):
    """Through verl's own loader and its naive reward manager: a response of token ids, decoded."""
    pytest.importorskip("verl")
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    path, model = saved_model
    config = OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {
                    "path": str(ROOT / "examples" / "verl_reward.py"),
                    "name": "compute_score",
                    "reward_kwargs": {"model_path": str(path)},
                }
            }
        }
    )
    manager = get_reward_manager_cls("naive")(
        config, model.tokenizer, reward.get_custom_reward_fn(config)
    )
    prompt, scores = "Next good:", []
    for target, response in ((2, " a red kettle"), (11, " a red kettle"), (11, " blue")):
        ids = torch.tensor([model.tokenizer(response, add_special_tokens=False).input_ids])
        padded = torch.nn.functional.pad(ids, (0, 3), value=model.tokenizer.pad_token_id)
        row = DataProto.from_dict(
            tensors={
                "responses": padded,
                "attention_mask": (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None],
            },
            non_tensors={
                "data_source": np.array(["toy"], object),
                "reward_model": np.array([{"ground_truth": str(target)}], object),
                "extra_info": np.array([{"prompt": prompt}], object),
            },
        )
        result = manager.loop.run_until_complete(manager.run_single(row))
        scores.append(result["reward_score"])
        text = prompt + response + "<answer>"
        assert scores[-1] == pytest.approx(expected_score(model, text, target), rel=1e-4)
        assert 1 <= result["reward_extra_info"]["rank"] <= 16
    assert len({round(score, 6) for score in scores}) == 3


@pytest.mark.peers
def test_recbole_evaluates_the_same():
    """RecBole needs numpy 1."""
    pytest.importorskip("recbole")
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("RecBole 1.2.1 needs numpy < 2 (np.float_)")
    theirs, ours = load("examples/recbole_evaluation.py").evaluate_both()
    for name, metric in (("hit", "hit_rate"), ("ndcg", "ndcg"), ("mrr", "mrr")):
        for k in (5, 10, 20):
            assert ours[f"{metric}@{k}"] == pytest.approx(theirs[f"{name}@{k}"], abs=1e-12)
        assert theirs[f"{name}@20"] > 0.01
    assert ours["examples"] == 80
