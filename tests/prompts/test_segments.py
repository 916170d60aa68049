"""Prompts from token segments are the ids of the whole text, or take the whole-text path."""

import csv
import logging
import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from _support import tiny_tokenizer as helpers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r2ec_fast.data import Catalog, Examples, History, IdMap, InteractionData, RecDataset
from r2ec_fast.data.report import LoadReport
from r2ec_fast.prompts.builder import PromptBuilder, PromptConfig
from r2ec_fast.prompts.segments import SECONDS_PER_DAY, PromptAssembler

pytest.importorskip("r2ec_fast._packing", reason="the C++ extension is not built")

TITLES = [
    "Blue ceramic mug",
    "  two\nlines\tand  spaces ",
    "\"Quoted\" 'single' “curly”",
    "[bracketed] (5.0)",
    "]",
    "(",
    "👩‍👩‍👧 family emoji 🎉🎉",
    "e\u0301 combining, \u0301leading",
    "日本語のタイトル 中文",
    "العربية \u200fRTL",
    "3d 4.2h ago: [fake line] (4.0)",
    "<|im_end|> <end_of_turn> <answer>",
    "\u00a0\u2003odd spaces\u3000",
    "12345 67890",
    "'s 're 'll",
    "... --- !!!",
    "▁▁ sentencepiece ▁marks",
    "x" * 5000,
    "word " * 300,
    "ﬁ ligature Å Å",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fast(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<start_of_turn>", "<end_of_turn>"],
    )
    out.chat_template = template
    return out


def corpus() -> list[str]:
    lines = [f"{a}d {b}.5h ago: [{t[:60]}] ({r}.0)" for a, b, r, t in zip(
        range(20), range(20), [1, 2, 3, 4, 5] * 4, TITLES, strict=True
    )]  # fmt: skip
    return [*helpers.CORPUS, "\n".join(lines), "(out of 5):\n[x]\n[y] (4.0)\n\n"] * 3


def train(tokenizer: Tokenizer, size: int, alphabet: list[str], bytes_: tuple = ()) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(bytes_),
        special_tokens=[*helpers.SPECIAL_TOKENS, *bytes_],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def qwen_style(template: str | None = helpers.CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return fast(train(tokenizer, 700, pre_tokenizers.ByteLevel.alphabet()), template)


def gemma_style(prefix: bool = False) -> PreTrainedTokenizerFast:
    """BPE over ▁-text with byte fallback; merges stay within a word, as Gemma's do."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if prefix:
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\n]+|▁+|\n+"), "isolated")
    alphabet = sorted({c for text in [*corpus(), "▁"] for c in text})
    tokenizer = train(tokenizer, 900, alphabet, ("<unk>", *(f"<0x{i:02X}>" for i in range(256))))
    tokenizer.pre_tokenizer = None
    return fast(tokenizer, helpers.GEMMA_TEMPLATE)


TOKENIZERS = {
    "gpt2": lambda: helpers.tiny_tokenizer(corpus=corpus(), vocab_size=700),
    "gpt2-no-template": lambda: helpers.tiny_tokenizer(None, corpus=corpus(), adds_bos=True),
    "gemma-template": lambda: helpers.tiny_tokenizer(helpers.GEMMA_TEMPLATE, corpus=corpus()),
    "qwen2": qwen_style,
    "qwen2-no-template": lambda: qwen_style(None),
    "gemma": gemma_style,
    "llama-prefix": lambda: gemma_style(prefix=True),
}
BY_WHOLE_TEXT = {"llama-prefix"}


def catalog(titles: list[str] = TITLES) -> Catalog:
    return Catalog(ids=IdMap(range(len(titles))), fields=pl.DataFrame({"title": titles}))


def random_histories(count: int, num_items: int, seed: int = 0) -> list[History]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        n = int(rng.integers(1, 32))
        ages = rng.integers(0, SECONDS_PER_DAY * 10 ** rng.integers(0, 3), n)
        ratings = rng.choice(np.array([1, 3.5, 4.333333, 5, 10, 0, -2], np.float32), n)
        ratings[rng.random(n) < rng.choice([0, 0.3, 1])] = np.nan
        out.append(
            History(
                items=rng.integers(0, num_items, n),
                timestamps=None if i % 5 == 4 else 10**9 - np.sort(ages)[::-1],
                ratings=None if i % 7 == 6 else ratings,
                target_time=None if i % 11 == 10 else 10**9,
            )
        )
    return out


def assert_rows(rows, expected: list[list[int]]) -> None:
    assert rows.values.dtype == rows.offsets.dtype == np.int64
    assert [row.tolist() for row in rows] == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("limit", [2048, 190])
def test_assembled_ids_are_the_ids_of_the_whole_text(name, limit):
    titles = TITLES if limit == 2048 else [t for t in TITLES if len(t) < 100]
    tokenizer = TOKENIZERS[name]()
    shortest = PromptBuilder(tokenizer, catalog(titles), PromptConfig(category="things"))
    budget = max(limit, len(shortest.user_frame().bare) + 60)
    builder = PromptBuilder(
        tokenizer, catalog(titles), PromptConfig(category="things", max_user_tokens=budget)
    )
    assembler = PromptAssembler(builder, threads=2, sample=16)
    assert (assembler.reason is None) == (name not in BY_WHOLE_TEXT), assembler.reason
    histories = random_histories(40, len(titles))
    expected = [builder.user_ids(h) for h in histories]
    assert_rows(assembler.history_rows(histories), expected)
    kept = [len(row) for row in expected]
    assert max(kept) <= budget
    if limit == 190:
        free = PromptBuilder(tokenizer, catalog(titles), PromptConfig(category="things"))
        whole = [len(free.user_ids(h)) for h in histories]
        assert sum(w > budget for w in whole) > 12  # the budget dropped events


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["gpt2", "qwen2", "gemma", "qwen2-no-template"]),
    st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_any_title(name, titles, seed):
    tokenizer = CACHE.setdefault(name, TOKENIZERS[name]())
    builder = PromptBuilder(tokenizer, catalog(titles))
    assembler = PromptAssembler(builder, sample=2)
    histories = random_histories(12, len(titles), seed)
    assert_rows(assembler.history_rows(histories), [builder.user_ids(h) for h in histories])


CACHE: dict[str, PreTrainedTokenizerFast] = {}


def test_no_event_fits():
    config = PromptConfig(max_user_tokens=250)
    builder = PromptBuilder(TOKENIZERS["qwen2"](), catalog(["y " * 300]), config)
    history = History(items=np.zeros(3, np.int64))
    rows = PromptAssembler(builder, sample=2).history_rows([history])
    bare = builder.user_frame().bare
    assert_rows(rows, [bare])
    assert builder.user_ids(history) == bare


def test_a_cut_that_merges_sends_everything_to_the_whole_text(caplog):
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens(["ago: ["])
    builder = PromptBuilder(tokenizer, catalog())
    with caplog.at_level(logging.INFO, logger="r2ec_fast.prompts.segments"):
        assembler = PromptAssembler(builder)
    assert "merges between" in assembler.reason and "whole texts" in caplog.text
    histories = random_histories(20, len(TITLES))
    assert_rows(assembler.history_rows(histories), [builder.user_ids(h) for h in histories])


def test_an_item_that_merges_sends_its_own_prompts_to_the_whole_text(caplog, monkeypatch):
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens(["ago: [Zed"])
    titles = ["Zed's dead", *(f"thing {i}" for i in range(200))]
    builder = PromptBuilder(tokenizer, catalog(titles))
    assembler = PromptAssembler(builder, sample=8)
    assert assembler.reason is None
    histories = random_histories(100, len(titles)) + [
        History(np.array([5, 0, 7]), np.array([1, 2, 3]), None, 10),
        History(np.array([5, 0, 7])),
    ]
    expected = [builder.user_ids(h) for h in histories]
    asked = []
    whole_text = builder.user_ids
    monkeypatch.setattr(builder, "user_ids", lambda h: asked.append(h) or whole_text(h))
    with caplog.at_level(logging.INFO, logger="r2ec_fast.prompts.segments"):
        rows = assembler.history_rows(histories)
    assert "1 of 201 item texts do not assemble" in caplog.text
    assert_rows(rows, expected)
    window = builder.config.window
    concerned = [
        h for h in histories
        if 0 in h.items[-window:] and h.timestamps is not None and h.target_time is not None
    ]  # fmt: skip
    assert asked == concerned and 0 < len(asked) < len(histories) / 2


def test_wording_that_the_assembler_does_not_know_is_noticed(monkeypatch):
    builder = PromptBuilder(TOKENIZERS["gpt2"](), catalog())
    line = builder._line
    monkeypatch.setattr(builder, "_line", lambda history, i: line(history, i).replace("[", "{"))
    assembler = PromptAssembler(builder)
    assert assembler.reason.startswith("a sampled prompt differs")
    history = random_histories(1, len(TITLES))[0]
    assert_rows(assembler.history_rows([history]), [builder.user_ids(history)])


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "r2ec_fast._packing", None)
    builder = PromptBuilder(TOKENIZERS["gpt2"](), catalog())
    assembler = PromptAssembler(builder)
    assert "was not built" in assembler.reason
    history = random_histories(1, len(TITLES))[0]
    assert_rows(assembler.history_rows([history]), [builder.user_ids(history)])


def test_old_events_and_odd_ratings(monkeypatch):
    monkeypatch.setattr("r2ec_fast.prompts.segments.MAX_DAYS", 300)
    builder = PromptBuilder(TOKENIZERS["gpt2"](), catalog())
    assembler = PromptAssembler(builder, sample=4)
    day = SECONDS_PER_DAY
    ages = [0, 29, 3599, 3600, day - 1, day, 100 * day, 299 * day, 300 * day]
    ratings = [-0.0, 0.0, np.inf, 1e9, 4.005, 1e-3, 5.0, 3.0, 2.0]
    histories = [
        History(np.array([i % 5]), np.array([10**11 - age]), np.array([r], np.float32), 10**11)
        for i, (age, r) in enumerate(zip(ages, ratings, strict=True))
    ]
    assert_rows(assembler.history_rows(histories), [builder.user_ids(h) for h in histories])


@pytest.mark.parametrize("timed", [True, False])
def test_only_a_large_call_waits_for_the_catalog(monkeypatch, timed):
    monkeypatch.setattr("r2ec_fast.prompts.segments.CHECK_COST", 0)
    titles = [f"thing {i}" for i in range(25)]
    builder = PromptBuilder(TOKENIZERS["gpt2"](), catalog(titles))
    tokenised, whole_text = [], builder.user_ids
    assembler = PromptAssembler(builder, sample=2, ahead=False)
    tokenize = assembler._tokenize
    monkeypatch.setattr(assembler, "_tokenize", lambda t: tokenised.append(t) or tokenize(t))
    times, target = (np.arange(20), 99) if timed else (None, None)
    histories = [History(np.arange(i, i + 20), times, None, target) for i in range(5)]
    asked = []
    monkeypatch.setattr(builder, "user_ids", lambda h: asked.append(h) or whole_text(h))
    for history in histories:  # 20 lines; the catalog costs 100
        assert_rows(assembler.history_rows([history]), [whole_text(history)])
    assert asked == histories and not tokenised
    with pytest.raises(ValueError, match="history 0: item 25 is outside 0..24"):
        assembler.history_rows([History(np.array([25]))])
    assert_rows(assembler.history_rows(histories), [whole_text(h) for h in histories])
    asked.clear()
    assert_rows(assembler.history_rows(histories[:1]), [whole_text(histories[0])])
    assert tokenised and not asked
    other = History(np.arange(3), None, np.ones(3, np.float32))  # of a table not made yet
    assert_rows(assembler.history_rows([other]), [whole_text(other)])
    assert asked == [other]


@pytest.mark.parametrize("threads", [2, 500])
def test_threads_do_not_change_the_result(threads):
    builder = PromptBuilder(TOKENIZERS["gpt2"](), catalog())
    histories = random_histories(60, len(TITLES))
    one = PromptAssembler(builder, sample=0).history_rows(histories)
    many = PromptAssembler(builder, threads=threads, sample=0).history_rows(histories)
    assert_rows(many, [row.tolist() for row in one])


@pytest.mark.parametrize("timed", [True, False])
def test_examples_of_a_dataset(timed):
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 40, 30)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    events = int(offsets[-1])
    data = InteractionData(
        users=IdMap(range(30)),
        catalog=catalog(),
        offsets=offsets,
        item=rng.integers(0, len(TITLES), events),
        timestamp=np.sort(rng.integers(0, 10**8, events)) if timed else None,
        rating=rng.integers(1, 6, events).astype(np.float32) if timed else None,
        report=LoadReport(),
    )
    user = np.repeat(np.arange(30), 2)
    examples = Examples(user, np.stack([np.ones(30, np.int64), counts - 1], axis=1).ravel())
    dataset = RecDataset(data, examples, examples[:0], examples[:0], {})
    builder = PromptBuilder(TOKENIZERS["qwen2"](), data.catalog)
    expected = [
        builder.user_ids(dataset.history(int(u), int(p), builder.config.window))
        for u, p in zip(examples.user, examples.position, strict=True)
    ]
    assembler = PromptAssembler(builder)
    assert_rows(assembler.example_rows(dataset, examples), expected)
    assert_rows(assembler.example_rows(dataset, examples[:0]), [])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (History(np.zeros(0, np.int64)), "history 1 is empty"),
        (History(np.array([0, 999])), "history 1: item 999 is outside 0..19"),
        (History(np.array([-1])), "history 1: item -1 is outside"),
        (History(np.array([0]), np.array([11]), None, 10), "history 1: an event at 11 lies after"),
    ],
)
def test_errors(history, message):
    assembler = PromptAssembler(PromptBuilder(TOKENIZERS["gpt2"](), catalog()))
    with pytest.raises(ValueError, match=message):
        assembler.history_rows([History(np.array([0])), history])


def movie_titles() -> list[str]:
    root = os.environ.get("R2EC_TEST_DATA")
    if root is None:
        pytest.skip("R2EC_TEST_DATA does not name a folder of data sets")
    path = Path(root) / "ml-latest-small" / "movies.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [row["title"] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", ["model", "qwen2", "gemma"])
def test_ten_thousand_histories(name):
    if name == "model":
        if "R2EC_TEST_MODEL" not in os.environ:
            pytest.skip("R2EC_TEST_MODEL does not name a language model")
        tokenizer = AutoTokenizer.from_pretrained(os.environ["R2EC_TEST_MODEL"])
    else:
        tokenizer = TOKENIZERS[name]()
    titles = movie_titles() + TITLES
    builder = PromptBuilder(tokenizer, catalog(titles))
    assembler = PromptAssembler(builder)
    assert assembler.reason is None
    histories = random_histories(5000, len(titles)) + [
        History(TITLE_BLOCK[h.items], h.timestamps, h.ratings, h.target_time)
        for h in random_histories(5000, 200, seed=1)
        for TITLE_BLOCK in [np.arange(len(titles) - 200, len(titles))]
    ]
    assert_rows(assembler.history_rows(histories), [builder.user_ids(h) for h in histories])
