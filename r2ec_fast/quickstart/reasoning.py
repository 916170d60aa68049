"""Chains as sentences: writing them, and reading what a model wrote.

An amber lantern leads to a kettle. A jade kettle leads to a tripod. So a tripod comes next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from r2ec_fast.quickstart.world import COLOURS, PRODUCTS, Chain, Link, World

COLOURED = [f"{'An' if colour[0] in 'aeiou' else 'A'} {colour}" for colour in COLOURS]
LEADS_TO = "leads to a"
NEXT = "So a"
COMES_NEXT = "comes next."

_STEP = re.compile(
    f"({'|'.join(COLOURED)}) ({'|'.join(PRODUCTS)}) {LEADS_TO} ({'|'.join(PRODUCTS)})\\. "
)
_END = re.compile(f"{NEXT} ({'|'.join(PRODUCTS)}) {re.escape(COMES_NEXT)}")


def write_chain(chain: Chain) -> str:
    """The chain in words, a sentence a step, and one that says where it ends."""
    steps = [
        f"{COLOURED[link.colour]} {PRODUCTS[link.product]} {LEADS_TO} {PRODUCTS[link.leads_to]}. "
        for link in chain.links
    ]
    return f"{''.join(steps)}{NEXT} {PRODUCTS[chain.end]} {COMES_NEXT}"


def read_chain(text: str) -> Chain | None:
    """The chain that ``text`` spells, true or not; None where it is anything but such sentences.
    Spaces around it do not count."""
    text = text.strip()
    place, links = 0, []
    while step := _STEP.match(text, place):
        colour, product, leads_to = step.groups()
        links.append(
            Link(COLOURED.index(colour), PRODUCTS.index(product), PRODUCTS.index(leads_to))
        )
        place = step.end()
    end = _END.fullmatch(text, place)
    return Chain(tuple(links), PRODUCTS.index(end[1])) if end else None


@dataclass(frozen=True)
class Judgement:
    """What a written reasoning is worth in its world.

    Args:
        steps: how many steps it writes, counted wherever they stand.
        true_steps: for each of them, whether that is a relation of the world.
        well_formed: it consists of such sentences and one that says what comes next.
        right: it is the chain that the world itself walks for this history, no more and no less.
    """

    steps: int
    true_steps: tuple[bool, ...]
    well_formed: bool
    right: bool


def judge_reasoning(world: World, text: str, history: np.ndarray) -> Judgement:
    """Read ``text`` (without the marker) as a reasoning about ``history``, int64 [L] internal item
    ids, oldest first, L at least the world's ``steps``."""
    written = [
        (COLOURED.index(colour), PRODUCTS.index(product), PRODUCTS.index(leads_to))
        for colour, product, leads_to in _STEP.findall(text)
    ]
    true = tuple(
        colour < world.colours
        and max(product, leads_to) < world.products
        and int(world.leads_to[colour, product]) == leads_to
        for colour, product, leads_to in written
    )
    chain = read_chain(text)
    right = chain is not None and chain == world.chain(history)
    return Judgement(len(written), true, chain is not None, right)
