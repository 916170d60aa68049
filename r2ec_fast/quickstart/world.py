"""A generated world where one pass cannot know the next item and a written chain can.

An item is a product in a colour. Every colour is a fixed relation between products: in this world
an amber lantern leads to a kettle, a jade lantern to a mug, and so for each product. A user's next
product follows from the last one by walking the colours of the last ``steps`` purchases, the newest
colour first; its own colour is free:

    bought    an ivory tent, a jade mirror, an amber lantern
    amber     lantern -> kettle
    jade      kettle  -> tripod
    ivory     tripod  -> vase           next: a vase, in any colour

Counting sees only pairs of items, and a single pass would have to look up three relations one after
another. Written out, each step is one look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from r2ec_fast.data import Catalog, Examples, RecDataset

# 60 products; none begins with a vowel: "a kettle"
WORDS = """
    tent lantern stove kettle teapot mug tray helmet saddle pump canvas brush palette planter trowel
    bench desk chair notebook lamp rope compass flask ladle skillet whisk grater basket blanket
    pillow candle mirror frame vase clock radio camera tripod filter battery charger cable keyboard
    mouse monitor speaker globe harp kite puzzle drum violin whistle ladder bucket hammer wrench
    chisel ruler stapler
"""
PRODUCTS = tuple(WORDS.split())
COLOURS = ("amber", "ivory", "jade", "navy", "crimson", "teal", "olive", "pink")
ORDERS = ("newest_first", "oldest_first")
START = 1_640_995_200  # 2022-01-01
DAY = 86_400
FIRST_DAYS = 365  # users begin within so many days
LONGEST_GAP = 3  # days between two purchases of a user, 1 to so many


class Link(NamedTuple):
    """One step of a chain: a ``product`` in a ``colour`` leads to another product (indices)."""

    colour: int
    product: int
    leads_to: int


@dataclass(frozen=True)
class Chain:
    """A walk along the relations: its steps, and the product it ends at (of none: it begins at)."""

    links: tuple[Link, ...]
    end: int


@dataclass(frozen=True)
class World:
    """The settings of a world; everything else follows from them.

    Internal item id = product * colours + colour.

    Args:
        products: how many products, at most 60.
        colours: how many colours, which are the relations, at most 8.
        steps: length of the chain that gives the next product; as many purchases of a user, the
            first ones, are any items at all and not examples.
        users: generated users.
        events: purchases of each user; nobody buys an item twice.
        noise: probability that a purchase ignores the chain and is any item at all.
        seed: of relations and purchases.

    Raises:
        ValueError: naming the setting, the range that was expected, and what came.
    """

    products: int = 48
    colours: int = 4
    steps: int = 3
    users: int = 1500
    events: int = 9
    noise: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        self._check("products", 2, len(PRODUCTS))
        self._check("colours", 1, len(COLOURS))
        self._check("steps", 1)
        self._check("users", 1)
        self._check("events", self.steps + 1, self.num_items)
        self._check("seed", 0)
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected a probability in 0..1, got {self.noise}")

    def _check(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least}..{most}"
            raise ValueError(f"{name}: expected {wanted}, got {value}")

    @property
    def num_items(self) -> int:
        """N, the size of the catalog."""
        return self.products * self.colours

    # ---- relations ------------------------------------------------------------------------------

    @cached_property
    def leads_to(self) -> np.ndarray:
        """int64 [colours, products], the relations: the product that each product leads to, in each
        colour. Each colour's is one-to-one, and no product leads to itself."""
        rng = np.random.default_rng([self.seed, 0])
        own = np.arange(self.products)
        relations = np.empty((self.colours, self.products), np.int64)
        for colour in range(self.colours):
            relations[colour] = rng.permutation(own)
            while (relations[colour] == own).any():
                relations[colour] = rng.permutation(own)
        return relations

    def chain(
        self, history: np.ndarray, *, steps: int | None = None, order: str = "newest_first"
    ) -> Chain:
        """The walk from the last product of ``history`` along the colours of its last purchases.

        Args:
            history: int64 [L] internal item ids, oldest first; L is at least the world's ``steps``.
            steps: how many steps to walk, 0 to the world's ``steps``, which is the default.
            order: in which the colours of the last ``steps`` (the world's) purchases are read:
                "newest_first", as the world itself does, or "oldest_first".

        Raises:
            ValueError: a value outside these.
        """
        steps = self.steps if steps is None else steps
        if len(history) < self.steps:
            raise ValueError(f"history: expected at least {self.steps} items, got {len(history)}")
        if not 0 <= steps <= self.steps:
            raise ValueError(f"steps: expected 0..{self.steps}, got {steps}")
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
        products, colours = np.divmod(np.asarray(history)[-self.steps :], self.colours)
        product, links = int(products[-1]), []
        for colour in (colours[::-1] if order == "newest_first" else colours)[:steps].tolist():
            links.append(Link(colour, product, int(self.leads_to[colour, product])))
            product = links[-1].leads_to
        return Chain(tuple(links), product)

    # ---- purchases ------------------------------------------------------------------------------

    def next_item_probabilities(self, histories: np.ndarray) -> np.ndarray:
        """The true distribution of what X users buy next, float64 [X, N].

        ``histories`` int64 [X, L]: all that each has bought, oldest first. Nothing of it comes
        again. The product at the end of the chain comes with probability 1 - noise, each of its
        colours alike; the noise, and a user who has that product in all colours, takes any item.
        """
        users, length = histories.shape
        free = np.ones((users, self.num_items))
        np.put_along_axis(free, histories, 0.0, axis=1)
        anything = free / free.sum(axis=1, keepdims=True)
        if length < self.steps:
            return anything
        products, colours = np.divmod(histories[:, -self.steps :], self.colours)
        product = products[:, -1]
        for step in range(1, self.steps + 1):
            product = self.leads_to[colours[:, -step], product]
        of_product = np.arange(self.num_items) // self.colours == product[:, None]
        right = free * of_product
        count = right.sum(axis=1, keepdims=True)
        follows = np.where(count > 0, right / np.maximum(count, 1), anything)
        return (1 - self.noise) * follows + self.noise * anything

    def catalog(self) -> Catalog:
        """The items, with the columns title, product and colour."""
        import polars as pl

        from r2ec_fast.data import Catalog, IdMap

        pairs = [divmod(item, self.colours) for item in range(self.num_items)]
        fields = {
            "title": [f"{COLOURS[c].title()} {PRODUCTS[p]}" for p, c in pairs],
            "product": [PRODUCTS[p] for p, _ in pairs],
            "colour": [COLOURS[c] for _, c in pairs],
        }
        ids = IdMap([f"P{item:03d}" for item in range(self.num_items)])
        return Catalog(ids, pl.DataFrame(fields))

    def dataset(self) -> RecDataset:
        """Generate the users and split their purchases by time, 80/10/10. Purchases before which
        fewer than ``steps`` were made are no examples."""
        from r2ec_fast.data import IdMap, InteractionData, RecDataset, make_splits
        from r2ec_fast.data.report import LoadReport

        rng = np.random.default_rng([self.seed, 1])
        bought = np.empty((self.users, 0), np.int64)
        for _ in range(self.events):
            below = self.next_item_probabilities(bought).cumsum(axis=1)
            drawn = (below / below[:, -1:] <= rng.random((self.users, 1))).sum(axis=1)
            bought = np.concatenate([bought, drawn[:, None]], axis=1)
        first_day = rng.integers(0, FIRST_DAYS, (self.users, 1))
        gaps = rng.integers(1, LONGEST_GAP + 1, bought.shape)
        report = LoadReport(source=f"generated data, seed {self.seed}")
        report.add_stage("generation", bought.size, self.users, self.num_items)
        data = InteractionData(
            users=IdMap([f"U{user:04d}" for user in range(self.users)]),
            catalog=self.catalog(),
            offsets=np.arange(self.users + 1) * self.events,
            item=bought.ravel(),
            timestamp=(START + DAY * (first_day + gaps.cumsum(axis=1))).ravel(),
            rating=None,
            report=report,
        )
        split = make_splits(data)

        def known(examples: Examples) -> Examples:
            return examples[examples.position >= self.steps]

        return RecDataset(
            data, known(split.train), known(split.valid), known(split.test), split.settings
        )

    # ---- the best possible ----------------------------------------------------------------------

    def best_possible(
        self, dataset: RecDataset, examples: Examples, ks: tuple[int, ...] = (5, 10, 20)
    ) -> dict[str, float]:
        """What the best ranking that there can be scores on ``examples``, in expectation.

        It knows the relations and the rule, but not the free colour and the noise: it ranks the
        items that the user has not bought by their true probability. Nobody buys an item twice, so
        that excluding the history takes nothing away.

        Returns:
            The metrics of `r2ec_fast.eval.metrics.ranking_metrics`, without standard errors.
        """
        from r2ec_fast.eval.metrics import ranking_metrics

        # the chance that the target is at rank 1, 2, ... N of the best ranking, summed over users
        chance = np.zeros(self.num_items)
        data = dataset.data
        for length in np.unique(examples.position):
            first = data.offsets[examples.user[examples.position == length]]
            histories = data.item[first[:, None] + np.arange(length)]
            probabilities = np.sort(self.next_item_probabilities(histories), axis=1)
            chance += probabilities[:, ::-1].sum(axis=0)
        chance /= len(examples)
        at_rank = [ranking_metrics([rank], ks) for rank in range(1, self.num_items + 1)]
        names = [name for name in at_rank[0] if not name.endswith("/se") and name != "examples"]
        best = {name: float(chance @ [gains[name] for gains in at_rank]) for name in names}
        return best | {"examples": float(len(examples))}
