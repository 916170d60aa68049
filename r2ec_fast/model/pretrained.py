"""A model on disk: the Hub's layout, and beside it settings, item table and catalog.

config.json, *.safetensors, adapter_*, tokenizer   as transformers and peft write them
r2ec_config.json            similarity, temperature, prompts, whose rows the table holds
item_index.safetensors      the item table
catalog.parquet             ids and texts of its items
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from r2ec_fast.model.hf_compat import quiet_renames
from r2ec_fast.prompts import PromptConfig
from r2ec_fast.utils.atomic_files import updated_directory

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from r2ec_fast.data import Catalog
    from r2ec_kernels import ItemIndex

CONFIG_FILE = "r2ec_config.json"
INDEX_FILE = "item_index.safetensors"
CATALOG_FILE = "catalog.parquet"
ADAPTER_FILE = "adapter_config.json"
ITEM_FILES = (CONFIG_FILE, INDEX_FILE, CATALOG_FILE)
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_*")


class TableIds(NamedTuple):
    """Whose rows an item table holds: ``sha256`` of the items' ids in their order, and the
    ``catalog`` file that lists them, where there is one."""

    sha256: str
    catalog: Path


class SavedModel(Protocol):
    """What of an `R2ecModel` is saved."""

    backbone: PreTrainedModel | PeftModel | PeftMixedModel
    tokenizer: PreTrainedTokenizerBase
    similarity: str
    temperature: float
    prompts: PromptConfig
    index: ItemIndex | None
    table_ids: TableIds | None


class Settings(NamedTuple):
    """What r2ec_config.json says: arguments of R2ecModel, and whose rows the table holds."""

    head: dict[str, Any]
    table_ids: TableIds | None


def read_settings(directory: Path) -> Settings:
    """The settings in ``directory``; none where it is no model of this program's."""
    path = directory / CONFIG_FILE
    head = json.loads(path.read_text()) if path.is_file() else {}
    sha256 = head.pop("table_ids_sha256", None)
    if "prompts" in head:
        fields = head["prompts"]
        fields["item_fields"] = tuple(fields["item_fields"])
        head["prompts"] = PromptConfig(**fields)
    return Settings(head, TableIds(sha256, directory / CATALOG_FILE) if sha256 else None)


def save_model(
    model: SavedModel, directory: str | os.PathLike[str], catalog: Catalog | None
) -> None:
    """`R2ecModel.save_pretrained`."""
    with updated_directory(directory, owned=_is_model_file, kept=_is_card) as temporary:
        model.backbone.save_pretrained(str(temporary), safe_serialization=True)
        _fix_base_path(temporary / ADAPTER_FILE)
        model.tokenizer.save_pretrained(temporary)
        _write_items(model, temporary, catalog)


def save_items(model: SavedModel, directory: str | os.PathLike[str], catalog: Catalog) -> None:
    """`R2ecModel.save_items`."""
    with updated_directory(directory, owned=ITEM_FILES.__contains__) as temporary:
        _write_items(model, temporary, catalog)


def check_catalog(model: SavedModel, catalog: Catalog, argument: str) -> None:
    """`R2ecModel.check_catalog`."""
    from r2ec_fast.data.store import load_catalog

    again = "re-encode the catalog (r2ec-fast index)"
    if model.index is not None and len(model.index) != len(catalog):
        raise ValueError(
            f"{argument}: expected the {len(model.index)} items of the model's item table, "
            f"got {len(catalog)}; {again}"
        )
    known = model.table_ids
    if model.index is None or known is None or known.sha256 == _digest(catalog.ids.ids):
        return
    text = f"{argument}: its items are not those of the model's item table, or in another order"
    if known.catalog.is_file():
        stored = load_catalog(known.catalog).ids.ids
        pairs = enumerate(zip(stored, catalog.ids.ids, strict=False))
        for i, (own, other) in pairs:
            if own != other:
                text += f": item {i} is {own!r} in the table and {other!r} here"
                break
    raise ValueError(f"{text}; {again}")


def _write_items(model: SavedModel, directory: Path, catalog: Catalog | None) -> None:
    from r2ec_fast.data.store import save_catalog

    settings: dict[str, Any] = {
        "similarity": model.similarity,
        "temperature": model.temperature,
        "prompts": asdict(model.prompts),
    }
    if model.index is not None:
        model.index.save(directory / INDEX_FILE)
        if catalog is not None:
            settings["table_ids_sha256"] = _digest(catalog.ids.ids)
        elif model.table_ids is not None:
            settings["table_ids_sha256"] = model.table_ids.sha256
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    if catalog is not None:
        save_catalog(catalog, directory / CATALOG_FILE)


def _digest(ids: Sequence[Hashable]) -> str:
    """SHA-256 of ids in their order; text and numbers of the same digits differ."""
    return hashlib.sha256(json.dumps(list(ids), default=repr).encode()).hexdigest()


def _is_model_file(name: str) -> bool:
    """Whether a file of this name would be read as part of a saved model."""
    return name in ITEM_FILES or any(fnmatch(name, pattern) for pattern in _WEIGHT_FILES)


def _is_card(name: str) -> bool:
    return name == "README.md"  # peft writes one; a user's own is worth more


def _fix_base_path(adapter: Path) -> None:
    """Write a base model that is a directory with its whole path: the adapter may be loaded from
    elsewhere, and a relative one would then name a model of the Hub."""
    if adapter.is_file():
        settings = json.loads(adapter.read_text())
        base = settings["base_model_name_or_path"]
        if base and Path(base).is_dir():
            settings["base_model_name_or_path"] = str(Path(base).resolve())
            adapter.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _base_of(adapter: Path) -> str:
    """The base model of a saved adapter. Raises FileNotFoundError where it was a directory that is
    no longer there."""
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    if not base:
        raise ValueError(f"{adapter}: base_model_name_or_path: expected a base model, got {base!r}")
    is_path = os.path.isabs(base) or base.startswith(".") or base.count("/") > 1
    if is_path and not os.path.isdir(base):
        raise FileNotFoundError(
            f"{adapter}: its base model {base!r} is not there; put it back, or write its "
            "place into base_model_name_or_path"
        )
    return base


def load_backbone(path: str, hf_kwargs: dict):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {
        k: hf_kwargs[k] for k in ("gguf_file", "revision", "trust_remote_code") if k in hf_kwargs
    }
    adapter = Path(path) / ADAPTER_FILE
    base = _base_of(adapter) if adapter.is_file() else path
    backbone = AutoModelForCausalLM.from_pretrained(base, **hf_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path, **names)
    if not adapter.is_file():
        return backbone, tokenizer
    from peft import PeftModel

    with quiet_renames():
        return PeftModel.from_pretrained(backbone, path, is_trainable=True), tokenizer
