"""The built-in world's knowledge: `knowledge.yaml` as typed values, and the rules that say what fits a need."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FILE = Path(__file__).parent / "knowledge.yaml"


@dataclass(frozen=True)
class Class:
    name: str
    picture: str  # the pictogram's name in the icon sets
    names: tuple[str, ...]  # the first is the canonical one
    category: str
    attributes: frozenset[str]

    @property
    def facts(self) -> frozenset[str]:
        """Every word a rule may use that is true of this class."""
        return self.attributes | {self.category.replace(" ", "_"), self.name.replace(" ", "_")}


@dataclass(frozen=True)
class Category:
    name: str
    plural: str
    ways: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    name: str
    thing: str  # how one asks for it: "something sharp"
    says: str  # completes "the knife …": "is sharp"
    plural_says: str


@dataclass(frozen=True)
class Need:
    name: str
    rule: str
    because: str
    says: tuple[str, ...]
    held_out: tuple[str, ...]  # ways of saying it that training never sees
    kind: str
    split: str  # "train" or "held_out_need"


@dataclass(frozen=True)
class Knowledge:
    classes: dict[str, Class]
    categories: dict[str, Category]
    attributes: dict[str, Attribute]
    needs: dict[str, Need]
    _fits: dict[str, frozenset[str]] = field(default_factory=dict, repr=False)

    def fitting(self, rule: str) -> frozenset[str]:
        """The classes for which a rule such as "drinkable and not alcoholic" is true."""
        if rule not in self._fits:
            self._fits[rule] = frozenset(n for n, c in self.classes.items() if holds(rule, c.facts))
        return self._fits[rule]


def holds(rule: str, facts: Iterable[str]) -> bool:
    """Evaluate `and`, `or`, `not` and parentheses over words; a word is true if it is among `facts`."""
    known = set(facts)
    tokens = re.findall(r"[()]|[\w-]+", rule)
    position = 0

    def expression(operator: str) -> bool:
        nonlocal position
        value = expression("and") if operator == "or" else atom()
        while position < len(tokens) and tokens[position] == operator:
            position += 1
            other = expression("and") if operator == "or" else atom()
            value = (value or other) if operator == "or" else (value and other)
        return value

    def atom() -> bool:
        nonlocal position
        token = tokens[position]
        position += 1
        if token == "not":
            return not atom()
        if token == "(":
            value = expression("or")
            position += 1  # the closing parenthesis
            return value
        return token in known

    return expression("or")


@functools.cache
def load_knowledge(path: Path = FILE) -> Knowledge:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Knowledge(
        classes={
            n: Class(n, c["picture"], tuple(c["names"]), c["category"], frozenset(c["is"]))
            for n, c in raw["classes"].items()
        },
        categories={n: Category(n, c["plural"], tuple(c["ways"])) for n, c in raw["categories"].items()},
        attributes={n: Attribute(n, a["thing"], a["says"], a["plural_says"]) for n, a in raw["attributes"].items()},
        needs={
            n: Need(
                name=n,
                rule=d["rule"],
                because=d["because"],
                says=tuple(d["says"]),
                held_out=tuple(d.get("held_out", ())),
                kind=d["kind"],
                split=d["split"],
            )
            for n, d in raw["needs"].items()
        },
    )
