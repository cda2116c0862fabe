"""The models that a visitor may choose, each loaded at its first use and kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from detgpt.errors import InputError
from detgpt.models import resolve
from detgpt.pipeline import DetGPT, Options

KEPT = 2  # loaded models; a third one takes the place of the one that rested longest


class Models:
    """`models["picto"]` is the loaded pair of that name; `names` are those on offer, the first is the default.

    loading: arguments of `DetGPT.from_pretrained` for each of them.
    """

    def __init__(self, names: Sequence[str], **loading: Any) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._lock = threading.Lock()  # two visitors who ask for the same model load it once
        self._load = functools.lru_cache(maxsize=KEPT)(functools.partial(DetGPT.from_pretrained, **loading))

    @property
    def default(self) -> str:
        return self.names[0]

    def __getitem__(self, name: str) -> DetGPT:
        if name not in self.names:
            raise InputError(f"the model {name!r} is not on offer here: choose one of {', '.join(self.names)}")
        with self._lock:
            return self._load(name)

    def options(self, name: str) -> Options:
        """The settings that a pair brings, known before it is loaded."""
        return Options().updated(dict(resolve(name).options))

    def choices(self) -> list[tuple[str, str]]:
        """(what it knows and costs, name) of each model."""
        return [(_described(name), name) for name in self.names]


def _described(name: str) -> str:
    pair = resolve(name)
    return " · ".join(filter(None, [name, pair.knows, pair.needs]))
