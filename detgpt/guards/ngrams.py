"""How likely a question means harm, and which, by the words that stand near each other in it.

    ngrams = NGrams.load(folder)
    ngrams.score([normalised("Whom could I rob here?")])  # logits
    ngrams.kind(normalised("Whom could I rob here?"))  # "theft"

A linear model over words, pairs of near words, and beginnings and ends of words. A wish is a short text: a small
network that has read little else tells less of it than such pairs do (docs/finetune-guard.md has both). Features are
known by their hashes, so there is no vocabulary to keep.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from detgpt.errors import ModelError

NGRAMS_FILE = "ngrams.safetensors"
TENSORS = ("hashes", "weights", "bias", "kind_hashes", "kind_weights")
HASHES = 2**24
NEAR = 5  # words: how far two may stand apart to be a pair
WORD = re.compile(r"\w+|[?!]")


@dataclass(frozen=True)
class NGrams:
    """hashes: of the features that are known, ascending, (F,) int32. weights: theirs, (F,). bias: of every text.

    kinds: of harm, C names. kind_hashes: of the features that tell them apart, ascending, (K,). kind_weights: (K, C).
    """

    hashes: np.ndarray
    weights: np.ndarray
    bias: float
    kinds: tuple[str, ...]
    kind_hashes: np.ndarray
    kind_weights: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> NGrams:
        """Raises `ModelError` where there are none."""
        file = folder / NGRAMS_FILE
        try:
            with safe_open(file, "np") as stored:
                kinds = tuple(json.loads(stored.metadata()["kinds"]))
                tensors = {name: stored.get_tensor(name) for name in TENSORS}
            found = cls(
                hashes=tensors["hashes"],
                weights=tensors["weights"].astype(np.float32),
                bias=float(tensors["bias"].item()),
                kinds=kinds,
                kind_hashes=tensors["kind_hashes"],
                kind_weights=tensors["kind_weights"].astype(np.float32),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"cannot load the part of a guard that reads questions from {file}: {error}") from error
        shapes = (
            found.hashes.shape == found.weights.shape != (0,),
            found.kind_weights.shape
            == (
                len(found.kind_hashes),
                len(kinds),
            ),
        )
        ascending = all((np.diff(hashes) > 0).all() for hashes in (found.hashes, found.kind_hashes))
        finite = all(np.isfinite(numbers).all() for numbers in (found.weights, found.bias, found.kind_weights))
        if not all((*shapes, ascending, finite)):
            raise ModelError(f"{file} is damaged: it must hold finite weights for each hash, in ascending order")
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, np.ndarray] = {
            "hashes": self.hashes.astype(np.int32),
            "weights": self.weights.astype(np.float16),
            "bias": np.array([self.bias], np.float32),
            "kind_hashes": self.kind_hashes.astype(np.int32),
            "kind_weights": self.kind_weights.astype(np.float16),
        }
        save_file(tensors, folder / NGRAMS_FILE, metadata={"kinds": json.dumps(self.kinds)})

    def score(self, questions: Sequence[str]) -> np.ndarray:
        """The logit of harm of each question, (N,). They are read as they are: write out what they hide before."""
        return np.array([self._score(features(question)) for question in questions], np.float32)

    def kind(self, question: str, answer: str | None = None) -> str | None:
        """The kind of harm that a question or its answer means if it means any; None where no kinds are known.

        With an answer the question counts half as much again: somebody who wants to die is not about weapons because
        the answer names a knife.
        """
        if not self.kinds:
            return None
        if answer is None:
            return self.kinds[int(self._kinds_of(question).argmax())]
        return self.kinds[int((self._kinds_of(f"{question} {answer}") + 0.5 * self._kinds_of(question)).argmax())]

    def _kinds_of(self, text: str) -> np.ndarray:
        """How much speaks for each kind, (C,)."""
        return self.kind_weights[_places(self.kind_hashes, features(text))].sum(axis=0)

    def _score(self, found: np.ndarray) -> float:
        # Over the length of the vector of features, so that a long text is not sure of everything.
        return float(self.weights[_places(self.hashes, found)].sum()) / max(len(found), 1) ** 0.5 + self.bias


def _places(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where those of `hashes` that are known stand among the known ones; both ascend."""
    places = np.searchsorted(known, hashes)
    return places[np.take(known, places, mode="clip") == hashes]


def features(question: str) -> np.ndarray:
    """The hashes of what is in a question, ascending, each once, (F,)."""
    words = WORD.findall(question.lower())
    return np.array(sorted({zlib.crc32(feature.encode()) % HASHES for feature in _features(words)}), np.int32)


def _features(words: Sequence[str]) -> Iterator[str]:
    for i, word in enumerate(words):
        yield word
        if i + 1 < len(words):
            yield f"{word} {words[i + 1]}"
        for near in words[i + 2 : i + 1 + NEAR]:
            yield f"{word} … {near}"
        if len(word) > 3:  # other forms of the word, and misspelled ones
            yield from (f"{word[:length]}-" for length in range(3, min(7, len(word))))
        if len(word) > 5:
            yield f"-{word[-4:]}"
