"""What a model of transformers writes, followed token by token: the text, who wrote which letters, and how surely."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from detgpt.answer import answer_is_complete
from detgpt.reasoners import RawAnswer, TokenSpan


class Logprobs(LogitsProcessor):
    """Changes no score and remembers those of the step at hand: no (steps, batch, vocabulary) tensor is kept.

    A step writes one token, or with an assistant those of its draft that the model kept and one more. This is a class,
    because at every step transformers looks the signature of `__call__` up, which takes half a millisecond for a method
    in its place.
    """

    def __init__(self) -> None:
        self._scores: dict[int, torch.Tensor] = {}  # (batch, vocabulary) by the number of tokens before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.latest = input_ids.shape[1]  # an assistant's scores are followed by the model's own
        self._scores[self.latest] = scores
        return scores

    @property
    def first(self) -> int:
        return min(self._scores)

    def of(self, new_ids: torch.Tensor, place: int) -> torch.Tensor:
        """Natural log-probabilities of `new_ids` (batch, 1) after `place` tokens."""
        scores = self._scores[place]
        return scores.gather(-1, new_ids) - scores.logsumexp(-1, keepdim=True)

    def clear(self) -> None:
        self._scores.clear()


class Recorder(StoppingCriteria):
    """Follows `generate` step by step: hands each new token to its row's writer and says which rows are done."""

    def __init__(
        self,
        writers: list[Writer],
        on_text: Callable[[str], None] | None,
        abandoned: threading.Event | None,
    ) -> None:
        self._writers = writers
        self._on_text = on_text or (lambda piece: None)
        self._abandoned = abandoned
        self.logprobs = Logprobs()
        self.drafted = self.accepted = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        before, latest, after = self.logprobs.first, self.logprobs.latest, input_ids.shape[1]
        self.drafted += latest - before
        self.accepted += after - before - 1
        for place in range(before, after):
            new_ids = input_ids[:, place : place + 1]
            logprobs = self.logprobs.of(new_ids, place)
            steps = zip(self._writers, new_ids[:, 0].tolist(), logprobs[:, 0].tolist(), strict=True)
            for writer, token_id, logprob in steps:
                if not writer.done:  # a finished row gets padding
                    writer.add(token_id, logprob, self._on_text)
        self.logprobs.clear()
        given_up = self._abandoned is not None and self._abandoned.is_set()
        done = [given_up or writer.done for writer in self._writers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def answers(self) -> list[RawAnswer]:
        for writer in self._writers:
            writer.flush(self._on_text)
        return [RawAnswer(writer.text, tuple(writer.tokens), writer.done) for writer in self._writers]


class Writer:
    """One row's text as it grows, and the characters that each token wrote.

    A token's text depends on its neighbours (leading spaces, letters of several bytes), so tokens are decoded
    together with the piece before them, and tokens that end within a letter wait for the rest of it.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], inside_thought: bool) -> None:
        self.text = ""
        self.tokens: list[TokenSpan] = []
        self.done = False
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._thought_prefix = "<think>" if inside_thought else ""
        self._written: list[int] = []  # the last piece's ids: context for decoding what follows
        self._waiting: list[int] = []
        self._waiting_logprobs: list[float] = []

    def add(self, token_id: int, logprob: float, on_text: Callable[[str], None]) -> None:
        if token_id in self._end_ids:
            self.done = True
            self.flush(on_text)
        elif token_id not in self._special_ids:
            self._waiting.append(token_id)
            self._waiting_logprobs.append(logprob)
            piece = self._new_text()
            if piece and not piece.endswith("\ufffd"):
                self._write(piece, on_text)
                self.done = "]" in piece and answer_is_complete(self._thought_prefix + self.text)

    def flush(self, on_text: Callable[[str], None]) -> None:
        """Write what still waits: a letter that never got its last byte."""
        if self._waiting:
            self._write(self._new_text(), on_text)

    def _new_text(self) -> str:
        before = self._decode(self._written)
        return self._decode(self._written + self._waiting)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _write(self, piece: str, on_text: Callable[[str], None]) -> None:
        start, end = len(self.text), len(self.text) + len(piece)
        self.tokens += [TokenSpan(start, end, min(logprob, 0.0)) for logprob in self._waiting_logprobs]
        self.text += piece
        self._written, self._waiting, self._waiting_logprobs = self._waiting, [], []
        on_text(piece)
