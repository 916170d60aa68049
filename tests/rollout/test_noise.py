import math

import pytest
import torch
from scipy import stats

from r2ec_fast.rollout.noise import gumbel, mix64, row_keys
from r2ec_fast.rollout.sampling import SamplingParams, sample_tokens

WORD = (1 << 64) - 1


def splitmix_finaliser(x: int) -> int:
    """The published C code, in Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def test_mix_equals_the_published_integer_code():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    words = torch.cat([words, torch.tensor([0, 1, -1, -(2**63)])])
    expected = [splitmix_finaliser(w & WORD) for w in words.tolist()]
    assert [w & WORD for w in mix64(words).tolist()] == expected
    # the first output of SplitMix64 seeded with 0, a published test vector
    assert mix64(torch.tensor([0x9E3779B97F4A7C15 - (1 << 64)])).item() & WORD == 0xE220A8397B1DCDAF


def test_noise_is_gumbel_distributed_and_has_no_serial_correlation():
    keys = row_keys(range(50), 4, seed=3, step=7)
    noise = gumbel(keys, 5, torch.arange(100).expand(200, 100))
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("change", ["seed", "step", "user", "sample", "position", "token"])
def test_every_part_of_the_key_matters(change):
    def draw(seed=1, step=2, user=3, sample=0, position=4, token=5):
        keys = row_keys([user], sample + 1, seed=seed, step=step)[-1:]
        return gumbel(keys, position, torch.tensor([[token]])).item()

    assert draw(**{change: 9}) != draw()
    assert draw(**{change: 9}) == draw(**{change: 9})


def test_keys_do_not_depend_on_the_batch():
    together = row_keys([11, -4, 2**63 + 5], 3, seed=0, step=0).view(3, 3)
    alone = row_keys([-4], 3, seed=0, step=0)
    assert torch.equal(together[1], alone)
    assert together.unique().numel() == 9


@pytest.mark.parametrize("top_k", [0, 4])
def test_draws_follow_the_tempered_truncated_softmax(top_k):
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.9, -2.0, 0.0])
    temperature, draws = 1.7, 40_000
    keys = row_keys(range(draws), 1, seed=0, step=0)
    params = SamplingParams(temperature=temperature, top_k=top_k)
    drawn = sample_tokens(logits.expand(draws, 7), keys, 0, params)
    probability = (logits.double() / temperature).softmax(-1)
    full_log_prob = probability.log()
    if top_k:
        kept = logits.topk(top_k).indices
        truncated = torch.zeros_like(probability)
        truncated[kept] = probability[kept] / probability[kept].sum()
        probability = truncated
    count = torch.bincount(drawn.tokens, minlength=7).double()
    assert (count[probability == 0] == 0).all()
    support = probability > 0
    expected = (probability * draws)[support]
    assert stats.chisquare(count[support].numpy(), expected.numpy()).pvalue > 1e-3
    # log-probabilities are of the full softmax, whatever top_k is
    torch.testing.assert_close(drawn.log_prob.double(), full_log_prob[drawn.tokens])


def test_greedy_takes_the_best_and_top_one_agrees():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(2))
    keys = row_keys(range(6), 1, seed=0, step=0)
    greedy = sample_tokens(logits, keys, 0, SamplingParams(greedy=True))
    assert torch.equal(greedy.tokens, logits.argmax(-1))
    assert torch.equal(
        sample_tokens(logits, keys, 0, SamplingParams(top_k=1)).tokens, greedy.tokens
    )


def test_impossible_sampling_parameters_are_refused():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        SamplingParams(temperature=0.0)
    with pytest.raises(ValueError, match="temperature must be > 0, got nan"):
        SamplingParams(temperature=float("nan"))
    with pytest.raises(ValueError, match="top_k must be >= 0"):
        SamplingParams(top_k=-1)
