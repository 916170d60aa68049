"""A generated catalog and users whose next item follows from their history.

Every item is a point of a grid: brand x product x colour, plus a material that goes with the
brand. Products form kits; within a kit each product leads to the next (tent -> sleeping bag ->
...). A user has two brands, two colours and walks along kits: the next item is, most of the time,
the product that follows the last one, in a brand and a colour the user likes. So the titles of the
last few items tell the next one up to a handful of items, while few users share whole items.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.types import Catalog, IdMap, InteractionData

KITS: dict[str, tuple[str, ...]] = {
    "Camping": ("Tent", "Sleeping Bag", "Lantern", "Stove"),
    "Kitchen": ("Kettle", "Teapot", "Mug", "Tray"),
    "Cycling": ("Helmet", "Gloves", "Saddle", "Pump"),
    "Painting": ("Easel", "Canvas", "Brush Set", "Palette"),
    "Garden": ("Planter", "Trowel", "Watering Can", "Bench"),
    "Office": ("Desk", "Chair", "Notebook", "Lamp"),
}
BRANDS = (
    ("Alder", "Oak"),
    ("Boreal", "Wool"),
    ("Cinder", "Steel"),
    ("Dunmore", "Linen"),
    ("Everly", "Bamboo"),
    ("Fjord", "Wool"),
    ("Granite", "Steel"),
    ("Harrow", "Leather"),
    ("Ironwood", "Oak"),
    ("Juniper", "Bamboo"),
    ("Kestrel", "Carbon"),
    ("Lumen", "Glass"),
)
COLORS = ("Amber", "Black", "Crimson", "Ivory", "Jade", "Navy", "Silver", "Teal")
START = 1_640_995_200  # 2022-01-01
YEAR = 365 * 86_400


def generate_interactions(
    num_users: int = 1_200,
    seed: int = 0,
    *,
    mean_events: int = 10,
    noise: float = 0.1,
) -> InteractionData:
    """Generate the quick start's data: 2,304 items, users over two years, times and ratings.

    Args:
        num_users: users, each with 4 to 2 * mean_events - 4 events.
        seed: everything follows from it.
        mean_events: mean number of events a user.
        noise: share of events that are any item at all.

    Returns:
        InteractionData whose catalog has the columns title, description, brand, color, product,
        kit, material, average_rating, rating_number. The report says that it is generated.
    """
    if num_users < 1:
        raise ValueError(f"num_users: expected >= 1, got {num_users}")
    if mean_events < 4:
        raise ValueError(f"mean_events: expected >= 4, got {mean_events}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise: expected a share in 0..1, got {noise}")
    rng = np.random.default_rng(seed)
    lengths = 4 + (rng.random(num_users) * (2 * mean_events - 7)).astype(np.int64)
    items, times, ratings = [], [], []
    for length in lengths.tolist():
        chosen, liked = _walk(rng, length, noise)
        gaps = 3600 + (rng.random(length) ** 2 * 60 * 86_400).astype(np.int64)
        begin = START + int(rng.random() * YEAR)
        items.append(chosen)
        times.append(begin + np.cumsum(gaps))
        stars = np.where(liked, 4 + (rng.random(length) < 0.7), 2 + (rng.random(length) * 3) // 1)
        ratings.append(stars)
    item = np.concatenate(items)
    rating = np.concatenate(ratings).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    report = LoadReport(source=f"generated data, seed {seed}")
    catalog = _catalog(rng)
    report.add_stage("generation", len(item), num_users, len(catalog))
    return InteractionData(
        users=IdMap([f"U{i:05d}" for i in range(num_users)]),
        catalog=catalog,
        offsets=offsets,
        item=item,
        timestamp=np.concatenate(times),
        rating=rating,
        report=report,
    )


def _products() -> list[tuple[str, str]]:
    return [(kit, name) for kit, names in KITS.items() for name in names]


def _walk(rng: np.random.Generator, length: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """One user's items [length] int64, and which of them follow the user's taste [length] bool."""
    brands, products, colors = len(BRANDS), len(_products()), len(COLORS)
    kit_size = products // len(KITS)
    my_brands = _two(rng, brands)
    my_colors = _two(rng, colors)
    my_kits = _two(rng, len(KITS))
    kit, step = my_kits[0], int(rng.random() * kit_size)
    items = np.empty(length, dtype=np.int64)
    liked = np.ones(length, dtype=bool)
    for i in range(length):
        if rng.random() < noise:
            items[i] = int(rng.random() * brands * products * colors)
            liked[i] = False
            continue
        # The favourite three times out of four, else the second choice.
        brand = my_brands[int(rng.random() < 0.25)]
        color = my_colors[int(rng.random() < 0.25)]
        items[i] = (brand * products + kit * kit_size + step) * colors + color
        step += 1
        if step == kit_size:
            step = 0
            kit = my_kits[1] if kit == my_kits[0] else my_kits[0]
    return items, liked


def _two(rng: np.random.Generator, size: int) -> tuple[int, int]:
    first = int(rng.random() * size)
    return first, (first + 1 + int(rng.random() * (size - 1))) % size


def _catalog(rng: np.random.Generator) -> Catalog:
    products = _products()
    rows = []
    for brand, material in BRANDS:
        for kit, product in products:
            after = KITS[kit][KITS[kit].index(product) - 1]
            for color in COLORS:
                rows.append(
                    {
                        "title": f"{brand} {color} {material} {product}",
                        "description": f"{kit} gear by {brand}. {color} {material.lower()} "
                        f"{product.lower()}, made to go with the {after.lower()}.",
                        "brand": brand,
                        "color": color,
                        "product": product,
                        "kit": kit,
                        "material": material,
                    }
                )
    fields = pl.DataFrame(rows).with_columns(
        pl.Series("average_rating", np.round(3.5 + 1.4 * rng.random(len(rows)), 1)),
        pl.Series("rating_number", (10 ** (1 + 2.5 * rng.random(len(rows)))).astype(np.int64)),
    )
    return Catalog(IdMap([f"P{i:05d}" for i in range(len(rows))]), fields)
