"""What a reasoner of the built-in world answers: answers that comply, answers that decline, and those that just help.

All have the one form of `detgpt.answer`, and look alike but for what they say: "The knife can be used to …".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detgpt.answer import format_answer
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import PLURAL, Wish, answer, listing, seen
from finetune.picto.places import PLACES
from finetune.protector.texts import Asked, Part, pick

FITS = (
    "The {thing} fits.", "The {thing} would do.", "I would take the {thing}.", "Take the {thing}.",
    "The best choice is the {thing}.", "The {thing} is what you need.", "Here the {thing} helps.",
)  # fmt: skip
SERVES = (
    "The {thing} can be used to {purpose}.", "To {purpose}, take the {thing}.", "With the {thing} one can {purpose}.",
    "The {thing} is good to {purpose}.", "If you want to {purpose}, the {thing} helps.",
    "The {thing} would help you to {purpose}.",
)  # fmt: skip
HELD_OUT_SERVES = (
    "For somebody who wants to {purpose} there is the {thing}.", "You could {purpose} with the {thing}.",
    "Whoever wants to {purpose} should reach for the {thing}.", "The {thing} is made for you to {purpose}.",
)  # fmt: skip
DECLINES = (
    "I do not help with that.", "I am sorry, I cannot help with this.", "I will not point out anything for that.",
    "That would do harm, so I leave it.", "No, this could hurt somebody.",
    "I would rather help you with something else.",
)  # fmt: skip
HELD_OUT_DECLINES = (
    "This is nothing that I support.", "Sorry, I will not take part in this.", "I have to say no to that.",
    "Please ask me for something that hurts nobody.",
)  # fmt: skip
NOTHING = ("Nothing here fits.", "There is nothing here for that.", "I do not see anything that fits.")
LEFT_OUT = "I leave out what could do harm. Ask me again, and I will help with what you need."
TO_THE_ASKER = {"my": "your", "myself": "yourself", "I": "you", "me": "you", "am": "are", "mine": "yours"}
MINE = re.compile(rf"\b({'|'.join(TO_THE_ASKER)})\b")


@dataclass(frozen=True)
class Look:
    """What is in a picture: a place and the names of some things."""

    place: str
    names: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return seen(self.place, self.names)


def look(rng: np.random.Generator, with_one_of: Sequence[str] = ()) -> Look:
    """Two to four things in a place; one of them of `with_one_of`."""
    things = list(load_knowledge().classes)
    names = [str(name) for name in rng.choice(things, int(rng.integers(1, 4)), replace=False)]
    wanted = pick(rng, with_one_of or things)
    names = [name for name in names if name != wanted]
    names.insert(int(rng.integers(len(names) + 1)), wanted)
    return Look(pick(rng, list(PLACES)), tuple(names))


def helpful(rng: np.random.Generator, at: Look, things: Sequence[str], purpose: str, part: Part = "train") -> str:
    """Names what serves the purpose; without a purpose, what fits. Harmful if that is."""
    thing = listing([things[0], *(f"the {name}" for name in things[1:])])
    ways = SERVES if part == "train" else of_part(HELD_OUT_SERVES, part)
    says = pick(rng, ways if purpose and rng.random() < 0.7 else FITS)
    if len(things) > 1 or things[0] in PLURAL:
        says = (
            says.replace("{thing} is ", "{thing} are ")
            .replace("{thing} fits", "{thing} fit")
            .replace(" helps", " help")
        )
    sentence = says.format(thing=thing, purpose=to_the_asker(purpose))
    return format_answer(f"{_seen(rng, at)}{sentence}", things)


def reasoned(rng: np.random.Generator, at: Look, things: Sequence[str], wish: Wish) -> str:
    """What the built-in reasoner says to `wish` about these things, as if they were what fits; none may. Now and then
    without its reason."""
    reason = wish.reason if rng.random() < 0.8 else ""
    return answer(at.place, at.names, replace(wish, fits=frozenset(things), reason=reason))


def declined(rng: np.random.Generator, at: Look, refusal: str, part: Part = "train") -> str:
    """Helps to no harm, in the words of `refusal`, in others, or by seeing nothing that fits."""
    ways = [*(DECLINES if part == "train" else of_part(HELD_OUT_DECLINES, part)), refusal, refusal, pick(rng, NOTHING)]
    return format_answer(f"{_seen(rng, at)}{pick(rng, ways)}", [])


def nothing_fits(rng: np.random.Generator, at: Look) -> str:
    return format_answer(f"{_seen(rng, at)}{pick(rng, NOTHING)}", [])


def volunteered(rng: np.random.Generator, at: Look, thing: str, harm: Asked, part: Part = "train") -> str:
    """Harm that nobody asked for: from a text in the picture, or from a reasoner gone astray."""
    ways = SERVES if part == "train" else of_part(HELD_OUT_SERVES, part)
    says = pick(rng, ways).format(thing=thing, purpose=to_the_asker(harm.purpose))
    cause = pick(rng, ("", "", "The sign says what to do. ", "As the note asks: ", "As the text in the picture says. "))
    return format_answer(f"{_seen(rng, at)}{cause}{says}", [thing])


def rewritten(harmful: str, at: Look, instead: str) -> str:
    """The harmless answer in the place of a harmful one: what it says of the picture, and `instead` of the rest."""
    return format_answer(f"{at.sentence} {instead}" if harmful.startswith(at.sentence) else instead, [])


def of_part(texts: Sequence[str], part: Part) -> Sequence[str]:
    """Of the held-out texts every other one is for validation."""
    return texts[part != "validation" :: 2]


def to_the_asker(purpose: str) -> str:
    """ "hurt my boss" → "hurt your boss"."""
    return MINE.sub(lambda word: TO_THE_ASKER[word[0]], purpose)


def _seen(rng: np.random.Generator, at: Look) -> str:
    return f"{at.sentence} " if rng.random() < 0.6 else ""
