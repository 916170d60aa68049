"""Ids as a user writes them on the command line or in a YAML file: text, never numbers."""

from __future__ import annotations

import re

import yaml

_ELEMENT = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^']|'')*)'|([^,]*?))\s*(,|\Z)""", re.DOTALL
)


def split_ids(text: str, name: str) -> list[str]:
    """`[a, 007, "b, c"]` -> ["a", "007", "b, c"]; what is no list is one id, as written.

    Raises ValueError, naming the option, for a list that does not end and for an empty element.
    """
    text = text.strip()
    if not text.startswith("["):
        return [text]
    if not text.endswith("]"):
        raise ValueError(f"{name}: expected a list as [u1, u2], got {text!r}: its end is missing")
    inner = text[1:-1]
    out: list[str] = []
    place = 0
    while place < len(inner) and inner[place:].strip():
        match = _ELEMENT.match(inner, place)
        if match is None:
            raise ValueError(f"{name}: expected a comma or the end after {inner[:place]!r}")
        double, single, plain, _ = match.groups()
        if double is not None:
            out.append(re.sub(r"\\(.)", r"\1", double))
        elif single is not None:
            out.append(single.replace("''", "'"))
        elif plain:
            out.append(plain)
        else:
            raise ValueError(f"{name}: expected ids between the commas of {text!r}, got nothing")
        place = match.end()
    return out


def load_with_text_ids(text: str, names: tuple[str, ...]) -> object:
    """A YAML value; lists, and what stands under `names`, hold text as written: 007, null, 1e5."""
    value = yaml.safe_load(text)
    if isinstance(value, list):
        return yaml.load(text, yaml.BaseLoader)
    if isinstance(value, dict) and any(name in value for name in names):
        written = yaml.load(text, yaml.BaseLoader)
        for name in names:
            ids = written.get(name)
            if value.get(name) is not None:
                value[name] = [str(i) for i in ids] if isinstance(ids, list) else [str(ids)]
    return value
