"""What both models that judge questions learn from, and how: questions, each with whether it means harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from finetune import rundir
from finetune.arguments import arguments

CERTAIN = 0.98  # how sure a model shall be at most


class Asked(Dataset):
    """Questions by the numbers of their tokens, of which those after the first `most` are cut off."""

    def __init__(self, ids: Sequence[Sequence[int]], harmful: Sequence[bool], most: int) -> None:
        self._ids, self._harmful, self._most = ids, harmful, most

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index][: self._most], "labels": float(self._harmful[index])}


class AskedTrainer(Trainer):
    """Learns by binary cross-entropy of a model's logits, (B,), never to be wholly sure."""

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs)
        loss = binary_cross_entropy(logits, labels * (2 * CERTAIN - 1) + (1 - CERTAIN))
        return (loss, {"logits": logits}) if return_outputs else loss


def asked_arguments(
    output: Path, seed: int, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> TrainingArguments:
    """Of a run to the folder `output`: `defaults`, over them what the recipe gives. Raises `InputError`."""
    common: dict[str, Any] = {
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 50,
        "report_to": "none",
        "save_total_limit": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    ours = {
        "output_dir": str(output / rundir.CHECKPOINTS),
        "seed": seed,
        "remove_unused_columns": False,
        "label_names": [],
        "eval_strategy": "no",
    }
    return arguments(TrainingArguments, given, defaults={**common, **defaults}, ours=ours)
