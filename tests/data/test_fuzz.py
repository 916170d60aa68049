"""A hundred mutated files; `python tests/data/fuzz_readers.py --files 2000` runs more."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def fuzz_module():
    path = Path(__file__).with_name("fuzz_readers.py")
    spec = importlib.util.spec_from_file_location("fuzz_readers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_files_are_read_or_refused_in_one_line():
    fuzz = fuzz_module()
    counts, failures = fuzz.fuzz(104, seed=7)
    assert not failures, "\n\n".join(failures)
    for kind in fuzz.FORMATS:
        assert counts[kind, fuzz.READ] and counts[kind, fuzz.REFUSED], fuzz.table(counts)
