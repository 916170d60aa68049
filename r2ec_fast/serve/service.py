"""A model with its catalog as a service: what the HTTP server, a Ray replica or a test calls."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.data import Catalog, History, RecDataset, UnknownIdError
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.continuous.decoder import ContinuousDecoder
from r2ec_fast.serve.catalog.live import LiveCatalog
from r2ec_fast.serve.catalog.records import Fields, log_header
from r2ec_fast.serve.catalog.table import LiveTable, LocalTable
from r2ec_fast.serve.catalog.write_ahead import ChangeLog, Record, WriteAheadLog
from r2ec_fast.serve.jobs import Job, Search, Writer
from r2ec_fast.serve.numerics import invariant
from r2ec_fast.serve.state_cache import StateCache
from r2ec_fast.serve.worker import Observe, Worker, WorkerSettings

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_kernels import ItemIndex

log = logging.getLogger(__name__)

ITEMS_LOG = "item_changes.log"  # beside the item table


@dataclass(frozen=True)
class Event:
    """Something a user bought: an item's id or title, when (unix seconds), and how it was rated."""

    item: Hashable
    timestamp: int | None = None
    rating: float | None = None


@dataclass(frozen=True)
class Request:
    """A wish for recommendations; see `http.schemas.RecommendRequest`, which checks it."""

    history: Sequence[Event] | None = None
    user_id: Hashable | None = None
    k: int = 10
    reasoned: bool = True
    exclude: Sequence[Hashable] = ()
    include: Sequence[Hashable] | None = None
    wanted: Mapping[str, Any] | None = None
    max_reasoning_tokens: int = 256
    timeout: float | None = None
    now: int | None = None


class BadRequest(ValueError):
    """A request that cannot be answered; ``field`` is the part of it that is wrong."""

    def __init__(self, field: str, message: str, *, status: int = 422) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class Service:
    """Answers requests with one model.

    Args:
        model: in evaluation mode, with its item table; this object owns it from now on.
        catalog: the items, in the order of the table.
        data: the data set whose users can be asked for by id; None: none can.
        items_log: file of item changes, or what opens a log for a header; None: changes are lost
            with the process.
        settings: of the worker.
        cache_entries, cache_seconds: of user states.
        table: makes the table that is searched of the model's; default: `LocalTable`.
        engine: what writes reasonings: "transformers", the model itself, or "vllm:URL", a vLLM
            server of the same weights (`engines.vllm.VLLMWriter`).
        observe: see `Worker`.

    Raises:
        ValueError: the table is that of another catalog, the log that of another table, or the
            model's architecture cannot decode continuously, or the engine serves other weights.
        EngineUnavailable: the engine is away.
    """

    def __init__(
        self,
        model: R2ecModel,
        catalog: Catalog,
        *,
        name: str = "r2ec",
        data: RecDataset | None = None,
        items_log: str | os.PathLike[str] | Callable[[Record], ChangeLog] | None = None,
        settings: WorkerSettings | None = None,
        cache_entries: int = 10_000,
        cache_seconds: float = 3600.0,
        table: Callable[[ItemIndex], LiveTable] = LocalTable,
        engine: str = "transformers",
        observe: Observe = lambda name, value: None,
    ) -> None:
        model.check_catalog(catalog)
        if data is not None and data.data.catalog.ids != catalog.ids:
            raise ValueError("data: its items are not those of the model's catalog")
        if model.index is None:
            model.set_items(model.encode_items(catalog))
        self.model, self.data, self.name = model, data, name
        self.started = time.time()
        self.log: ChangeLog | None = None
        if items_log is not None:
            opened = items_log if callable(items_log) else partial(WriteAheadLog, items_log)
            self.log = opened(log_header(model, catalog))
        assert model.index is not None
        self.catalog = LiveCatalog(model, catalog, table(model.index), self.log)
        model.index = None  # the table's, which may not be in this process
        # a tokenizer serves one thread at a time; the worker has the model's own
        self._builder = copy.copy(model.prompt_builder(catalog))
        self._builder.tokenizer = copy.deepcopy(model.tokenizer)
        self._builder.titles = self.catalog.items.prompt_titles
        self._tokenizing = threading.Lock()
        prefix = model.known_prefix(self._builder)
        decoder: ContinuousDecoder[Job] = ContinuousDecoder(
            model, self._builder.marker_ids, _end_of_text(model), prefix
        )
        self._writer = self._writer_of(engine)
        settings = settings or WorkerSettings()
        if settings.together and model.device.type == "cpu":
            settings = self._checked_company(settings, prefix)
        self.worker = Worker(
            model,
            self.catalog,
            marker_ids=self._builder.marker_ids,
            prefix=prefix,
            decoder=decoder,
            writer=self._writer,
            settings=settings,
            cache=StateCache(cache_entries, cache_seconds),
            observe=observe,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        data: str | os.PathLike[str] | None = None,
        items_log: str | os.PathLike[str] | Callable[[Record], ChangeLog] | None = "",
        device: str | None = None,
        **settings: Any,
    ) -> Service:
        """Serve what a training run exported. ``items_log``: "" is the file beside the table.

        Raises as `Recommender.from_pretrained`, and OSError where the log cannot be written.
        """
        from r2ec_fast.serve.recommender import load_recommender

        model, catalog = load_recommender(directory, device=device)
        dataset = None if data is None else RecDataset.load(os.fspath(data))
        path = Path(directory) / ITEMS_LOG if items_log == "" else items_log
        name = settings.pop("name", None) or Path(directory).resolve().name
        return cls(model, catalog, name=name, data=dataset, items_log=path, **settings)

    def close(self) -> None:
        """Answer what waits, and stop."""
        self.worker.close()
        if self._writer is not None:
            self._writer.close()
        if self.log is not None:
            self.log.close()

    # ---- recommendations ------------------------------------------------------------------------

    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Job:
        """Queue a request; ``job.future`` gets its answer.

        Raises BadRequest, QueueFull, ShuttingDown.
        """
        job = self._job(request, search=True)
        job.on_text = on_text
        self.worker.submit(job)
        return job

    def submit_state(self, request: Request) -> Job:
        """Queue the computation of a user's state alone."""
        job = self._job(request, search=False)
        self.worker.submit(job)
        return job

    def _job(self, request: Request, *, search: bool) -> Job:
        history, known = self._history(request)
        with self._tokenizing:
            prompt = np.asarray(self._builder.user_ids(history), np.int64)
        wanted = None
        if search:
            exclude = {row for item in known for row in self.catalog.items.rows_of(item)}
            for given in request.exclude:
                exclude.update(self._rows_of_given("exclude", given))
            if request.wanted is not None:
                self._check_filter(request.wanted)
            wanted = Search(request.k, sorted(exclude), request.wanted, request.include)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        limit = request.max_reasoning_tokens if request.reasoned else 0
        self._check_positions(len(prompt), limit)
        return Job(prompt, limit, wanted, deadline)

    def _history(self, request: Request) -> tuple[History, set[Hashable]]:
        """What the prompt shows, its items as rows, and the ids of all items the user knows."""
        if (request.history is None) == (request.user_id is None):
            raise BadRequest("history", "expected either a history or a user_id")
        if request.user_id is not None:
            return self._history_of_user(request)
        events = request.history or ()
        if not events:
            raise BadRequest("history", "a history needs at least one item, got none")
        found = []
        for place, event in enumerate(events):
            try:
                found.append(self.catalog.items.find(event.item))
            except (UnknownIdError, ValueError) as error:
                raise BadRequest(f"history[{place}]", str(error)) from error
        times = [event.timestamp for event in events]
        given = [at for at in times if at is not None]
        if given and len(given) < len(times):
            raise BadRequest("history", "timestamps: expected one for every event, or for none")
        if given != sorted(given):
            raise BadRequest("history", "timestamps: expected the oldest event first")
        now = request.now if request.now is not None else (given[-1] if given else None)
        if given and now is not None and now < given[-1]:
            raise BadRequest("now", f"expected a time after the newest event, {given[-1]}")
        ratings = [event.rating for event in events]
        history = History(
            items=np.array([item.row for item in found], np.int64),
            timestamps=np.array(given, np.int64) if given else None,
            ratings=None
            if all(rating is None for rating in ratings)
            else np.array([np.nan if r is None else r for r in ratings], np.float32),
            target_time=now if given else None,
        )
        return history, {item.id for item in found}

    def _history_of_user(self, request: Request) -> tuple[History, set[Hashable]]:
        if self.data is None:
            raise BadRequest("user_id", "the server has no data set to look users up in (--data)")
        data = self.data.data
        try:
            user = int(data.users.encode([request.user_id])[0])
        except UnknownIdError as error:
            raise BadRequest("user_id", str(error), status=404) from error
        history = self.data.history(user, int(data.offsets[user + 1] - data.offsets[user]))
        known = set(data.catalog.ids.decode(history.items))
        # an item that has been changed since is shown as it is now
        rows = [
            self.catalog.items.find(item).row for item in data.catalog.ids.decode(history.items)
        ]
        now = request.now
        if now is None and history.timestamps is not None:
            now = int(history.timestamps[-1])
        return History(np.array(rows, np.int64), history.timestamps, history.ratings, now), known

    def _rows_of_given(self, field: str, given: Hashable) -> list[int]:
        try:
            return self.catalog.items.rows_of(self.catalog.items.find(given).id)
        except (UnknownIdError, ValueError) as error:
            raise BadRequest(field, str(error)) from error

    def _check_filter(self, wanted: Mapping[str, Any]) -> None:
        try:
            self.catalog.check_filter(wanted)
        except ValueError as error:
            raise BadRequest("filter", str(error).removeprefix("filter: ")) from error

    def _check_positions(self, tokens: int, limit: int) -> None:
        from r2ec_fast.model.hf_compat import context_limit

        longest = context_limit(self.model.language_model.config)
        room = tokens + limit + len(self._builder.marker_ids) + 1
        if longest is not None and room > longest:
            raise BadRequest(
                "max_reasoning_tokens",
                f"the prompt ({tokens} tokens) and the reasoning ({limit}) do not fit the model's "
                f"{longest} positions",
            )

    # ---- items ----------------------------------------------------------------------------------

    def put_items(self, items: Sequence[tuple[Hashable, Fields]]) -> int:
        """Add or change items; returns the version of the table that has them. Waits for the
        worker to encode them, and for the disk."""
        rows = self.worker.encode(items).result()
        return self.catalog.put(items, rows)

    def _writer_of(self, engine: str) -> Writer | None:
        if engine == "transformers":
            return None
        kind, _, url = engine.partition(":")
        if kind != "vllm" or not url:
            raise ValueError(f"engine: expected transformers or vllm:URL, got {engine!r}")
        from r2ec_fast.serve.engines.vllm import VLLMWriter

        shown = np.arange(min(4, len(self._builder.titles)))
        probe = self._builder.user_ids(History(shown))
        eos = _end_of_text(self.model)
        return VLLMWriter(url, self.model, self._builder.marker_ids, eos, probe)

    def _checked_company(self, settings: WorkerSettings, prefix: Any) -> WorkerSettings:
        """Prompts share passes where that does not change their states."""
        count = min(8, len(self.catalog))
        if not count:
            return settings
        with self._tokenizing:
            ids = [
                self._builder.user_ids(
                    History(np.arange(row, row + n) % len(self.catalog.items.prompt_titles))
                )
                for row, n in zip(range(count), (1, 2, 1, 5, 3, 9, 2, 14), strict=False)
            ]
        rows = Ragged.of(ids).append(self._builder.marker_ids)
        if invariant(self.model, rows, prefix):
            return settings
        log.info(
            "products of this CPU round by their size: direct prompts are computed a pass each, so "
            "that answers do not depend on their company"
        )
        return WorkerSettings(**{**vars(settings), "together": False})


def _end_of_text(model: R2ecModel) -> frozenset[int]:
    from r2ec_fast.rollout.transformers_engine import default_eos

    return frozenset(default_eos(model.backbone, model.tokenizer))
