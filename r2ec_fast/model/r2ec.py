"""One backbone, two heads: any Hugging Face causal language model plus the item head.

The read-out of a row is the state, after the final norm, of its last token
(docs/method.md#read-out). The item head has no weights: row ``v`` of its table is the read-out of
item ``v``'s own prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from r2ec_fast.model import pretrained
from r2ec_fast.model.attention import VARLEN, VarlenLayout, register
from r2ec_fast.model.hf_compat import (
    FEW_ROWS,
    attention_implementation,
    base_causal_lm,
    cache_argument,
    context_limit,
    eval_mode,
    last_layer_at,
    quiet_renames,
)
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.model.pretrained import INDEX_FILE, TableIds
from r2ec_fast.packing.packer import PackedBatch, pack_histories, pack_readouts
from r2ec_fast.packing.ragged import Ragged, Rows
from r2ec_fast.prompts.builder import PromptBuilder, PromptConfig
from r2ec_fast.utils.atomic_files import finish_interrupted
from r2ec_kernels import ItemIndex, TargetStats, TopK

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from r2ec_fast.data import Catalog

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
        self.table_ids: TableIds | None = None  # whose rows a saved table holds, where it is known
        self._check_adapters()
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

    def _check_adapters(self) -> None:
        # the losses read the token tables themselves: an adapter around one would not be seen
        tables = {
            "lm_head": self.language_model.get_output_embeddings(),
            "the token embeddings": self.language_model.get_input_embeddings(),
        }
        for name, module in tables.items():
            if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
                raise ValueError(
                    f"target_modules: adapters on {name} are not supported, because the losses and "
                    "the item head use the table itself; expected layers of attention and MLP only"
                )

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
        self._check_positions(batch)
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

    def _check_positions(self, batch: PackedBatch) -> None:
        limit = context_limit(self.language_model.config)
        if limit is None or batch.position_ids.device.type != "cpu" or not batch.num_tokens:
            return
        longest = int(batch.position_ids[0, : batch.num_tokens].max()) + 1
        if longest > limit:
            raise ValueError(
                f"rows: expected at most {limit} tokens, the context of the model, got one of "
                f"{longest}; lower max_user_tokens, max_item_tokens or max_completion_length"
            )

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
        least = FEW_ROWS if known else 0
        for batch, source in pack_readouts(rows, max_tokens, known, least):
            at = batch.readout[: len(source)].to(self.device) - known
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
        self.table_ids = None
        self.index = ItemIndex(
            _storable(table), similarity=self.similarity, temperature=self.temperature, scan=scan
        )
        return self.index

    def write_items(self, ids: torch.Tensor, states: torch.Tensor) -> None:
        """Replace rows of the table: ``ids`` int64 [M], ``states`` [M, d]."""
        self._table.write(ids, _storable(states).to(self._table.dtype))

    def target_stats(
        self, states: torch.Tensor, targets: torch.Tensor, exclude, include=None
    ) -> TargetStats:
        """Rank and log-probability of ``targets`` int64 [B] for user states [B, d]; ``exclude`` and
        ``include`` as r2ec_kernels takes them."""
        return self._table.target_stats(
            _storable(states), targets, exclude=exclude, include=include, use_scan=False
        )

    def top_items(self, states: torch.Tensor, k: int, exclude=None, include=None) -> TopK:
        """The k best items for user states [B, d]: scores float32 and ids int64, [B, k]."""
        return self._table.search(_storable(states), k, exclude=exclude, include=include)

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
        finish_interrupted(path)
        settings = pretrained.read_settings(path)
        backbone, tokenizer = pretrained.load_backbone(str(name_or_path), hf_kwargs)
        model = cls(backbone, tokenizer, **settings.head)
        if (path / INDEX_FILE).is_file():
            model.index = ItemIndex.load(path / INDEX_FILE)
            model.table_ids = settings.table_ids
        return model

    def save_pretrained(
        self, directory: str | os.PathLike[str], catalog: Catalog | None = None
    ) -> None:
        """Write model (or adapter), tokenizer, settings and item table, in the Hub's layout.

        With ``catalog``, that of the item table, the items' ids and texts go beside the table, so
        that a recommender can name what it recommends.

        An earlier model in ``directory`` is replaced; every other file and folder there stays, a
        README.md too. Everything is written to a temporary folder first, so an interrupted call
        leaves the model as it was.

        Raises OSError, naming ``directory``, where it is a file or cannot be written.
        """
        pretrained.save_model(self, directory, catalog)

    def save_items(self, directory: str | os.PathLike[str], catalog: Catalog) -> None:
        """Write settings, item table and catalog beside a model that is already in ``directory``;
        no other file is touched. Raises as :meth:`save_pretrained`."""
        pretrained.save_items(self, directory, catalog)

    def check_catalog(self, catalog: Catalog, argument: str = "catalog") -> None:
        """Raise ValueError, naming ``argument`` and the first difference, unless the item table is
        that of ``catalog``: the same ids in the same order. Where the ids are not known (a table
        of version 0.1.0, or one set from a tensor) the numbers of rows are compared."""
        pretrained.check_catalog(self, catalog, argument)

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
        self._refuse_token_tables(target_modules)
        with quiet_renames():
            self.backbone = get_peft_model(self.backbone, config)
        self._check_adapters()

    def _refuse_token_tables(self, target_modules: Sequence[str]) -> None:
        model = self.language_model
        tables = (model.get_output_embeddings(), model.get_input_embeddings())
        for name, module in model.named_modules():
            if module in tables and any(
                name == target or name.endswith(f".{target}") for target in target_modules
            ):
                raise ValueError(
                    f"target_modules: expected layers of attention and MLP, got {name}: the "
                    "losses use the token table itself and would not see an adapter on it"
                )


def _storable(states: torch.Tensor) -> torch.Tensor:
    # a table holds 16 or 32 bits; float64 models are for tests of the mathematics
    return states.float() if states.dtype == torch.float64 else states
