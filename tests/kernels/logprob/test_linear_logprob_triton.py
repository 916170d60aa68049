"""linear_logprob by its Triton kernels: on a GPU and in Triton's interpreter.

Values and gradients against the reference in float64, within the error budget of the plain
expression in the same type.
"""

import contextlib

import pytest
import torch
from _support.budget import assert_within_budget

from r2ec_kernels import linear_logprob
from r2ec_kernels._block_sizes import block_sizes

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "temperature": 1.6},
    "softcap, bias": {"softcap": 3.0, "bias": True},
    "bias": {"bias": True},
}
# what is trained, whether the entropy is asked for
USES = {
    "frozen": (True, False),
    "frozen, entropy": (True, True),
    "trainable": (False, False),
    "trainable, entropy": (False, True),
}
# on a CPU torch has no product of narrow types into float32, which two of the kernels follow
INTERPRETED_TYPES = ("float32",)


def make(shape, device, dtype):
    num, d, vocab = shape
    generator = torch.Generator().manual_seed(num)
    tensors = [
        torch.randn(num, d, generator=generator) * 2,
        torch.randn(vocab, d, generator=generator) / d**0.5,
        torch.randn(vocab, generator=generator),
    ]
    targets = torch.randint(0, vocab, (num,), generator=generator)
    targets[1::4] = -100
    return [x.to(device, dtype) for x in tensors], targets.to(device)


def run(tensors, targets, head, impl, frozen, entropy):
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in tensors)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    head = dict(head)
    if head.pop("bias", False):
        head["bias"] = bias
    out = linear_logprob(hidden, weight, targets, **head, entropy=entropy, impl=impl)
    upstream = torch.linspace(-1, 2, targets.numel(), device=targets.device)
    total = (out.log_prob * upstream.to(out.log_prob.dtype)).sum()
    if entropy:
        total = total + (out.entropy * upstream.flip(0).to(out.entropy.dtype)).sum()
    leaves = [x for x in (hidden, weight, head.get("bias")) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(total, leaves)
    return [out.log_prob.detach(), *([out.entropy.detach()] if entropy else []), *grads]


def small_blocks(device, fused):
    """In the interpreter: many tiles and blocks, and the way that is asked for."""
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.logprob.impl import triton as implementation

    return block_sizes(
        implementation,
        ROW_TILE=16,
        BLOCK_COLUMNS=128,
        FUSED_WIDTH=128 if fused else 0,
        FUSED_TYPES=(torch.float32,),
        FUSED_ROWS=16,
        FUSED_ROWS_SOFTCAP=16,
        FUSED_COLUMNS=32,
    )


def check(shape, head, use, device, dtype, fused=False):
    tensors, targets = make(shape, device, dtype)
    case = (targets, HEADS[head])
    exact = run([x.double() for x in tensors], *case, "reference", *USES[use])
    plain = run(tensors, *case, "reference", *USES[use])
    with small_blocks(device, fused):
        ours = run(tensors, *case, "triton", *USES[use])
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    assert not ours[0][targets == -100].any()
    # the interpreter's exp2 and the tanh by exp2 round once more than torch's
    budget = {} if device == "cuda" else {"share": 3, "units": 4}
    assert_within_budget(ours, plain, exact, **budget)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "shape",  # T, d, V
    [
        (1, 3, 1),
        (5, 20, 63),
        (19, 33, 500),
        pytest.param((130, 160, 4097), marks=pytest.mark.gpu),  # two blocks and one column
        pytest.param((513, 128, 2049), marks=pytest.mark.gpu),  # the widest fused head
    ],
    ids=str,
)
def test_within_the_error_budget(shape, head, use, device, dtype):
    check(shape, head, use, device, dtype)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(1, 3, 1), (5, 20, 63), (19, 33, 500)], ids=str)
def test_one_kernel_for_narrow_heads(shape, head, device):
    """bfloat16 heads of these widths take it on a GPU; float32 has to be asked for."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    check(shape, head, "frozen", device, dtype, fused=True)


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["frozen", "trainable"])
@pytest.mark.parametrize("head", ["plain", "softcap, bias"])
@pytest.mark.parametrize(
    "shape",
    [
        (513, 1024, 32_003),
        (4099, 96, 5003),  # more rows than one pass takes
        (4099, 300, 5003),
        (64, 576, 152_001),
    ],
    ids=str,
)
def test_large(shape, head, use, device, dtype):
    check(shape, head, use, device, dtype)


def test_nothing_counted_and_empty(device, dtype):
    tensors, targets = make((6, 5, 30), device, dtype)
    with small_blocks(device, fused=False):
        log_prob, *grads = run(tensors, targets.fill_(-100), {}, "triton", False, False)
        hidden = tensors[0][:0]
        empty = linear_logprob(hidden, tensors[1], targets[:0], entropy=True, impl="triton")
    assert not log_prob.any() and not any(grad.any() for grad in grads)
    assert empty.log_prob.shape == empty.entropy.shape == (0,)


def test_extremes_of_the_logits(device):
    """Large, equal and -inf logits; a maximum that rises in every block."""
    weight = torch.linspace(-1, 1, 700, device=device)[:, None].repeat(1, 3)
    hidden = torch.tensor([[200.0] * 3, [-200.0] * 3, [0.0] * 3, [1e-30] * 3], device=device)
    targets = torch.tensor([699, 699, 205, 300], device=device)
    bias = torch.zeros(700, device=device)
    bias[:200] = -torch.inf
    tensors = [hidden, weight, bias]
    with small_blocks(device, fused=False):
        for head in ({}, {"bias": True}):
            ours = run(tensors, targets, head, "triton", True, True)
            exact = run([x.double() for x in tensors], targets, head, "reference", True, False)
            assert all(torch.isfinite(x).all() for x in ours)
            rounding = 2000 * torch.finfo(torch.float32).eps  # of the largest logits, in log 2
            torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=rounding)


def test_rows_apart(device, dtype):
    tensors, targets = make((17, 12, 300), device, dtype)
    strided = [x.T.contiguous().T for x in tensors[:2]] + tensors[2:]
    with small_blocks(device, fused=False):
        for use in ("frozen", "trainable"):
            one, other = (
                run(given, targets, HEADS["softcap, bias"], "triton", *USES[use])
                for given in (tensors, strided)
            )
            for a, b in zip(one, other, strict=True):
                unit = torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=8 * unit, atol=8 * unit)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("use", USES)
def test_compiles_in_one_graph(use, backend, device):
    tensors, targets = make((40, 72, 3001), device, torch.bfloat16)
    frozen, entropy = USES[use]
    hidden, weight, _ = (x.requires_grad_() for x in tensors)
    weight = weight.detach() if frozen else weight

    def call(hidden, weight, targets):
        out = linear_logprob(hidden, weight, targets, softcap=5.0, entropy=entropy, impl="triton")
        return out.log_prob.sum() + (out.entropy.sum() if entropy else 0)

    leaves = [hidden] if frozen else [hidden, weight]
    got = torch.compile(call, fullgraph=True, backend=backend)(hidden, weight, targets)
    want = call(hidden, weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
