"""Teach a Grounding DINO to find your things: `stage: detector`.

    detgpt-finetune run grounding-dino-tiny train=data/shop validation=data/shop-val output=runs/shop

Data in COCO's format, ODVG or the project's own; the model a folder or hub id of a Grounding DINO, MM-Grounding-DINO
or LLMDet, or the configuration of a new one. The result is `<output>/detector`, which the detector backend loads, and
`<output>/detgpt.json`, which pairs it with a reasoner.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from detgpt.models import resolve
from finetune import rundir
from finetune.arguments import TrainerSettings, arguments
from finetune.grounding.augment import Augmentation
from finetune.grounding.data import Example, Source
from finetune.grounding.evaluation import average_precisions
from finetune.grounding.loss import Proposals
from finetune.grounding.model import load_trained, make_fresh
from finetune.grounding.parts import Parts, set_trainable
from finetune.grounding.questions import Asking, Collator, PromptMaker, TrainingQuestions, ValidationQuestions
from finetune.grounding.trainer import DetectorTrainer
from finetune.recipe import StageConfig
from finetune.tuning import Lora


class Config(StageConfig):
    """Settings of the stage.

    model: the detector to go on from, a folder, a hub id, or a named pair or the folder of a run, whose detector is
    meant; or from_config: one whose config.json and processor a new detector takes, and backbone: a trained backbone
    for that. train: one source or several. validation: measured as
    the training goes on, so that the checkpoint with the best AP50 is kept; without it the last is. prompting: of the
    validation. proposals: how the encoder's are taught, see `finetune.grounding.loss.detection_loss`; unset: "matched"
    for a trained detector, "centres" for a new one. reasoner: the other half of the pair that the result makes: a
    folder, a hub id, or a named pair. trainer: transformers' TrainingArguments.
    """

    stage: Literal["detector"] = "detector"
    model: str | None = None
    from_config: str | None = None
    backbone: str | None = None
    train: Source | list[Source]
    validation: Source | None = None
    prompting: Literal["joint", "separate"] = "joint"
    parts: Parts = Parts()
    lora: Lora = Lora()
    asking: Asking = Asking()
    augmentation: Augmentation | None = Augmentation()
    proposals: Proposals | None = None
    reasoner: str = "picto"
    trainer: TrainerSettings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_beginning(self) -> Config:
        if (self.model is None) == (self.from_config is None):
            raise ValueError("give either 'model', a trained detector, or 'from_config', that of a new one")
        if self.backbone is not None and self.from_config is None:
            raise ValueError("'backbone' is for a new detector, 'from_config'; a trained one has its own")
        return self

    @property
    def sources(self) -> list[Source]:
        """Of the training."""
        return self.train if isinstance(self.train, list) else [self.train]


def run(config: Config) -> None:
    """Train, and write the result to `config.output`.

    A finished run is left as it is; one that was interrupted goes on from its last checkpoint.
    """
    args = _arguments(config)
    if rundir.is_finished(config):
        return
    set_seed(config.seed)
    examples = [example for source in config.sources for example in source.read()]
    validation = config.validation.read() if config.validation is not None else []
    if config.model is not None:
        processor, model = load_trained(_detector(config.model))
    else:
        processor, model = make_fresh(_detector(str(config.from_config)), config.backbone)
    prompts = PromptMaker(processor.tokenizer, model.config.max_text_len)
    prompts.check([*examples, *validation])
    folder = rundir.start(config, _fingerprints(config))
    wrapper = set_trainable(model, config.parts, config.lora)
    trainer = _trainer(config, args, processor, model, prompts, examples, validation)
    checkpoint = rundir.last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.evaluate() if validation else {}
    if trainer.is_world_process_zero():
        _write(config, wrapper.merge_and_unload() if wrapper is not model else model, processor)
        rundir.finish(folder, metrics)


def _detector(source: str) -> str:
    return resolve(source).detector if rundir.is_pair(source) else source


def _trainer(
    config: Config,
    args: TrainingArguments,
    processor: Any,
    model: Any,
    prompts: PromptMaker,
    examples: list[Example],
    validation: list[Example],
) -> DetectorTrainer:
    fill = tuple(round(255 * value) for value in processor.image_processor.image_mean)
    questions = ValidationQuestions(validation, prompts, config.prompting) if validation else None
    trainer = DetectorTrainer(
        model=model,
        args=args,
        parts=config.parts,
        proposals=config.proposals or ("matched" if config.model else "centres"),
        train_dataset=TrainingQuestions(examples, prompts, config.asking, config.augmentation, fill, config.seed),
        eval_dataset=questions,
        data_collator=Collator(processor),
        processing_class=processor,
        compute_metrics=partial(average_precisions, questions) if questions else None,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(config.output / rundir.TENSORBOARD)
    return trainer


def _arguments(config: Config) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    validated = config.validation is not None
    defaults: dict[str, Any] = {
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.1,
        "dataloader_num_workers": 4 if gpu else 0,
        "dataloader_pin_memory": gpu,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if validated else "no",
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": validated,
        "metric_for_best_model": "ap50" if validated else None,
    }
    ours = {
        "output_dir": str(config.output / rundir.CHECKPOINTS),
        "seed": config.seed,
        "remove_unused_columns": False,
    }
    return arguments(TrainingArguments, config.trainer, defaults=defaults, ours=ours)


def _fingerprints(config: Config) -> dict[str, str]:
    train = " ".join(source.fingerprint() for source in config.sources)
    return {"train": train, **({"validation": config.validation.fingerprint()} if config.validation else {})}


def _write(config: Config, model: Any, processor: Any) -> None:
    """Write `<output>/detector` and the pair that it makes."""

    def write(place: Path) -> None:
        model.save_pretrained(place)
        processor.save_pretrained(place)

    rundir.write_folder(config.output / "detector", write)
    rundir.write_pair(config.output, reasoner=config.reasoner)
