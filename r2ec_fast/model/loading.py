"""A model for a command: loaded onto the device there is, with the item table of a catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from r2ec_fast.model.r2ec import R2ecModel

if TYPE_CHECKING:
    from r2ec_fast.data import Catalog


def load_model(name_or_path: str, *, dtype: str, gguf_file: str | None) -> R2ecModel:
    """A model in evaluation mode, on the GPU if there is one; OSError where it cannot be loaded."""
    names = {"dtype": dtype} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    try:
        model = R2ecModel.from_pretrained(name_or_path, **names)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"model: cannot load {name_or_path!r}: {reason}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def give_items(model: R2ecModel, catalog: Catalog, max_tokens: int) -> None:
    """Encode the catalog unless the model brings its table; ValueError for another catalog's."""
    model.check_catalog(catalog, "data")
    if model.index is None:
        model.set_items(model.encode_items(catalog, max_tokens=max_tokens))
