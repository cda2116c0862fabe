"""A reasoner as its guard lets it speak.

    refuse a harmful wish → reason → check the answer: pass it as it is, have it rewritten, or refuse

It is a reasoner itself, so the pipeline grounds what was allowed and nothing else: a refusal is an answer without
targets. What was held back is logged, with what was shown instead, by the logger `detgpt.guards` at level INFO.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from detgpt.answer import RETRY_INSTRUCTION, format_answer, parse_answer
from detgpt.guards import Guard, Verdict
from detgpt.guards.reading import TextReader
from detgpt.guards.template import conversation
from detgpt.reasoners import RawAnswer, Reasoner, Request

SENTENCE_END = re.compile(r"[.!?…](?=\s)|[。！？]|\n")

log = logging.getLogger("detgpt.guards")


class GuardedReasoner:
    """`reasoner`, of which nothing harmful is heard. Safe to call from several threads, as its parts are.

    reader: reads the writing in pictures, which is then judged like a wish; None: it is not read.
    """

    def __init__(self, reasoner: Reasoner, guard: Guard, reader: TextReader | None = None) -> None:
        self.name = reasoner.name
        self.unguarded = reasoner
        self._guard = guard
        self._reader = reader

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        """One answer per request, in order, each with its verdict; a refused request never reaches the reasoner."""
        refusals = self._refusals(requests)
        allowed = [request for request, refusal in zip(requests, refusals, strict=True) if refusal is None]
        raws = self.unguarded.reason(allowed, max_new_tokens=max_new_tokens) if allowed else []
        verdicts = self._guard.check_batch([(_question(r), raw.text) for r, raw in zip(allowed, raws, strict=True)])
        checked = iter([_shown(*each) for each in zip(allowed, raws, verdicts, strict=True)])
        return [next(checked) if refusal is None else refusal for refusal in refusals]

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        """The answer sentence by sentence, each after a check of all that was said so far; the verdict is on the whole.

        From a harmful sentence on nothing is passed on until the answer has ended. Then comes the rest of it, where the
        whole is harmless after all, or what is shown instead.
        """
        (refusal,) = self._refusals([request])
        if refusal is not None:
            yield refusal.text
            return refusal
        heard, released, harmful = "", 0, False
        with closing(self.unguarded.stream(request, max_new_tokens=max_new_tokens)) as pieces:
            while True:
                try:
                    heard += next(pieces)
                except StopIteration as stop:
                    raw: RawAnswer = stop.value
                    break
                end = _last_sentence_end(heard, released)
                if end > released and not harmful:
                    harmful = self._guard.check(_question(request), heard[:end]).harmful
                    if not harmful:
                        yield heard[released:end]
                        released = end
        shown = _shown(request, raw, self._guard.check(_question(request), raw.text))
        if shown.text != raw.text:
            yield ("\n\n" if released else "") + shown.text
        elif rest := raw.text[released:]:
            yield rest
        return shown

    def _refusals(self, requests: Sequence[Request]) -> list[RawAnswer | None]:
        """For each request the refusal of its wish or of the writing in its picture; None where it may be asked."""
        asked = [self._questions(request) for request in requests]
        verdicts = iter(self._guard.check_batch([(text, None) for questions in asked for text, _ in questions]))
        refusals: list[RawAnswer | None] = []
        for request, questions in zip(requests, asked, strict=True):
            judged = [
                verdict.in_picture() if from_picture else verdict
                for (_, from_picture), verdict in zip(questions, verdicts, strict=False)
            ]
            harmful = next((verdict for verdict in judged if verdict.harmful), None)
            refusals.append(None if harmful is None else _shown(request, RawAnswer(""), harmful))
        return refusals

    def _questions(self, request: Request) -> list[tuple[str, bool]]:
        """What is judged before the reasoner is asked, and whether it has words of the picture in it."""
        questions = [(wish, False) for wish in (*_wishes(request), _question(request))]
        written = self._reader.read(request.image) if self._reader and request.image else ""
        if written.strip():
            questions += [(written, True), (conversation([_wishes(request)[-1], written]), True)]
        return list(dict.fromkeys(questions))


def _wishes(request: Request) -> list[str]:
    """What the user asked, oldest first; not our own asking again for the form."""
    said = [*(turn.instruction for turn in request.history), request.instruction]
    return [wish for wish in said if wish != RETRY_INSTRUCTION] or said


def _question(request: Request) -> str:
    return conversation(_wishes(request))


def _last_sentence_end(text: str, start: int) -> int:
    """Where the last sentence that has ended ends, at or after `start`."""
    return max((match.end() for match in SENTENCE_END.finditer(text, start)), default=start)


def _shown(request: Request, raw: RawAnswer, verdict: Verdict) -> RawAnswer:
    """The answer that may be shown, with its verdict; one that is not the reasoner's own has its last line added."""
    if verdict.action == "pass":
        return replace(raw, guard=verdict)
    log.info(
        "%s, because %s (%.2f). Asked: %r. Held back: %r. Shown: %r",
        *(verdict.action, verdict.reason, verdict.score, request.instruction, verdict.original, verdict.text),
    )
    text = format_answer(verdict.text, []) if parse_answer(verdict.text).problem else verdict.text
    return RawAnswer(text, guard=verdict)
