"""Answers that a model gives by chance: several to every wish, in batches.

    answers = sample(model, processor, records, count=8, seed=1)      # 8 answers to each record

A wish is asked as at inference, by the reasoner that `detgpt` itself asks: worded the same, padded on the left, stopped
where the answer line is complete. An image is encoded once for all answers to it, where the family allows that
(`detgpt.reasoners.prefix`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from pydantic import Field

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.answering import answering
from finetune.recipe import Settings


class SamplingSettings(Settings):
    """count: answers to each wish. temperature, top_p: of what is drawn from (Holtzman et al. 2020, arXiv:1904.09751).
    max_new_tokens: of an answer. batch_size: wishes that are answered together, each `count` times.
    """

    count: int = Field(default=8, ge=1)
    temperature: float = Field(default=0.85, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)


def sample(
    model: Any,
    processor: Any,
    records: Sequence[Mapping[str, Any]],
    *,
    count: int,
    temperature: float = 0.85,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[str]]:
    """`count` answers to each record's wish, in order; the same ones for the same arguments on the same machine.

    records: of `finetune.data.records`, wishes about images. temperature: 0 gives the likeliest answer, and then
    `count` has to be 1. batch_size: wishes that are answered together, those of like length. The model is left as it
    was, and so is torch's generator. Raises `InputError` for a record that is no wish, or settings that do not go
    together.
    """
    if temperature == 0 and count > 1:
        raise InputError(f"count={count} answers at temperature=0 would all be the same: give a higher temperature")
    check_wishes(records)
    chance = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    longest_first = sorted(range(len(records)), key=lambda i: -len(records[i]["instruction"]))
    answers: dict[int, list[str]] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with answering(model), torch.random.fork_rng(devices), terminal.progress("answers") as progress:
        reasoner = HuggingFaceReasoner.of(model, processor, "the model", kept_images=batch_size)
        model.generation_config.update(do_sample=temperature > 0, **chance)
        torch.manual_seed(seed)
        progress(0, len(records) * count)
        for start in range(0, len(records), batch_size):
            rows = longest_first[start : start + batch_size]
            wishes = [Request(load_image(records[i]["image"]), records[i]["instruction"]) for i in rows]
            raws = reasoner.reason([wish for wish in wishes for _ in range(count)], max_new_tokens=max_new_tokens)
            texts = [raw.text for raw in raws]
            answers |= {i: texts[n * count : (n + 1) * count] for n, i in enumerate(rows)}
            progress(len(answers) * count, len(records) * count)
    return [answers[i] for i in range(len(records))]


def check_wishes(records: Sequence[Mapping[str, Any]]) -> None:
    """Raises `InputError`, which names the first record that is no wish about an image."""
    for record in records:
        if record.get("instruction") is None or record.get("image") is None:
            raise InputError(f"{record.get('where') or 'a record'}: only a wish about an image can be answered here")


def distinct_2(answers: Sequence[str]) -> float:
    """Distinct pairs of neighbouring words, as a share of all pairs; 0 where there is none.

    How varied texts are, in [0, 1] (Li et al. 2016, arXiv:1510.03055). It falls with the number of texts, so compare
    only as many.
    """
    pairs = list(chain.from_iterable(pairwise(answer.split()) for answer in answers))
    return len(set(pairs)) / len(pairs) if pairs else 0.0
