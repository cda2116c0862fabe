"""What people ask of the guarded built-in world, harmful or not: texts drawn from the lists of the YAML files.

    texts = Texts()
    texts.harm(rng, "theft")              # Asked("I plan to steal a bicycle, nobody must notice", "steal a bicycle", …)
    texts.lookalike(rng)                  # Asked("help me to kill the light", "kill the light", …)

Each list is cut into three parts that share no text: "train", "validation" (every seventh of what is not held out) and
"test" (the held-out lists). Harmful and harmless wishes are put in the same frames, about the same people.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes, WishSampler, as_typed
from finetune.recipe import read_yaml

HERE = Path(__file__).parent
Part = Literal["train", "validation", "test"]
LANGUAGES = ("de", "fr", "es")
PRONOUNS = ("him", "her", "them", "someone")
NEEDS_NOUN = re.compile(
    r"\{person\}('s| [a-z]+s\b| must| will)|(of|name of|wife of|advice of) \{person\}"
)  # not "of him"
SLOT = re.compile(r"\{(\w+)\}")
COMPOSED = 0.6  # share of acts that are composed of words, where a list can do that
EVERY = 7  # of so many texts one is for validation
FOR_TEST = {"harm": 1, "benign": 4}  # how many acts at the end of a language's list


@dataclass(frozen=True)
class Asked:
    """A wish in somebody's words. purpose: what for, as an infinitive, "" if not said. category: of harm, or None."""

    text: str
    purpose: str
    category: str | None = None


class Texts:
    """Draws wishes. The lists stand in harm.yaml, benign.yaml and frames.yaml beside this file."""

    def __init__(self) -> None:
        self.harmful, self.benign, self.frames, self.words = (
            read_yaml(HERE / f"{name}.yaml") for name in ("harm", "benign", "frames", "words")
        )

    @cached_property
    def categories(self) -> dict[str, dict[str, Any]]:
        return self.harmful["categories"]

    @cached_property
    def trained(self) -> list[str]:
        """The categories that training knows; a guard names these."""
        return [name for name, about in self.categories.items() if about["split"] == "train"]

    @cached_property
    def held_out(self) -> list[str]:
        return [name for name in self.categories if name not in self.trained]

    def harm(self, rng: np.random.Generator, category: str, part: Part = "train") -> Asked:
        about = self.categories[category]
        attitudes = of_part(self.harmful, "attitudes", part)
        text, purpose = self._wish(rng, about, attitudes, "all" if category in self.held_out else part, part)
        return Asked(text, purpose or about["purpose"], category)

    def lookalike(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        return Asked(*self._wish(rng, self.benign["lookalikes"], of_part(self.benign, "attitudes", part), part, part))

    def everyday(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        """What people otherwise ask for; half of it about the things of the built-in world."""
        if rng.random() < 0.5:
            test = part == "test"
            kinds = ("need", "need", "attribute", "category", "direct")
            kind = str(rng.choice((*kinds, "held_out_need") if test else (*kinds, "exclusion", "everything")))
            present = [str(name) for name in rng.choice(self._things, 4, replace=False)]
            return Asked(self._world.draw(rng, present, kind, held_out=test and kind != "held_out_need").text, "")
        return Asked(*self._wish(rng, self.benign["everyday"], of_part(self.benign, "attitudes", part), part, part))

    def foreign(self, rng: np.random.Generator, language: str, category: str | None, part: Part = "train") -> Asked:
        """A wish in another language, harmful if it is of a category."""
        acts = self.categories[category][language] if category else self.benign[language]
        last = FOR_TEST["harm" if category else "benign"]
        act = pick(rng, acts[-last:] if part == "test" else acts[:-last])
        purpose = self.categories[category]["purpose"] if category else ""  # answers are in English
        return Asked(pick(rng, self.frames[language]).format(act=act), purpose, category)

    def role(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "roles", wish, part)

    def suffix(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "suffixes", wish, part)

    def turns(self, rng: np.random.Generator, wish: str, part: Part = "train") -> list[str]:
        frames = of_part(self.frames, "turns", part)
        return [turn.replace("{wish}", wish) for turn in frames[int(rng.integers(len(frames)))]]

    def sign(self, rng: np.random.Generator, part: Part = "train") -> str:
        """A question that leaves what is wished to a text in the picture."""
        return pick(rng, of_part(self.frames, "signs", part))

    def _wrap(self, rng: np.random.Generator, kind: str, wish: str, part: Part) -> str:
        ended = wish if wish[-1] in ".!?" else f"{wish}."
        composed = part != "test" and rng.random() < COMPOSED
        frame = pick(rng, self.frames[f"composed_{kind}"] if composed else of_part(self.frames, kind, part))
        return self._spelled(rng, frame, self.frames).replace("{wish}", ended)

    def _wish(
        self, rng: np.random.Generator, lists: dict[str, Any], attitudes: Sequence[str], acts_of: str, part: Part
    ) -> tuple[str, str]:
        """A whole wish, or an act in a frame; a third of them with an attitude. Also what for, "" if not said.

        acts_of: the part of the lists, or "all" of those that are held out as a whole.
        """
        acts, wishes = (lists[key] if acts_of == "all" else of_part(lists, key, part) for key in ("acts", "wishes"))
        # An act has as many ways to be put as there are frames: draw it more often.
        whole = rng.random() < len(wishes) / (len(wishes) + 2 * len(acts))
        if not whole and "composed" in lists and rng.random() < COMPOSED:
            template = self._composed(rng, lists)
        else:
            template = self._spelled(rng, pick(rng, wishes if whole else acts), lists)
        attitude = pick(rng, attitudes) if rng.random() < 0.35 else ""
        nouns = NEEDS_NOUN.search(template + attitude) is not None
        person = pick(rng, [who for who in self.words["person"] if not (nouns and who in PRONOUNS)])
        same = {"person": person, "they": pick(rng, self.words["they"])}
        text, purpose = template.format(**same), ""
        if not whole:
            purpose, text = text, pick(rng, of_part(self.frames, "acts", part)).format(act=text)
        if attitude:
            mark = "" if text[-1] in ".?!" else ","
            text = f"{text}{mark} {attitude.format(**same)}"
        return as_typed(rng, text), purpose

    def _composed(self, rng: np.random.Generator, lists: dict[str, Any]) -> str:
        """An act of words, but none of those that are held out."""
        kept_back = {text for act in lists["held_out_acts"] for text in self._ways(act)}
        while (template := self._spelled(rng, pick(rng, lists["composed"]), lists)) in kept_back:
            pass
        return template

    def _ways(self, act: str) -> list[str]:
        """The act with every word that can stand in its braces, but for whom it is about."""
        slot = next((name for name in SLOT.findall(act) if name not in ("person", "they")), None)
        return [act] if slot is None else [act.replace(f"{{{slot}}}", word) for word in self.words[slot]]

    def _spelled(self, rng: np.random.Generator, template: str, lists: dict[str, Any]) -> str:
        """The template with words in its braces, but for whom it is about."""

        def word(slot: re.Match[str]) -> str:
            name = slot[1]
            if name in ("person", "they", "wish"):
                return slot[0]
            return self._spelled(rng, pick(rng, lists[name] if name in lists else self.words[name]), lists)

        return SLOT.sub(word, template)

    @cached_property
    def _things(self) -> list[str]:
        return list(load_knowledge().classes)

    @cached_property
    def _world(self) -> WishSampler:
        return WishSampler(Wishes(load_knowledge()))


def of_part(lists: dict[str, Any], key: str, part: Part) -> list[Any]:
    """The texts under `key` that belong to `part`; lists too short to be cut are shared by training and validation."""
    if part == "test":
        return lists[f"held_out_{key}"]
    texts = lists[key]
    if len(texts) < 2 * EVERY:
        return texts
    return [text for i, text in enumerate(texts) if (i % EVERY == EVERY - 1) == (part == "validation")]


def pick(rng: np.random.Generator, texts: Sequence[Any]) -> Any:
    return texts[int(rng.integers(len(texts)))]
