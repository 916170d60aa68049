"""Reasonings by templates: what the fields mean, and that nothing but training events enters."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from _support.toy import toy_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import (
    Attribute,
    Catalog,
    Examples,
    IdMap,
    InteractionData,
    LoadReport,
    ReasoningTemplates,
    RecDataset,
    make_splits,
)

FIELDS = pl.DataFrame(
    {
        "title": ["Red mug (1990)", "Blue mug (1991)", "Red bowl (1990)", "Lamp", "It (2001)"],
        "kind": ["cup, red", "cup, blue", "bowl, red", None, "book"],
        "price": [2.5, 3.0, None, float("nan"), 7.0],
    }
)
MUG, BLUE, BOWL, LAMP, IT = range(5)
KIND = {"kind": Attribute("kind", r"[^,\s]+")}


def dataset(*histories: list[int]) -> RecDataset:
    """Users' items; the last two events of each are for validation and test."""
    lengths = [len(h) for h in histories]
    data = InteractionData(
        users=IdMap([f"u{i}" for i in range(len(histories))]),
        catalog=Catalog(IdMap([f"i{i}" for i in range(FIELDS.height)]), FIELDS),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item=np.concatenate(histories).astype(np.int64),
        timestamp=None,
        rating=None,
        report=LoadReport(),
    )
    return make_splits(data, "leave_one_out")


def text(data, template, position=None, attributes=KIND, **changes) -> str | None:
    """The text of one example of the first user: that of its last training target."""
    wanted = ReasoningTemplates([template, "?"], attributes=attributes, **changes)
    found = wanted.fill(data, 0)
    own = found.examples.user == 0
    at = found.examples.position[own].max() if position is None else position
    (place,) = np.flatnonzero(own & (found.examples.position == at))
    return None if found.texts[place] == "?" else found.texts[place]


# the first user: MUG, BLUE, BOWL and then, as the last training target, IT
FIRST = [MUG, BLUE, BOWL, IT, LAMP, LAMP]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{last.kind}", "bowl"),  # the first of its values
        ("{last.title}!", "Red bowl (1990)!"),  # a column needs no attribute
        ("{target.kind}", "book"),
        ("{target.price} and {{this}}", "7.0 and {this}"),
        ("{last.price}", None),  # missing
        ("{shared.kind}", "red"),  # red of MUG and BOWL, and cup of MUG and BLUE: the newest
        ("{shared.title}", None),
        ("{next.kind}", None),  # nothing else ever followed BOWL
        ("no field", "no field"),
    ],
)
def test_what_a_field_is(template, expected):
    assert text(dataset(FIRST), template) == expected


def test_shared_is_of_at_least_two_events_and_of_half():
    found = {w: text(dataset(FIRST), "{shared.kind}", window=w) for w in (2, 3, 5)}
    assert found == {2: None, 3: "red", 5: "red"}
    # cup of two of five events is less than half; the same item twice counts twice
    assert text(dataset([MUG, BLUE, IT, IT, BOWL, LAMP, MUG, MUG]), "{shared.kind}") is None
    assert text(dataset([LAMP, IT, IT, MUG, MUG, MUG]), "{shared.kind}") == "book"


def test_next_counts_the_steps_of_training_without_its_own():
    def found(*others):
        return text(dataset(FIRST, *others), "{next.kind}")

    # BOWL -> IT is the example's own step, so that one more is not enough, and two are
    own = [BOWL, IT, LAMP, LAMP]
    assert found(own) is None
    assert found(own, own) == "book"
    # BOWL -> MUG twice has as many cups as reds: the first in text order; BLUE makes cups three
    red = [BOWL, MUG, LAMP, LAMP]
    assert found(own, own, red, red) == "book"
    assert found(own, red, red) == "cup"
    assert found(own, own, red, red, [BOWL, BLUE, LAMP, LAMP]) == "cup"
    # a step into a validation or test event does not count
    assert found(own, [IT, BOWL, MUG, MUG], [IT, LAMP, BOWL, MUG]) is None


def test_values_are_cut_and_cleaned():
    data = dataset(FIRST)
    attributes = {"t": Attribute("title", r"^(.*)\((\d+)\)$"), "year": Attribute("title", r"\d{4}")}
    assert text(data, "{last.t}|{last.year}", attributes=attributes) == "Red bowl|1990"
    assert text(data, "{last.t}", attributes=attributes, value_words=1) == "Red"
    optional = {"t": Attribute("title", r"Lamp|Red (mugs)?")}
    assert text(data, "{last.t}", attributes=optional) is None  # the group is empty


def test_the_titles_words_are_only_in_a_text_that_asks_for_it():
    data = dataset([MUG, LAMP, IT, IT, IT])
    assert text(data, "a lamp?", position=1) is None
    assert text(data, "a LAMP: {last.kind}", position=1) is None
    assert text(data, "lampshades after {last.kind}", position=1) == "lampshades after cup"
    assert text(data, "{target.title} after {last.kind}", position=1) == "Lamp after cup"
    # a title that was cut is still the title
    assert text(data, "it", position=2, value_words=1) is None
    assert text(data, "it", position=2) == "it"  # whose title is It (2001)


def test_the_first_templates_that_apply_or_any():
    data, names = toy_dataset(), ["{target.missing}", "a", "b", "a", "c"]
    attributes = {"missing": Attribute("title", "never")}

    def texts(seed=0, **changes):
        found = ReasoningTemplates(names, attributes=attributes, **changes).fill(data, seed)
        assert found.items.tolist() == data.target(found.examples).tolist()
        return found.texts

    assert texts() == ("a",) * 24
    assert texts(per_example=2) == ("a", "b") * 24
    assert texts(per_example=9) == ("a", "b", "c") * 24  # a text is there once
    shuffled = texts(order="random")
    assert len(shuffled) == 24 and set(shuffled) == {"a", "b", "c"}
    assert shuffled == texts(order="random") != texts(1, order="random")


def full_texts(data, seed=3):
    every = ["{shared.kind} {shared.year}", "{next.kind}, {next.title}", "{last.title}"]
    wanted = ReasoningTemplates(
        [*every, "{target.kind} of {target.year}", "{target.title}", "nothing"],
        attributes={"kind": Attribute("title", r"\w+"), "year": Attribute("title", r"(\w+)$")},
        order="random",
        per_example=2,
    )
    found = wanted.fill(data, seed)
    return list(zip(found.examples.user, found.examples.position, found.texts, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_validation_or_test_event_changes_a_text(drawn):
    data = toy_dataset(users=8, events=7, seed=drawn.draw(st.integers(0, 50)))
    if drawn.draw(st.booleans()):  # by time, across users
        data = make_splits(data.data)
    outside = [
        (int(data.data.offsets[u]) + int(p))
        for split in (data.valid, data.test)
        for u, p in zip(split.user, split.position, strict=True)
    ]
    assert outside
    item = data.data.item.copy()
    for event in outside:
        item[event] = drawn.draw(st.integers(0, 15))
    rating = np.where(np.isin(np.arange(len(item)), outside), 1, data.data.rating)
    other = replace(data, data=replace(data.data, item=item, rating=rating.astype(np.float32)))
    assert full_texts(other) == full_texts(data)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000))
def test_no_text_holds_the_title_unless_asked(seed):
    data = toy_dataset(users=8, events=7, seed=seed)
    for user, position, found in full_texts(data):
        example = Examples(np.array([user]), np.array([position]))
        title = data.data.catalog.titles[int(data.target(example)[0])]
        assert found == title or title not in found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{brand}", r"has the field \{brand\}; expected \{source.name\} with a source of shared,"),
        ("{item.brand}", r"has the field \{item.brand\}"),
        ("{target.}", r"has the field \{target.\}"),
        ("{target.title:>9}", r"has the field \{target.title\}"),
        ("{target.title!r}", r"has the field \{target.title\}"),
        ("{}", r"has the field \{\}"),
        ("{target.title", "templates: '{target.title': expected '}'"),
    ],
)
def test_a_wrong_field_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        ReasoningTemplates([template])


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="templates: expected a list of texts, got 'a'"):
        ReasoningTemplates("a")
    with pytest.raises(ValueError, match=r"templates: expected a list of texts, got \[\]"):
        ReasoningTemplates([])
    with pytest.raises(ValueError, match="order: expected one of first, random, got 'any'"):
        ReasoningTemplates(["a"], order="any")
    for name, least in (("window", 2), ("value_words", 1), ("per_example", 1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got 0"):
            ReasoningTemplates(["a"], **{name: 0})
    with pytest.raises(ValueError, match="attributes: year: '\\(' is no regular expression"):
        ReasoningTemplates(["a"], attributes={"year": {"column": "title", "pattern": "("}})
    data = toy_dataset()
    with pytest.raises(ValueError, match=r"needs 'brand', and the catalog has no column 'brand'"):
        ReasoningTemplates(["{last.brand}"]).fill(data, 0)
    with pytest.raises(ValueError, match="no column 'maker'; its columns: title; attributes: b"):
        ReasoningTemplates(["{last.b}"], {"b": Attribute("maker")}).fill(data, 0)
    with pytest.raises(ValueError, match="none applies to any of the 24 training examples"):
        ReasoningTemplates(["{last.b}"], {"b": Attribute("title", "never")}).fill(data, 0)
