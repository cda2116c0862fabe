"""Learn what an answer is worth from which of two is better: `stage: reward`.

    detgpt-finetune run reward-picto train=data/preferences validation=data/held-out output=runs/reward

A multimodal language model with a score in the place of its logits (`finetune.scoring`) learns −log σ(r_chosen −
r_rejected), the likelihood of the preferences after Bradley and Terry (Ouyang et al. 2022, arXiv:2203.02155). Start
from a model that was taught to answer: one that was not tells good answers less well from bad ones. The result is a
reward for `raft`, `grpo`, `rloo` and `iterative_dpo`: `reward.model=runs/reward`.

Each evaluation of the validation data gives, and run.json keeps of the last one,

    eval_accuracy      the share of pairs whose chosen answer scores higher
    eval_calibration   the expected calibration error of σ(|r_chosen − r_rejected|), the model's own word for how likely
                       it is to be right; 0 is best
    eval_agreement     of the pairs that the true reward tells apart, the share that both rewards order alike; where
                       records have 'targets'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset
from pydantic import field_validator
from torch.nn.functional import logsigmoid
from transformers import EvalPrediction, Trainer, TrainingArguments

from detgpt.errors import InputError
from detgpt.evaluation.calibration import expected_calibration_error
from detgpt.reasoners.chat import is_bare
from finetune.batching import Batch
from finetune.callbacks import DetectionSettings
from finetune.preference.encoding import SIDES, PairCollator, PairEncoder, load_preferences
from finetune.preference.rewards import RewardSettings
from finetune.stages.reasoner import PartsConfig, Paths, train
from finetune.tuning import Group


class Config(PartsConfig):
    """Settings of the stage.

    train, validation: folders of records with `chosen` and `rejected`. truth: the reward that the learned one is held
    against. trainer: transformers' TrainingArguments. A model that scores makes no pair with a `detector`.
    """

    arguments: ClassVar[type[TrainingArguments]] = TrainingArguments
    scores: ClassVar[bool] = True

    stage: Literal["reward"] = "reward"
    truth: RewardSettings = RewardSettings()

    @field_validator("detection")
    @classmethod
    def _detects_nothing(cls, detection: DetectionSettings | None) -> None:
        if detection is not None:
            raise InputError("detection: a reward model detects nothing: leave it out")


def run(config: Config) -> None:
    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        encoder = PairEncoder(processor, bare=is_bare(model.config), max_length=config.max_length)
        return load_preferences(paths).with_transform(encoder)

    train(
        config,
        config.how,
        prepare,
        build=partial(_trainer, truth=config.truth),
        ours={},
        lisa=config.layers,
        quantized=config.quantized,
        defaults={"learning_rate": 3e-5 if config.how[Group.LANGUAGE] == "lora" else 3e-6, "num_train_epochs": 1},
    )


def _trainer(
    model: Any, processor: Any, args: Any, examples: Dataset, validation: Dataset | None, *, truth: RewardSettings
) -> Trainer:
    return _Preferences(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=validation,
        data_collator=_Collator(getattr(processor, "tokenizer", processor).pad_token_id),
        compute_metrics=_metrics(validation.with_format(None), truth) if validation is not None else None,
    )


class _Collator(PairCollator):
    """B pairs as 2·B conversations, chosen ones first, without a word on what is learned of them."""

    def __call__(self, pairs: Any) -> Batch:
        batch = super().__call__(pairs)
        del batch["labels"]
        return batch


class _Preferences(Trainer):
    """Learns by `pair_loss`; what it predicts of a pair is by how much the chosen answer scores higher."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected = model(**inputs).logits.float().chunk(len(SIDES))
        loss = pair_loss(chosen, rejected)
        return (loss, chosen - rejected) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, margins = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss, margins, torch.ones_like(margins)  # labels: the chosen one is the better one


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of −log σ(r_chosen − r_rejected) over the pairs' scores, (B,) each."""
    return -logsigmoid(chosen - rejected).mean()


def _metrics(pairs: Dataset, settings: RewardSettings) -> Callable[[EvalPrediction], dict[str, float]]:
    """What is told of the margins of `pairs`, which come in their order."""
    true = true_margins(list(pairs), settings)

    def metrics(predicted: EvalPrediction) -> dict[str, float]:
        return measured(np.asarray(predicted.predictions), true)

    return metrics


def measured(margins: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """accuracy, calibration and agreement of `margins` (N,); `true` (N,): those of the true reward, NaN if unknown."""
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    error = expected_calibration_error(sure.tolist(), (margins > 0).tolist())
    assert error is not None, "a split without pairs is refused"
    told_apart = np.nan_to_num(true) != 0
    alike = np.sign(margins[told_apart]) == np.sign(true[told_apart])
    agreement = {"agreement": float(alike.mean())} if len(alike) else {}
    return {"accuracy": float((margins > 0).mean()), "calibration": error, **agreement}


def true_margins(pairs: Sequence[Mapping[str, Any]], settings: RewardSettings) -> np.ndarray:
    """By how much the true reward prefers the chosen answers, (N,); NaN where a pair has no 'targets'."""
    margins = np.full(len(pairs), np.nan)
    known = [i for i, pair in enumerate(pairs) if pair["targets"] is not None]
    if known:
        reward, records = settings.build(), [pairs[i] for i in known]
        chosen, rejected = (np.array(reward([pair[side] for pair in records], records)) for side in SIDES)
        margins[known] = chosen - rejected
    return margins
