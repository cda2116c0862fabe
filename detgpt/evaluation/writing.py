"""How a reasoner is asked to write wishes about an annotated picture, and how its answers are read.

Two prompts and their readers. The first asks for wishes and what fulfils each; the second asks about one wish,
in a conversation of its own, what fulfils it, so that a truth stands only where two independent answers agree.
Both readers are total: any text gives a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from detgpt.answer import parse_answer
from detgpt.names import MAX_NAME_LENGTH

MAX_WISH_LENGTH = 300
OTHER = "other"


def writing_prompt(things: Sequence[str], count: int, captions: Sequence[str] = ()) -> str:
    """Asks for `count` wishes that some of `things` fulfil."""
    return f"""{_what_is_known(things, captions)}

Write {count} different wishes of somebody who looks at this picture. Each wish says what the person needs, wants to \
do or asks about, in everyday words, so that one has to think to know which things in the picture fulfil it. A wish \
never says the name of a thing that fulfils it, and nothing about where it stands. At least one marked thing fulfils it.

Answer with one JSON object a line and nothing else, like these two:
{{"wish": "I have to cut this rope", "fits": ["scissors", "knife"], "also_called": {{"knife": ["blade"]}}}}
{{"wish": "where can I sit down", "fits": ["chair"], "also_called": {{}}}}
In "fits" stand all marked things that fulfil the wish, named exactly as above, and no others. In "also_called" may \
stand other names that people use for them."""


def checking_prompt(things: Sequence[str], wish: str, captions: Sequence[str] = (), explain: bool = False) -> str:
    """Asks which of `things` fulfil `wish`; with `explain`, in the three steps of an answer to learn from."""
    return f"""{_what_is_known(things, captions)}

Somebody says: {json.dumps(wish, ensure_ascii=False)}

Look at the picture and think which of the marked things fulfil this wish. \
{_THREE_STEPS if explain else ""}If a thing in the picture that is not \
marked fulfils it too, add the word "{OTHER}". End with one line, a JSON list of these names, for example
Targets: ["scissors"]
If nothing in the picture fulfils the wish, the line is
Targets: []"""


_THREE_STEPS = """First describe the picture in one or two sentences. Then say what in it fulfils the wish, \
and explain why each of these things does; if nothing does, explain why. Write plain sentences without numbers, as one \
who answers that person: say nothing of marks or of these instructions. """


def _what_is_known(things: Sequence[str], captions: Sequence[str]) -> str:
    described = "".join(f"\nSomebody described it so: {caption}" for caption in captions)
    return f"In this picture these things are marked: {', '.join(things)}.{described}"


@dataclass(frozen=True)
class Wish:
    """A wish, the categories that fulfil it, other names of these, and the thoughts that lead to the answer."""

    text: str
    targets: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasoning: str = ""


@dataclass(frozen=True)
class Names:
    """The categories of a picture and how each may be called."""

    things: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def _meanings(self) -> dict[str, str]:
        """The thing that each name means; a thing's own name goes before another's synonym."""
        meanings = {_folded(thing): thing for thing in self.things}
        for thing in self.things:
            for other in self.synonyms.get(thing, ()):
                meanings.setdefault(_folded(other), thing)
        return meanings

    def find(self, name: str) -> str | None:
        """The thing that `name` means, ignoring case, article and a plural; None where it is none of them."""
        return self._meaning(_folded(name))

    def said_in(self, text: str) -> frozenset[str]:
        """The things that `text` names; of overlapping names the longest counts: ice cream says nothing of ice."""
        words = _folded(text).split()
        longest = max((name.count(" ") + 1 for name in self._meanings), default=0)
        things: set[str] = set()
        start = 0
        while start < len(words):
            for end in range(min(start + longest, len(words)), start, -1):
                if thing := self._meaning(" ".join(words[start:end])):
                    things.add(thing)
                    start = end - 1
                    break
            start += 1
        return frozenset(things)

    def _meaning(self, said: str) -> str | None:
        singulars = (said, said.removesuffix("s"), said.removesuffix("es"), re.sub("ies$", "y", said))
        return next((self._meanings[form] for form in singulars if form in self._meanings), None)


def read_wishes(text: str, names: Names) -> tuple[list[Wish], dict[str, int]]:
    """The usable wishes of an answer to `writing_prompt`, each once, and how many are not, by reason."""
    wishes: dict[str, Wish] = {}
    refused: dict[str, int] = {}
    for row in _objects(text):
        wish = _read_wish(row, names)
        if isinstance(wish, Wish) and _folded(wish.text) not in wishes:
            wishes[_folded(wish.text)] = wish
        else:
            reason = wish if isinstance(wish, str) else "said before"
            refused[reason] = refused.get(reason, 0) + 1
    return list(wishes.values()), refused


def read_check(text: str, names: Names) -> frozenset[str] | None:
    """The things that an answer to `checking_prompt` names; None if it cannot be read or names something else."""
    answer = parse_answer(text)
    found = [names.find(name) for name in answer.names]
    if answer.problem or None in found:
        return None
    return frozenset(thing for thing in found if thing)


def read_reasoning(text: str) -> str | None:
    """The thoughts of an answer to `checking_prompt`; None if it has none, or speaks of marks that no user sees."""
    reasoning = parse_answer(text).reasoning
    return reasoning if reasoning and not re.search(r"\bmarked\b", reasoning, re.IGNORECASE) else None


def same_wording(a: str, b: str) -> bool:
    return _folded(a) == _folded(b)


def _read_wish(row: Mapping[str, Any], names: Names) -> Wish | str:
    """The wish, or why it is none."""
    text, fits = row.get("wish"), row.get("fits")
    if not isinstance(text, str) or not isinstance(fits, list) or not all(isinstance(name, str) for name in fits):
        return "not in the form asked for"
    text = " ".join(text.split())
    if not 0 < len(text) <= MAX_WISH_LENGTH:
        return "empty or too long"
    found = [names.find(name) for name in fits]
    if not found or None in found:
        return "names a thing that is not marked" if found else "nothing fulfils it"
    targets = tuple(dict.fromkeys(thing for thing in found if thing))
    synonyms = _synonyms(row.get("also_called"), targets, names)
    if Names(targets, synonyms).said_in(text):
        return "says what it asks for"
    return Wish(text, targets, synonyms)


def _synonyms(said: Any, targets: Collection[str], names: Names) -> dict[str, tuple[str, ...]]:
    """Other names of the targets: the annotation's and the writer's, but none that means another thing here."""
    synonyms = {target: list(names.synonyms.get(target, ())) for target in targets}
    for name, others in said.items() if isinstance(said, dict) else ():
        target = names.find(name)
        if target not in synonyms or not isinstance(others, list):
            continue
        usable = (other for other in others if isinstance(other, str) and 0 < len(other.strip()) <= MAX_NAME_LENGTH)
        synonyms[target] += [" ".join(other.split()) for other in usable if names.find(other) is None]
    return {target: tuple(dict.fromkeys(others)) for target, others in synonyms.items() if others}


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in `text`, whatever stands around them."""
    decoder = json.JSONDecoder()
    start = text.find("{", text.rfind("</think>") + 1)
    while start >= 0:
        try:
            row, end = decoder.raw_decode(text, start)
            yield row
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)


def _folded(text: str) -> str:
    """Words in lower case without punctuation and articles, to compare by; an article alone stays, as option "A"."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
