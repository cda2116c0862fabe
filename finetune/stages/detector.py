"""Teach a Grounding DINO to find your things: `stage: detector`.

    detgpt-finetune run grounding-dino-tiny output=runs/cups data.train.annotations=train.json data.train.images=images

Data in COCO's format or ODVG; the model a folder or hub id of a Grounding DINO, MM-Grounding-DINO or LLMDet, or
the configuration of a new one. The result is `<output>/detector`, which the detector backend loads, and
`<output>/detgpt.json`, which pairs it with a reasoner.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from detgpt.errors import InputError
from detgpt.models import PAIR_FILE, PAIRS, resolve
from finetune.grounding.augment import Augmentation
from finetune.grounding.data import Example, read_examples
from finetune.grounding.evaluation import average_precisions
from finetune.grounding.loss import Proposals
from finetune.grounding.model import load_trained, make_fresh
from finetune.grounding.parts import Lora, Parts, set_trainable
from finetune.grounding.questions import Asking, Collator, PromptMaker, TrainingQuestions, ValidationQuestions
from finetune.grounding.trainer import DetectorTrainer
from finetune.recipe import Settings, StageConfig, write_recipe


class Source(Settings):
    """A COCO annotation file (.json) or an ODVG file (.jsonl), and the folder of its pictures.

    label_map: for ODVG, the JSON file of its label numbers and their names.
    """

    annotations: Path
    images: Path
    label_map: Path | None = None

    def read(self) -> list[Example]:
        return read_examples(self.annotations, self.images, self.label_map)


class Data(Settings):
    """validation: measured as the training goes on, so that the best checkpoint is kept; without it the last is."""

    train: Source | list[Source]
    validation: Source | None = None

    def read(self) -> tuple[list[Example], list[Example]]:
        sources = self.train if isinstance(self.train, list) else [self.train]
        validation = self.validation.read() if self.validation is not None else []
        return [example for source in sources for example in source.read()], validation


class Config(StageConfig):
    """Settings of the stage.

    model: the detector to go on from, a folder or hub id; or from_config: one whose config.json and processor a new
    detector takes, and backbone: a trained backbone for that. proposals: how the encoder's are taught, see
    `finetune.grounding.loss.detection_loss`; unset: "matched" for a trained detector, "centres" for a new one.
    prompting: of the validation. reasoner: a folder, a hub id, or a named pair whose reasoner `detgpt.json` takes.
    trainer: transformers' TrainingArguments.
    """

    stage: Literal["detector"] = "detector"
    model: str | None = None
    from_config: str | None = None
    backbone: str | None = None
    data: Data
    parts: Parts = Parts()
    lora: Lora = Lora()
    asking: Asking = Asking()
    augmentation: Augmentation | None = Augmentation()
    proposals: Proposals | None = None
    prompting: Literal["joint", "separate"] = "joint"
    reasoner: str = "picto"
    trainer: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_beginning(self) -> Config:
        if (self.model is None) == (self.from_config is None):
            raise ValueError("give either 'model', a trained detector, or 'from_config', that of a new one")
        if self.backbone is not None and self.from_config is None:
            raise ValueError("'backbone' is for a new detector, 'from_config'; a trained one has its own")
        return self


def run(config: Config) -> None:
    """Train, and write the result to `config.output`; a run that finds its own checkpoints there goes on from them."""
    arguments = _arguments(config)
    train, validation = config.data.read()
    if config.model is not None:
        processor, model = load_trained(config.model)
    else:
        processor, model = make_fresh(str(config.from_config), config.backbone)
    write_recipe(config, config.output)
    prompts = PromptMaker(processor.tokenizer, model.config.max_text_len)
    prompts.check([*train, *validation])
    wrapper = set_trainable(model, config.parts, config.lora)
    fill = tuple(round(255 * value) for value in processor.image_processor.image_mean)
    questions = ValidationQuestions(validation, prompts, config.prompting) if validation else None
    trainer = DetectorTrainer(
        model=model,
        args=arguments,
        parts=config.parts,
        proposals=config.proposals or ("matched" if config.model else "centres"),
        train_dataset=TrainingQuestions(train, prompts, config.asking, config.augmentation, fill, config.seed),
        eval_dataset=questions,
        data_collator=Collator(processor),
        processing_class=processor,
        compute_metrics=partial(average_precisions, questions) if questions else None,
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(arguments))
    if wrapper is not model:
        model = wrapper.merge_and_unload()
    if trainer.is_world_process_zero():
        _write_result(config, model, processor)


def _arguments(config: Config) -> TrainingArguments:
    """Raises `InputError` for settings that transformers does not have or that do not go together."""
    validated = config.data.validation is not None
    defaults: dict[str, Any] = {
        "seed": config.seed,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.1,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if validated else "no",
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": validated,
        "metric_for_best_model": "ap50" if validated else None,
    }
    ours = {"output_dir": str(config.output / "checkpoints"), "remove_unused_columns": False}
    if taken := sorted(ours.keys() & config.trainer.keys()):
        raise InputError(f"trainer.{taken[0]} is not yours to set: it follows from 'output' and the data")
    try:
        return TrainingArguments(**{**defaults, **config.trainer, **ours})
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {error}") from error


def _last_checkpoint(arguments: TrainingArguments) -> str | None:
    folder = Path(str(arguments.output_dir))
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _write_result(config: Config, model: Any, processor: Any) -> None:
    partial_folder, folder = config.output / "detector.partial", config.output / "detector"
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.save_pretrained(partial_folder)
    processor.save_pretrained(partial_folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    reasoner = resolve(config.reasoner).reasoner if config.reasoner in PAIRS else config.reasoner
    pair = {"reasoner": reasoner, "detector": "detector"}
    (config.output / PAIR_FILE).write_text(json.dumps(pair, indent=2) + "\n", encoding="utf-8")
