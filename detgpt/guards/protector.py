"""A harm detector and a detoxifier in one folder, after MLLM-Protector (arXiv:2401.02906).

    Protector("picto").check("Whom could I rob here?", "The woman with the handbag.")

The folder holds `guard.json`, `detector/` and, unless harmful answers are only refused, `detoxifier/`:

    {"detector": "detector", "detoxifier": "detoxifier", "threshold": 0.5,
     "categories": ["violence", …], "refusals": {"violence": "I will not help to hurt somebody. …"},
     "questions": {"folder": "questions", "alone": [0.6, 0.4, 0.5, 0.2], "answered": [0.9, 0.3, -0.1]}}

The detector is a sequence classifier: its first logit says harm, the others which of the categories. "questions", which
a small detector needs, are n-grams, a network and an encoder that judge a question alone, and beside the detector one
with an answer; the numbers are those of `parts.Questions`. The detoxifier is a language model that goes on from
`template.rewrite_prompt`; what it writes is judged again, and refused if it is still harmful. The detector reads what a
text hides by spelling or encoding (`normalise`), as it did in training. Texts that are longer than it reads at once
("max_length" tokens, where that is less than the model could) are judged in overlapping pieces; the most harmful one
counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detgpt.errors import InputError, ModelError
from detgpt.guards import Exchange, Verdict
from detgpt.models import guard_folder

GUARD_FILE = "guard.json"


class Protector:
    """The guard of a folder, loaded once; safe to call from several threads.

    folder: "picto", the one that comes with the package, or a path.
    threshold: the least score that is harm, in (0, 1); the folder's own unless given.
    detoxify: False refuses harmful answers instead of rewriting them, and leaves the detoxifier on the disk.
    device: where it runs, such as "cpu" or "cuda"; a GPU where there is one unless given.

    Raises `ModelError` for a folder that is not whole, `InputError` for a wrong argument.
    """

    def __init__(
        self,
        folder: str | Path = "picto",
        *,
        device: str | None = None,
        threshold: float | None = None,
        detoxify: bool = True,
    ) -> None:
        place = guard_folder(folder)
        self.described = _read_description(place)
        self.threshold = self.described.threshold if threshold is None else threshold
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold={self.threshold!r} is no chance of harm: give a fraction between 0 and 1")
        from detgpt.device import choose_device
        from detgpt.guards.parts import Detoxifier, HarmDetector, Questions

        self.name = str(folder)
        on = choose_device(device)
        self._detector = HarmDetector(
            place / self.described.detector,
            self.described.categories,
            on,
            max_length=self.described.max_length,
            questions=None if self.described.questions is None else Questions.load(place, self.described.questions, on),
        )
        rewriter = self.described.detoxifier if detoxify else None
        self._detoxifier = None if rewriter is None else Detoxifier(place / rewriter, on)

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """The verdict on an answer to a question; without an answer, on the question alone.

        Raises `InputError` for a text that is too long to be judged.
        """
        return self.check_batch([(question, answer)])[0]

    def check_batch(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """`check` for each of several pairs of a question and an answer, in order."""
        scored = zip(exchanges, self._detector.score(exchanges), strict=True)
        return [self._verdict(exchange, *score) for exchange, score in scored]

    def _verdict(self, exchange: Exchange, score: float, category: str | None) -> Verdict:
        question, answer = exchange
        if score < self.threshold:
            return Verdict.passed(score, answer)
        if answer is not None and self._detoxifier is not None:
            rewritten = self._detoxifier.rewrite(question, answer)
            if rewritten and self._detector.score([(question, rewritten)])[0][0] < self.threshold:
                return Verdict.detoxified(score, category, answer, rewritten)
        return Verdict.refused(score, category, answer, self.described.refusals)


@dataclass(frozen=True)
class Description:
    """What `guard.json` says; `detector` and `detoxifier` are folders beside it."""

    detector: str
    detoxifier: str | None = None
    threshold: float = 0.5
    max_length: int | None = None
    categories: Sequence[str] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    questions: Mapping[str, Any] | None = None


def _read_description(folder: Path) -> Description:
    file = folder / GUARD_FILE
    try:
        described = Description(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder} is no guard ({error}): it must hold {GUARD_FILE} with 'detector', and may have 'detoxifier', "
            "'threshold', 'max_length', 'categories', 'refusals' and 'questions'"
        ) from error
    if not isinstance(described.refusals, Mapping) or isinstance(described.categories, str):
        raise ModelError(f"{file}: 'categories' must be a list of names, and 'refusals' must map them to texts")
    return described
