"""Shared prompts, repeated prompts and padded rows are one computation: states, logits, losses,
gradients and read-outs, where sequences cross the sliding window too."""

import os
from dataclasses import dataclass

import pytest
import torch
from _support.backbones import SIZES
from _support.toy import toy_model

from r2ec_fast.model import attention
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.packing.packer import PackedBatch, pack_histories

GENERATIONS = 3
WINDOW = 8
KINDS = ("llama", "qwen2", "gemma2", "gemma3")


@dataclass
class Forms:
    """What one form of the batch gives: token log-probs [E], read-outs [B*G, d], logits [E, V]."""

    log_prob: torch.Tensor
    readout: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor]

    def named(self) -> dict[str, torch.Tensor]:
        out = {"log_prob": self.log_prob, "readout": self.readout, "logits": self.logits}
        out["loss"] = self.loss
        return out | {f"gradient {i}": g for i, g in enumerate(self.gradients)}


def make_rows(
    vocabulary: int, prompt_lengths=(5, 19, 3), longest: int = 14
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions, some of them longer than the window alone, all longer together."""
    generator = torch.Generator().manual_seed(0)

    def row(n: int) -> list[int]:
        return torch.randint(4, vocabulary, (n,), generator=generator).tolist()

    prompts = [row(n) for n in prompt_lengths]
    sizes = [1 + (7 * i + 3) % longest for i in range(GENERATIONS * len(prompts))]
    return prompts, [row(n) for n in sizes]


def make_targets(completions: list[list[int]]) -> torch.Tensor:
    """The completions, the last token of every second one not counted."""
    rows = [
        [*row[:-1], -100] if i % 2 and len(row) > 1 else row for i, row in enumerate(completions)
    ]
    return torch.tensor([token for row in rows for token in row])


def finish(model: R2ecModel, logits: torch.Tensor, readout: torch.Tensor, targets: torch.Tensor):
    """The loss of a policy step in miniature: weighted token log-probs and read-outs."""
    counted = targets != -100
    log_prob = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    log_prob = torch.where(counted, log_prob, 0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.rand(len(targets), generator=generator, dtype=torch.float64)
    states = torch.rand(readout.shape, generator=generator, dtype=torch.float64)
    loss = -(log_prob * tokens.to(logits)).sum() / counted.sum()
    loss = loss + (readout * states.to(logits)).mean()
    parameters = list(model.backbone.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    return Forms(
        *(x.detach().double().cpu() for x in (log_prob, readout, logits, loss)),
        [g.double().cpu() for g in gradients],
    )


def head(model: R2ecModel, hidden: torch.Tensor) -> torch.Tensor:
    logits = hidden @ model.lm_head_weight.T
    cap = model.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def padded(model: R2ecModel, prompts, completions, attention: str = "eager") -> Forms:
    """Every row alone on the right-padded grid, by an attention of transformers' own."""
    device = model.device
    rows = [prompts[i // GENERATIONS] + c for i, c in enumerate(completions)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    model.language_model.set_attn_implementation(attention)
    # no mask: nothing real sees the padding behind it (and a masked row is NaN in float64 there)
    out = model.language_model(ids, output_hidden_states=True, use_cache=False)
    hidden = out.hidden_states[-1]
    readout = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    logits = torch.cat(
        [out.logits[i, len(r) - len(c) - 1 : len(r) - 1] for i, (r, c) in
         enumerate(zip(rows, completions, strict=True))]
    )  # fmt: skip
    return finish(model, logits, readout, make_targets(completions).to(device))


def packed(model: R2ecModel, prompts, completions, *, share: bool, max_tokens: int) -> Forms:
    targets = make_targets(completions)
    batches = pack_histories(
        prompts, completions, max_tokens=max_tokens, share_prompts=share, pad_to_multiple_of=4,
        completion_targets=targets,
    )  # fmt: skip
    logits, readout, order, groups = [], [], [], []
    for batch in batches:
        states = model(batch)
        logits.append(head(model, states[batch.predict_from.to(states.device)]))
        readout.append(states[batch.readout.to(states.device)])
        order.append(batch.source)
        assert torch.equal(batch.targets, targets[batch.source])
        groups.append(trajectories(batch))
    back = torch.cat(order).argsort()
    rows = torch.cat(groups).argsort()
    device = states.device
    return finish(
        model, torch.cat(logits)[back.to(device)], torch.cat(readout)[rows.to(device)],
        targets.to(device),
    )  # fmt: skip


def trajectories(batch: PackedBatch) -> torch.Tensor:
    """Global trajectory of every read-out of a batch."""
    return (batch.groups[:, None] * GENERATIONS + torch.arange(GENERATIONS)).ravel()


def model_of(kind: str, dtype: torch.dtype, **settings) -> R2ecModel:
    if kind.startswith("gemma"):  # one layer with a window and one without
        kinds = ["sliding_attention", "full_attention"]
        settings |= {"sliding_window": WINDOW, "layer_types": kinds}
    if kind == "gemma2":  # caps that these small scores feel
        settings |= {"attn_logit_softcapping": 0.05, "final_logit_softcapping": 2.0}
    return toy_model(kind, dtype=dtype, **settings)


def plain_forms(model: R2ecModel, prompts, completions) -> list[Forms]:
    """By eager attention, and by the fused one where it knows the model: on CPUs with AVX512 its
    exponential is a shorter one, and its gradients are twice as far off."""
    caps = getattr(model.language_model.config, "attn_logit_softcapping", None) is not None
    kinds = ["eager"] if caps else ["eager", "sdpa"]
    return [padded(model, prompts, completions, attention=kind) for kind in kinds]


def assert_within_budget(ours: Forms, plain: list[Forms], exact: Forms, dtype: torch.dtype) -> None:
    """Error against float64 (root mean square: the largest of few entries is chance) at most twice
    that of the worse plain form, plus a rounding unit."""
    for name, reference in exact.named().items():
        error, *others = (
            (form.named()[name] - reference).square().mean().sqrt() for form in (ours, *plain)
        )
        allowed = 2 * max(others)
        unit = torch.finfo(dtype).eps * reference.abs().max().clamp(min=1e-3)
        assert error <= allowed + unit, (
            f"{name}: error {error:.3g}, allowed {allowed:.3g}+{unit:.3g}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [100, 1000])
def test_float64_forms_agree(kind, max_tokens):
    model = model_of(kind, torch.float64)
    prompts, completions = make_rows(SIZES["vocab_size"])
    assert max(map(len, prompts)) > WINDOW and max(map(len, completions)) > WINDOW
    expected = padded(model, prompts, completions).named()
    for share in (True, False):
        got = packed(model, prompts, completions, share=share, max_tokens=max_tokens).named()
        for name, reference in expected.items():
            # norms, and the eager attention's softmax, are float32 inside whatever the model's type
            error = (got[name] - reference).abs().max()
            assert error <= 2e-6 * reference.abs().max(), f"{name}: {error:.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_float32_forms_keep_the_error_budget(kind, share):
    prompts, completions = make_rows(SIZES["vocab_size"])
    exact = padded(model_of(kind, torch.float64), prompts, completions)
    model = model_of(kind, torch.float32)
    plain = plain_forms(model, prompts, completions)
    ours = packed(model, prompts, completions, share=share, max_tokens=200)
    assert_within_budget(ours, plain, exact, torch.float32)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_the_rows_do_reach_past_the_window(kind, monkeypatch):
    """The tests above would fail if the window, or the soft-cap, were ignored."""
    prompts, completions = make_rows(SIZES["vocab_size"])
    model = model_of(kind, torch.float64)
    options = {"share": True, "max_tokens": 1000}
    right = packed(model, prompts, completions, **options)
    one_sequence = attention._one_sequence
    for change in ("window", "softcap"):

        def ignoring(q, k, v, scale, dropout, window, softcap, change=change):
            window, softcap = (None, softcap) if change == "window" else (window, None)
            return one_sequence(q, k, v, scale, dropout, window, softcap)

        monkeypatch.setattr(attention, "_one_sequence", ignoring)
        wrong = packed(model, prompts, completions, **options)
        differs = (wrong.log_prob - right.log_prob).abs().max() > 1e-4
        assert differs == (change == "window" or kind == "gemma2")


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_states_agree(kind, monkeypatch):
    """flex_attention has no backward pass on CPU: states only."""
    model = model_of(kind, torch.float64)
    prompts, completions = make_rows(SIZES["vocab_size"])
    with torch.no_grad():
        for share in (True, False):
            [batch] = pack_histories(
                prompts, completions, max_tokens=1000, share_prompts=share, pad_to_multiple_of=4
            )
            expected = model(batch)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "choose_path", lambda query: "flex")
                torch.testing.assert_close(model(batch), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("path", "dtype"),
    [("flex", torch.float32), ("flex", torch.bfloat16), ("flash", torch.bfloat16)],
)
def test_gpu_paths_keep_the_error_budget(kind, share, path, dtype, monkeypatch):
    if path == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    prompts, completions = make_rows(SIZES["vocab_size"])
    # the compiled flex_attention takes no narrower heads
    exact = padded(model_of(kind, torch.float64, head_dim=16), prompts, completions)
    model = model_of(kind, dtype, head_dim=16).to("cuda")
    plain = plain_forms(model, prompts, completions)
    monkeypatch.setattr(attention, "choose_path", lambda query: path)
    ours = packed(model, prompts, completions, share=share, max_tokens=200)
    assert_within_budget(ours, plain, exact, dtype)


@pytest.mark.slow
@pytest.mark.real_data
def test_a_real_model_agrees_in_every_form():
    path = os.environ.get("R2EC_TEST_MODEL")
    if path is None:
        pytest.skip("R2EC_TEST_MODEL does not name a language model")
    prompts, completions = make_rows(40_000, (40, 150, 7), 30)
    exact = padded(R2ecModel.from_pretrained(path, dtype=torch.float64), prompts, completions)
    model = R2ecModel.from_pretrained(path, dtype=torch.float32)
    plain = plain_forms(model, prompts, completions)
    for share in (True, False):
        ours = packed(model, prompts, completions, share=share, max_tokens=500)
        assert_within_budget(ours, plain, exact, torch.float32)
