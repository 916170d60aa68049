"""Settings of loading: frozen, plain JSON in the manifest, the options of the command line."""

import json

import pytest

from r2ec_fast.cli import build_parser
from r2ec_fast.data import EventRules, LoadSettings, load_interactions
from r2ec_fast.data.sources.amazon import AmazonRules


def test_settings_are_json_without_infinity():
    settings = LoadSettings(columns={"user_id": "who"}, rating_range=(1.0, float("inf")))
    values = json.loads(json.dumps(settings.to_dict(), allow_nan=False))
    assert values["columns"] == {"user_id": "who"} and values["item_columns"] is None
    assert values["rating_range"] == [1.0, None]
    values["rating_range"] = (1.0, float("inf"))
    assert LoadSettings(**values) == settings


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(TypeError, match="min_ratng"):
        load_interactions(tmp_path / "log.csv", min_ratng=3)


@pytest.mark.parametrize(
    "source, settings",
    [("generic", LoadSettings()), ("movielens", EventRules()), ("amazon", AmazonRules())],
)
def test_every_setting_is_an_option_with_its_default(source, settings):
    needed = [] if source == "amazon" else ["--path", "x"]
    parsed = build_parser().parse_args(["prepare", source, "--output_dir", "y", *needed])
    options = vars(parsed.prepare[source])
    assert vars(settings).items() <= options.items()
