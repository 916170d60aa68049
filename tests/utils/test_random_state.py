"""Random numbers go on where the state was taken."""

import torch

from r2ec_fast.utils.random_state import random_state, restore_random_state


def test_the_same_numbers_come_again():
    state = random_state()
    first = torch.rand(5)
    torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(5), first)


def test_a_state_without_generators_changes_nothing():
    before = random_state()
    restore_random_state({})
    assert torch.equal(random_state()["cpu"], before["cpu"])
