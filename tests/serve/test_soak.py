"""Threads, modes and writes of the item table at once: every answer is one of a serial run.

The long soak: `python tests/_support/soak.py --minutes 10`.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from _support import soak
from _support.processes import environment
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("minutes", [0.05, pytest.param(2.0, marks=pytest.mark.slow)])
def test_answers_stay_right_while_rows_are_written_and_interrupts_arrive(minutes):
    done = subprocess.run(
        [sys.executable, soak.__file__, "--minutes", str(minutes)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong answers or errors: 0; threads that hang: 0" in done.stdout


@pytest.fixture(scope="module")
def served():
    return soak.Soak()


@settings(max_examples=25, deadline=None)
@given(
    work=st.lists(st.tuples(st.integers(0, 11), st.booleans(), st.sampled_from("aaab01"))),
    threads=st.integers(2, 6),
    last=st.integers(0, 1),
)
def test_any_mix_of_threads_modes_and_writes(served, work, threads, last):
    def run(step):
        user, reasoning, kind = step
        if kind in "01":  # the versions of the table, of which answers[0] is the second
            served.index.write(served.ids, served.versions[int(kind)])
            return True
        job = (f"u{user}", reasoning)
        return served.ask(job) in [answers[job] for answers in served.answers]

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(run, work))
    served.index.write(served.ids, served.versions[1 - last])
    job = ("u3", bool(last))
    assert served.ask(job) == served.answers[last][job]
