"""Interaction files -> id map, splits, next-item examples; a generated catalog."""

from r2ec_fast.data.dataset import RecDataset
from r2ec_fast.data.reasonings import Reasonings
from r2ec_fast.data.report import LoadReport, ReportLine, StageLine
from r2ec_fast.data.settings import EventRules, LoadSettings
from r2ec_fast.data.sources.generic import load_interactions
from r2ec_fast.data.splits import make_splits
from r2ec_fast.data.templates import Attribute, ReasoningTemplates
from r2ec_fast.data.types import (
    Catalog,
    Examples,
    History,
    IdMap,
    InteractionData,
    UnknownIdError,
)

__all__ = [
    "Attribute",
    "Catalog",
    "EventRules",
    "Examples",
    "History",
    "IdMap",
    "InteractionData",
    "LoadReport",
    "LoadSettings",
    "ReasoningTemplates",
    "Reasonings",
    "RecDataset",
    "ReportLine",
    "StageLine",
    "UnknownIdError",
    "load_interactions",
    "make_splits",
]
