"""An item table is used with the catalog it was made for, and with no other."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import Catalog, IdMap
from r2ec_fast.data.store import save_catalog
from r2ec_fast.model import R2ecModel
from r2ec_fast.serve.recommender import Recommender


def catalog_of(ids, titles=None) -> Catalog:
    return Catalog(IdMap(ids), pl.DataFrame({"title": titles or [f"thing {i}" for i in ids]}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    model = toy_model(dtype=torch.float32).eval()
    catalog = toy_dataset().data.catalog
    model.set_items(model.encode_items(catalog))
    model.save_pretrained(directory, catalog)
    return directory


IDS = [f"i{i}" for i in range(16)]
OTHERS = {
    "another order": (["i1", "i0", *IDS[2:]], r"item 0 is 'i0' in the table and 'i1' here"),
    "one other id": ([*IDS[:15], "new"], r"item 15 is 'i15' in the table and 'new' here"),
    "numbers for text": (list(range(16)), r"item 0 is 'i0' in the table and 0 here"),
    "fewer": (IDS[:15], r"expected the 16 items of the model's item table, got 15"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_catalog_is_refused_with_the_first_difference(saved, name):
    ids, message = OTHERS[name]
    model = R2ecModel.from_pretrained(saved)
    with pytest.raises(ValueError, match=f"data: .*{message}.*re-encode"):
        model.check_catalog(catalog_of(ids), "data")
    with pytest.raises(ValueError, match=message):
        Recommender(model, catalog_of(ids))


def test_its_own_catalog_is_taken_whatever_the_texts(saved):
    model = R2ecModel.from_pretrained(saved)
    model.check_catalog(catalog_of(IDS, ["other"] * 16))


def test_a_catalog_file_that_was_exchanged_is_refused(saved, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    save_catalog(catalog_of(IDS[::-1]), copy / "catalog.parquet")
    with pytest.raises(ValueError, match="catalog: its items are not those of the model's item"):
        Recommender.from_pretrained(copy)


def test_the_ids_stay_known_where_a_table_is_saved_again(saved, tmp_path):
    model = R2ecModel.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    again = R2ecModel.from_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="are not those of the model's item table"):
        again.check_catalog(catalog_of(IDS[::-1]))
    again.set_items(torch.randn(16, again.hidden_size))
    again.check_catalog(catalog_of(IDS[::-1]))  # whose rows these are is not known


def test_a_model_of_version_0_1_0_is_compared_by_length(saved, tmp_path):
    import shutil

    old = tmp_path / "old"
    shutil.copytree(saved, old)
    settings = json.loads((old / "r2ec_config.json").read_text())
    del settings["table_ids_sha256"]
    (old / "r2ec_config.json").write_text(json.dumps(settings))
    R2ecModel.from_pretrained(old).check_catalog(catalog_of(IDS[::-1]))
    with pytest.raises(ValueError, match="got 3"):
        R2ecModel.from_pretrained(old).check_catalog(catalog_of(IDS[:3]))
