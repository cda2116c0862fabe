"""The two models of a guard's folder: the harm detector, which classifies, and the detoxifier, which writes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from detgpt.errors import InputError, ModelError
from detgpt.guards import Exchange
from detgpt.guards.encoder import QuestionEncoder
from detgpt.guards.network import QuestionNetwork
from detgpt.guards.ngrams import NGrams
from detgpt.guards.normalise import normalised
from detgpt.guards.template import harm_prompt, rewrite_prompt

MAX_PIECES = 64  # of one exchange; longer ones are not judged but refused as input
ROWS_PER_PASS = 16
MAX_REWRITTEN = 256  # tokens


@dataclass
class Questions:
    """What judges questions in a detector's place, and has a say in answers: a detector that has read little tells
    answers well, questions less. It names the kind of harm, too.

    alone: the factors of the logits of the three for a question, and a bias. answered: the factors of the detector's
    logit for an exchange and of its question's, and a bias. Both are logistic regressions.
    """

    ngrams: NGrams
    network: QuestionNetwork
    encoder: QuestionEncoder
    alone: tuple[float, ...] = (0.3, 0.3, 0.3, 0.0)
    answered: tuple[float, ...] = (1.0, 0.0, 0.0)
    _said: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def load(cls, guard: Path, described: Mapping[str, Any], device: torch.device) -> Questions:
        """Those that a guard's folder describes as "folder", "alone" and "answered". Raises `ModelError`."""
        try:
            alone, answered = (tuple(map(float, described[name])) for name in ("alone", "answered"))
            folder = guard / described["folder"]
            if (len(alone), len(answered)) != (4, 3):
                raise ValueError(f"got {len(alone)} and {len(answered)}")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{guard}: 'questions' must have 'folder', four numbers 'alone' and three 'answered': {error!r}"
            ) from error
        return cls.of(folder, device, alone=alone, answered=answered)

    @classmethod
    def of(cls, folder: Path, device: torch.device, **factors: tuple[float, ...]) -> Questions:
        """Those of a folder. Raises `ModelError`."""
        return cls(NGrams.load(folder), QuestionNetwork.load(folder), QuestionEncoder.load(folder, device), **factors)

    def asked(self, questions: Sequence[str]) -> np.ndarray:
        """The logits of harm of questions, (N,): of the worst that is said in one, line by line and as a whole."""
        parts = [
            list(dict.fromkeys([" ".join(question.split()), *filter(str.strip, question.splitlines())]))
            for question in questions
        ]
        said = self.said([part for these in parts for part in these])
        *factors, bias = self.alone
        logits = said @ np.array(factors) + bias
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return np.maximum.reduceat(logits, starts) if len(parts) else logits

    def said(self, texts: Sequence[str]) -> np.ndarray:
        """The logits of n-grams, network and encoder, (N, 3).

        Those of the last call are kept: a question is judged before it is answered, and again with each sentence.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._said]
        logits = np.stack([part.score(new) for part in (self.ngrams, self.network, self.encoder)], axis=1)
        known = self._said | dict(zip(new, logits, strict=True))
        self._said = {text: known[text] for text in texts}
        return np.array([known[text] for text in texts], np.float32).reshape(-1, 3)

    def mix(self, exchanges: Sequence[Exchange], logits: np.ndarray) -> np.ndarray:
        """The logits of harm of exchanges, (N,), from those of the detector, (N,), of which those without an answer
        do not matter."""
        asked = self.asked([question for question, _ in exchanges])
        of_exchange, beside, bias = self.answered
        alone = np.array([answer is None for _, answer in exchanges], bool)
        return np.where(alone, asked, of_exchange * logits + beside * asked + bias)


class HarmDetector:
    """How harmful an exchange is, and in which way. `questions` judge the questions in its place, if they are there."""

    def __init__(
        self,
        folder: Path,
        categories: Sequence[str],
        device: torch.device,
        *,
        max_length: int | None = None,
        questions: Questions | None = None,
    ) -> None:
        """Raises `ModelError` where it does not load, or has other outputs than harm and `categories`."""
        self._tokenizer, self._model = _load(folder, AutoModelForSequenceClassification, device)
        if not self._tokenizer.is_fast or self._tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer in {folder} must be a fast one (tokenizer.json) with a padding token")
        outputs = self._model.config.num_labels
        if outputs != 1 + len(categories):
            raise ModelError(
                f"{folder} has {outputs} outputs, but its guard names {len(categories)} categories: "
                "there must be one for harm and one for each category"
            )
        self._categories = tuple(categories)
        self.questions = questions
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        could = _window(self._tokenizer, self._model)
        self._most = min(could, max_length or could)
        self._frame = self._count(harm_prompt("", ""))
        self._lock = threading.Lock()  # a tokenizer's padding is a setting of its own

    def score(self, exchanges: Sequence[Exchange]) -> list[tuple[float, str | None]]:
        """For each exchange the chance of harm in [0, 1] and the likeliest category; of the worst of its pieces."""
        with self._lock, torch.inference_mode():
            rows = [(i, row) for i, exchange in enumerate(exchanges) for row in self._fitting(*exchange)]
            logits = self._logits([row for _, row in rows])
        found: list[tuple[float, str | None]] = [(-1.0, None)] * len(exchanges)
        for (i, row), row_logits in zip(rows, logits, strict=True):
            harm = float(row_logits[0].sigmoid())
            if harm > found[i][0]:
                found[i] = harm, self._kind(row, row_logits[1:])
        return found

    def _kind(self, exchange: Exchange, logits: torch.Tensor) -> str | None:
        if self.questions is not None:
            return self.questions.ngrams.kind(*exchange)
        return self._categories[int(logits.argmax())] if len(logits) else None

    def _fitting(self, question: str, answer: str | None) -> list[Exchange]:
        """The exchange where it fits, else one for each pair of a piece of the question and of the answer."""
        question, answer = normalised(question), None if answer is None else normalised(answer)
        if self._count(harm_prompt(question, answer)) <= self._most:
            return [(question, answer)]
        # Half of the room each; a little less, because a piece may take more tokens inside the frame than alone.
        room = (self._most - self._frame) // 2 - 2
        said = [None] if answer is None else self._pieces(answer, room)
        pieces = [(part, other) for part in self._pieces(question, room) for other in said]
        if len(pieces) > MAX_PIECES:
            raise InputError(
                f"a text of {len(question) + len(answer or '')} characters is too long to be checked for harm: "
                "make it shorter"
            )
        return pieces

    def _pieces(self, text: str, room: int) -> list[str]:
        """Parts of `text` of at most `room` tokens that overlap by a quarter."""
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if not spans:
            return [text]
        starts = range(0, max(1, len(spans) - room // 4), room - room // 4)
        return [text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]] for start in starts]

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _logits(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """(rows, 1 + categories), float32."""
        logits = torch.zeros(len(exchanges), 1 + len(self._categories))
        read = [i for i, (_, answer) in enumerate(exchanges) if answer is not None or self.questions is None]
        for start in range(0, len(read), ROWS_PER_PASS):
            rows = read[start : start + ROWS_PER_PASS]
            texts = [harm_prompt(*exchanges[i]) for i in rows]
            inputs = self._tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
            logits[rows] = self._model(**inputs.to(self._model.device)).logits.float().cpu()
        if self.questions is not None:
            logits[:, 0] = torch.from_numpy(self.questions.mix(exchanges, logits[:, 0].numpy()))
        if not torch.isfinite(logits).all():
            raise ModelError("the harm detector gave a number that is none: its weights are damaged")
        return logits


class Detoxifier:
    """Writes harmful answers anew."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises `ModelError` where it does not load."""
        config = _read_config(folder)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        self._tokenizer, self._model = _load(folder, kind, device)
        self._model.generation_config = GenerationConfig(
            max_new_tokens=MAX_REWRITTEN,
            do_sample=False,
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.eos_token_id,  # one row needs no padding, but `generate` asks for it
            decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        )
        self._lock = threading.Lock()

    def rewrite(self, question: str, answer: str) -> str:
        """The answer made harmless; empty where the exchange is longer than the model reads."""
        with self._lock, torch.inference_mode():
            inputs = self._tokenizer(
                rewrite_prompt(question, answer), return_tensors="pt", return_token_type_ids=False, verbose=False
            ).to(self._model.device)
            read = inputs["input_ids"].shape[1]
            both = 0 if self._model.config.is_encoder_decoder else MAX_REWRITTEN
            if read + both > _window(self._tokenizer, self._model):
                return ""
            written = self._model.generate(**inputs)[0]
        new = written if self._model.config.is_encoder_decoder else written[read:]
        return self._tokenizer.decode(new, skip_special_tokens=True).strip()


def _window(tokenizer: Any, model: Any) -> int:
    """How many tokens the model reads at once."""
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", sys.maxsize))


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a part of a guard from {folder}: {error}") from error


def _load(folder: Path, kind: Any, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model of one part, whole and in float32."""
    _read_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load a part of a guard from {folder}: {error} It must hold config.json, model.safetensors "
            "and the tokenizer's files."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors of its config.json, such as {missing[0]}; "
            "they would run as random numbers: train or copy the guard again"
        )
    return tokenizer, model.to(device).eval()
