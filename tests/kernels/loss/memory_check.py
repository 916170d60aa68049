"""Peak memory of one loss, forward and backward, above its inputs: prints MiB. Arguments: T V."""

import ctypes
import sys
from pathlib import Path

import torch

from r2ec_kernels import RecPOLossConfig, recpo_loss

D, GROUP = 64, 4


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_mib(tokens: int, vocab: int) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, D, generator=generator)
    hidden = torch.randn(tokens, D, generator=generator).requires_grad_()
    states = torch.randn(GROUP, D, generator=generator).requires_grad_()
    item = torch.randn(1, D, generator=generator)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    trajectory = torch.arange(tokens) % GROUP
    rewards = torch.arange(GROUP, dtype=torch.float32)[None]

    def run():
        config = RecPOLossConfig(softcap=30.0)
        ids = torch.zeros(1, dtype=torch.int64)
        out = recpo_loss(
            hidden, weight, targets, trajectory, rewards, states, item, ids, config=config
        )
        torch.autograd.grad(out.loss, [hidden, states])

    run()  # library buffers, threads
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 1024


sys.stdout.write(f"{peak_mib(int(sys.argv[1]), int(sys.argv[2])):.1f}\n")
