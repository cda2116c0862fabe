"""Wishes about a scene and the answers to them, in words: the text that the built-in reasoner learns from.

A `Wish` is what somebody types and the set of classes that would fulfil it. `answer` writes what a good reasoner
says: what it sees, why something fits, and the answer line of `detgpt.answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detgpt.answer import format_answer
from finetune.picto.knowledge import Attribute, Knowledge
from finetune.picto.places import PLACES

ASKS = (
    "find {x}", "show me {x}", "where is {x}?", "I want {x}", "I need {x}", "I am looking for {x}", "is there {x}?",
    "can you see {x}?", "please point out {x}", "I would like {x}", "give me {x}", "detect {x}", "look for {x}",
    "I'm searching for {x}", "which one is {x}?", "mark {x}", "{x}", "{x}, please", "do you have {x}?", "get me {x}",
)  # fmt: skip
HELD_OUT_ASKS = (
    "please find {x} for me",
    "can you show me {x}?",
    "do you see {x} here?",
    "I want you to look for {x}",
)
ASKS_ALL = (
    "find all {x}", "show me all {x}", "where are the {x}?", "which {x} can you see?", "point out every one of the {x}",
    "mark all {x}", "what {x} are there?", "are there any {x}?", "I am looking for {x}", "all {x}", "{x}", "detect {x}",
)  # fmt: skip
HELD_OUT_ASKS_ALL = ("please show me where the {x} are", "can you find all the {x}?", "I want to see all {x}")
ASKS_EVERYTHING = (
    "what is in this picture?", "what do you see?", "describe the picture", "find everything", "list all the things",
    "show me all objects", "what is here?", "detect all objects", "what can you see?",
)  # fmt: skip
FOLLOW_UPS = ("only {x}", "just {x}", "of these, {x}", "{x} among them", "but only {x}", "now only {x}")
OPENERS = ("", "", "", "", "", "Hi, ", "Hello, ", "Hey, ", "Please help: ", "Excuse me, ", "Help, ")
CLOSERS = (
    "", "", "", "", "", " What could help?", " What here could help me?", " Which of these helps?", " Any idea?",
    " What can I use?", " Please help.", " What should I take?", " Is there something for that?",
)  # fmt: skip
NO_ARTICLE = {"french fries", "ice cream", "toilet paper"} | set(
    """grapes broccoli corn bread cheese chocolate honey milk coffee beer wine juice soda ice jeans gloves socks glasses
    headphones scissors soap dice""".split()
)
PLURAL = frozenset({"grapes", "jeans", "gloves", "socks", "glasses", "headphones", "scissors", "french fries"})


@dataclass(frozen=True)
class Wish:
    """What somebody asks, what fits it, and why, in a sentence: what it takes, or the wish in the plainest words."""

    text: str
    fits: frozenset[str]
    kind: str  # need | two_step | exclusion | attribute | category | combination | direct | everything | refinement
    key: str
    reason: str = ""


def with_article(name: str) -> str:
    if name in NO_ARTICLE:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def of_kind(attribute: Attribute, name: str, says: str) -> str:
    """What a thing of that name with that attribute is called: "red fruit", "animal that flies"."""
    if not attribute.thing.startswith("something "):
        return f"{name} that {says}"
    kind = attribute.thing.removeprefix("something ")
    return f"{name} {kind}" if " " in kind else f"{kind} {name}"


def in_a_talk(rng: np.random.Generator, text: str) -> str:
    """A wish with what people say before and behind it."""
    closer = str(rng.choice(CLOSERS)) if not text.endswith("?") else ""
    return str(rng.choice(OPENERS)) + text + ("." if closer and text[-1].isalnum() else "") + closer


def listing(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def answer(place: str, names: Sequence[str], wish: Wish) -> str:
    """The whole answer about a scene: `names` are what is in it, in reading order.

    First the reason, then everything in the picture with a mark at what fits: whether a thing fits is decided where it
    is named, and no longer from somebody's words but from the reason.
    """
    fitting = [n for n in names if n in wish.fits]
    if wish.kind == "everything":
        return format_answer(seen(place, names), fitting)
    nothing = "" if fitting else "Nothing here fits."
    return format_answer(" ".join(s for s in (wish.reason, seen(place, names, fitting), nothing) if s), fitting)


def seen(place: str, names: Sequence[str], fitting: Sequence[str] = ()) -> str:
    """What is in the picture, in a sentence, with a mark at what fits."""
    parts = [f"{with_article(n)} (fits)" if n in fitting else with_article(n) for n in names]
    return f"{PLACES[place].phrase} I see {listing(parts)}."


@dataclass(frozen=True)
class Wishes:
    """Everything that can be asked, from the knowledge base. `held_out` draws the phrasings kept for evaluation."""

    knowledge: Knowledge

    def of_need(self, key: str, rng: np.random.Generator, *, held_out: bool = False) -> Wish:
        need = self.knowledge.needs[key]
        says = need.held_out if held_out and need.held_out else need.says
        text = str(rng.choice(list(says)))
        if not held_out:
            text = in_a_talk(rng, text)
        because = need.because[0].upper() + need.because[1:] + "."
        return Wish(text, self.knowledge.fitting(need.rule), need.kind, key, because)

    def of_attribute(self, key: str, rng: np.random.Generator, *, held_out: bool = False) -> Wish:
        attribute = self.knowledge.attributes[key]
        text = str(rng.choice(HELD_OUT_ASKS if held_out else ASKS)).format(x=attribute.thing)
        return Wish(text, self.knowledge.fitting(key), "attribute", key, f"You want {attribute.thing}.")

    def of_category(self, key: str, rng: np.random.Generator, *, held_out: bool = False) -> Wish:
        category = self.knowledge.categories[key]
        singular = category.ways[0]
        asked = str(rng.choice([category.plural, category.plural, *category.ways[1:]]))
        asks: Sequence[str] = HELD_OUT_ASKS_ALL if held_out else ASKS_ALL
        if rng.random() < 0.4:
            asked, asks = with_article(singular), HELD_OUT_ASKS if held_out else ASKS
        text, reason = str(rng.choice(asks)).format(x=asked), f"You want {category.plural}."
        return Wish(text, self.knowledge.fitting(key), "category", key, reason)

    def of_class(self, key: str, rng: np.random.Generator, *, held_out: bool = False) -> Wish:
        names = self.knowledge.classes[key].names
        name = names[0] if rng.random() < 0.5 else str(rng.choice(names))
        asked = f"the {name}" if rng.random() < 0.5 else with_article(name)
        text = str(rng.choice(HELD_OUT_ASKS if held_out else ASKS)).format(x=asked)
        return Wish(text, frozenset({key}), "direct", key, f"You want the {key}.")

    def of_exception(self, key: str, but: str, rng: np.random.Generator) -> Wish:
        """A category without one of its classes."""
        category = self.knowledge.categories[key]
        phrase = str(rng.choice(["{p} but not the {n}", "{p} except the {n}", "{p} other than the {n}"]))
        asked = phrase.format(p=category.plural, n=but)
        fits = self.knowledge.fitting(key) - {but}
        text, reason = str(rng.choice(ASKS_ALL)).format(x=asked), f"You want {category.plural}, but not the {but}."
        return Wish(text, fits, "exclusion", f"{key} - {but}", reason)

    def of_combination(self, rule: str, rng: np.random.Generator) -> Wish:
        """What is in a category and has an attribute, too: "fruit and red"."""
        first, second = rule.split(" and ")
        category, attribute = self.knowledge.categories[first], self.knowledge.attributes[second]
        one, many = category.ways[0], category.plural
        ways = [
            str(rng.choice(ASKS)).format(x=with_article(f"{one} that {attribute.says}")),
            str(rng.choice(ASKS)).format(x=with_article(of_kind(attribute, one, attribute.says))),
            str(rng.choice(ASKS_ALL)).format(x=of_kind(attribute, many, attribute.plural_says)),
            f"which {one} {attribute.says}?",
        ]
        text = in_a_talk(rng, str(rng.choice(ways)))
        reason = f"You want {category.plural}, and only {attribute.thing}."
        return Wish(text, self.knowledge.fitting(rule), "combination", rule, reason)

    def of_everything(self, rng: np.random.Generator) -> Wish:
        return Wish(str(rng.choice(ASKS_EVERYTHING)), frozenset(self.knowledge.classes), "everything", "everything")

    def refined(self, first: Wish, key: str, rng: np.random.Generator) -> Wish:
        """A follow-up that narrows `first` down to an attribute."""
        attribute = self.knowledge.attributes[key]
        fits = first.fits & self.knowledge.fitting(key)
        text = str(rng.choice(FOLLOW_UPS)).format(x=attribute.thing)
        before = first.reason.removesuffix(".")
        reason = f"{before}, and only {attribute.thing}." if before else f"You want {attribute.thing}."
        return Wish(text, fits, "refinement", key, reason)

    @cached_property
    def trained_needs(self) -> list[str]:
        return [k for k, n in self.knowledge.needs.items() if n.split == "train"]

    @cached_property
    def held_out_needs(self) -> list[str]:
        return [k for k, n in self.knowledge.needs.items() if n.split != "train"]


KINDS = {
    "need": 0.35,
    "attribute": 0.12,
    "category": 0.10,
    "combination": 0.12,
    "direct": 0.12,
    "exclusion": 0.14,  # more than people ask: what is left out must not be what is named
    "everything": 0.05,
}  # shares


class WishSampler:
    """Draws a wish for a scene: usually one that something in it fulfils, sometimes one that nothing does."""

    def __init__(self, wishes: Wishes, *, nothing_fits: float = 0.22):
        self.wishes = wishes
        self.nothing_fits = nothing_fits
        knowledge = wishes.knowledge
        self._fits = {
            "need": {k: knowledge.fitting(knowledge.needs[k].rule) for k in wishes.trained_needs},
            "attribute": {k: knowledge.fitting(k) for k in knowledge.attributes},
            "category": {k: knowledge.fitting(k) for k in knowledge.categories},
            "direct": {k: frozenset({k}) for k in knowledge.classes},
        }
        self._fits["held_out_need"] = {k: knowledge.fitting(knowledge.needs[k].rule) for k in wishes.held_out_needs}
        rules = [f"{c} and {a}" for c in knowledge.categories for a in knowledge.attributes]
        combinations = {rule: knowledge.fitting(rule) for rule in rules}
        self._fits["combination"] = {
            rule: fits for rule, fits in combinations.items() if fits and not self._held_out(rule, fits)
        }
        self._columns = {name: i for i, name in enumerate(knowledge.classes)}
        self._tables = {
            kind: (list(fits), np.array([[c in classes for c in self._columns] for classes in fits.values()]))
            for kind, fits in self._fits.items()
        }

    def _held_out(self, rule: str, fits: frozenset[str]) -> bool:
        """Whether only the evaluation may ask for this: for just these, or a held-out need is of the same attribute and
        some of these fulfil it, too."""
        attribute = rule.split(" and ")[1]
        return any(
            fits == classes or (fits & classes and attribute in self.wishes.knowledge.needs[need].rule.split())
            for need, classes in self._fits["held_out_need"].items()
        )

    def draw(
        self,
        rng: np.random.Generator,
        present: Sequence[str],
        kind: str | None = None,
        *,
        held_out: bool = False,
    ) -> Wish:
        kind = kind or list(KINDS)[int(np.searchsorted(np.cumsum(list(KINDS.values())), rng.random()))]
        if kind == "everything":
            return self.wishes.of_everything(rng)
        if kind == "exclusion":
            return self._exception(rng, present)
        if kind == "combination":
            return self.wishes.of_combination(self._choose(rng, kind, present), rng)
        key = self._choose(rng, kind, present)
        make = {
            "need": self.wishes.of_need,
            "held_out_need": self.wishes.of_need,
            "attribute": self.wishes.of_attribute,
            "category": self.wishes.of_category,
            "direct": self.wishes.of_class,
        }[kind]
        return make(key, rng, held_out=held_out)

    def _choose(self, rng: np.random.Generator, kind: str, present: Sequence[str]) -> str:
        keys, fits = self._tables[kind]
        wanted = rng.random() >= self.nothing_fits
        fulfilled = fits[:, [self._columns[n] for n in present]].any(1)
        # Wishes that many classes fulfil would come up most often: weigh them down.
        weights = (fulfilled == wanted) / (fits.sum(1) + 2 if wanted else 1)
        reach = np.cumsum(weights if weights.any() else np.ones(len(keys)))
        return keys[int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))]

    def _exception(self, rng: np.random.Generator, present: Sequence[str]) -> Wish:
        classes = self.wishes.knowledge.classes
        but = str(rng.choice(list(present)))
        return self.wishes.of_exception(classes[but].category, but, rng)

    def follow_up(self, rng: np.random.Generator, first: Wish, present: Sequence[str]) -> Wish | None:
        """A refinement of `first` that keeps some but not all of what fitted; None where there is none."""
        fitted = first.fits & set(present)
        kept_back = set(self._fits["held_out_need"].values())  # combinations that only the evaluation may ask for
        keys = [
            k
            for k, c in self._fits["attribute"].items()
            if 0 < len(c & fitted) < len(fitted) and c & first.fits not in kept_back
        ]
        return self.wishes.refined(first, str(rng.choice(keys)), rng) if keys else None


def as_typed(rng: np.random.Generator, text: str) -> str:
    """The wish as people type it: sometimes without capitals or the final mark."""
    if rng.random() < 0.4:
        text = text.lower()
    if rng.random() < 0.4:
        text = text.rstrip(".!?")
    elif text[-1].isalnum() and rng.random() < 0.3:
        text += str(rng.choice([".", "!"]))
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
