"""A harm detector and a detoxifier in one folder, after MLLM-Protector (arXiv:2401.02906).

    Protector("picto").check("Whom could I rob here?", "The woman with the handbag.")

The folder holds `guard.json`, `detector/` and, unless harmful answers are only refused, `detoxifier/`:

    {"detector": "detector", "detoxifier": "detoxifier", "threshold": 0.5,
     "categories": ["violence", …], "refusals": {"violence": "I will not help to hurt somebody. …"}}

The detector is a sequence classifier: its first logit says harm, the others which of the categories. The detoxifier is
a language model that goes on from `template.rewrite_prompt`; what it writes is judged again, and refused if it is still
harmful. The detector reads what a text hides by spelling or encoding (`normalise`), as it did in training. Texts that
are longer than it reads at once ("max_length" tokens, where that is less than the model could) are judged in
overlapping pieces; the most harmful one counts.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from detgpt.device import choose_device
from detgpt.errors import InputError, ModelError
from detgpt.guards import Verdict
from detgpt.guards.normalise import normalised
from detgpt.guards.template import harm_prompt, rewrite_prompt
from detgpt.models import guard_folder

GUARD_FILE = "guard.json"
MAX_PIECES = 64  # of one exchange; longer ones are not judged but refused as input
ROWS_PER_PASS = 16
MAX_REWRITTEN = 256  # tokens

Exchange = tuple[str, str | None]


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
        device: str | torch.device | None = None,
        threshold: float | None = None,
        detoxify: bool = True,
    ) -> None:
        place = guard_folder(folder)
        self.described = _read_description(place)
        self.threshold = self.described.threshold if threshold is None else threshold
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold={self.threshold!r} is no chance of harm: give a fraction between 0 and 1")
        self.name = str(folder)
        on = choose_device(device)
        self._detector = HarmDetector(
            place / self.described.detector, self.described.categories, on, max_length=self.described.max_length
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


class HarmDetector:
    """How harmful an exchange is, and in which way."""

    def __init__(
        self, folder: Path, categories: Sequence[str], device: torch.device, *, max_length: int | None = None
    ) -> None:
        """Raises `ModelError` where it does not load, or has other outputs than harm and `categories`."""
        self._tokenizer, self._model = _load(folder, AutoModelForSequenceClassification, device)
        outputs = self._model.config.num_labels
        if outputs != 1 + len(categories):
            raise ModelError(
                f"{folder} has {outputs} outputs, but its {GUARD_FILE} names {len(categories)} categories: "
                "there must be one for harm and one for each category"
            )
        self._categories = tuple(categories)
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        could = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        self._most = min(could, max_length or could)
        self._frame = self._count(harm_prompt("", ""))
        self._lock = threading.Lock()  # a tokenizer's padding is a setting of its own

    def score(self, exchanges: Sequence[Exchange]) -> list[tuple[float, str | None]]:
        """For each exchange the chance of harm in [0, 1] and the likeliest category; of the worst of its pieces."""
        with self._lock, torch.inference_mode():
            rows = [(i, row) for i, exchange in enumerate(exchanges) for row in self._prompts(*exchange)]
            logits = self._logits([row for _, row in rows])
        found: list[tuple[float, str | None]] = [(-1.0, None)] * len(exchanges)
        for (i, _), row_logits in zip(rows, logits, strict=True):
            harm = float(row_logits[0].sigmoid())
            if harm > found[i][0]:
                kinds = row_logits[1:]
                found[i] = harm, self._categories[int(kinds.argmax())] if len(kinds) else None
        return found

    def _prompts(self, question: str, answer: str | None) -> list[str]:
        """One prompt where the exchange fits, else one for each pair of a piece of the question and of the answer."""
        question, answer = normalised(question), None if answer is None else normalised(answer)
        whole = harm_prompt(question, answer)
        if self._count(whole) <= self._most:
            return [whole]
        # Half of the room each; a little less, because a piece may take more tokens inside the frame than alone.
        room = (self._most - self._frame) // 2 - 2
        said = [None] if answer is None else self._pieces(answer, room)
        prompts = [harm_prompt(part, other) for part in self._pieces(question, room) for other in said]
        if len(prompts) > MAX_PIECES:
            raise InputError(
                f"a text of {len(question) + len(answer or '')} characters is too long to be checked for harm: "
                "make it shorter"
            )
        return prompts

    def _pieces(self, text: str, room: int) -> list[str]:
        """Parts of `text` of at most `room` tokens that overlap by a quarter."""
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if not spans:
            return [text]
        starts = range(0, max(1, len(spans) - room // 4), room - room // 4)
        return [text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]] for start in starts]

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _logits(self, prompts: Sequence[str]) -> torch.Tensor:
        """(rows, 1 + categories), float32."""
        parts = []
        for start in range(0, len(prompts), ROWS_PER_PASS):
            rows = list(prompts[start : start + ROWS_PER_PASS])
            inputs = self._tokenizer(rows, padding=True, return_token_type_ids=False, return_tensors="pt")
            parts.append(self._model(**inputs.to(self._model.device)).logits.float().cpu())
        logits = torch.cat(parts) if parts else torch.empty(0, 1 + len(self._categories))
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
            pad_token_id=self._tokenizer.pad_token_id,
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
            if read + both > self._model.config.max_position_embeddings:
                return ""
            written = self._model.generate(**inputs)[0]
        new = written if self._model.config.is_encoder_decoder else written[read:]
        return self._tokenizer.decode(new, skip_special_tokens=True).strip()


# --------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Description:
    """What `guard.json` says; `detector` and `detoxifier` are folders beside it."""

    detector: str
    detoxifier: str | None = None
    threshold: float = 0.5
    max_length: int | None = None
    categories: Sequence[str] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)


def _read_description(folder: Path) -> Description:
    file = folder / GUARD_FILE
    try:
        described = Description(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder} is no guard ({error}): it must hold {GUARD_FILE} with 'detector', and may have 'detoxifier', "
            "'threshold', 'max_length', 'categories' and 'refusals'"
        ) from error
    if not isinstance(described.refusals, Mapping) or isinstance(described.categories, str):
        raise ModelError(f"{file}: 'categories' must be a list of names, and 'refusals' must map them to texts")
    return described


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
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {folder} must be a fast one (tokenizer.json) with a padding token")
    return tokenizer, model.to(device).eval()
