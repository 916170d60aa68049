"""The categories of Amazon Reviews 2023 and the words prompts use for them."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

AMAZON_CATEGORIES = (
    "All_Beauty",
    "Amazon_Fashion",
    "Appliances",
    "Arts_Crafts_and_Sewing",
    "Automotive",
    "Baby_Products",
    "Beauty_and_Personal_Care",
    "Books",
    "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Digital_Music",
    "Electronics",
    "Gift_Cards",
    "Grocery_and_Gourmet_Food",
    "Handmade_Products",
    "Health_and_Household",
    "Health_and_Personal_Care",
    "Home_and_Kitchen",
    "Industrial_and_Scientific",
    "Kindle_Store",
    "Magazine_Subscriptions",
    "Movies_and_TV",
    "Musical_Instruments",
    "Office_Products",
    "Patio_Lawn_and_Garden",
    "Pet_Supplies",
    "Software",
    "Sports_and_Outdoors",
    "Subscription_Boxes",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Video_Games",
)
# (plural, singular) of the paper's three categories.
WORDS: dict[str, tuple[str, str]] = {
    "Musical_Instruments": ("musical instruments", "musical instrument"),
    "CDs_and_Vinyl": ("CDs and vinyl", "CD or vinyl"),
    "Video_Games": ("video games", "video game"),
}


def category_words(
    category: str, words: tuple[str, str] | list[str] | None = None
) -> tuple[str, str]:
    """What prompts call the items: (plural, singular).

    Args:
        category: a category's name, e.g. "Musical_Instruments".
        words: the caller's own (plural, singular); taken as they are.

    Returns:
        `words`, the shipped words, or words derived from the name; the last logs a warning.
    """
    if words is not None:
        if len(words) != 2 or not all(isinstance(w, str) and w.strip() for w in words):
            raise ValueError(f"words: expected (plural, singular), got {words!r}")
        return words[0], words[1]
    if category in WORDS:
        return WORDS[category]
    plural = category.replace("_", " ").strip().lower() or "products"
    last = plural.split()[-1]
    if " and " in plural or not last.endswith("s") or last.endswith("ss"):
        singular = f"{plural} product"
    elif last.endswith("ies"):
        singular = f"{plural[:-3]}y"
    else:
        singular = plural[:-1]
    logger.warning(
        "no words for category %r: using %r and %r; set words=(plural, singular) for better ones",
        category,
        plural,
        singular,
    )
    return plural, singular
