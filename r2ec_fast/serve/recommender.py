"""Serving: histories -> (reasoning) -> the best unseen items, with their titles."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from r2ec_fast.data import Catalog, History, RecDataset, UnknownIdError
from r2ec_fast.data.filters import matching
from r2ec_fast.eval.ranking import transformers_engine, user_states
from r2ec_fast.model.hf_compat import exclusive
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.rollout import RolloutEngine

UserHistory = Hashable | Sequence[Hashable] | History


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Args:
        item_id: external id.
        title: its title in the catalog.
        score: the item head's score (similarity / temperature); comparable within one user only.
        rank: place from 1.
    """

    item_id: Hashable
    title: str
    score: float
    rank: int


@dataclass(frozen=True)
class Recommendations(Sequence[Recommendation]):
    """The items recommended to one user, best first: a sequence of `Recommendation`.

    Args:
        items: the recommendations, at most k.
        reasoning: the text written before the answer; None in direct mode.
        history: titles of the events shown to the model, oldest first.
    """

    items: tuple[Recommendation, ...]
    reasoning: str | None
    history: tuple[str, ...]

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.items)


class Recommender:
    """Recommends items of a catalog with a trained model, whose weights stay as they are here: the
    item table, and what all prompts begin with, are computed once.

    Several threads may call one Recommender, and several Recommenders may share a model: passes
    over the model run one after another, searches of the item table together.

    Args:
        model: a model; without an item table the whole catalog is encoded here, once.
        catalog: the items, in the order of the model's item table.
        data: the prepared data set whose users can be asked for by id; None: none can.
        engine: writes the reasoning; default: transformers, on the model itself.

    Raises:
        ValueError: the item table is that of another catalog.
    """

    def __init__(
        self,
        model: R2ecModel,
        catalog: Catalog,
        *,
        data: RecDataset | None = None,
        engine: RolloutEngine | None = None,
    ) -> None:
        self.model, self.catalog, self.data = model, catalog, data
        self.builder = model.prompt_builder(catalog)
        if model.index is None:
            model.set_items(model.encode_items(catalog))
        model.check_catalog(catalog)
        if data is not None and data.data.catalog.ids != catalog.ids:
            raise ValueError("data: its items are not those of the model's catalog")
        self.assembler = PromptAssembler(self.builder, ahead=False)
        self.prefix = model.known_prefix(self.builder)
        self.engine = engine or transformers_engine(
            model, self.builder, prefix=self.prefix, keep_packed=True
        )
        self._titles: dict[str, list[int]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        data: RecDataset | str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> Recommender:
        """Load what a training run exported (`output_dir/model`).

        Args:
            directory: a directory with model, tokenizer, item table and catalog.
            data: a prepared data set (or its directory), to recommend to its users by id.
            device: where to run; default: CUDA where there is one, else the CPU.

        Raises:
            FileNotFoundError: the directory or its catalog does not exist.
            OSError, ValueError: a file cannot be read or is damaged.
        """
        if data is not None and not isinstance(data, RecDataset):
            data = RecDataset.load(os.fspath(data))
        model, catalog = load_recommender(directory, device=device)
        return cls(model, catalog, data=data)

    def recommend(
        self,
        histories: Sequence[UserHistory],
        k: int = 10,
        reasoning: bool = True,
        *,
        include: Sequence[Hashable] | None = None,
        filter: Mapping[str, Any] | None = None,
        max_completion_length: int = 512,
        batch_size: int = 64,
        now: int | None = None,
    ) -> list[Recommendations]:
        """The k best items for each history that are not in it.

        Args:
            histories: one entry a user: the id of a user of the data set (everything known of that
                user is the history), or a list of item ids or titles, oldest first, or a `History`.
            k: items a user.
            reasoning: write a greedy reasoning first; False reads the state right after the prompt.
            include: ids or titles of the only items that may be recommended; None: all may.
            filter: only items whose columns fit it, such as ``{"genres": ["Comedy", "Drama"]}`` or
                ``{"price": {"max": 20}}`` (`r2ec_fast.data.filters`); with ``include``, both hold.
            max_completion_length: longest reasoning (tokens).
            batch_size: users computed together.
            now: unix seconds that the ages in the prompt are counted from; default: the time of
                each user's last event.

        Returns:
            One `Recommendations` a history, in their order; fewer than k items where the catalog
            has no more unseen ones.

        Raises:
            ValueError: k or batch_size below 1, an empty history, a title that several items have,
                a filter that does not fit the catalog's columns.
            UnknownIdError: an unknown user or item. TypeError: `histories` is a single text.
        """
        for name, value in (("k", k), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if isinstance(histories, str | bytes) or not isinstance(histories, Sequence | np.ndarray):
            raise TypeError(
                f"histories: expected a list of user ids or of item lists, got {histories!r}"
            )
        allowed = self._allowed(include, filter)
        resolved = [self._history(entry, now) for entry in histories]
        with exclusive(self.model):  # a tokenizer serves one thread at a time
            prompts = self.assembler.history_rows(resolved)
        out: list[Recommendations] = []
        for start in range(0, len(resolved), batch_size):
            part = slice(start, start + batch_size)
            out += self._recommend_batch(
                resolved[part], prompts[part], k, allowed, reasoning, max_completion_length
            )
        return out

    def _allowed(
        self, include: Sequence[Hashable] | None, filter: Mapping[str, Any] | None
    ) -> torch.Tensor | None:
        """Which items may be recommended, bool [N]; None: all."""
        if include is None and filter is None:
            return None
        if isinstance(include, str | bytes):
            raise TypeError(f"include: expected a list of items, got {include!r}")
        allowed = np.full(len(self.catalog), include is None)
        allowed[[self._item(item) for item in include or ()]] = True
        if filter is not None:
            allowed &= matching(self.catalog.fields, filter).to_numpy()
        return torch.from_numpy(allowed)

    def _recommend_batch(
        self,
        histories: Sequence[History],
        prompts: Ragged,
        k: int,
        allowed: torch.Tensor | None,
        reasoning: bool,
        max_completion_length: int,
    ) -> list[Recommendations]:
        with exclusive(self.model):
            users = user_states(
                self.model,
                self.builder,
                prompts,
                engine=self.engine if reasoning else None,
                max_completion_length=max_completion_length,
                prefix=self.prefix,
            )
            texts = [self._reasoning_text(tokens) for tokens in users.reasoning]
        finite = users.finite()
        if not bool(finite.all()):
            raise ValueError(
                f"model: the states of {int((~finite).sum())} of {len(histories)} histories hold "
                "NaN or infinity; nothing can be recommended from them"
            )
        seen = Ragged.of([np.unique(history.items) for history in histories])
        best = self.model.top_items(users.states, k, exclude=seen.tensors(), include=allowed)
        titles = self.catalog.titles
        out = []
        for row, history in enumerate(histories):
            pairs = zip(best.indices[row].tolist(), best.scores[row].tolist(), strict=True)
            items = tuple(
                Recommendation(self.catalog.ids.ids[item], titles[item], score, rank)
                for rank, (item, score) in enumerate(pairs, start=1)
                if item >= 0
            )
            text = texts[row] if reasoning else None
            shown = history.items[-self.model.prompts.window :]
            out.append(Recommendations(items, text, tuple(titles[i] for i in shown)))
        return out

    def _reasoning_text(self, tokens: np.ndarray) -> str:
        text = self.model.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        assert isinstance(text, str)  # of one row
        return text.split(self.model.prompts.emb_token)[0].strip()

    def _history(self, entry: UserHistory, now: int | None) -> History:
        if isinstance(entry, History):
            history = self._checked(entry)
        elif isinstance(entry, list | tuple | np.ndarray):
            items = [self._item(item) for item in entry]
            history = History(items=np.asarray(items, dtype=np.int64))
        elif isinstance(entry, Hashable):
            history = self._history_of_user(entry)
        else:
            raise TypeError(
                "histories: expected a user id, a list of items or a History for each user, got "
                f"{type(entry).__name__}"
            )
        if len(history) == 0:
            raise ValueError("histories: every history needs at least one item, got an empty one")
        if history.timestamps is None or (history.target_time is not None and now is None):
            return history
        return replace(history, target_time=int(history.timestamps[-1]) if now is None else now)

    def _checked(self, history: History) -> History:
        """A history given by internal ids."""
        items = np.asarray(history.items)
        if items.size and not np.issubdtype(items.dtype, np.integer):
            raise TypeError(f"histories: History.items: expected int64 [n], got {items.dtype}")
        outside = items[(items < 0) | (items >= len(self.catalog))]
        if outside.size:
            raise ValueError(
                f"histories: item {outside[0]} is outside 0..{len(self.catalog) - 1}, the internal "
                "ids of the catalog"
            )
        return replace(history, items=items.astype(np.int64, copy=False))

    def _history_of_user(self, user: Hashable) -> History:
        if self.data is None:
            raise ValueError(
                f"histories: got the user id {user!r}, but no data set to look it up in; "
                "pass data=..., or a list of items"
            )
        data = self.data.data
        user = user.item() if isinstance(user, np.generic) else user
        internal = int(data.users.encode([user])[0])
        events = int(data.offsets[internal + 1] - data.offsets[internal])
        return self.data.history(internal, events)

    def _item(self, item: Hashable) -> int:
        """Internal id of an item given by external id, or else by title (case is ignored)."""
        if isinstance(item, np.generic):
            item = item.item()
        if item in self.catalog.ids:
            return int(self.catalog.ids.encode([item])[0])
        if self._titles is None:
            titles: dict[str, list[int]] = {}
            for i, title in enumerate(self.catalog.titles):
                titles.setdefault(title.casefold(), []).append(i)
            self._titles = titles  # whole: another thread may be looking
        found = self._titles.get(str(item).casefold(), [])
        if not found:
            raise UnknownIdError(f"unknown item {item!r}: neither an item id nor a title")
        if len(found) > 1:
            ids = self.catalog.ids.decode(found[:5])
            raise ValueError(f"histories: the title {item!r} belongs to several items: {ids}")
        return found[0]


def load_recommender(
    directory: str | os.PathLike[str], *, device: str | torch.device | None = None
) -> tuple[R2ecModel, Catalog]:
    """The model and the catalog that a training run exported; see `Recommender.from_pretrained`."""
    from r2ec_fast.data.store import load_catalog
    from r2ec_fast.model import R2ecModel
    from r2ec_fast.model.pretrained import CATALOG_FILE

    if not os.path.isdir(directory):
        raise FileNotFoundError(f"no model directory at {os.fspath(directory)!r}")
    path = os.path.join(directory, CATALOG_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{os.fspath(directory)!r} holds no {CATALOG_FILE}: not a trained recommender "
            "(r2ec-fast train, or r2ec-fast index for a bare model)"
        )
    catalog = load_catalog(path)
    model = R2ecModel.from_pretrained(directory)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), catalog
