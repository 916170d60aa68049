"""`r2ec-fast report`; its docstring is the help of its settings."""

from __future__ import annotations

from r2ec_fast.utils.terminal import say


def report(run_dir: str) -> None:
    """Write one self-contained HTML file about a training run: curves, numbers, reasonings.

    Args:
        run_dir: output directory of the run; gets report.html.
    """
    from r2ec_fast.report.html import write_report

    say(f"wrote {write_report(run_dir)}")
