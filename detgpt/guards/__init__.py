"""The guard protocol: a question and its answer in, a verdict out. Imports no model code.

A guard judges what was asked and what is about to be said. It lets harmless words through as they are, has harmful
answers rewritten, or refuses with a reason. Backends, one file each: `protector` (a harm detector and a detoxifier,
after MLLM-Protector, arXiv:2401.02906; beside a small detector `ngrams`, `network` and `encoder`), `served` (a guard
model on an OpenAI-compatible server). `guarded` puts one before a reasoner, `reading` reads what is written in a
picture, `template` has the wording that the models of a guard are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

Action = Literal["pass", "detoxified", "refused"]
Place = Literal["instruction", "picture", "answer"]
Exchange = tuple[str, str | None]  # a question, and its answer if there is one

REFUSAL = "I would rather not help with this, because somebody could come to harm. Ask me for something else."


@dataclass(frozen=True)
class Verdict:
    """What a guard found, and what it did about it.

    harmful: whether it saw harm.
    category: the kind of harm, in the guard's own words; None where there is none, or the guard names none.
    score: how sure it is of harm, in [0, 1].
    action: "pass": the answer goes on as it is, byte for byte; "detoxified": it was rewritten; "refused".
    where: what was harmful: the instruction, text in the picture, or the answer; None where nothing was.
    original: the answer that was held back; None where none was. It is for logs: never show it. It is no part of
        `repr`, of equality or of `to_dict`.
    text: what may be shown: the answer, its rewriting, or a refusal; empty where a question passed.
    reason: for people, why; empty where nothing was found.
    """

    harmful: bool
    category: str | None
    score: float
    action: Action
    where: Place | None
    original: str | None = field(repr=False, compare=False)
    text: str
    reason: str

    @classmethod
    def passed(cls, score: float, answer: str | None = None) -> Verdict:
        """No harm: `answer` may be shown as it is."""
        return cls(False, None, score, "pass", None, None, answer or "", "")

    @classmethod
    def refused(
        cls, score: float, category: str | None, answer: str | None, refusals: Mapping[str, str] | None = None
    ) -> Verdict:
        """Harm in a question (`answer` None) or in an answer: `refusals`, by category, have the words."""
        where: Place = "instruction" if answer is None else "answer"
        text = (refusals or {}).get(category or "", REFUSAL)
        return cls(True, category, score, "refused", where, answer, text, _reason(where, category))

    @classmethod
    def detoxified(cls, score: float, category: str | None, answer: str, rewritten: str) -> Verdict:
        """Harm in an answer, which was rewritten."""
        return cls(True, category, score, "detoxified", "answer", answer, rewritten, _reason("answer", category))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, safe for JSON and for any eye: not the original."""
        values = {name: value for name, value in asdict(self).items() if name != "original"}
        return {**values, "score": round(self.score, 4)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`, up to its rounding. Raises `TypeError` for anything else."""
        return cls(**values, original=None)

    def in_picture(self) -> Verdict:
        """The same of words that stand in the picture."""
        text = f"Something is written in this picture that I will not follow. {self.text}"
        return replace(self, where="picture", text=text, reason=_reason("picture", self.category))


def _reason(where: Place, category: str | None) -> str:
    return f"the {where} looks harmful" + (f": {category}" if category else "")


class Guard(Protocol):
    """Judges exchanges. Safe to call from several threads.

    A guard that cannot judge raises `ModelError` or `InputError`; it never passes what it did not read.
    """

    name: str

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """The verdict on an answer to a question; without an answer, on the question alone."""
        ...

    def check_batch(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """`check` for each of several pairs of a question and an answer, in order."""
        ...
