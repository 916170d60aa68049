"""linear_logprob and recpo_loss over gloo processes that each hold a part of the vocabulary."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _support.interpreter import interpreter_problem
from _support.processes import environment

from r2ec_kernels import linear_logprob
from r2ec_kernels.logprob.impl.shards import ELSEWHERE, local_targets

HERE = Path(__file__).parent


def run(ranks: int, store: Path, impl: str) -> list[tuple[str, int]]:
    variables = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if impl == "triton" else {})
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                *(["-m", "_support.old_triton"] if impl == "triton" else []),
                str(HERE / "shards_check.py"),
                str(rank),
                str(ranks),
                str(store),
                impl,
            ],
            env=environment(**variables),
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    return [(p.communicate(timeout=300)[0], p.returncode) for p in processes]


@pytest.mark.parametrize(
    ("ranks", "impl"), [(1, "torch"), (2, "torch"), (3, "torch"), (3, "triton")]
)
def test_equal_to_one_process(ranks, impl, tmp_path):
    if impl == "triton" and (problem := interpreter_problem()):
        pytest.skip(problem)
    for output, code in run(ranks, tmp_path / "store", impl):
        assert code == 0, output


def test_targets_of_a_shard():
    targets = torch.tensor([0, 4, 5, 7, 8, -100])
    expected = torch.tensor([ELSEWHERE, ELSEWHERE, 0, 2, ELSEWHERE, -100])
    assert torch.equal(local_targets(targets, 5, 3), expected)


def test_arguments():
    arguments = (torch.ones(1, 4), torch.ones(3, 4), torch.tensor([0]))
    with pytest.raises(TypeError, match="group: expected a ProcessGroup or None, got int"):
        linear_logprob(*arguments, group=1)
    with pytest.raises(ValueError, match="first_token: expected at least 0, got -1"):
        linear_logprob(*arguments, first_token=-1)
    with pytest.raises(ValueError, match="first_token: expected 0 without group, got 3"):
        linear_logprob(*arguments, first_token=3)
