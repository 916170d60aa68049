"""The packer: layouts by hand, what every row can see, best fit, C++ against numpy, errors."""

import dataclasses
import importlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.packing import packer as packing
from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.packing.ragged import Ragged

_packing = pytest.importorskip("r2ec_fast._packing", reason="the C++ extension is not built")
BACKENDS = ["numpy", "cpp"]


def as_lists(batch: PackedBatch) -> dict:
    return {
        f.name: value.tolist() if isinstance(value, torch.Tensor) else value
        for f in dataclasses.fields(batch)
        if (value := getattr(batch, f.name)) is not None
    }


def assert_same(left: list[PackedBatch], right: list[PackedBatch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(PackedBatch):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype and x.shape == y.shape, field.name
                assert torch.equal(x, y), field.name
            else:
                assert type(x) is type(y) and x == y, field.name


@st.composite
def calls(draw):
    """Arguments of pack_histories: ragged prompts, completions or none, every option."""
    lengths = st.integers(1, 12)
    prompts = draw(st.lists(lengths, max_size=9))
    generations = draw(st.sampled_from([0, 1, 2, 3]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    def rows(sizes):
        dtype = rng.choice([np.int32, np.int64])
        return Ragged.of([rng.integers(0, 50, n).astype(dtype) for n in sizes])

    multiple = draw(st.sampled_from([None, 1, 4, 7]))
    options = {
        "max_tokens": draw(st.integers(multiple or 1, 80)),
        "pad_to_multiple_of": multiple,
        "oversize": "alone",
        "readout": draw(st.booleans()),
    }
    if not generations:
        return (rows(prompts), None), options | {"labels": draw(st.booleans())}
    sizes = [draw(lengths) for _ in range(generations * len(prompts))]
    completions = rows(sizes)
    share = draw(st.booleans())
    options |= {"share_prompts": share, "num_generations": generations}
    options["labels"] = draw(st.booleans()) and (generations == 1 or not share)
    if draw(st.booleans()):
        targets = completions.values.astype(np.int64)
        targets[rng.random(len(targets)) < 0.3] = -100
        options["completion_targets"] = targets
    return (rows(prompts), completions), options


@settings(max_examples=300, deadline=None)
@given(calls(), st.integers(1, 5))
def test_cpp_equals_numpy(call, threads):
    args, options = call
    expected = pack_histories(*args, backend="numpy", **options)
    assert_same(expected, pack_histories(*args, backend="cpp", threads=threads, **options))


def visible_tokens(batch: PackedBatch) -> list[list[int]]:
    """What the state of each row may depend on, read off the batch as attention reads it."""
    tokens = batch.input_ids[0].tolist()
    cu_q, cu_k = batch.cu_seq_lens_q.tolist(), batch.cu_seq_lens_k.tolist()
    kv = range(len(tokens)) if batch.kv_index is None else batch.kv_index.tolist()
    seen = []
    for s in range(len(cu_q) - 1):
        keys = kv[cu_k[s] : cu_k[s + 1]]
        length = cu_q[s + 1] - cu_q[s]
        for i in range(length):
            seen.append([tokens[k] for k in keys[: len(keys) - (length - 1 - i)]])
    return seen


@settings(max_examples=200, deadline=None)
@given(calls(), st.sampled_from(BACKENDS))
def test_every_state_sees_its_own_history(call, backend):
    (prompts, completions), options = call
    g = options.get("num_generations", 1)
    budget = options["max_tokens"]
    multiple = options["pad_to_multiple_of"] or 1

    groups, sources = [], []
    for batch in pack_histories(prompts, completions, backend=backend, **options):
        total = batch.input_ids.shape[1]
        seen = visible_tokens(batch)
        groups += batch.groups.tolist()
        sources += batch.source.tolist()
        assert total % multiple == 0 and total - multiple < batch.num_tokens <= total
        assert total <= budget // multiple * multiple or len(batch.groups) == 1
        assert [len(s) - 1 for s in seen] == batch.position_ids[0].tolist()
        widths = np.diff(batch.cu_seq_lens_q.numpy())
        assert batch.max_length_q == max(widths)
        assert batch.max_length_k == max(np.diff(batch.cu_seq_lens_k.numpy()))
        assert batch.seq_idx[0].tolist() == np.repeat(np.arange(len(widths)), widths).tolist()
        if completions is None:
            full = [prompts[i].tolist() for i in batch.groups.tolist()]
            assert len(batch.predict_from) == len(batch.source) == 0
        else:
            full = [
                prompts[i].tolist() + completions[i * g + j].tolist()
                for i in batch.groups.tolist()
                for j in range(g)
            ]
            target_values = options.get("completion_targets", completions.values)
            assert batch.targets.tolist() == target_values[batch.source.numpy()].tolist()
            for at, source, trajectory in zip(
                batch.predict_from.tolist(),
                batch.source.tolist(),
                batch.trajectory.tolist(),
                strict=True,
            ):
                # the state that predicts a token sees exactly what comes before it
                before = seen[at]
                assert full[trajectory][: len(before)] == before
                assert full[trajectory][len(before)] == completions.values[source]
                group = batch.groups[trajectory // g]
                first = completions.offsets[group * g + trajectory % g]
                prompt_length = len(prompts[group])
                assert source - first + prompt_length == len(before)
        if options["readout"]:
            assert [seen[i] for i in batch.readout.tolist()] == full
        else:
            assert batch.readout.shape == (0,)
        if options["labels"]:
            assert batch.labels.shape == batch.input_ids.shape
    assert sorted(groups) == list(range(len(prompts)))
    if completions is not None:
        assert sorted(sources) == list(range(len(completions.values)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_layout_by_hand(backend):
    [batch] = pack_histories(
        [[1, 2, 3], [4, 5]],
        [[10, 11], [12], [13], [14, 15, 16]],
        completion_targets=[10, -100, 12, 13, 14, 15, -100],
        max_tokens=20,
        pad_to_multiple_of=8,
        backend=backend,
    )
    assert as_lists(batch) == {
        "input_ids": [[1, 2, 3, 10, 11, 12, 4, 5, 13, 14, 15, 16, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3, 4, 0, 1, 2, 3]],
        "seq_idx": [[0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 6, 6, 6, 6]],
        "cu_seq_lens_q": [0, 3, 5, 6, 8, 9, 12, 16],
        "cu_seq_lens_k": [0, 3, 8, 12, 14, 17, 22, 26],
        "max_length_q": 4,
        "max_length_k": 5,
        "kv_index": [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 7, 8, 6, 7, 9, 10, 11]
        + [12, 13, 14, 15],
        "predict_from": [2, 3, 2, 7, 7, 9, 10],
        "targets": [10, -100, 12, 13, 14, 15, -100],
        "trajectory": [0, 0, 1, 2, 3, 3, 3],
        "readout": [4, 5, 8, 11],
        "groups": [0, 1],
        "source": [0, 1, 2, 3, 4, 5, 6],
        "num_tokens": 12,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_layout_by_hand(backend):
    [batch] = pack_histories(
        [[1, 2, 3]],
        [[10, 11], [12]],
        share_prompts=False,
        labels=True,
        max_tokens=10,
        pad_to_multiple_of=5,
        completion_targets=[10, -100, 12],
        backend=backend,
    )
    assert batch.kv_index is None
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 12, 0]]
    assert batch.labels.tolist() == [[-100] * 3 + [10, -100] + [-100] * 3 + [12, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]
    assert batch.cu_seq_lens_q.tolist() == batch.cu_seq_lens_k.tolist() == [0, 5, 9, 10]
    assert batch.predict_from.tolist() == [2, 3, 7]
    assert batch.readout.tolist() == [4, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_alone_by_hand(backend):
    batches = pack_histories(
        [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], max_tokens=5, labels=True, backend=backend
    )
    assert [b.groups.tolist() for b in batches] == [[2, 3], [0, 1]]
    assert batches[1].input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batches[1].labels.tolist() == [[-100, 2, 3, -100, 5]]
    assert batches[1].readout.tolist() == [2, 4]


def brute_force_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    batches, spaces = [], []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = [(space, b) for b, space in enumerate(spaces) if space >= sizes[i]]
        if room:
            b = min(room)[1]
        else:
            b = len(batches)
            batches.append([])
            spaces.append(capacity)
        batches[b].append(i)
        spaces[b] -= sizes[i]
    return [sorted(b) for b in batches]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "largest", "capacity"),
    [(1, 1, 1), (63, 9, 9), (500, 200, 256), (500, 5, 4096), (400, 3000, 70_000), (2000, 64, 65)],
)
def test_best_fit_decreasing(backend, rows, largest, capacity):
    lengths = np.random.default_rng(rows).integers(1, largest + 1, rows)
    values = np.zeros(lengths.sum(), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    batches = pack_histories((values, offsets), max_tokens=capacity, backend=backend)
    expected = brute_force_best_fit(lengths.tolist(), capacity)
    assert [b.groups.tolist() for b in batches] == expected


@pytest.mark.parametrize("capacity", [5000, 2**20 + 7, 2**31 - 1])
def test_free_space_structures_agree(capacity):
    """A bucket a value, or an ordered set above 2^20: the same batches."""
    lengths = np.random.default_rng(0).integers(1, 5000, 3000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    plan = _packing.Plan(offsets, offsets[-1], None, 0, 0, capacity, 1, False, False)
    expected = brute_force_best_fit(lengths.tolist(), capacity)
    splits = np.split(plan.groups, plan.starts["groups"][1:-1])
    assert [s.tolist() for s in splits] == expected


def test_threads_do_not_change_the_result():
    rng = np.random.default_rng(0)
    prompts = Ragged.of([rng.integers(0, 9, n) for n in rng.integers(1, 200, 300)])
    completions = Ragged.of([rng.integers(0, 9, n) for n in rng.integers(1, 60, 1200)])
    one = pack_histories(prompts, completions, max_tokens=1000, pad_to_multiple_of=8)
    for threads in (2, 3, 64, 10_000):
        many = pack_histories(
            prompts, completions, max_tokens=1000, pad_to_multiple_of=8, threads=threads
        )
        assert_same(one, many)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_pack(backend):
    assert pack_histories([], max_tokens=8, backend=backend) == []
    assert pack_histories([], [], num_generations=4, max_tokens=8, backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": [[1], []]}, "prompts: row 1 is empty"),
        ({"completions": [[1], [], [2], [3]]}, "completions: row 1 is empty"),
        ({"completions": [[1], [2], [3]]}, "num_generations rows for each of the 2 prompts"),
        ({"num_generations": 3}, "got 4 rows and num_generations=3"),
        ({"num_generations": 0}, "num_generations"),
        ({"completions": []}, "num_generations"),
        ({"completions": None, "num_generations": 2}, "need completions"),
        ({"max_tokens": 4}, "group 0 has 6 tokens, more than the budget of 4"),
        ({"max_tokens": 7, "pad_to_multiple_of": 4}, "more than the budget of 4"),
        ({"max_tokens": 0}, "max_tokens must be in 1"),
        ({"max_tokens": 2**31}, "max_tokens must be in 1"),
        ({"threads": 0}, "threads must be in 1"),
        ({"pad_to_multiple_of": 64}, "must not exceed max_tokens"),
        ({"oversize": "drop"}, "oversize must be"),
        ({"labels": True}, "share_prompts=False"),
        ({"completion_targets": [1, 2]}, "one entry for each of the 5 completion tokens"),
        ({"prompts": (np.arange(3), np.array([0, 2]))}, "the last offset must be the number"),
        ({"prompts": (np.arange(3), np.array([1, 3]))}, "offsets must start at 0"),
        ({"prompts": (np.arange(3), np.array([0, 5, 3]))}, "offsets must not fall, got 5 then 3"),
        ({"prompts": (np.arange(3), np.array([0, -1, 3]))}, "offsets must not fall"),
        ({"prompts": (np.arange(3), np.array([], np.int64))}, "offsets must hold at least"),
        ({"prompts": (np.zeros((2, 2), np.int64), np.array([0, 4]))}, "must have one dimension"),
    ],
)
def test_errors_name_the_argument(backend, kwargs, message):
    call = {"prompts": [[1, 2, 3], [4]], "completions": [[5, 6], [7], [8], [9]], "max_tokens": 50}
    with pytest.raises(ValueError, match=message):
        pack_histories(**(call | kwargs), backend=backend)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": 5}, "prompts must be a sequence"),
        ({"prompts": [["a", "b"]]}, "prompts must hold integers"),
        ({"prompts": (np.zeros(2), np.array([0, 2]))}, "prompts values must hold integers"),
        ({"max_tokens": 5.0}, "max_tokens must be an int"),
        ({"threads": True}, "threads must be an int"),
    ],
)
def test_wrong_types(kwargs, message):
    with pytest.raises(TypeError, match=message):
        pack_histories(**({"prompts": [[1]], "max_tokens": 8} | kwargs))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be"):
        pack_histories([[1]], max_tokens=8, backend="rust")


BIG = 2**31


@pytest.mark.parametrize(
    ("prompts", "completions", "generations", "message"),
    [
        ([0, BIG], None, 0, "would hold 2147483648 tokens"),
        ([0, BIG - 1], None, 0, None),
        ([0, 2**30], [0, 1, 2], 2, "tokens and 3221225474 keys"),
        ([0, 2**62], [0, 1, 2], 2, "group 0: its token count does not fit into 63 bits"),
        ([0, BIG - 1, 2 * (BIG - 1)], None, 0, None),
    ],
)
def test_two_billion_tokens_by_predicate(prompts, completions, generations, message):
    """Planning reads offsets only, so that sizes past 2^31 need no memory."""
    offsets = None if completions is None else np.array(completions)
    args = (
        np.array(prompts), prompts[-1], offsets, 0 if completions is None else completions[-1],
        generations, BIG - 1, 1, generations > 0, True,
    )  # fmt: skip
    if message is not None:
        with pytest.raises(ValueError, match=message):
            _packing.Plan(*args)
        return
    plan = _packing.Plan(*args)
    assert plan.num_batches == len(prompts) - 1
    assert plan.starts["tokens"].tolist() == prompts
    assert plan.max_length_q == [BIG - 1] * plan.num_batches


@pytest.mark.parametrize(
    ("offsets", "num_values", "message"),
    [
        ([], 0, "at least the entry 0"),
        ([1, 2], 2, "must start at 0"),
        ([0, 2, 2], 2, "row 1 is empty"),
        ([0, 3, 2], 2, "must not fall"),
        ([0, 2], 3, "must be the number of values"),
        ([0, 2], -1, "must be the number of values"),
    ],
)
def test_the_core_checks_for_itself(offsets, num_values, message):
    with pytest.raises(ValueError, match=message):
        _packing.Plan(np.array(offsets, np.int64), num_values, None, 0, 0, 8, 1, False, False)


def test_the_core_refuses_arrays_of_the_wrong_size():
    plan = _packing.Plan(np.array([0, 2]), 2, None, 0, 0, 8, 1, False, False)
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="prompts must have 2 entries, got 3"):
        plan.fill(np.arange(3), none, None, {}, 1)
    with pytest.raises(ValueError, match="input_ids is missing"):
        plan.fill(np.arange(2), none, None, {}, 1)
    with pytest.raises(ValueError, match="input_ids must have 2 entries, got 1"):
        plan.fill(np.arange(2), none, None, {"input_ids": np.zeros(1, np.int64)}, 1)
    with pytest.raises(ValueError, match="input_ids: wrong dtype"):
        plan.fill(np.arange(2), none, None, {"input_ids": np.zeros(2, np.int32)}, 1)


def test_offsets_changed_after_planning_do_no_harm():
    offsets = np.array([0, 2, 4])
    plan = _packing.Plan(offsets, 4, None, 0, 0, 8, 1, False, False)
    offsets[1] = 2**40
    assert plan.starts["tokens"].tolist() == [0, 4]
    assert plan.num_tokens == [4]


def test_one_warning_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "r2ec_fast._packing", None)
    packing._extension.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="build_ext --inplace") as caught:
            first = pack_histories([[1, 2]], max_tokens=4)
            second = pack_histories([[1, 2]], max_tokens=4)
        assert len(caught) == 1
        assert_same(first, second)
        with pytest.raises(RuntimeError, match="was not built"):
            pack_histories([[1, 2]], max_tokens=4, backend="cpp")
    finally:
        packing._extension.cache_clear()


def test_the_gil_is_released():
    lengths = np.full(1_000_000, 3)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ticks = [0]
    seen = []

    def plan():
        before = ticks[0]
        for _ in range(3):
            _packing.Plan(offsets, offsets[-1], None, 0, 0, 8192, 1, False, False)
        seen.append(ticks[0] - before)

    worker = threading.Thread(target=plan)
    worker.start()
    while worker.is_alive():
        time.sleep(0.0005)
        ticks[0] += 1
    assert seen[0] > 10


MEMORY_SCRIPT = r"""
import re
import numpy as np, torch
from r2ec_fast.packing.packer import pack_histories
lengths = np.random.default_rng(0).integers(1, 120, 1_000_000)
offsets = np.concatenate([[0], np.cumsum(lengths)])
values = np.ones(offsets[-1], np.int64)
del lengths
pack_histories([[1, 2], [3]], max_tokens=8)
def peak():  # of this program; ru_maxrss starts at what the process that started it held
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
batches = pack_histories((values, offsets), max_tokens=8192, threads=2)
inputs = values.nbytes + offsets.nbytes
outputs = sum(
    t.nbytes for b in batches for t in vars(b).values() if isinstance(t, torch.Tensor)
)
print(inputs, outputs, peak() - before)
"""


def test_a_million_rows_stay_within_twice_inputs_and_outputs():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    inputs, outputs, grown = map(int, run.stdout.split())
    assert outputs > 1e9
    # `grown` is what the call added to the inputs: the outputs, and whatever it held beside them
    assert grown > 0.9 * outputs
    assert inputs + grown <= 2 * (inputs + outputs)
    assert grown <= 1.15 * outputs


def test_moving_to_a_device_keeps_every_field():
    [batch] = pack_histories([[1, 2]], [[3], [4]], max_tokens=8)
    moved = batch.to("meta")
    for field in dataclasses.fields(PackedBatch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, field.name).device.type == "meta"
        else:
            assert getattr(moved, field.name) == value


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_pinned_where_cuda_is(backend):
    [batch] = pack_histories([[1, 2]], [[3], [4]], max_tokens=8, backend=backend)
    assert batch.input_ids.is_pinned() and batch.kv_index.is_pinned()
    assert torch.equal(batch.to("cuda").input_ids.cpu(), batch.input_ids)


def test_the_extension_does_not_need_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_packing', {_packing.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.import_module("r2ec_fast._packing") is _packing
