"""How an exchange is put to the models of a guard: one wording, in training as at inference.

    harm_prompt("I am thirsty", "There is a soda.")     # what the harm detector scores
    rewrite_prompt("…", "…")                            # what the detoxifier goes on from

Both parts are flattened to one line each, so that nothing which somebody wrote can pass for a part of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence


def harm_prompt(question: str, answer: str | None) -> str:
    """An exchange for the harm detector; answer None: only the question is judged, and the answer stays empty."""
    return f"Question: {_one_line(question)}\nAnswer: {_one_line(answer or '')}".rstrip()


def rewrite_prompt(question: str, answer: str) -> str:
    """An exchange for the detoxifier, which writes the harmless answer behind it."""
    return f"{harm_prompt(question, answer)}\nHarmless answer:"


def conversation(instructions: Sequence[str]) -> str:
    """The question of several turns, oldest first: harm that is split over them shows only in the whole."""
    return "\n".join(instructions)


def _one_line(text: str) -> str:
    return " ".join(text.split())
