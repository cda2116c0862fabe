"""How right a reasoner is, and whether it knows: by its own answers to wishes, and token by token of true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from detgpt import terminal
from detgpt.answer import parse_answer
from detgpt.confidence import name_confidence
from detgpt.evaluation.calibration import summary
from detgpt.evaluation.judging import Judged
from detgpt.images import load_image
from detgpt.reasoners import Request
from detgpt.reasoners.chat import is_bare
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.answering import answering
from finetune.batching import collator
from finetune.data.records import Row, load_records
from finetune.distill.student import answered_logits
from finetune.distill.trust import temperature_loss
from finetune.encoding import RecordEncoder
from finetune.stages.reasoner import Paths


def wishes_answered(
    model: Any, processor: Any, records: Sequence[Row], *, batch_size: int = 16, max_new_tokens: int = 160
) -> tuple[dict[str, float], Judged]:
    """Ask the wishes of `records`, which are about pictures and have their 'targets'.

    exact: share of wishes to which exactly the true names are given; f1: of the names, pooled. The second are the named
    targets, each with the probability that the reasoner gave to it (`detgpt.answer.name_confidence`).
    """
    longest_first = sorted(range(len(records)), key=lambda i: -len(records[i]["instruction"]))
    exact, hits, named, true = 0, 0, 0, 0
    claims: list[tuple[float, bool, int]] = []
    with answering(model), terminal.progress("answers") as move:
        reasoner = HuggingFaceReasoner.of(model, processor, "the student")
        for start in range(0, len(records), batch_size):
            rows = longest_first[start : start + batch_size]
            wishes = [Request(load_image(records[i]["image"]), records[i]["instruction"]) for i in rows]
            for i, raw in zip(rows, reasoner.reason(wishes, max_new_tokens=max_new_tokens), strict=True):
                answer = parse_answer(raw.text)
                wanted = {name.casefold() for name in records[i]["targets"]}
                said = {name.casefold() for name in answer.names}
                exact += said == wanted and answer.problem is None
                hits, named, true = hits + len(said & wanted), named + len(said), true + len(wanted)
                for name, span in zip(answer.names, answer.spans, strict=True):
                    claims.append((name_confidence(raw, span) or 0.0, name.casefold() in wanted, i))
            move(min(start + batch_size, len(records)), len(records))
    sure, right, pictures = (np.array(column) for column in zip(*claims, strict=True)) if claims else [np.empty(0)] * 3
    judged = Judged(sure.astype(np.float64), right.astype(bool), pictures.astype(np.int64))
    return {"exact": exact / len(records), "f1": 2 * hits / max(named + true, 1)}, judged


def true_answers(model: Any, processor: Any, paths: Paths, *, batch_size: int = 16) -> dict[str, float | None]:
    """`detgpt.evaluation.calibration.summary` of the likeliest token at each place of the records' true answers, and
    `true_nll`, the mean of −log of the probability that the true token has."""
    encoder = RecordEncoder(processor, bare=is_bare(model.config))
    records: Any = load_records(paths).with_transform(encoder)
    logits, labels = answered_logits(
        model, DataLoader(records, batch_size=batch_size, collate_fn=collator(model, processor))
    )
    said = logits.argmax(-1)
    sure = (-temperature_loss(logits, said, 1.0)).exp()
    numbers = summary(sure.numpy(), (said == labels).numpy())
    return {**numbers, "true_nll": float(temperature_loss(logits, labels, 1.0).mean())}
