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

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import DataCollatorWithPadding, set_seed

from detgpt.guards.encoder import QuestionEncoder, load_base
from finetune import callbacks, rundir
from finetune.arguments import TrainerSettings
from finetune.protector.asked import Asked, AskedTrainer, asked_arguments
from finetune.protector.exchanges import read_questions
from finetune.recipe import StageConfig
from finetune.tuning import Lora

ENCODER = "encoder"  # in a run's folder: the result
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "learning_rate": 8e-4,
    "warmup_steps": 0.05,  # of all steps
    "save_steps": 250,
}


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

    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    args = asked_arguments(config.output, config.seed, config.trainer, {**DEFAULTS, "bf16": bf16})
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
    ids = tokenizer(list(asked), truncation=True, max_length=config.max_length)["input_ids"]
    trainer = AskedTrainer(
        model=QuestionEncoder(tokenizer, get_peft_model(encoder, lora)),
        args=args,
        train_dataset=Asked(ids, [harmful for harmful, _ in asked.values()], config.max_length),
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
