"""Teach a sentence encoder which questions mean harm (`stage: protector.encoder`).

    stage: protector.encoder
    model: sentence-transformers/all-MiniLM-L6-v2
    train: [build/guard/data/train, build/guard/data/questions]
    output: build/guard/encoder

It has read much, so it knows that a goose is much like a duck, and learns by low-rank adapters (LoRA, Hu et al. 2021,
arXiv:2106.09685) and a head of one logit. Questions of several turns are left out: which of their wishes means harm is
not known. The result, without the encoder itself, is `<output>/encoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from detgpt.guards.encoder import QuestionEncoder, load_base
from finetune import callbacks, rundir
from finetune.arguments import TrainerSettings, arguments
from finetune.protector.exchanges import read_questions
from finetune.recipe import StageConfig
from finetune.tuning import Lora

ENCODER = "encoder"  # in a run's folder: the result
CERTAIN = 0.98  # how sure it shall be at most


class Config(StageConfig):
    """model: the encoder, a hub id or a folder. train: exchanges, of which only the questions are read. lora: the
    adapters that are trained. rank: of those that are stored, which are cut down to it by a singular value
    decomposition. max_length: tokens of a question in training; the rest is cut off. trainer: settings of transformers'
    TrainingArguments."""

    stage: Literal["protector.encoder"] = "protector.encoder"
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    train: Path | list[Path]
    lora: Lora = Lora(r=32, alpha=32)
    rank: int = Field(default=20, ge=1)
    max_length: int = Field(default=64, ge=8)
    trainer: TrainerSettings = Field(default_factory=dict)


def run(config: Config) -> None:
    """Train, and write the result; a run that was interrupted goes on from its last checkpoint."""
    from peft import LoraConfig, get_peft_model

    args = _arguments(config)
    if rundir.is_finished(config):
        return
    folder = rundir.start(config)
    set_seed(config.seed)
    tokenizer, encoder = load_base(config.model)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",
        task_type="FEATURE_EXTRACTION",
    )
    asked = read_questions(config.train)
    trainer = _Trainer(
        model=QuestionEncoder(tokenizer, get_peft_model(encoder, lora)),
        args=args,
        train_dataset=_Asked(tokenizer, config.max_length, list(asked), [harmful for harmful, _ in asked.values()]),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    callbacks.attach(trainer)
    callbacks.train(trainer)
    if trainer.is_world_process_zero():
        learned = trainer.accelerator.unwrap_model(trainer.model)
        rundir.write_folder(
            folder / ENCODER, lambda place: learned.save(place, config.model, min(config.rank, config.lora.r))
        )
        rundir.finish(folder, {})


class _Asked(Dataset):
    def __init__(self, tokenizer: Any, max_length: int, questions: Sequence[str], harmful: Sequence[bool]) -> None:
        encoded = tokenizer(list(questions), truncation=True, max_length=max_length, return_token_type_ids=False)
        self._ids = encoded["input_ids"]
        self._harmful = harmful

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": float(self._harmful[index])}


class _Trainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs)
        loss = binary_cross_entropy(logits, labels * (2 * CERTAIN - 1) + (1 - CERTAIN))
        return (loss, {"logits": logits}) if return_outputs else loss


def _arguments(config: Config) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 64,
        "learning_rate": 8e-4,
        "warmup_steps": 0.05,  # of all steps
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "logging_steps": 50,
        "report_to": "none",
        "save_steps": 250,
        "save_total_limit": 1,
    }
    ours = {
        "output_dir": str(config.output / rundir.CHECKPOINTS),
        "seed": config.seed,
        "remove_unused_columns": False,
        "label_names": [],
        "eval_strategy": "no",
    }
    return arguments(TrainingArguments, config.trainer, defaults=defaults, ours=ours)
