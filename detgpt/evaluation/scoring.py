"""How right a free answer is: pure functions from the text that a model wrote and the truth to a number in [0, 1].

Thoughts in <think> are passed over. Case, punctuation and articles never matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from detgpt.answer import answer_is_complete, parse_answer, visible
from detgpt.evaluation.writing import Names, same_wording

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_VALUES = {word: float(value) for value, word in enumerate(NUMBER_WORDS)} | {"no": 0.0, "none": 0.0, "nothing": 0.0}
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])|\d+(?:\.\d+)?|[^\W\d_]+(?:-[^\W\d_]+)*")
_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def exact(text: str, answer: str) -> float:
    """1 where the whole text is the answer."""
    return float(same_wording(_spoken(text), answer))


def number(text: str, answer: str) -> float:
    """1 where the last number that the text says is that of the answer."""
    said = read_number(text)
    return float(said is not None and said == read_number(answer))


def yes_no(text: str, answer: str) -> float:
    """1 where the first yes or no of the text is that of the answer."""
    said = read_yes_no(text)
    return float(said is not None and said == read_yes_no(answer))


def names(text: str, targets: Collection[str], known: Names) -> float:
    """F1 of the `known` things that a free text names against the expected ones, a plural being its singular.

    Only what is known can be wrong: other words of the text do not count.
    """
    return _f1(known.said_in(_spoken(text)), {known.find(name) for name in targets})


def targets(text: str, expected: Collection[str]) -> float:
    """F1 of the names in the answer line, ignoring case only, as for a detection; 0 where it cannot be read."""
    answer = parse_answer(text)
    if answer.problem and not answer.names:
        return 0.0
    return _f1({name.casefold() for name in answer.names}, {name.casefold() for name in expected})


def read_number(text: str) -> float | None:
    """The last number before the answer line, the sum behind its parts: "a dog twice and a cat: that makes three".

    In digits or in words up to twenty; "no" as in "no cups", "none" and "nothing" are 0. None if there is no number.
    """
    spoken = _spoken(text)
    if answer_is_complete(spoken):
        spoken = parse_answer(spoken).reasoning
    for word in reversed(_NUMBER.findall(spoken.casefold())):
        if word[0].isdecimal():
            return float(word.replace(",", ""))
        if word in _VALUES:
            return _VALUES[word]
    return None


def read_yes_no(text: str) -> bool | None:
    found = _YES_OR_NO.search(_spoken(text))
    return found and found.group().casefold() == "yes"


def wilson(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a mean of `n` values in [0, 1]; `z` 1.96 is for 95% (Wilson 1927).

    It is made for rights and wrongs; shares vary less about the same mean, so for them it is too wide, if anything.
    """
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _spoken(text: str) -> str:
    begin, end, _ = visible(text)
    return text[begin:end]


def _f1(said: Collection[str], wanted: Collection[str | None]) -> float:
    """1 where nothing was wanted and nothing said."""
    total = len(said) + len(wanted)
    return 2 * len(set(said) & set(wanted)) / total if total else 1.0
