"""Captions as text-conditional LlamaGen models were trained on them."""

from __future__ import annotations

import html
import re

_RULES = (
    (re.compile(r"https?://\S+|www\.\S+"), " "),
    (re.compile(r"<[^>]*>"), " "),
    (re.compile(r"@[\w\d]+\b"), " "),
    (re.compile(r"[\u2010-\u2015\u2212]"), "-"),
    (re.compile(r"[\u2018\u2019\u00b4`]"), "'"),
    (re.compile(r"[\u00ab\u00bb\u201c\u201d\u201e]"), '"'),
    (re.compile(r"\\n|\s+"), " "),
)


def clean_caption(text: str) -> str:
    """A caption in the plain form that T5-conditioned models are trained on.

    Lower case, without links, tags and mentions, with plain dashes and quotes and single spaces.
    The official models clean twice; a second pass of this function changes nothing.
    """
    text = html.unescape(html.unescape(text)).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()
