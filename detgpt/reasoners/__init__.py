"""What a reasoner is: it looks at an image, thinks about an instruction, and answers in text.

Backends, one file each: `huggingface` (any image-text-to-text checkpoint), `openai` (any OpenAI-compatible
server), `scripted` (answers from a script). This module imports no model code.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from detgpt.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from detgpt.guards import Verdict


@dataclass(frozen=True)
class Turn:
    """One finished exchange about the same image."""

    instruction: str
    answer: str


@dataclass(frozen=True)
class Request:
    """An RGB image, what the user wants, and what was said about this image before (oldest first).

    image: None asks the language model alone. A batch has images in all of its requests, or in none.
    verbatim: the instruction is a prompt of its own; the three steps and the answer's form are not added.

    Raises `InputError` for an instruction without text.
    """

    image: Image.Image | None
    instruction: str
    history: tuple[Turn, ...] = ()
    verbatim: bool = False

    def __post_init__(self) -> None:
        if not self.instruction.strip():
            raise InputError("the instruction is empty: say in words what you want to find")


@dataclass(frozen=True)
class TokenSpan:
    """Characters [start, end) of the answer text that one token wrote, and its natural log-probability.

    Tokens that share a character (the bytes of one letter) carry the same span.
    """

    start: int
    end: int
    logprob: float


@dataclass(frozen=True)
class RawAnswer:
    """The text as the model wrote it; tokens None: unknown; complete False: cut at max_new_tokens.

    guard: what a guard found, whose text this is where it did not let the model's pass; None: nobody looked.
    """

    text: str
    tokens: tuple[TokenSpan, ...] | None = None
    complete: bool = True
    guard: Verdict | None = None


def check_prompt(prompt: str | None) -> None:
    """Raise `InputError` for something that is no way to put an instruction to a model."""
    if prompt not in (None, "full", "bare"):
        raise InputError(f'prompt must be "full" or "bare", not {prompt!r}')


class Reasoner(Protocol):
    """Answers requests in text. Safe to call from several threads."""

    name: str

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        """One answer per request, in order. Raises `InputError` (a wrong argument) or `ModelError`."""
        ...

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        """A generator of text pieces that returns the `RawAnswer` (`StopIteration.value`) they add up to."""
        ...
