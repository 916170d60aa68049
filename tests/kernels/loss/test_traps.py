"""The reference code's departures from the paper, as far as the loss shows them
(docs/method.md#departures-from-the-reference-code).

Every test compares with gradients derived by hand, in numpy and float64, and shows that the trap
gives other numbers. ``pytest -s -k gradient_table`` prints them side by side.
"""

import sys

import numpy as np
import pytest
import torch

from r2ec_kernels import RecPOLossConfig, grouped_advantage, linear_logprob, recpo_loss

GROUPS, GROUP, WIDTH, VOCAB, SOFTCAP = 3, 4, 8, 23, 4.0
LENGTHS = [5, 2, 7, 3, 4, 4, 1, 6, 2, 3, 5, 4]  # tokens of each trajectory
SAMPLING = 1.7  # temperature
TAU = 0.3
LIMIT = 9  # max_completion_length
REDUCTIONS = ["sum", "token", "sequence", "constant"]


class Case:
    """A step of three groups; user 2 has the same target as user 0."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.trajectory = np.repeat(np.arange(GROUPS * GROUP), LENGTHS)
        tokens = self.trajectory.size
        self.hidden = rng.normal(size=(tokens, WIDTH))
        self.weight = rng.normal(size=(VOCAB, WIDTH))
        self.targets = rng.integers(0, VOCAB, tokens)
        self.targets[1] = -100  # an appended marker
        self.rewards = rng.random((GROUPS, GROUP))
        self.users = rng.normal(size=(GROUPS * GROUP, WIDTH))
        self.items = rng.normal(size=(GROUPS, WIDTH))
        self.item_ids = np.array([40, 7, 40])
        self.old = self.logits()[0] + rng.normal(size=tokens) * 0.3
        self.counted = self.targets >= 0

    def logits(self, temperature=SAMPLING):
        """(log_prob [T], d log_prob / d hidden [T, d]) by hand."""
        tanh = np.tanh(self.hidden @ self.weight.T / SOFTCAP)
        x = SOFTCAP * tanh / temperature
        p = softmax(x)
        one = np.eye(VOCAB)[np.maximum(self.targets, 0)]
        log_prob = np.log((p * one).sum(1))
        return log_prob, ((one - p) * (1 - tanh**2) / temperature) @ self.weight

    def advantages(self):
        centred = self.rewards - self.rewards.mean(1, keepdims=True)
        return centred / (self.rewards.std(1, ddof=1, keepdims=True) + 1e-8)

    def weights(self, reduction="sum"):
        """What one action of each trajectory weighs, [groups * group]."""
        lengths = np.bincount(self.trajectory[self.counted], minlength=GROUPS * GROUP)
        one = np.ones(GROUPS * GROUP)
        return {
            "sum": one / (GROUPS * GROUP),
            "token": one / lengths.sum(),
            "sequence": 1 / (GROUPS * GROUP * lengths),
            "constant": one / (GROUPS * GROUP * LIMIT),
        }[reduction]

    def token_gradient(self, old=None, temperature=SAMPLING, epsilon=0.2, reduction="sum"):
        """d token_loss / d hidden."""
        log_prob, jacobian = self.logits(temperature)
        ratio = np.exp(log_prob - (log_prob if old is None else old))
        advantage = self.advantages().ravel()[self.trajectory]
        stopped = ((ratio > 1 + epsilon) & (advantage > 0)) | (
            (ratio < 1 - epsilon) & (advantage < 0)
        )
        scale = -ratio * advantage * self.counted * ~stopped
        return (scale * self.weights(reduction)[self.trajectory])[:, None] * jacobian

    def item_gradients(self, selected=None, masked=True, reduction="sum", weights=None):
        """d item_loss / d (users, items), cosine, ratio 1."""
        weights = self.weights(reduction) if weights is None else weights
        advantage = self.advantages()
        if selected is None:
            selected = np.zeros(advantage.shape, bool)
            selected[np.arange(GROUPS), advantage.argmax(1)] = True
        user_norm = np.linalg.norm(self.users, axis=1, keepdims=True)
        item_norm = np.linalg.norm(self.items, axis=1, keepdims=True)
        u, v = self.users / user_norm, self.items / item_norm
        scores = u @ v.T / TAU
        owner = np.repeat(np.arange(GROUPS), GROUP)
        own = owner[:, None] == np.arange(GROUPS)[None]
        same = self.item_ids[owner][:, None] == self.item_ids[None]
        p = softmax(np.where(same & ~own, -np.inf, scores) if masked else scores)
        d_scores = (own - p) * (-advantage * selected).reshape(-1, 1) * weights[:, None] / TAU
        d_u, d_v = d_scores @ v, d_scores.T @ u
        d_users = (d_u - (d_u * u).sum(1, keepdims=True) * u) / user_norm
        return d_users, (d_v - (d_v * v).sum(1, keepdims=True) * v) / item_norm

    def run(self, **changes):
        """Our loss and its gradients (hidden, users, items)."""
        config = {"softcap": SOFTCAP, "temperature": SAMPLING, "item_temperature": TAU}
        config["max_completion_length"] = LIMIT
        config |= changes.pop("config", {})
        tensors = {
            name: torch.from_numpy(getattr(self, name)).requires_grad_()
            for name in ("hidden", "users", "items")
        }
        loss = recpo_loss(
            tensors["hidden"],
            torch.from_numpy(self.weight),
            torch.from_numpy(self.targets),
            torch.from_numpy(self.trajectory),
            torch.from_numpy(self.rewards),
            tensors["users"],
            tensors["items"],
            torch.from_numpy(changes.pop("item_ids", self.item_ids)),
            config=RecPOLossConfig(**config),
            **changes,
        )
        grads = torch.autograd.grad(loss.loss, list(tensors.values()))
        return loss, [g.numpy() for g in grads]


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_code_loss(case, log_prob, item_log_prob):
    """The broadcast of traps 1 and 2 for one group: ratios [G, S] times advantages [G, 1, 1]."""
    advantage = torch.from_numpy(case.advantages()[0])[:, None, None]
    ratio = torch.cat([log_prob, item_log_prob[:, None]], 1)
    ratio = (ratio - ratio.detach()).exp()
    return -(ratio * advantage).mean()


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def exact(a, b):
    assert np.linalg.norm(a - b) <= 1e-14 * np.linalg.norm(b)


def apart(a, b):
    assert np.abs(a - b).max() > 1e-3 * np.abs(b).max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("old", [False, True])
def test_gradients_equal_those_derived_by_hand(old, impl, reduction):
    case = Case()
    stored = torch.from_numpy(case.old) if old else None
    config = {"reduction": reduction, "impl": impl}
    _, (hidden, users, items) = case.run(old_log_prob=stored, config=config)
    exact(hidden, case.token_gradient(case.old if old else None, reduction=reduction))
    for ours, hand in zip((users, items), case.item_gradients(reduction=reduction), strict=True):
        exact(ours, hand)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_item_weight_scales_the_item_action_alone(reduction):
    case = Case()
    config = {"reduction": reduction, "item_weight": 2.5}
    _, (hidden, users, items) = case.run(config=config)
    exact(hidden, case.token_gradient(reduction=reduction))
    for ours, hand in zip((users, items), case.item_gradients(reduction=reduction), strict=True):
        exact(ours, 2.5 * hand)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_trap_12_the_item_action_is_one_more_action_of_its_trajectory(reduction):
    """The reference code takes a mean over tokens and another over item actions."""
    case = Case()
    _, (_, users, items) = case.run(config={"reduction": reduction})
    mean = np.full(GROUPS * GROUP, 1 / GROUPS)
    trap_users, trap_items = case.item_gradients(weights=mean)
    apart(trap_users, users)
    apart(trap_items, items)
    # what the item action of each best trajectory weighs in ours, in tokens of its trajectory: 1
    best = np.abs(users).max(1) > 0
    tokens = np.abs(trap_users[best]).max(1) / np.abs(users[best]).max(1)
    close(tokens, mean[best] / case.weights(reduction)[best])


def test_trap_1_one_advantage_per_trajectory_not_their_sum():
    case = Case()
    logits = torch.randn(GROUP, 6, VOCAB, dtype=torch.float64, requires_grad=True)
    log_prob = torch.log_softmax(logits, -1)[..., 0]
    item = torch.randn(GROUP, dtype=torch.float64, requires_grad=True)
    broadcast = torch.autograd.grad(reference_code_loss(case, log_prob, item), logits)[0]
    assert broadcast.abs().max() < 1e-15  # the advantages of a group sum to zero
    _, (hidden, _, _) = case.run()
    close(hidden, case.token_gradient())
    assert np.abs(hidden).max() > 1e-2


def test_trap_2_only_the_best_trajectory_trains_the_item():
    case = Case()
    loss, (_, users, items) = case.run()
    every = np.ones((GROUPS, GROUP), bool)
    hand_users, hand_items = case.item_gradients()
    all_users, all_items = case.item_gradients(every)
    close(users, hand_users)
    apart(all_users, hand_users)
    apart(all_items, hand_items)
    best = loss.best.numpy().ravel()
    assert best.sum() == GROUPS
    assert not users[~best].any() and np.abs(users[best]).min(1).all()


def test_trap_2_best_two():
    case = Case()
    loss, (_, users, items) = case.run(config={"best": 2})
    advantage = case.advantages()
    selected = advantage >= np.sort(advantage, 1)[:, -2:-1]
    assert (loss.best.numpy() == selected).all()
    for ours, hand in zip((users, items), case.item_gradients(selected), strict=True):
        close(ours, hand)


def test_trap_3_leave_one_out_leaves_one_out():
    rewards = Case().rewards
    ours = grouped_advantage(torch.from_numpy(rewards), estimator="rloo").advantages.numpy()
    others = (rewards.sum(1, keepdims=True) - rewards) / (GROUP - 1)
    close(ours, rewards - others)
    apart(rewards * (1 + 1 / GROUP) - rewards.mean(1, keepdims=True), ours)
    assert np.abs(ours.sum(1)).max() < 1e-12  # the reference's does not sum to zero


def test_trap_4_the_last_token_of_the_longest_trajectory_counts():
    case = Case()
    longest = int(np.argmax(LENGTHS))
    last = int(np.flatnonzero(case.trajectory == longest)[-1])
    loss, (hidden, _, _) = case.run()
    assert int(loss.num_tokens) == case.counted.sum()
    close(hidden[last], case.token_gradient()[last])
    assert np.abs(hidden[last]).max() > 1e-3
    case.targets[last], case.counted[last] = -100, False  # the trap
    dropped, (other, _, _) = case.run()
    assert not other[last].any()
    apart(other, hidden)
    assert abs(float(dropped.token_loss - loss.token_loss)) > 1e-3


def test_trap_5_stored_log_probs_clip():
    case = Case()
    old = torch.from_numpy(case.old)
    loss, (hidden, _, _) = case.run(old_log_prob=old)
    trap, (never, _, _) = case.run()
    assert float(trap.clip_fraction) == 0 and float(trap.ratio) == 1
    ratio = np.exp(case.logits()[0] - case.old)
    advantage = case.advantages().ravel()[case.trajectory]
    stopped = np.where(advantage > 0, ratio > 1.2, ratio < 0.8) & case.counted
    assert stopped.any()
    assert float(loss.clip_fraction) == pytest.approx(stopped.sum() / case.counted.sum())
    assert not hidden[stopped].any() and np.abs(never[stopped]).max(1).all()
    close(hidden, case.token_gradient(case.old))
    apart(never, hidden)


def test_trap_6_log_probs_are_those_of_the_sampling_temperature():
    case = Case()
    tensors = [torch.from_numpy(x) for x in (case.hidden, case.weight, case.targets)]
    sampled = linear_logprob(*tensors, softcap=SOFTCAP, temperature=SAMPLING).log_prob
    close(sampled.numpy()[case.counted], case.logits()[0][case.counted])
    same, (hidden, _, _) = case.run(old_log_prob=sampled)
    assert float(same.ratio) == pytest.approx(1, abs=1e-12)  # nothing was updated: on policy
    trap, (other, _, _) = case.run(old_log_prob=sampled, config={"temperature": 1.0})
    assert abs(float(trap.ratio) - 1) > 0.1 and float(trap.clip_fraction) > 0
    apart(other, hidden)
    close(other, case.token_gradient(sampled.numpy(), temperature=1.0))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_trap_7_duplicate_targets_are_not_negatives(impl):
    case = Case()
    _, (_, users, items) = case.run(config={"impl": impl})
    hand = case.item_gradients()
    trap = case.item_gradients(masked=False)
    for ours, right, wrong in zip((users, items), hand, trap, strict=True):
        close(ours, right)
        apart(wrong, right)
    _, (_, users, _) = case.run(item_ids=np.array([1, 2, 3]))  # distinct ids: the trap's numbers
    close(users, trap[0])


def gradient_table() -> str:
    """Norms of the gradients: ours, by hand, and under each trap."""
    case = Case()
    old = torch.from_numpy(case.old)
    _, (hidden, users, items) = case.run(old_log_prob=old)
    hand_users, hand_items = case.item_gradients()
    every = case.item_gradients(np.ones((GROUPS, GROUP), bool))
    unmasked = case.item_gradients(masked=False)
    _, (never, _, _) = case.run()
    _, (cold, _, _) = case.run(old_log_prob=old, config={"temperature": 1.0})
    by_hand = case.token_gradient(case.old)
    jacobian = case.logits()[1]
    summed = -(case.advantages().sum() * case.counted / case.counted.sum())[:, None] * jacobian
    averaged = case.item_gradients(weights=np.full(GROUPS * GROUP, 1 / GROUPS))
    of_reductions = []
    for reduction in REDUCTIONS[1:]:
        ours = case.run(old_log_prob=old, config={"reduction": reduction})[1]
        right = (
            case.token_gradient(case.old, reduction=reduction),
            *case.item_gradients(reduction=reduction),
        )
        names = "hidden (tokens)", "user_states (item action)", "item_states (item action)"
        of_reductions += [
            (name, f'by hand, "{reduction}"', a, b)
            for name, a, b in zip(names, ours, right, strict=True)
        ]
    rows = [
        ("hidden (tokens)", "by hand", hidden, by_hand),
        ("user_states (item action)", "by hand", users, hand_users),
        ("item_states (item action)", "by hand", items, hand_items),
        *of_reductions,
        ("hidden (tokens)", "trap 1: sum of advantages", summed, by_hand),
        ("user_states", "trap 2: every trajectory", every[0], hand_users),
        ("item_states", "trap 2: every trajectory", every[1], hand_items),
        ("hidden (tokens)", "trap 5: old = current", never, by_hand),
        ("hidden (tokens)", "trap 6: temperature 1", cold, by_hand),
        ("user_states", "trap 7: duplicates", unmasked[0], hand_users),
        ("item_states", "trap 7: duplicates", unmasked[1], hand_items),
        ("user_states", "trap 12: mean over item actions", averaged[0], hand_users),
        ("item_states", "trap 12: mean over item actions", averaged[1], hand_items),
    ]
    lines = [
        "| gradient | computed | norm | norm by hand | relative difference |",
        "|---" * 5 + "|",
    ]
    for name, how, value, right in rows:
        norm, exact = np.linalg.norm(value), np.linalg.norm(right)
        error = np.linalg.norm(value - right) / exact
        lines.append(f"| {name} | {how} | {norm:.3g} | {exact:.3g} | {error:.1e} |")
    return "\n".join(lines) + "\n"


def test_gradient_table():
    table = gradient_table()
    sys.stdout.write("\n" + table)
    errors = [float(line.split("|")[5]) for line in table.splitlines()[2:]]
    by_hand = len(REDUCTIONS) * 3
    assert max(errors[:by_hand]) < 1e-14 and min(errors[by_hand:]) > 0.05
