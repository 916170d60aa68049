"""Run with TRITON_INTERPRET=1: the kernels against the reference in float64."""

import sys

import torch

from r2ec_kernels import linear_logprob
from r2ec_kernels.logprob.impl import triton as logprob_triton

HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "temperature": 1.6},
    {"softcap": 3.0, "bias": True},
]
SHAPES = [(1, 3, 1), (5, 20, 63), (37, 33, 500)]  # T, d, V


def run(tensors, targets, head, impl, frozen, entropy):
    hidden, weight, bias = (x.clone().requires_grad_() for x in tensors)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    head = dict(head)
    if head.pop("bias", False):
        head["bias"] = bias
    out = linear_logprob(hidden, weight, targets, **head, entropy=entropy, impl=impl)
    scale = torch.linspace(-1, 2, targets.numel(), dtype=out.log_prob.dtype)
    total = (out.log_prob * scale).sum()
    if entropy:
        total = total + (out.entropy * scale.flip(0)).sum()
    leaves = [x for x in (hidden, weight, head.get("bias")) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(total, leaves)
    return [out.log_prob.detach(), *([out.entropy.detach()] if entropy else []), *grads]


def compare(shape, head, frozen, entropy):
    num, d, vocab = shape
    generator = torch.Generator().manual_seed(num)
    tensors = [
        torch.randn(num, d, generator=generator) * 2,
        torch.randn(vocab, d, generator=generator) / d**0.5,
        torch.randn(vocab, generator=generator),
    ]
    targets = torch.randint(0, vocab, (num,), generator=generator)
    targets[1::4] = -100
    args = (targets, head)
    exact = run([x.double() for x in tensors], *args, "reference", frozen, entropy)
    plain = run(tensors, *args, "reference", frozen, entropy)
    ours = run(tensors, *args, "triton", frozen, entropy)
    for place, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = (a - c).abs().max(), (b - c).abs().max()
        # 3: the interpreter's exp2 and the tanh by exp2 round once more than torch's
        limit = 3 * allowed + 4 * torch.finfo(a.dtype).eps * c.abs().max()
        assert error <= limit, (shape, head, frozen, entropy, place, float(error), float(limit))


def main():
    logprob_triton.ROW_TILE, logprob_triton.BLOCK_COLUMNS = 16, 128  # many tiles and blocks
    logprob_triton.FUSED_ROWS, logprob_triton.FUSED_COLUMNS = 16, 32
    logprob_triton.FUSED_ROWS_SOFTCAP = 16
    logprob_triton.FUSED_TYPES = (torch.float32,)  # all that the interpreter multiplies rightly
    cases = 0
    for width in (0, 128):  # library products with the fold kernel; the fused kernel
        logprob_triton.FUSED_WIDTH = width
        for shape in SHAPES:
            for head in HEADS:
                for frozen, entropy in ((True, False), (False, False), (True, True)):
                    if width and not frozen:
                        continue
                    compare(shape, head, frozen, entropy)
                    cases += 1
    sys.stdout.write(f"cases {cases}\n")


if __name__ == "__main__":
    main()
