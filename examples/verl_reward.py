"""RecPO's reward as verl's custom reward function (docs/guides/use-elsewhere.md).

reward.custom_reward_function.path=examples/verl_reward.py
reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.model_path=runs/movielens-contrastive/model

Each row of the data carries the target's row of the item table as `ground_truth` and its prompt as
`extra_info["prompt"]`. The model and its table are those that `r2ec-fast train` saved; a process of
verl loads them at its first reward.
"""

import functools

import torch
from transformers import AutoModel, AutoTokenizer

from r2ec_kernels import ItemIndex, recpo_reward


@functools.cache
def load(path):
    index = ItemIndex.load(f"{path}/item_index.safetensors")
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval(), index


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, *, model_path, marker="<answer>", **_
):
    tokenizer, reader, index = load(model_path)
    text = extra_info["prompt"] + solution_str + marker
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        state = reader(**batch).last_hidden_state[:, -1]
    rank, log_prob = index.target_stats(state, torch.tensor([int(ground_truth)]), use_scan=False)
    score = float(recpo_reward(rank, log_prob))
    return {"score": score, "rank": int(rank), "probability": float(log_prob.exp())}
