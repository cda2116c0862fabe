"""What can be asked about a scene beside wishes: how many there are of something, and what is true of things at all.

`counting` is answered from the picture, with the things that were counted as targets; `fact` needs no picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detgpt.answer import format_answer
from finetune.picto.knowledge import Knowledge
from finetune.picto.language import PLURAL, listing, with_article

HOW_MANY = (
    "how many {x} are there?", "how many {x} do you see?", "count the {x}", "how many {x} are in the picture?",
    "what is the number of {x} here?", "can you count the {x}?",
)  # fmt: skip
IS_IT_TRUE = ("is it true that {x}?", "would you say that {x}?", "{x}: right or wrong?", "do you think that {x}?")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TIMES = {1: "", 2: " twice"}
EVERYTHING = ("thing", "things")


@dataclass(frozen=True)
class Question:
    """What is asked, what a good reasoner says, and what of it counts: a number, or "yes" or "no"."""

    text: str
    answer: str
    value: str


def counting(rng: np.random.Generator, knowledge: Knowledge, counts: Mapping[str, int]) -> Question:
    """How many of a category, or of all things, there are. counts: of each name in the scene, in reading order."""
    present = sorted({knowledge.classes[name].category for name in counts})
    draw = rng.random()
    if draw < 0.15:
        singular, plural = EVERYTHING
        counted = dict(counts)
    else:
        key = str(rng.choice(present if draw < 0.8 else list(knowledge.categories)))
        category = knowledge.categories[key]
        singular, plural = category.ways[0], category.plural
        counted = {name: n for name, n in counts.items() if name in knowledge.fitting(key)}
    total = sum(counted.values())
    text = str(rng.choice(HOW_MANY)).format(x=plural)
    return Question(text, format_answer(_sum(counted, total, singular, plural), list(counted)), str(total))


def _sum(counted: Mapping[str, int], total: int, singular: str, plural: str) -> str:
    """The parts before their sum, which is then easy to say."""
    said = f"{NUMBERS[total] if total < len(NUMBERS) else total} {singular if total == 1 else plural}"
    if total <= 1:
        return f"There is {said}." if total else f"There are {said} here."
    parts = [f"{with_article(name)}{TIMES.get(n, f' {n} times')}" for name, n in counted.items()]
    sentence = f"{listing(parts)}: that makes {said}."
    return sentence[0].upper() + sentence[1:]


def fact(rng: np.random.Generator, knowledge: Knowledge) -> Question:
    """Whether an attribute or a category holds of a class; true as often as not."""
    name = str(rng.choice(list(knowledge.classes)))
    plural = name in PLURAL
    claims = {a.name: a.plural_says if plural else a.says for a in knowledge.attributes.values()}
    for category in knowledge.categories.values():
        claims[category.name] = f"are {category.plural}" if plural else f"is {with_article(category.ways[0])}"
    true = [key for key in claims if name in knowledge.fitting(key)]
    right = bool(rng.random() < 0.5)
    key = str(rng.choice(true if right else [key for key in claims if key not in true]))
    claim = f"{name if plural else with_article(name)} {claims[key]}"
    text = str(rng.choice(IS_IT_TRUE)).format(x=claim)
    answer = f"Yes, {claim}." if right else f"No, that is not true of {name if plural else with_article(name)}."
    return Question(text, answer, "yes" if right else "no")
