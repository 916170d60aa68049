"""linear_logprob: values and gradients against the reference in float64, over an odd grid."""

import pytest
import torch
from _support.budget import assert_within_budget

from r2ec_kernels import linear_logprob
from r2ec_kernels.logprob.impl import common as shared
from r2ec_kernels.logprob.impl import torch as torch_impl

SHAPES = [(1, 1, 1), (3, 60, 63), (17, 5, 500), (64, 33, 1031)]  # T, d, V
HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 3.0, "temperature": 1.6, "bias": True},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many row tiles and vocabulary blocks, ragged at both ends."""
    monkeypatch.setattr(torch_impl, "ROW_TILE", 24)
    monkeypatch.setattr(torch_impl, "MIN_BLOCK", 96)
    monkeypatch.setattr(torch_impl, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(shared, "STORE_BYTES", 40_000)  # some shapes store, some recompute


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(shape, dtype=torch.float64, scale=1.0, seed=0):
    num, d, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, d, generator=generator, dtype=torch.float64)
    hidden *= torch.exp2(torch.randint(-3, 4, (num, 1), generator=generator)) * scale
    weight = torch.randn(vocab, d, generator=generator, dtype=torch.float64) / d**0.5
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (num,), generator=generator)
    targets[1::4] = -100
    return [x.to(dtype) for x in (hidden, weight, bias)], targets


def run(tensors, targets, head, upstream, impl, frozen, entropy=False):
    head = dict(head)
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in tensors)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    if head.pop("bias", False):
        head["bias"] = bias
    out = linear_logprob(hidden, weight, targets, **head, entropy=entropy, impl=impl)
    total = (out.log_prob * upstream.to(out.log_prob.dtype)).sum()
    if entropy:
        total = total + (out.entropy * upstream.flip(0).to(out.entropy.dtype)).sum()
    leaves = [x for x in (hidden, weight, head.get("bias")) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(total, leaves)
    return [out.log_prob.detach(), *([out.entropy.detach()] if entropy else []), *grads]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_within_the_error_budget(shape, head, frozen, dtype):
    tensors, targets = make(shape, dtype)
    upstream = normal(shape[0])
    exact = run([x.double() for x in tensors], targets, head, upstream, "reference", frozen)
    plain = run(tensors, targets, head, upstream, "reference", frozen)
    ours = run(tensors, targets, head, upstream, "torch", frozen)
    if dtype == torch.float64:
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    else:
        assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
        assert_within_budget(ours, plain, exact)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head, frozen):
    tensors, targets = make((5, 4, 7))
    hidden, weight, bias = (x.requires_grad_() for x in tensors)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    rest = {k: v for k, v in head.items() if k != "bias"}

    def function(hidden, weight, bias):
        extra = {"bias": bias} if "bias" in head else {}
        return tuple(linear_logprob(hidden, weight, targets, **rest, **extra, entropy=True))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_entropy(head, frozen):
    tensors, targets = make((17, 5, 500), torch.float32)
    upstream = normal(17)
    args = (targets, head, upstream)
    exact = run([x.double() for x in tensors], *args, "reference", frozen, entropy=True)
    plain = run(tensors, *args, "reference", frozen, entropy=True)
    ours = run(tensors, *args, "torch", frozen, entropy=True)
    assert_within_budget(ours, plain, exact)
    assert not exact[1][targets == -100].any()


def test_softcap_slope_is_one_minus_tanh_squared():
    """The slope x * tanh(x / c) of a well-known mistake gives another gradient."""
    tensors, targets = make((17, 5, 500), scale=4.0)
    hidden, weight, _ = tensors
    softcap = 3.0
    upstream = torch.ones(17, dtype=torch.float64)
    ours = run(tensors, targets, {"softcap": softcap}, upstream, "torch", True)[1]
    tanh = torch.tanh(hidden @ weight.T / softcap)
    one = torch.nn.functional.one_hot(targets.clamp(min=0), 500)
    d_capped = (one - torch.softmax(softcap * tanh, -1)) * (targets != -100)[:, None]
    torch.testing.assert_close(ours, (d_capped * (1 - tanh**2)) @ weight)
    mistake = (d_capped * (softcap * tanh) * tanh) @ weight
    assert (mistake - ours).abs().max() > 0.1 * ours.abs().max()


def test_extremes_of_the_logits():
    """Large, tiny, equal and -inf logits; a maximum that rises in every block."""
    weight = torch.linspace(-1, 1, 700, dtype=torch.float64)[:, None].repeat(1, 3)
    hidden = torch.tensor([[200.0] * 3, [-200.0] * 3, [0.0] * 3, [1e-30] * 3], dtype=torch.float64)
    targets = torch.tensor([699, 699, 5, 0])
    bias = torch.zeros(700, dtype=torch.float64)
    bias[:200] = -torch.inf
    for dtype in (torch.float64, torch.float32):
        tensors = [x.to(dtype) for x in (hidden, weight, bias)]
        for head in ({}, {"bias": True}):
            targets[3] = 0 if not head else 300
            targets[2] = 5 if not head else 205
            upstream = torch.ones(4, dtype=torch.float64)
            ours = run(tensors, targets, head, upstream, "torch", True, entropy=True)
            exact = run([hidden, weight, bias], targets, head, upstream, "reference", True)
            assert all(torch.isfinite(x).all() for x in ours)
            rounding = 2000 * torch.finfo(dtype).eps  # of the largest logits, in log 2
            torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=rounding)


def test_nothing_counted_and_empty():
    tensors, targets = make((6, 5, 30), torch.float32)
    upstream = torch.ones(6)
    log_prob, *grads = run(tensors, targets.fill_(-100), {}, upstream, "torch", False)
    assert not log_prob.any() and not any(g.any() for g in grads)
    empty = linear_logprob(torch.empty(0, 5), tensors[1], torch.empty(0, dtype=torch.int64))
    assert empty.log_prob.shape == (0,) and empty.entropy is None


def test_non_contiguous_inputs():
    tensors, targets = make((17, 12, 300), torch.float32)
    upstream = normal(17).float()
    strided = [x.T.contiguous().T for x in tensors[:2]] + tensors[2:]
    for frozen in (True, False):
        a = run(tensors, targets, HEADS[3], upstream, "torch", frozen)
        b = run(strided, targets, HEADS[3], upstream, "torch", frozen)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def test_backward_twice_gives_the_same():
    tensors, targets = make((9, 5, 300), torch.float32)
    hidden = tensors[0].requires_grad_()
    total = linear_logprob(hidden, tensors[1], targets).log_prob.sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


BAD = {
    "int_hidden": ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "hidden"),
    "width": ({"weight": torch.ones(9, 5)}, ValueError, "hidden and weight"),
    "targets_shape": ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, "targets"),
    "targets_dtype": ({"targets": torch.zeros(3)}, TypeError, "targets"),
    "target_high": ({"targets": torch.tensor([0, 9, 1])}, ValueError, "targets"),
    "target_minus_one": ({"targets": torch.tensor([0, -1, 1])}, ValueError, "targets"),
    "bias": ({"bias": torch.ones(8)}, ValueError, "bias"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
    "impl": ({"impl": "cuda"}, ValueError, "impl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, error, name = BAD[case]
    arguments = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(9, 4),
        "targets": torch.tensor([0, 8, -100]),
    } | changes
    positional = [arguments.pop(k) for k in ("hidden", "weight", "targets")]
    with pytest.raises(error, match=name):
        linear_logprob(*positional, **arguments)
