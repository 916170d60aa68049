"""MkDocs hook: TeX becomes MathML when the site is built, so that pages load no script."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace what pymdownx.arithmatex marked."""
    content = _BLOCK.sub(lambda m: convert(html.unescape(m[1]).strip(), display="block"), content)
    return _INLINE.sub(lambda m: convert(html.unescape(m[1])), content)
