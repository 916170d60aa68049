"""The one thread that owns the model: two lanes of requests, and new items beside them.

A turn of the worker is

    direct      the prompts that wait, in one packed pass of at most ``max_batch_tokens``; and those
                that came meanwhile, up to `DIRECT_IN_A_ROW` passes
    reasoned    some new prompts are read (not while direct requests wait, unless one has waited for
                `PATIENCE`), then one token is written for every reasoning under way
    items       new items' texts are encoded, a pass a turn

so a direct answer waits for one token of the reasonings, never for a reasoning. States that are
known, from the cache, only search. Searches of a turn are made together. With a `Writer` reasonings
are written elsewhere: their jobs come back with their states, or to the direct lane to have them
read.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.continuous.decoder import ContinuousDecoder, Row
from r2ec_fast.serve.jobs import Job, QueueFull, ShuttingDown, UserState, Writer
from r2ec_fast.serve.reasoning_text import ReasoningText
from r2ec_fast.serve.state_cache import StateCache

if TYPE_CHECKING:
    from r2ec_fast.model.prefix_cache import KnownPrefix
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.serve.catalog.live import LiveCatalog

log = logging.getLogger(__name__)

Observe = Callable[[str, float], None]
DIRECT_IN_A_ROW = 4
PATIENCE = 1.0  # seconds
EXPIRE_SECONDS = 0.25  # between looks at the deadlines of jobs that cannot begin


@dataclass(frozen=True)
class WorkerSettings:
    """Sizes of the worker.

    Args:
        max_batch_tokens: of a pass over prompts, without what all of them begin with.
        max_cache_tokens: of all reasonings under way together, prompts included.
        max_wait: seconds that an idle worker waits for company for a first direct request.
        max_queue: requests that wait; more are refused.
        together: whether direct prompts share passes. False: a pass a prompt, so that an answer
            does not depend on its company by a bit.
    """

    max_batch_tokens: int = 8192
    max_cache_tokens: int = 32768
    max_wait: float = 0.0
    max_queue: int = 1024
    together: bool = True


class Worker:
    """Answers jobs until it is closed.

    Args:
        model: its weights stay as they are; nobody else may use it meanwhile.
        catalog: its items.
        marker_ids: tokens of the marker.
        prefix: what all prompts begin with.
        decoder: writes reasonings.
        writer: writes them in its place.
        cache: of states.
        observe: told of figures: "batch_tokens" of each pass, "step_rows" of each decoding step.
    """

    def __init__(
        self,
        model: R2ecModel,
        catalog: LiveCatalog,
        *,
        marker_ids: Sequence[int],
        prefix: KnownPrefix | None,
        decoder: ContinuousDecoder[Job],
        writer: Writer | None = None,
        settings: WorkerSettings | None = None,
        cache: StateCache | None = None,
        observe: Observe = lambda name, value: None,
    ) -> None:
        self.model, self.catalog = model, catalog
        self.settings = settings or WorkerSettings()
        self.cache = StateCache(0, 0) if cache is None else cache
        self.observe = observe
        self._marker = list(marker_ids)
        self._prefix, self._decoder, self._writer = prefix, decoder, writer
        self._text = ReasoningText(model.tokenizer, model.prompts.emb_token)
        self._known = 0 if prefix is None else len(prefix)
        self._direct: deque[Job] = deque()
        self._reasoned: deque[Job] = deque()
        self._ready: list[Job] = []  # with states
        self._items: deque[tuple[Any, Future[torch.Tensor]]] = deque()
        self._away = 0  # reasonings with the writer
        self._error: BaseException | None = None  # the thread ended of
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 0.0  # seconds between answers, smoothed
        self._last_answer = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="r2ec-worker", daemon=True)
        self._thread.start()

    # ---- from other threads ---------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job; its future gets the answer.

        Raises QueueFull, ShuttingDown.
        """
        job.user = self.cache.get(job.key)
        job.cached = job.user is not None
        with self._changed:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            waiting = self.waiting
            if waiting >= self.settings.max_queue:
                raise QueueFull(waiting, max(1.0, waiting * self._pace))
            if job.user is not None:
                self._ready.append(job)
            else:
                (self._reasoned if job.limit else self._direct).append(job)
            self._changed.notify_all()

    def encode(self, items: Sequence[tuple[Any, dict[str, Any]]]) -> Future[torch.Tensor]:
        """Rows of new items, when the worker comes to it."""
        future: Future[torch.Tensor] = Future()
        with self._changed:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            self._items.append((items, future))
            self._changed.notify_all()
        return future

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._direct) + len(self._reasoned) + len(self._ready)

    @property
    def running(self) -> int:
        """Reasonings under way."""
        return len(self._decoder) + self._away

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what is queued, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # nothing is left that could answer
            log.critical("the worker has failed", exc_info=error)
            with self._changed:
                self._closing, self._error = True, error
                jobs = [*self._direct, *self._reasoned, *self._ready]
            for job in [*jobs, *(row.owner for row in self._decoder.rows)]:
                job.fail(error)
            for _, future in self._items:
                future.set_exception(error)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    if self._closing and not self._away:
                        return
                    # with all of the writer's slots taken, jobs wait whose time may run out
                    self._changed.wait(EXPIRE_SECONDS if self._reasoned else None)
                    for job in self._reasoned:
                        job.expire(time.monotonic())
            self._gather()
            for _ in range(DIRECT_IN_A_ROW):
                self._turn_direct()
                self._turn_search()
                if not self._direct:
                    break
            for turn in (self._turn_reasoned, self._turn_search, self._turn_items):
                turn()

    def _has_work(self) -> bool:
        reasoned = self._reasoned and (self._writer is None or self._away < self._writer.slots)
        return bool(self._direct or reasoned or self._ready or self._items or len(self._decoder))

    def _gather(self) -> None:
        """Wait for company for a first direct request, where nothing else is to be done."""
        if self.settings.max_wait <= 0 or len(self._decoder) or self._reasoned or self._ready:
            return
        until = time.monotonic() + self.settings.max_wait
        with self._changed:
            while self._direct and not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _taken(self, queue: deque[Job], tokens: int, most: int | None = None) -> list[Job]:
        """Jobs from the front of a queue, of about so many tokens in all, at least one."""
        now = time.monotonic()
        found: list[Job] = []
        with self._changed:
            while queue and (most is None or len(found) < most):
                job = queue[0]
                if not job.expire(now):
                    tokens -= len(job.row(self._marker)) - self._known
                    if found and tokens < 0:
                        break
                    found.append(job)
                    job.mark("started")
                queue.popleft()
        return found

    def _turn_direct(self) -> None:
        most = None if self.settings.together else 1
        jobs = self._taken(self._direct, self.settings.max_batch_tokens, most)
        if not jobs:
            return
        rows = Ragged.of([job.row(self._marker) for job in jobs])
        self.observe("batch_tokens", float(rows.lengths.sum() - self._known * len(jobs)))
        try:
            states = self.model.encode_rows(rows, self._budget(rows), self._prefix)
        except Exception as error:
            self._failed(jobs, error)
            return
        for job, state in zip(jobs, states, strict=True):
            job.mark("read" if job.written is None else "written")
            self._keep(job, UserState.of(state.clone(), job.written))

    def _turn_reasoned(self) -> None:
        if self._writer is not None:
            self._hand_over(self._writer)
            return
        self._drop_over()
        room = self.settings.max_cache_tokens - sum(
            len(row.owner.prompt) - self._known + row.limit for row in self._decoder.rows
        )
        if self._may_join() and (room > 0 or not len(self._decoder)):
            tokens = min(self.settings.max_batch_tokens, max(1, room))
            jobs = self._taken(self._reasoned, tokens, 1 if self._direct else None)
            if jobs:
                self._join(jobs)
        if not len(self._decoder):
            return
        self.observe("step_rows", float(len(self._decoder)))
        try:
            finished = self._decoder.step()
        except Exception as error:
            rows = list(self._decoder.rows)
            self._decoder.drop(rows)
            self._failed([row.owner for row in rows], error)
            return
        for row in self._decoder.rows:
            self._text.show(row.owner, row.tokens)
        for row in finished:
            self._finish_reasoning(row)

    def _may_join(self) -> bool:
        """Whether to read prompts of reasonings now: a pass as long as a direct request's."""
        if not self._reasoned or not self._direct:
            return bool(self._reasoned)
        return time.monotonic() - self._reasoned[0].marks["arrived"] > PATIENCE

    def _hand_over(self, writer: Writer) -> None:
        free = writer.slots - self._away
        jobs = self._taken(self._reasoned, sys.maxsize, free) if free > 0 else []
        with self._changed:
            self._away += len(jobs)
        for job in jobs:
            writer.start(job, self._returned)

    def _returned(self, job: Job) -> None:
        """A job comes back, in a thread of the writer."""
        with self._changed:
            self._away -= 1
            if not job.over:
                if self._error is not None:
                    job.fail(self._error)
                elif job.written is not None and job.written.state is not None:
                    self._keep(job, UserState.of(job.written.state, job.written))
                else:
                    self._direct.append(job)
            self._changed.notify_all()

    def _join(self, jobs: list[Job]) -> None:
        rows = Ragged.of([job.prompt for job in jobs])
        self.observe("batch_tokens", float(rows.lengths.sum() - self._known * len(jobs)))
        try:
            self._decoder.join(rows, jobs, [job.limit for job in jobs])
        except Exception as error:
            self._failed(jobs, error)
            return
        for job in jobs:
            job.mark("read")

    def _drop_over(self) -> None:
        now = time.monotonic()
        over = [row for row in self._decoder.rows if row.owner.expire(now)]
        if over:
            self._decoder.drop(over)

    def _finish_reasoning(self, row: Row[Job]) -> None:
        job = row.owner
        assert row.state is not None and row.finish_reason is not None
        job.mark("written")
        text = self._text.of(row.tokens).strip()
        self._text.show(job, row.tokens, whole=True)
        self._keep(job, UserState(row.state, text, row.finish_reason, len(row.tokens)))

    def _keep(self, job: Job, user: UserState) -> None:
        """A job's state is there: it searches next."""
        if not bool(torch.isfinite(user.state).all()):
            job.fail(
                ValueError(
                    "model: the state of this history holds NaN or infinity; nothing can be "
                    "recommended from it"
                )
            )
            return
        job.user = user
        self.cache.put(job.key, user)
        with self._changed:
            self._ready.append(job)

    def _turn_search(self) -> None:
        with self._changed:
            jobs, self._ready = self._ready, []
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            job.mark("started")
            if job.over:
                continue
            if job.search is None:
                self._answered(job, None, None)
            else:
                groups.setdefault(job.search.group, []).append(job)
        for group in groups.values():
            try:
                self._search(group)
            except Exception as error:
                self._failed(group, error)

    def _search(self, jobs: list[Job]) -> None:
        searches = [job.search for job in jobs if job.search is not None]
        states = torch.stack([job.user.state for job in jobs if job.user is not None])
        found, version = self.catalog.search(
            states,
            max(search.k for search in searches),
            exclude=[search.exclude for search in searches],
            wanted=searches[0].wanted,
            include=searches[0].include,
        )
        for job, search, own in zip(jobs, searches, found, strict=True):
            self._answered(job, own.first(search.k), version)

    def _answered(self, job: Job, found: Any, version: int | None) -> None:
        job.finish(found, version)
        now = time.monotonic()
        self._pace = 0.9 * self._pace + 0.1 * (now - self._last_answer)
        self._last_answer = now

    def _turn_items(self) -> None:
        if not self._items:
            return
        items, future = self._items.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self.catalog.encode(items))
        except Exception as error:
            future.set_exception(error)

    def _budget(self, rows: Ragged) -> int:
        return max(self.settings.max_batch_tokens + self._known, int(rows.lengths.max()))

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        log.exception("%d requests failed", len(jobs), exc_info=error)
        for job in jobs:
            job.fail(error)
