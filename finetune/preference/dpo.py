"""Teach a reasoner which of two answers is better: `stage: dpo`.

    detgpt-finetune run dpo-picto train=data/preferences output=runs/preferred

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) by TRL: the model is to raise the chosen answer
over the rejected one, against what it said when the run began. Beside the loss it logs `rewards/margins`, by how much
it prefers the chosen answers more than then, and `rewards/accuracies`, for how many pairs it does.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

from datasets import Dataset
from pydantic import Field
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from detgpt.reasoners.chat import is_bare
from finetune.batching import IGNORED, Batch
from finetune.preference.encoding import PairCollator, PairEncoder, load_preferences
from finetune.stages.reasoner import PartsConfig, Paths, has_adapters, train
from finetune.tuning import Group


class PreferenceConfig(PartsConfig):
    """Settings of a stage that learns from preferences.

    beta: how dear it is to move away from the model that the training begins with. loss: one of TRL's, or several,
    which are added up. trainer: TRL's DPOConfig.
    """

    arguments: ClassVar[type[TrainingArguments]] = DPOConfig

    beta: float = Field(default=0.1, gt=0)
    loss: str | list[str] = "sigmoid"


class Config(PreferenceConfig):
    """Settings of the stage; train, validation: folders of records with `chosen` and `rejected`."""

    stage: Literal["dpo"] = "dpo"


def run(config: Config) -> None:
    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        encoder = PairEncoder(processor, bare=is_bare(model.config), max_length=config.max_length)
        return load_preferences(paths).with_transform(encoder)

    ours = {
        "beta": config.beta,
        "loss_type": [config.loss] if isinstance(config.loss, str) else config.loss,
        "max_length": None,  # the encoder cuts, and says so where nothing is left
        "precompute_ref_log_probs": False,  # pairs are encoded as they are drawn
    }
    train(
        config,
        config.how,
        prepare,
        build=_trainer,
        ours=ours,
        lisa=config.layers,
        quantized=config.quantized,
        defaults={"learning_rate": 5e-6 if config.how[Group.LANGUAGE] == "lora" else 5e-7},
    )


def _trainer(model: Any, processor: Any, args: Any, examples: Dataset, validation: Dataset | None) -> DPOTrainer:
    trainer = _EncodedPairs(
        model=model,
        # TRL would load the checkpoint anew, without what the recipe changed in it.
        ref_model=None if has_adapters(model) else copy.deepcopy(model),
        args=args,
        train_dataset=examples,
        eval_dataset=validation,
        processing_class=processor,
        data_collator=_Collator(getattr(processor, "tokenizer", processor).pad_token_id),
    )
    if has_adapters(model):
        model.delete_adapter("ref")  # a copy of ours, untrained: the model without adapters says the same
    return trainer


class _EncodedPairs(DPOTrainer):
    """Takes pairs that are encoded already: TRL's own wording is not that of inference."""

    def _prepare_dataset(self, dataset: Dataset, *how: Any) -> Dataset:
        return dataset


class _Collator(PairCollator):
    """What TRL's trainer takes: `completion_mask` (2·B, longest), 1 on the answers, in the place of labels."""

    def __call__(self, pairs: Any) -> Batch:
        batch = super().__call__(pairs)
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch
