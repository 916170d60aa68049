"""What requests and answers look like; the OpenAPI document comes from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from r2ec_fast.serve.catalog.items import Item
from r2ec_fast.serve.jobs import Answer
from r2ec_fast.serve.service import Event, Request

MAX_HISTORY = 10_000
MAX_K = 1_000
MAX_ITEMS = 1_000  # of one change
# JSON numbers beyond these lose digits in other programs, and places in a table
Integer = Annotated[int, Field(ge=-(2**53), le=2**53, strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=2_000, strict=True)]
ItemId = Text | Integer
Time = Annotated[int, Field(ge=-(2**40), le=2**40)]
Mode = Literal["direct", "reasoned"]
Filter = dict[str, JsonValue]


class Strict(BaseModel):
    """A body whose unknown fields are errors, not silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class HistoryEvent(Strict):
    """Something the user bought."""

    item: ItemId = Field(description="An item's id, or its title.")
    timestamp: Time | None = Field(None, description="Unix seconds.")
    rating: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None


class RecommendRequest(Strict):
    """Who is recommended to, and what."""

    history: Annotated[list[ItemId | HistoryEvent], Field(max_length=MAX_HISTORY)] | None = Field(
        None, description="What the user bought, oldest first: ids, titles or events."
    )
    user_id: ItemId | None = Field(None, description="A user of the server's data set, instead.")
    k: int = Field(10, ge=1, le=MAX_K, description="Items wanted.")
    mode: Mode = Field("reasoned", description="Write a reasoning first, or answer directly.")
    exclude: list[ItemId] = Field(
        [], max_length=MAX_HISTORY, description="Items not wanted, besides the history's."
    )
    include: Annotated[list[ItemId], Field(max_length=1_000_000)] | None = Field(
        None, description="Only these items; ids that do not exist are ignored."
    )
    filter: Filter | None = Field(
        None,
        description='Only items whose columns pass, e.g. {"brand": "Acme", "price": {"max": 20}}.',
    )
    max_reasoning_tokens: int = Field(256, ge=1, le=8_192)
    timeout_s: float | None = Field(None, gt=0, le=3_600, description="Give up after so long.")
    now: Time | None = Field(
        None, description="Unix seconds that ages are counted from; default: the newest event's."
    )
    stream: bool = Field(False, description="Server-sent events, the reasoning as it is written.")

    def request(self, default_timeout: float | None = None) -> Request:
        history = None
        if self.history is not None:
            history = [
                Event(given.item, given.timestamp, given.rating)
                if isinstance(given, HistoryEvent)
                else Event(given)
                for given in self.history
            ]
        return Request(
            history=history,
            user_id=self.user_id,
            k=self.k,
            reasoned=self.mode == "reasoned",
            exclude=self.exclude,
            include=self.include,
            wanted=self.filter,
            max_reasoning_tokens=self.max_reasoning_tokens,
            timeout=self.timeout_s if self.timeout_s is not None else default_timeout,
            now=self.now,
        )


class RecommendedItem(BaseModel):
    """One of the items, best first. ``log_prob`` is among all items that could be recommended."""

    item_id: ItemId
    title: str
    rank: int
    score: float
    log_prob: float


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timing(BaseModel):
    """Milliseconds of each stage."""

    queue_ms: float
    prompt_ms: float
    reasoning_ms: float
    search_ms: float
    total_ms: float


class RecommendResponse(BaseModel):
    """An answer."""

    id: str
    object: Literal["recommendation"] = "recommendation"
    created: int
    model: str
    mode: Mode
    table_version: int = Field(description="Of the item table that was searched.")
    items: list[RecommendedItem]
    reasoning: str | None
    finish_reason: Literal["direct", "answer", "eos", "length"]
    cached: bool = Field(description="Whether the user's state was known already.")
    usage: Usage
    timing: Timing


class ItemBody(Strict):
    """An item: its id and title, and any other columns; those of the model's prompt are read by
    it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, str | Integer | float | bool | None]

    id: ItemId
    title: Annotated[str, Field(min_length=1, max_length=2_000, pattern=r"\S")]

    def fields(self) -> dict[str, Any]:
        return {"title": self.title, **(self.__pydantic_extra__ or {})}


class PutItems(Strict):
    items: list[ItemBody] = Field(min_length=1, max_length=MAX_ITEMS)


class DeleteItems(Strict):
    ids: list[ItemId] = Field(min_length=1, max_length=MAX_ITEMS)


class Rollback(Strict):
    version: int = Field(ge=0, le=2**53, description="The version whose items come back.")


class TableState(BaseModel):
    """The item table after a change."""

    table_version: int
    items: int = Field(description="Items in the table.")


class ItemState(BaseModel):
    """An item as it is now."""

    id: ItemId
    fields: dict[str, Any]
    since_version: int
    table_version: int

    @classmethod
    def of(cls, item: Item, version: int) -> ItemState:
        return cls(
            id=item.id,
            fields=item.fields,
            since_version=item.version,
            table_version=version,
        )


class FoundItems(BaseModel):
    items: list[ItemState]


class Warm(Strict):
    """Requests whose states are computed ahead and kept."""

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_ITEMS)


class Warmed(BaseModel):
    computed: int
    known: int


class Problem(BaseModel):
    """An error (RFC 9457): ``field`` names the part of the request that is wrong."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None


def response(
    answer: Answer, *, id_: str, created: int, model: str, prompt_tokens: int
) -> RecommendResponse:
    """An answer of the worker as JSON."""
    assert answer.found is not None and answer.version is not None
    found, user = answer.found, answer.user
    columns = zip(found.ids, found.titles, found.scores, found.log_probs, strict=True)
    seconds = answer.seconds
    return RecommendResponse(
        id=id_,
        created=created,
        model=model,
        mode="direct" if user.reasoning is None else "reasoned",
        table_version=answer.version,
        items=[
            RecommendedItem(
                item_id=item,
                title=title,
                rank=rank,
                score=score,
                log_prob=log_prob,
            )
            for rank, (item, title, score, log_prob) in enumerate(columns, start=1)
        ],
        reasoning=user.reasoning,
        finish_reason=user.finish_reason,
        cached=answer.cached,
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=user.completion_tokens,
            total_tokens=prompt_tokens + user.completion_tokens,
        ),
        timing=Timing(
            total_ms=1e3 * sum(seconds.values()),
            **{f"{stage}_ms": 1e3 * value for stage, value in seconds.items()},
        ),
    )
