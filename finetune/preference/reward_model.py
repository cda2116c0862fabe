"""A reward that was learned from preferences, for where the truth is not known: the model that `stage: reward` made.

    reward = LearnedReward("runs/reward")
    reward(['A desk.\\nTargets: ["cup"]'], [record])      # [1.3]; what counts is the difference to another answer

It reads the picture, the wish and the answer as the reasoner would, and gives a number for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from detgpt.device import choose_device
from detgpt.errors import ModelError
from detgpt.reasoners.chat import is_bare
from finetune.batching import collator
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.preference.encoding import answered
from finetune.scoring import SCORES
from finetune.stages.reasoner import REWARD_MODEL

BATCH = 16  # answers that are read together


class LearnedReward:
    """The reward model in `folder`, a run's or the model's own; a reward as in `finetune.preference.rewards`.

    Raises `ModelError` for a folder whose model does not score.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device | None = None) -> None:
        of_run = Path(folder) / REWARD_MODEL
        place = choose_device(device)
        dtype = "float32" if place.type == "cpu" else "bfloat16"
        model, processor = load(Checkpoint(model=str(of_run if of_run.is_dir() else folder)), dtype)
        if not getattr(model.config, SCORES, False):
            raise ModelError(f"{folder} holds no reward model: give the folder of a run of `stage: reward`")
        self._model = model.to(place).eval()
        self._encoder = RecordEncoder(processor, bare=is_bare(model.config))
        self._collate = collator(model, processor)

    @torch.inference_mode()
    def __call__(self, answers: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        said = [answered(record, answer) for answer, record in zip(answers, records, strict=True)]
        longest_first = sorted(range(len(said)), key=lambda i: -len(answers[i]))
        scores = dict[int, float]()
        for start in range(0, len(said), BATCH):
            rows = longest_first[start : start + BATCH]
            batch = self._collate([self._encoder.encode(said[i]) for i in rows])
            batch.pop("labels")
            inputs = {name: value.to(self._model.device) for name, value in batch.items()}
            scores |= zip(rows, self._model(**inputs).logits.float().tolist(), strict=True)
        return [scores[i] for i in range(len(said))]
