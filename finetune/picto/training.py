"""How the ResNet and the tower are trained: the Trainer, with a loss and an evaluation that are functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from finetune import rundir
from finetune.recipe import StageConfig


class LessonConfig(StageConfig):
    """world, validation_world: folders of `picto.world`. trainer: settings of transformers' TrainingArguments."""

    world: Path
    validation_world: Path
    trainer: dict[str, Any] = Field(default_factory=dict)


def generator() -> np.random.Generator:
    """Seeded from torch's generator, whose state a checkpoint keeps."""
    return np.random.default_rng(int(torch.randint(2**62, ())))


class _Lesson(Trainer):
    """The Trainer, with an evaluation that looks at the model as a whole."""

    def __init__(self, measure: Callable[[], dict[str, float]], **settings: Any):
        super().__init__(**settings)
        self.measure = measure

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        network: Any = self.model
        network.eval()
        with torch.inference_mode():
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in self.measure().items()}
        network.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def learn(
    model: nn.Module,
    config: LessonConfig,
    *,
    train: Dataset,
    collate: Callable[[list[dict]], dict[str, Any]],
    loss: Callable[[Any, Any], torch.Tensor],
    measure: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Train `model` on batches {"pixel_values", "labels"}, going on from the last checkpoint; returns the last metrics.

    loss: of the model's output and the labels. measure: numbers of the model as it is, at each evaluation.
    """
    defaults = {
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.98,
        "max_grad_norm": 5.0,
        "weight_decay": 0.02,
        "eval_strategy": "steps",
        "save_total_limit": 1,
        "report_to": "none",
    }
    arguments = TrainingArguments(
        str(config.output / rundir.CHECKPOINTS),
        seed=config.seed,
        remove_unused_columns=False,
        **{**defaults, **config.trainer},
    )
    trainer = _Lesson(
        measure,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=train,  # not looked at: `measure` is the evaluation
        data_collator=collate,
        compute_loss_func=lambda output, labels, **_: loss(output, labels),
    )
    last = rundir.last_checkpoint(config.output)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.evaluate()
