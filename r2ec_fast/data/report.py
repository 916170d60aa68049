"""The load report: everything that was dropped, changed or kept on purpose, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsInt

ACTIONS = ("dropped", "changed", "kept", "noted")


@dataclass(frozen=True)
class ReportLine:
    """One rule and how often it acted.

    Args:
        what: what was found, e.g. "event without item id".
        count: how often.
        action: "dropped" (the row is gone), "changed" (a value was replaced), "kept" (stays on
            purpose) or "noted" (a fact, no row touched).
        rule: the stated rule, in words.
    """

    what: str
    count: int
    action: str
    rule: str

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action: expected one of {ACTIONS}, got {self.action!r}")


@dataclass(frozen=True)
class StageLine:
    """Sizes after one filter."""

    stage: str
    events: int
    users: int
    items: int


@dataclass
class LoadReport:
    """Counts of every rule (`lines`) and sizes after every filter (`stages`) of one load."""

    source: str = ""
    lines: list[ReportLine] = field(default_factory=list)
    stages: list[StageLine] = field(default_factory=list)

    def add(self, what: str, count: SupportsInt, action: str, rule: str) -> None:
        """Record that `what` was found `count` times; a repeated `what` adds up."""
        for i, line in enumerate(self.lines):
            if line.what == what:
                self.lines[i] = ReportLine(what, line.count + int(count), line.action, line.rule)
                return
        self.lines.append(ReportLine(what, int(count), action, rule))

    def add_stage(
        self, stage: str, events: SupportsInt, users: SupportsInt, items: SupportsInt
    ) -> None:
        """Record the sizes after a filter."""
        self.stages.append(StageLine(stage, int(events), int(users), int(items)))

    def count(self, what: str) -> int:
        """How often `what` was found (0 if its rule never ran)."""
        return next((line.count for line in self.lines if line.what == what), 0)

    def to_text(self) -> str:
        """The table: sizes after every filter, then every rule that acted."""
        out = [f"source: {self.source}"] if self.source else []
        if self.stages:
            rows = [("after", "events", "users", "items")]
            rows += [
                (s.stage, f"{s.events:,}", f"{s.users:,}", f"{s.items:,}") for s in self.stages
            ]
            out += _columns(rows, right=(1, 2, 3))
        acted = [line for line in self.lines if line.count]
        quiet = len(self.lines) - len(acted)
        if acted:
            rows = [("found", "count", "action", "rule")]
            rows += [(x.what, f"{x.count:,}", x.action, x.rule) for x in acted]
            out += _columns(rows, right=(1,))
        out.append(f"{quiet} further checks found nothing")
        return "\n".join(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            "source": self.source,
            "lines": [vars(line).copy() for line in self.lines],
            "stages": [vars(stage).copy() for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoadReport:
        """The inverse of `to_dict`."""
        return cls(
            source=values["source"],
            lines=[ReportLine(**line) for line in values["lines"]],
            stages=[StageLine(**stage) for stage in values["stages"]],
        )


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
