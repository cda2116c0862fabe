"""How likely a question means harm, by which words stand near each other in it.

    logits = NGrams.load(folder).score([normalised("Whom could I rob here?")])

A linear model over words, pairs of near words, and beginnings and ends of words. A wish is a short text: a small
network that has read little else tells less of it than such pairs do (docs/safety.md has both). Features are known by
their hashes, so there is no vocabulary to keep.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from detgpt.errors import ModelError

NGRAMS_FILE = "ngrams.safetensors"
HASHES = 2**24
NEAR = 5  # words: how far two may stand apart to be a pair
WORD = re.compile(r"\w+|[?!]")


@dataclass(frozen=True)
class NGrams:
    """hashes: of the features that are known, ascending, (F,) int32. weights: theirs, (F,). bias: of every text."""

    hashes: np.ndarray
    weights: np.ndarray
    bias: float

    @classmethod
    def load(cls, folder: Path) -> NGrams:
        """Raises `ModelError` where there are none."""
        file = folder / NGRAMS_FILE
        try:
            tensors = load_file(file)
            found = cls(tensors["hashes"], tensors["weights"].astype(np.float32), float(tensors["bias"].item()))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"cannot load the part of a guard that reads questions from {file}: {error}") from error
        sound = found.hashes.shape == found.weights.shape != (0,) and (np.diff(found.hashes) > 0).all()
        if not sound or not np.isfinite(found.weights).all() or not np.isfinite(found.bias):
            raise ModelError(f"{file} is damaged: it must hold a finite weight for each hash, in ascending order")
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, np.ndarray] = {
            "hashes": self.hashes.astype(np.int32),
            "weights": self.weights.astype(np.float16),
            "bias": np.array([self.bias], np.float32),
        }
        save_file(tensors, folder / NGRAMS_FILE)

    def score(self, questions: Sequence[str]) -> np.ndarray:
        """The logit of harm of each question, (N,). They are read as they are: write out what they hide before."""
        return np.array([self._score(features(question)) for question in questions], np.float32)

    def _score(self, found: np.ndarray) -> float:
        places = np.searchsorted(self.hashes, found)
        places = places[np.take(self.hashes, places, mode="clip") == found]
        # Over the length of the vector of features, so that a long text is not sure of everything.
        return float(self.weights[places].sum()) / max(len(found), 1) ** 0.5 + self.bias


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
