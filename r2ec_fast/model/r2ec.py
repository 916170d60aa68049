"""One backbone, two heads: any Hugging Face causal language model plus the item head.

The read-out of a row is the state, after the final norm, of its last token
(docs/method.md#read-out). The item head has no weights: row ``v`` of its table is the read-out of
item ``v``'s own prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from r2ec_fast.model.attention import VARLEN, VarlenLayout, register
from r2ec_fast.model.hf_compat import (
    attention_implementation,
    base_causal_lm,
    cache_argument,
    eval_mode,
    last_layer_at,
)
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.packing.ragged import Ragged, Rows, common_prefix
from r2ec_fast.prompts.builder import PromptBuilder, PromptConfig
from r2ec_kernels import ItemIndex, TargetStats, TopK

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from r2ec_fast.data import Catalog

CONFIG_FILE = "r2ec_config.json"
INDEX_FILE = "item_index.safetensors"
CATALOG_FILE = "catalog.parquet"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class R2ecModel(nn.Module):
    """A causal language model whose states also score a catalog of items.

    ``backbone`` is any transformers causal LM with rotary positions, or a peft model around one;
    ``similarity`` ("dot", "cosine", "l2") and ``temperature`` define the item head's score;
    ``prompts`` the wording. ``index`` holds the item table once :meth:`set_items` wrote it.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        similarity: str = "cosine",
        temperature: float = 0.02,
        prompts: PromptConfig | None = None,
    ) -> None:
        super().__init__()
        register()
        self.backbone: PreTrainedModel | PeftModel | PeftMixedModel = backbone
        self.tokenizer = tokenizer
        self.similarity = similarity
        self.temperature = temperature
        self.prompts = prompts or PromptConfig()
        self.index: ItemIndex | None = None
        self._check_head()

    # ---- the language model inside, whatever wraps it -------------------------------------------

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, without the peft wrapper (its adapters stay in place)."""
        return base_causal_lm(self.backbone)

    @property
    def hidden_size(self) -> int:
        return self.lm_head_weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """[V, d], the table that writes tokens."""
        return self.language_model.get_output_embeddings().weight

    @property
    def lm_head_bias(self) -> torch.Tensor | None:
        return getattr(self.language_model.get_output_embeddings(), "bias", None)

    @property
    def softcap(self) -> float | None:
        """c of Gemma-2's final c·tanh(logit / c), or None."""
        return getattr(self._text_config, "final_logit_softcapping", None)

    @property
    def logit_scale(self) -> float:
        """What the head's product is multiplied with (Cohere multiplies, Granite divides)."""
        config = self._text_config
        return float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    @property
    def _text_config(self):
        return self.language_model.config.get_text_config()

    @torch.no_grad()
    def _check_head(self) -> None:
        # the losses never see the model's own logits, so its head must be the one they compute
        ids = torch.arange(4, device=self.device)[None] % self.lm_head_weight.shape[0]
        model = self.language_model
        with eval_mode(model), attention_implementation(model, "eager"):
            expected = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = self._decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = nn.functional.linear(hidden, self.lm_head_weight, self.lm_head_bias)
        logits = logits.float() * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        gap = (logits - expected).abs().max().item()
        if not gap <= 0.02 * expected.abs().max().item():
            raise ValueError(
                f"backbone: {type(self.language_model).__name__} computes its logits in a way this "
                f"package does not know (they differ by {gap:.3g} from head · state); expected a "
                "linear head with an optional bias, scale and soft-cap"
            )

    @property
    def _decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # ---- states ---------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, prefix: KnownPrefix | None = None) -> torch.Tensor:
        """States after the final norm, [T, d], of a packed batch (best still in CPU memory).

        With a complete ``prefix`` the first sequence begins with it, and the states are those
        of the tokens behind it; one that is not takes up the batch's keys and values.
        """
        layout = VarlenLayout.from_batch(batch)
        known = len(prefix) if prefix is not None and prefix.complete else 0
        if known:
            layout = layout.behind(known)
        layout, batch = layout.to(self.device), batch.to(self.device)
        with attention_implementation(self.language_model, VARLEN):
            out = self._decoder(
                input_ids=batch.input_ids[:, known:],
                position_ids=batch.position_ids[:, known:],
                use_cache=prefix is not None,
                varlen_layout=layout,
                **{cache_argument(type(self._decoder)): prefix},
            )
        return out.last_hidden_state[0]

    def read_out(
        self,
        rows: Rows,
        *,
        max_tokens: int = 8192,
        prefix: KnownPrefix | None = None,
    ) -> torch.Tensor:
        """The state of each row's last token, [R, d], in row order; gradients flow if enabled.

        What all rows begin with (a template's head) is computed once a batch: the rows are packed
        as completions of their common prefix. ``max_tokens`` bounds a forward pass; a longer row
        runs alone. A ``prefix`` that all rows begin with is not computed at all; it holds no
        gradient, so it is for evaluation (ValueError otherwise). Other rows run without it.
        """
        rows = Ragged.of(rows)
        if not len(rows):
            return self.lm_head_weight.new_zeros((0, self.hidden_size))
        if prefix is not None and torch.is_grad_enabled():
            raise ValueError("prefix: expected None where gradients are wanted, it carries none")
        if prefix is not None and not prefix.begins(rows):
            prefix = None
        known = 0 if prefix is None else len(prefix)
        states, order = [], []
        for batch, source in _pack_rows(rows, max_tokens, known):
            at = batch.readout.to(self.device) - known
            # hooks are gone when a backward pass recomputes a layer: with gradient it runs whole
            pruned = nullcontext() if torch.is_grad_enabled() else last_layer_at(self._decoder, at)
            with pruned:
                states.append(self(batch, prefix)[at])
            order.append(source)
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(self.device)
        return torch.cat(states)[back]

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward passes: less memory, about a third more time."""
        model = self.language_model

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            # the recomputation comes when `forward` has put the attention back
            return nullcontext(), attention_implementation(model, VARLEN)

        # renamed in transformers 5.24
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})

    # ---- the item head --------------------------------------------------------------------------

    def prompt_builder(self, catalog: Catalog) -> PromptBuilder:
        """Prompts of this model's tokenizer and wording over ``catalog``."""
        return PromptBuilder(self.tokenizer, catalog, self.prompts)

    @torch.no_grad()
    def encode_items(self, catalog: Catalog, *, max_tokens: int = 8192) -> torch.Tensor:
        """The item table: read-outs of all item prompts, [N, d], in the order of internal ids."""
        builder = self.prompt_builder(catalog)
        return self.encode_rows(builder.items_ids(range(len(catalog))), max_tokens)

    @torch.no_grad()
    def encode_rows(
        self,
        rows: Rows,
        max_tokens: int = 8192,
        prefix: KnownPrefix | None = None,
    ) -> torch.Tensor:
        """:meth:`read_out` without gradient and in evaluation mode."""
        with eval_mode(self):
            return self.read_out(rows, max_tokens=max_tokens, prefix=prefix)

    @torch.no_grad()
    def known_prefix(self, builder: PromptBuilder) -> KnownPrefix | None:
        """What all user prompts of ``builder`` begin with, computed with the weights of now; None
        where a template leaves nothing in common."""
        tokens = builder.user_prefix_ids()
        if not tokens:
            return None
        prefix = KnownPrefix(tokens)
        (batch,) = pack_histories([prefix.tokens], max_tokens=len(prefix))
        with eval_mode(self):
            self(batch, prefix)
        prefix.complete = True
        return prefix

    def set_items(self, table: torch.Tensor, *, scan: str = "auto") -> ItemIndex:
        """Build the item head's index over ``table`` [N, d] and keep it as ``index``."""
        self.index = ItemIndex(
            _storable(table), similarity=self.similarity, temperature=self.temperature, scan=scan
        )
        return self.index

    def write_items(self, ids: torch.Tensor, states: torch.Tensor) -> None:
        """Replace rows of the table: ``ids`` int64 [M], ``states`` [M, d]."""
        self._table.write(ids, _storable(states).to(self._table.dtype))

    def target_stats(self, states: torch.Tensor, targets: torch.Tensor, exclude) -> TargetStats:
        """Rank and log-probability of ``targets`` int64 [B] for user states [B, d]; ``exclude`` as
        r2ec_kernels takes it."""
        return self._table.target_stats(_storable(states), targets, exclude=exclude, use_scan=False)

    def top_items(self, states: torch.Tensor, k: int, exclude=None) -> TopK:
        """The k best items for user states [B, d]: scores float32 and ids int64, [B, k]."""
        return self._table.search(_storable(states), k, exclude=exclude)

    @property
    def item_table(self) -> torch.Tensor:
        """[N, d], the item head's table; RuntimeError where there is none yet."""
        return self._table.items

    @property
    def _table(self) -> ItemIndex:
        if self.index is None:
            raise RuntimeError("the model has no item table: set_items(encode_items(catalog))")
        return self.index

    # ---- files ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hf_kwargs) -> R2ecModel:
        """Load a directory of :meth:`save_pretrained`, or any causal LM of the Hub as a backbone.

        ``hf_kwargs`` go to ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, revision,
        gguf_file, ...). A saved adapter comes back trainable. Raises OSError where no model is
        found, ValueError where the backbone's head is of an unknown kind.
        """
        path = Path(name_or_path)
        saved = path / CONFIG_FILE
        settings = json.loads(saved.read_text()) if saved.is_file() else {}
        backbone, tokenizer = _load_backbone(str(name_or_path), hf_kwargs)
        if "prompts" in settings:
            fields = settings["prompts"]
            fields["item_fields"] = tuple(fields["item_fields"])
            settings["prompts"] = PromptConfig(**fields)
        model = cls(backbone, tokenizer, **settings)
        if (path / INDEX_FILE).is_file():
            model.index = ItemIndex.load(path / INDEX_FILE)
        return model

    def save_pretrained(
        self, directory: str | os.PathLike[str], catalog: Catalog | None = None
    ) -> None:
        """Write model (or adapter), tokenizer, settings and item table, in the Hub's layout.

        With ``catalog`` the items' ids and texts go beside the table, so that a recommender can
        name what it recommends.

        Everything goes to a temporary directory first, so an interrupted call leaves ``directory``
        as it was.
        """
        from r2ec_fast.data.store import save_catalog
        from r2ec_fast.utils.atomic_files import replaced_directory

        with replaced_directory(directory) as temporary:
            self.backbone.save_pretrained(str(temporary), safe_serialization=True)
            self.tokenizer.save_pretrained(temporary)
            settings = {
                "similarity": self.similarity,
                "temperature": self.temperature,
                "prompts": asdict(self.prompts),
            }
            (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
            if self.index is not None:
                self.index.save(temporary / INDEX_FILE)
            if catalog is not None:
                save_catalog(catalog, temporary / CATALOG_FILE)

    def add_lora(
        self,
        *,
        r: int = 4,
        alpha: int = 128,
        dropout: float = 0.0,
        target_modules: Sequence[str] = LORA_TARGETS,
    ) -> None:
        """Freeze the backbone and put trainable low-rank adapters on ``target_modules``."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules),
            task_type="CAUSAL_LM",
        )
        self.backbone = get_peft_model(self.backbone, config)


def _storable(states: torch.Tensor) -> torch.Tensor:
    # a table holds 16 or 32 bits; float64 models are for tests of the mathematics
    return states.float() if states.dtype == torch.float64 else states


def _load_backbone(path: str, hf_kwargs: dict):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {
        k: hf_kwargs[k] for k in ("gguf_file", "revision", "trust_remote_code") if k in hf_kwargs
    }
    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path
    backbone = AutoModelForCausalLM.from_pretrained(base, **hf_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path, **names)
    if not adapter.is_file():
        return backbone, tokenizer
    from peft import PeftModel

    return PeftModel.from_pretrained(backbone, path, is_trainable=True), tokenizer


def _pack_rows(
    rows: Ragged, max_tokens: int, known: int = 0
) -> Iterator[tuple[PackedBatch, np.ndarray]]:
    """Packed batches of ``rows`` with the row each read-out belongs to.

    The first sequence of each batch begins with the ``known`` tokens that all rows begin with.
    """
    # every row keeps a token of its own
    prefix = known or min(common_prefix(rows), int(rows.lengths.min()) - 1)
    if not known and (len(rows) < 2 or prefix <= 0):
        for batch in pack_histories(rows, max_tokens=max_tokens, oversize="alone"):
            yield batch, batch.groups.numpy()
        return
    shared, tails = [rows[0][:prefix]], rows.tail(prefix)
    for part in tails.parts(max(max_tokens - prefix, 1)):
        (batch,) = pack_histories(
            shared,
            tails[part],
            num_generations=part.stop - part.start,
            max_tokens=max_tokens,
            oversize="alone",
        )
        yield batch, np.arange(part.start, part.stop)
