"""`r2ec-fast prepare SOURCE`; the settings are those of the source's function in data.prepare."""

from __future__ import annotations

from typing import Any

from r2ec_fast.utils.terminal import say


def prepare(source: str, **settings: Any) -> None:
    """Read interactions, split them, write a data set, and show what was read, dropped and kept."""
    from r2ec_fast.data import prepare as sources

    if source == "check":
        say(sources.check_amazon(**settings).text)
        return
    prepared = getattr(sources, f"prepare_{source}")(**settings)
    say(prepared.report)
    say(f"wrote {prepared.directory}")
