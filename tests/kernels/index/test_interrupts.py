"""Exceptions and Ctrl-C at any step of a search or a write: the lock is released, and a write is
there as a whole or not at all. Tables of ``torch.inference_mode`` can be written outside it."""

import itertools
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from _support.processes import environment

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels.index import fbgemm, fine, storage
from r2ec_kernels.index.locks import SharedLock

SCANS = ("none", "fp16", "bf16", "int8", "auto")
WIDTH = 8


def rows_like(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def make(scan, monkeypatch):
    """A small index whose packed blocks are small too, after a few changes; and its model."""
    for module in (fbgemm, storage):
        monkeypatch.setattr(module, "BLOCK", 64)
    items = rows_like(200, 0)
    index = ItemIndex(items, scan=scan)
    model = dict(enumerate(items))
    index.remove(torch.arange(3, 40, 5))
    for number in range(3, 40, 5):
        del model[number]
    return index, model


def assert_holds(index, model):
    """All of the index agrees: ids, rows, search by every product, ranks."""
    assert len(index) == len(model) and index.ids.tolist() == sorted(model)
    ids = torch.tensor(sorted(model))
    rows = torch.stack([model[i] for i in sorted(model)])
    assert torch.equal(index.items[index.ids], rows)
    queries = rows_like(3, 99)
    for batch in (queries[:1], queries):
        want = item_topk(batch, rows, 7, impl="reference")
        got = index.search(batch, 7)
        assert torch.equal(got.indices, ids[want.indices])
        assert torch.equal(got.scores, want.scores)
    at = torch.tensor([0, 5, len(ids) - 1])
    want = target_stats(queries, rows, at, impl="reference")
    assert torch.equal(index.target_stats(queries, ids[at]).rank, want.rank)


CHANGES = {
    "write": (
        lambda index: index.write(torch.arange(50, 190), rows_like(140, 1)),
        lambda model: model.update(zip(range(50, 190), rows_like(140, 1), strict=True)),
    ),
    "append": (
        lambda index: index.append(rows_like(300, 2)),
        lambda model: model.update(zip(range(200, 500), rows_like(300, 2), strict=True)),
    ),
    "append in place": (
        lambda index: index.append(rows_like(5, 3)),
        lambda model: model.update(zip(range(200, 205), rows_like(5, 3), strict=True)),
    ),
    "remove": (
        lambda index: index.remove(torch.arange(50, 120)),
        lambda model: [model.pop(number) for number in range(50, 120)],
    ),
}


class Failing:
    """Tensor assignments and helpers of an index that raise at their k-th call."""

    def __init__(self, monkeypatch, error):
        self.left, self.error, self.again = -1, error, 0
        self.patch(monkeypatch, storage, "encode")
        self.patch(monkeypatch, fbgemm.PackedCodes, "write")
        self.patch(monkeypatch, fbgemm.PackedCodes, "_pack")
        self.patch(monkeypatch, fbgemm.PackedCodes, "_drop")
        self.patch(monkeypatch, fbgemm.PackedCodes, "_reserve")
        self.patch(monkeypatch, fbgemm.PackedCodes, "_grow")
        self.patch(monkeypatch, torch.Tensor, "__setitem__")
        self.patch(monkeypatch, torch, "cat")

    def patch(self, monkeypatch, owner, name):
        plain = getattr(owner, name)

        def replaced(*arguments, **named):
            self.count()
            found = plain(*arguments, **named)
            self.count()
            return found

        monkeypatch.setattr(owner, name, replaced)

    def count(self):
        if self.left < 0:
            return
        self.left -= 1
        if self.left == 0:
            self.left = self.again or -1
            self.again = 0
            raise self.error("here")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_change_is_whole_or_not_at_all(scan, change, error, monkeypatch):
    apply, expect = CHANGES[change]
    whole, nothing = 0, 0
    for call in itertools.chain(range(1, 30), range(30, 2000, 17)):
        with monkeypatch.context() as patched:
            index, model = make(scan, patched)
            if change == "append in place":
                index.append(rows_like(150, 7))  # leaves room
                model |= dict(zip(range(200, 350), rows_like(150, 7), strict=True))
                apply = lambda index: index.append(rows_like(5, 3))  # noqa: E731
                expect = lambda model: model.update(  # noqa: E731
                    zip(range(350, 355), rows_like(5, 3), strict=True)
                )
            failing = Failing(patched, error)
            failing.left, failing.again = call, call % 3  # now and then in the repair too
            done = True
            try:
                apply(index)
            except error:
                done = False
            finally:
                failing.left = -1
            before = dict(model)
            expect(model)
            if len(index) == len(before) and not done:
                stored = index.items[index.ids]
                right = torch.stack([before[i] for i in sorted(before)])
                if torch.equal(stored, right):
                    model = before
            assert_holds(index, model)
            whole, nothing = whole + (model is not before), nothing + (model is before)
            index.write(index.ids[:2], rows_like(2, 5))  # and goes on as if nothing had been
            model.update(zip(index.ids[:2].tolist(), rows_like(2, 5), strict=True))
            assert_holds(index, model)
            if done and failing.left < 0:
                break
    assert nothing > 3 and whole


def test_a_failure_that_lasts_is_undone_once_it_has_passed(monkeypatch):
    for scan in SCANS:
        with monkeypatch.context() as patched:
            index, model = make(scan, patched)
            broken = Failing(patched, RuntimeError)
            broken.left = broken.again = 12

            def go_on(broken=broken):  # from the twelfth call on, every one
                broken.left -= 1
                if broken.left < 0:
                    raise RuntimeError("for long")

            broken.count = go_on
            with pytest.raises(RuntimeError, match="for long"):
                index.write(torch.arange(50, 190), rows_like(140, 1))
            broken.count = lambda: None
            assert_holds(index, model)


@pytest.mark.timeout(60)
def test_the_fine_copy_is_whole_or_not_there(monkeypatch):
    """The copy that a first ``target_stats`` makes; forced here, for it needs an AMX CPU."""
    for call in range(1, 12):
        with monkeypatch.context() as patched:
            index, model = make("int8", patched)
            failing = Failing(patched, KeyboardInterrupt)
            failing.patch(patched, fine, "refine")
            failing.left = call
            try:
                index._alone(index._storage.keep_fine)
            except KeyboardInterrupt:
                kinds = index._storage.kinds
                names = {name.split(".")[0] for name in index._storage.fields}
                assert (fine.KIND in kinds) == (fine.KIND in names)
            failing.left = -1
            assert_holds(index, model)
            index._alone(index._storage.keep_fine)
            index.write(torch.tensor([0]), rows_like(1, 3))
            model[0] = rows_like(1, 3)[0]
            assert_holds(index, model)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("module", "where", "k"),
    [
        ("cpu", "certified_topk", 7),  # of 50 rows: too many for a search of the rows alone
        ("cpu", "excluded_rows", 1),  # which this is part of
        ("index", "prepare_queries", 0),  # 0: target_stats
        ("index", "certified_stats", 0),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_reader_that_fails_is_not_counted(module, where, k, error, monkeypatch):
    index = ItemIndex(rows_like(50, 0), scan="none")
    with monkeypatch.context() as patched:

        def fail(*arguments, **named):
            raise error

        patched.setattr(f"r2ec_kernels.index.{module}.{where}", fail)
        try:
            if k:
                index.search(rows_like(1, 1), k)
            else:
                index.target_stats(rows_like(1, 1), torch.tensor([3]))
        except error:
            # while the failed call's frames still live
            index.write(torch.tensor([1]), rows_like(1, 2))
        else:
            pytest.fail(f"{where} was not called")
    writer = threading.Thread(
        target=lambda: index.write(torch.tensor([1]), rows_like(1, 2)), daemon=True
    )
    writer.start()
    writer.join(20)
    assert not writer.is_alive()


CALLS = {
    "search": lambda index: index.search(rows_like(1, 1), 2),
    "ranks": lambda index: index.target_stats(rows_like(1, 1), torch.tensor([3])),
    "ids": lambda index: index.ids,
    "write": lambda index: index.write(torch.tensor([1]), rows_like(1, 2)),
    "remove": lambda index: index.remove(torch.tensor([1])),
    "append": lambda index: index.append(rows_like(1, 2)),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_an_interrupt_at_any_step_of_the_lock(name):
    """A trace function raises where Python looks for signals in the code around the lock: at the
    begin of a function, and behind a call."""
    files = ("locks.py", "contextlib.py", "threading.py")
    for step in range(1, 60):
        index, left = ItemIndex(rows_like(20, 0), scan="none"), step

        def interrupt(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename.endswith(files) and event in ("call", "return"):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            CALLS[name](index)
        except KeyboardInterrupt as caught:  # kept, and with it the frames it went through
            sys.settrace(None)
            done = threading.Event()

            def write(index=index, done=done):
                index.write(torch.tensor([5]), rows_like(1, 3))
                done.set()

            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            assert done.wait(5), (step, caught.__traceback__)
        finally:
            sys.settrace(None)
        if left > 0:
            break
    assert 1 < step < 59


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where a shell in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_waiting_writer_that_is_interrupted_lets_readers_in(interruptible):
    lock, hold, inside = SharedLock(), threading.Event(), threading.Event()

    def read():
        inside.set()
        hold.wait(20)

    reader = threading.Thread(target=lambda: lock.shared(read), daemon=True)
    reader.start()
    inside.wait(5)
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lock.alone(lambda: None)
    assert lock.shared(lambda: 5) == 5
    hold.set()
    reader.join(5)
    assert lock.alone(lambda: 6) == 6


STORM = """
import os, random, signal, sys, threading, time
import torch
from r2ec_kernels import ItemIndex, item_topk

scan, mode, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
generator = torch.Generator().manual_seed(0)
items = torch.randn(600, 8, generator=generator)
index = ItemIndex(items, scan=scan)
index.search(items[:1], 2)
known = {i: {float(i)} for i in range(600)}
pid, done = os.getpid(), threading.Event()

def other():  # another thread searches and writes all the while
    rows = torch.randn(3, 8)
    while not done.is_set():
        index.search(rows, 5)
        index.write(torch.tensor([599, 598]), torch.full((2, 8), -1.0))

def storm():
    while not done.is_set():
        time.sleep(random.uniform(0.0005, 0.01))
        if not done.is_set():
            os.kill(pid, signal.SIGINT)

state = {i: items[i] for i in range(598)}
interrupted = calls = 0
end = time.monotonic() + seconds
threads = [threading.Thread(target=run, daemon=True) for run in (other, storm)]
step, pending = 0, None

def settle(pending):
    # a change that was interrupted is there as a whole or not at all
    kind, ids, rows = pending
    have = index.items
    if kind == "write":
        new = [bool(torch.equal(have[i], row)) for i, row in zip(ids, rows)]
        old = [bool(torch.equal(have[i], state[i])) for i in ids]
        assert all(new) or all(old), "a torn write"
        if all(new):
            state.update(zip(ids, rows))
    elif kind == "append":
        more = have.shape[0] - ids
        assert more in (0, len(rows)), "a torn append"
        if more:
            state.update(zip(range(ids, have.shape[0]), rows))
    else:
        live = set(index.ids.tolist())
        gone = [i not in live for i in ids]
        assert all(gone) or not any(gone), "a torn removal"
        if all(gone):
            for i in ids:
                del state[i]

def handler(*_):
    # up to ``armed`` interrupts hit one call, the second and third what the first one runs into
    global armed, interrupted
    if armed > 0:
        armed -= 1
        interrupted += 1
        raise KeyboardInterrupt

def attempt(work):
    global armed
    try:
        try:
            try:
                armed = random.randint(1, 3)
                work()
            finally:
                armed = 0
        except KeyboardInterrupt:
            armed = 0
    except KeyboardInterrupt:
        armed = 0

armed = 0
signal.signal(signal.SIGINT, handler)
for thread in threads:
    thread.start()
while time.monotonic() < end:
    pending = None
    step += 1
    calls += 1
    rows = torch.randn(40, 8, generator=generator)
    if mode == "search":
        attempt(lambda: index.search(rows[:2], 4))
    elif step % 3 == 0:
        ids = random.sample(sorted(state), 40)
        pending = ("write", ids, rows)
        attempt(lambda: index.write(torch.tensor(ids), rows))
    elif step % 3 == 1:
        pending = ("append", index.items.shape[0], rows)
        attempt(lambda: index.append(rows))
    else:
        ids = random.sample(sorted(state), 30)
        pending = ("remove", ids, None)
        attempt(lambda: index.remove(torch.tensor(ids)))
    if pending is not None:
        settle(pending)
signal.signal(signal.SIGINT, signal.SIG_IGN)
done.set()
for thread in threads:
    thread.join(20)
    assert not thread.is_alive(), "a thread hangs"
ids = index.ids
assert set(ids.tolist()) - {598, 599} == set(state)
rows = index.items[ids]
for number, row in zip(ids.tolist(), rows):
    if number in state:
        assert torch.equal(row, state[number]), number
queries = torch.randn(4, 8, generator=generator)
want = item_topk(queries, rows, 9, impl="reference")
got = index.search(queries, 9)
assert torch.equal(got.indices, ids[want.indices]) and torch.equal(got.scores, want.scores)
print("calls", calls, "interrupted", interrupted)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("scan", "mode"), [("auto", "search"), ("auto", "write"), ("bf16", "write")]
)
def test_a_storm_of_interrupts(scan, mode):
    done = subprocess.run(
        [sys.executable, "-c", STORM, scan, mode, "5"],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 20, done.stdout


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("made_inside", [False, True])
def test_tables_of_inference_mode_can_be_written(scan, made_inside, monkeypatch):
    """Made inside ``torch.inference_mode`` and changed outside, and the other way round."""
    with torch.inference_mode(made_inside):
        index, model = make(scan, monkeypatch)
        index.search(rows_like(1, 1), 3)
    for inside, (apply, expect) in itertools.product(
        (not made_inside, made_inside), (CHANGES["write"], CHANGES["append"])
    ):
        if len(index) > 200 and apply is CHANGES["append"][0]:
            continue
        with torch.inference_mode(inside):
            apply(index)
            expect(model)
            assert_holds(index, model)
        assert_holds(index, model)
    with torch.inference_mode(not made_inside):
        index.remove(torch.arange(50, 120))
    for number in range(50, 120):
        del model[number]
    index.write(index.ids[:3], rows_like(3, 8))
    model.update(zip(index.ids[:3].tolist(), rows_like(3, 8), strict=True))
    assert_holds(index, model)


@pytest.mark.parametrize("scan", SCANS)
def test_undone_inside_inference_mode_and_written_outside(scan, monkeypatch):
    """A search there finds the index half written, for the repair failed too."""
    index, model = make(scan, monkeypatch)
    with monkeypatch.context() as patched:
        failing = Failing(patched, RuntimeError)
        failing.left, failing.again = 20, 1
        with pytest.raises(RuntimeError, match="here"):
            index.write(torch.arange(50, 190), rows_like(140, 1))
        failing.left = -1
    with torch.inference_mode():
        assert_holds(index, model)
    CHANGES["write"][0](index)
    CHANGES["write"][1](model)
    assert_holds(index, model)


def test_saved_in_inference_mode_and_loaded(tmp_path):
    with torch.inference_mode():
        ItemIndex(rows_like(20, 0)).save(tmp_path / "a")
        index = ItemIndex.load(tmp_path / "a")
    index.append(rows_like(3, 1))
    index.write(torch.tensor([0, 21]), rows_like(2, 2))
    assert torch.equal(index.items[[0, 21]], rows_like(2, 2))


def test_searches_do_not_wait_for_each_other():
    lock, both = SharedLock(), threading.Barrier(3)
    threads = [threading.Thread(target=lambda: lock.shared(lambda: both.wait(10))) for _ in "ab"]
    for thread in threads:
        thread.start()
    both.wait(10)
    for thread in threads:
        thread.join()
    assert not lock._readers


def test_a_writer_is_not_starved_by_readers():
    lock, stop = SharedLock(), threading.Event()

    def read():
        while not stop.is_set():
            lock.shared(lambda: time.sleep(0.001))

    readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    begin = time.monotonic()
    for _ in range(20):
        lock.alone(lambda: None)
    stop.set()
    assert time.monotonic() - begin < 10
