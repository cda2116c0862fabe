"""What people ask of the guarded built-in world, harmful or not: texts drawn from the lists of the YAML files.

    texts = Texts()
    texts.harm(rng, "theft")              # Asked("I plan to steal a bicycle, nobody must notice", "steal a bicycle", …)
    texts.lookalike(rng)                  # Asked("help me to kill the light", "kill the light", …)

Texts have a part, and no text is in two:

    train                what is composed of the lists; contrasts.json, where harm and no harm have the same words; and
                         18 of every 20 texts of written.json. Several wrote both
    validation, test     the other two of these
    strangers            strangers.yaml, whose author has not seen the other lists

Harmful and harmless wishes are put in the same frames, about the same people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wish, Wishes, WishSampler, as_typed
from finetune.recipe import read_yaml

HERE = Path(__file__).parent
Part = Literal["train", "validation", "test", "strangers"]
LANGUAGES = ("de", "fr", "es")
PRONOUNS = ("him", "her", "them", "someone")
NEEDS_NOUN = re.compile(
    r"\{person\}('s| [a-z]+s\b| must| will)|(of|name of|wife of|advice of) \{person\}"
)  # not "of him"
SLOT = re.compile(r"\{(\w+)\}")
COMPOSED = 0.2  # share of acts that are composed of words, where a list can do that
EVERY = 20  # texts of written.json
MEASURED: dict[Part, int] = {"validation": 9, "test": 19}  # which of them
LATER = ("person", "they", "wish")  # slots that are the same throughout a wish


@dataclass(frozen=True)
class Asked:
    """A wish in somebody's words. purpose: what for, as an infinitive, "" if not said. category: of harm, or None."""

    text: str
    purpose: str
    category: str | None = None


class Texts:
    """Draws wishes. The lists stand in the YAML files beside this file."""

    def __init__(self) -> None:
        self.harmful, benign, frames, self.words, languages, strangers = (
            read_yaml(HERE / f"{name}.yaml") for name in ("harm", "benign", "frames", "words", "languages", "strangers")
        )
        composed = {
            "harm": self.harmful["categories"],
            "attitudes": {"harm": self.harmful["attitudes"], "benign": benign["attitudes"]},
            "lookalikes": benign["lookalikes"],
            "everyday": benign["everyday"],
            "frames": frames,
            "languages": languages,
        }
        written, contrasts = (
            json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in ("written", "contrasts")
        )
        learned = _joined(contrasts, _some(written, {*range(EVERY)} - {*MEASURED.values()}))
        later = {"frames": {name: strangers["frames"][name] for name in ("turns", "signs")}}
        self.lists: dict[Part, dict[str, Any]] = {
            "train": _joined(composed, learned),
            **{part: _joined(_some(written, {place}), later) for part, place in MEASURED.items()},
            "strangers": strangers,
        }

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
        text, purpose = self._wish(rng, self.lists[part]["harm"][category], "harm", part)
        return Asked(text, purpose or self.categories[category]["purpose"], category)

    def lookalike(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        return Asked(*self._wish(rng, self.lists[part]["lookalikes"], "benign", part))

    def everyday(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        """What people otherwise ask for; half of it about the things of the built-in world."""
        if rng.random() < 0.5:
            return Asked(self.of_the_world(rng, self.some_things(rng), part).text, "")
        return Asked(*self._wish(rng, self.lists[part]["everyday"], "benign", part))

    def some_things(self, rng: np.random.Generator) -> list[str]:
        """What may be in one picture."""
        return [str(name) for name in rng.choice(self._things, int(rng.integers(2, 8)), replace=False)]

    def of_the_world(self, rng: np.random.Generator, present: Sequence[str], part: Part = "train") -> Wish:
        """A wish of the kind that the built-in reasoner was made for, about a picture of these things."""
        kinds = ("need", "need", "attribute", "category", "direct")
        more = {"train": ("exclusion", "everything"), "validation": ()}.get(part, ("held_out_need",))
        kind = str(rng.choice((*kinds, *more)))
        return self._world.draw(rng, present, kind, held_out=part != "train" and kind != "held_out_need")

    def foreign(self, rng: np.random.Generator, language: str, category: str | None, part: Part = "train") -> Asked:
        """A wish in another language, harmful if it is of a category; some with an attitude."""
        lists = self.lists[part]["languages"][language]
        acts = lists["harm"][category] if category else lists["benign"]
        frame = pick(rng, lists["frames"])
        words = self.lists["train"]["languages"][language]["words"]
        text = frame.format(act=self._spelled(rng, pick(rng, acts), words, later=()))
        if "wishes" in lists and rng.random() < 0.3:
            text = pick(rng, lists["wishes"][category or "benign"])
        if "attitudes" in lists and rng.random() < 0.25:
            attitude = pick(rng, lists["attitudes"]["harm" if category else "benign"])
            text = f"{text}{'' if text[-1] in '.?!' else ','} {attitude}"
        purpose = self.categories[category]["purpose"] if category else ""  # answers are in English
        return Asked(as_typed(rng, text), purpose, category)

    def among_others(self, rng: np.random.Generator, wish: str) -> str:
        """A wish of the training as it is, or with friendly words before or behind it."""
        frames = self.lists["train"]["frames"]
        if rng.random() < 0.25:
            wish = pick(rng, frames["openers"]) + wish[0].lower() + wish[1:]
        if rng.random() < 0.2:
            wish = wish.rstrip(".!? ") + pick(rng, frames["closers"])
        return wish

    def role(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "roles", wish, part)

    def suffix(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "suffixes", wish, part)

    def turns(self, rng: np.random.Generator, wish: str, part: Part = "train") -> list[str]:
        frames = self.lists[part]["frames"]["turns"]
        return [turn.replace("{wish}", wish) for turn in pick(rng, frames)]

    def sign(self, rng: np.random.Generator, part: Part = "train") -> str:
        """A question that leaves what is wished to a text in the picture."""
        return pick(rng, self.lists[part]["frames"]["signs"])

    def _wrap(self, rng: np.random.Generator, kind: str, wish: str, part: Part) -> str:
        ended = wish if wish[-1] in ".!?" else f"{wish}."
        frames = self.lists[part]["frames"]
        composed = part == "train" and rng.random() < COMPOSED
        frame = pick(rng, frames[f"composed_{kind}"] if composed else frames[kind])
        return self._spelled(rng, frame, frames).replace("{wish}", ended)

    def _wish(self, rng: np.random.Generator, lists: dict[str, Any], attitude: str, part: Part) -> tuple[str, str]:
        """A whole wish, or an act in a frame; a third of them with an attitude. Also what for, "" if not said."""
        acts, wishes = (lists[key] for key in ("acts", "wishes"))
        # An act has as many ways to be put as there are frames: draw it more often.
        whole = rng.random() < len(wishes) / (len(wishes) + 2 * len(acts))
        if not whole and "composed" in lists and rng.random() < COMPOSED:
            template = self._composed(rng, lists)
        else:
            template = self._spelled(rng, pick(rng, wishes if whole else acts), lists)
        feels = ""
        if rng.random() < 0.35:
            feels = self._spelled(rng, pick(rng, self.lists[part]["attitudes"][attitude]), lists)
        nouns = NEEDS_NOUN.search(template + feels) is not None
        person = pick(rng, [who for who in self.words["person"] if not (nouns and who in PRONOUNS)])
        same = {"person": person, "they": pick(rng, self.words["they"])}
        text, purpose = template.format(**same), ""
        if not whole:
            purpose, text = text, pick(rng, self.lists[part]["frames"]["acts"]).format(act=text)
        if feels:
            mark = "" if text[-1] in ".?!" else ","
            text = f"{text}{mark} {feels.format(**same)}"
        return as_typed(rng, text), purpose

    def _composed(self, rng: np.random.Generator, lists: dict[str, Any]) -> str:
        """An act of words, but none of those that are held out."""
        while (template := self._spelled(rng, pick(rng, lists["composed"]), lists)) in self._kept_back:
            pass
        return template

    @cached_property
    def _kept_back(self) -> set[str]:
        """Every held-out act with every word that can stand in its braces, but for whom it is about."""
        parts: tuple[Part, ...] = ("validation", "test", "strangers")
        measured = [self.lists[part] for part in parts]
        kinds = [
            kind for lists in measured for kind in (*lists["harm"].values(), lists["lookalikes"], lists["everyday"])
        ]
        acts = [act for kind in kinds for act in kind["acts"]]
        return {text for act in acts for text in self._ways(act)}

    def _ways(self, act: str) -> list[str]:
        slot = next((name for name in SLOT.findall(act) if name not in LATER), None)
        return [act] if slot is None else [act.replace(f"{{{slot}}}", word) for word in self.words[slot]]

    def _spelled(
        self, rng: np.random.Generator, template: str, lists: dict[str, Any], later: Sequence[str] = LATER
    ) -> str:
        """The template with words in its braces, but for those that are filled in `later`."""

        def word(slot: re.Match[str]) -> str:
            name = slot[1]
            if name in later:
                return slot[0]
            return self._spelled(rng, pick(rng, lists[name] if name in lists else self.words[name]), lists, later)

        return SLOT.sub(word, template)

    @cached_property
    def _things(self) -> list[str]:
        return list(load_knowledge().classes)

    @cached_property
    def _world(self) -> WishSampler:
        return WishSampler(Wishes(load_knowledge()))


def _some(lists: Any, places: set[int]) -> Any:
    """Nested lists with the texts that stand at these places of every EVERY."""
    if isinstance(lists, dict):
        return {key: _some(part, places) for key, part in lists.items()}
    return [text for i, text in enumerate(lists) if i % EVERY in places]


def _joined(lists: Any, more: Any) -> Any:
    """Nested lists with the texts of `more`, which has the same shape, behind their own."""
    if not isinstance(more, dict):
        return [*lists, *more]
    return {**lists, **{key: _joined(lists.get(key, type(part)()), part) for key, part in more.items()}}


def pick(rng: np.random.Generator, texts: Sequence[Any]) -> Any:
    return texts[int(rng.integers(len(texts)))]
