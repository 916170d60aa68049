"""`r2ec-fast index`; its docstring is the help of its settings."""

from __future__ import annotations

from pathlib import Path

from r2ec_fast.utils.atomic_files import check_directory
from r2ec_fast.utils.terminal import say


def index(
    model: str,
    data: str,
    *,
    output_dir: str | None = None,
    scan: str = "auto",
    max_tokens: int = 16384,
    dtype: str = "auto",
    gguf_file: str | None = None,
) -> None:
    """Encode a data set's whole catalog and store it beside the model, ready to recommend.

    Args:
        model: directory of a model, or a name on the Hub.
        data: prepared data set (directory) whose catalog is encoded.
        output_dir: where the model with its new table is written; default: `model` itself.
        scan: first pass of the item index: "auto", "none", "fp16", "bf16" or "int8".
        max_tokens: token budget of a forward pass.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
    """
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.loading import load_model

    target = output_dir or model
    if output_dir is None and not Path(model).is_dir():
        raise ValueError(f"output_dir: needed, because {model!r} is not a directory")
    check_directory(target, "output_dir")
    catalog = RecDataset.load(data).data.catalog
    r2ec = load_model(model, dtype=dtype, gguf_file=gguf_file)
    r2ec.set_items(r2ec.encode_items(catalog, max_tokens=max_tokens), scan=scan)
    if output_dir is None and gguf_file is None:
        r2ec.save_items(target, catalog)  # the weights are there already
    else:
        r2ec.save_pretrained(target, catalog)
    say(f"encoded {len(catalog):,} items, wrote {target}")
