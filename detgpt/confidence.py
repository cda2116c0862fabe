"""How sure a reasoner was of a name that it gave, from the probabilities of its tokens."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detgpt.reasoners import RawAnswer


def name_confidence(raw: RawAnswer, span: tuple[int, int]) -> float | None:
    """Probability in [0, 1] that the reasoner gave to a name, the characters `span` of its text; None when unknown.

    The list repeats what the reasoning has concluded, so its own tokens are nearly certain, right or wrong. The choice
    was made where the reasoning says the name for the last time, with its article ("The" against "Nothing here fits")
    and what it says of it in brackets ("a cup (fits)"); all count.
    """
    if raw.tokens is None:
        return None
    places = [span, *_last_mention(raw.text, span)]
    logprobs = [
        token.logprob for token in raw.tokens if any(token.start < end and start < token.end for start, end in places)
    ]
    return math.exp(sum(logprobs)) if logprobs else None


def _last_mention(text: str, span: tuple[int, int]) -> list[tuple[int, int]]:
    """Where the lines above that of `span` say its name last, with article and brackets; empty where they do not."""
    start, end = span
    above = max(text.rfind("\n", 0, start), 0)
    name = rf"(?:(?:an?|the|some)\s{{1,4}})?{re.escape(text[start:end])}(?:e?s)?"
    mention = rf"(?<!\w){name}(?!\w)(?:\s\([^()\n]{{1,60}}\))?"
    return [found.span() for found in re.finditer(mention, text[:above], re.IGNORECASE)][-1:]
