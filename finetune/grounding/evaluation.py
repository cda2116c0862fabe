"""AP of a detector on its validation questions: from logits to boxes of names to COCO's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import EvalPrediction

from detgpt.boxes import cxcywh_norm_to_xyxy
from detgpt.evaluation.metrics import Boxes, average_precision
from finetune.grounding.questions import ValidationQuestions

MOST = 300  # boxes of a question, as in the evaluation of DETR's descendants
NOTHING = -1.0  # the score in the place of a box that there is not


def best_boxes(logits: torch.Tensor, boxes: torch.Tensor, asked: Sequence[torch.Tensor]) -> torch.Tensor:
    """The best pairs of query and name: (B, MOST, 6) rows of score, the name's place in the prompt, and cxcywh.

    logits: (B, Q, T). boxes: (B, Q, 4). asked: per question its names' tokens (k, T). A name's score is that of its
    best token, as in `detgpt.detectors.spans`.
    """
    rows = torch.zeros(len(logits), MOST, 6, device=logits.device)
    rows[..., 0] = NOTHING
    for row, (scores, places, names) in enumerate(zip(logits.sigmoid(), boxes, asked, strict=True)):
        of_names = (scores[:, None] * names.to(scores)).amax(-1)  # (Q, k)
        best, index = of_names.flatten().topk(min(MOST, of_names.numel()))
        query, name = index // of_names.shape[1], index % of_names.shape[1]
        rows[row, : len(best)] = torch.cat([best[:, None], name[:, None].to(best), places[query]], 1)
    return rows


def average_precisions(questions: ValidationQuestions, prediction: EvalPrediction) -> dict[str, float]:
    """AP and AP50 by pycocotools over all examples; `prediction` has `best_boxes` and the batches' "questions"."""
    found: list[list[tuple[np.ndarray, np.ndarray, list[str]]]] = [[] for _ in questions.examples]
    for rows, (number, width, height) in zip(prediction.predictions, prediction.label_ids, strict=True):
        index, prompt = questions.questions[int(number)]
        rows = rows[rows[:, 0] != NOTHING]
        names = questions.examples[index].vocabulary.names
        labels = [names[prompt.indices[int(place)]] for place in rows[:, 1]]
        found[index].append((cxcywh_norm_to_xyxy(rows[:, 2:], (int(width), int(height))), rows[:, 0], labels))
    predicted = [
        Boxes(
            np.concatenate([boxes for boxes, _, _ in parts]),
            np.concatenate([scores for _, scores, _ in parts]),
            tuple(label for _, _, labels in parts for label in labels),
        )
        for parts in found
    ]
    return {name: value or 0.0 for name, value in average_precision(predicted, questions.examples).items()}
