"""What the stages of a reasoner share: settings, and the way from records to a model that DetGPT loads.

A stage says which parts train, on what, and with which trainer: TRL's SFTTrainer unless it builds another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from datasets import Dataset
from pydantic import Field, field_validator, model_validator
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from detgpt.errors import InputError
from detgpt.models import PAIRS, ModelPair
from finetune import callbacks, rundir
from finetune.arguments import arguments, checked
from finetune.averaging.anchors import Anchor, AnchorSettings
from finetune.batching import collator, draw_by_length
from finetune.callbacks import AverageSettings, DetectionSettings, LisaSettings
from finetune.loading import Checkpoint, load, stored_dtype
from finetune.recipe import StageConfig
from finetune.tuning import Group, Lora, Tune, has_adapters, tuned

REASONER = "reasoner"  # in a run's folder: the result
REWARD_MODEL = "reward_model"  # the same of a run whose model scores
Paths = Path | list[Path]
Prepare = Callable[[Any, Any, Paths], Dataset]  # model, processor, where the records are → encoded examples
# (model, processor, arguments, training and validation examples) → the trainer
Build = Callable[[Any, Any, Any, Dataset, Dataset | None], Trainer]
After = Callable[[Trainer], Mapping[str, float]]  # the trainer, done → numbers for run.json
TUNE: dict[str, Tune] = {"qlora": "lora", "lisa": "full"}  # how the language model's weights are trained then


def _photo_detector() -> str:
    small = PAIRS["small"]
    assert isinstance(small, ModelPair)
    return small.detector


class ReasonerConfig(Checkpoint, StageConfig):
    """Settings of every stage that trains a reasoner.

    train, validation: folders of records (`finetune.data.records`). detector: the other half of the pair that the
    result makes: a hub id, a folder, or a named pair ("picto"). max_length: tokens of an example, the rest is cut off.
    lisa: which layers train at a time where `language` is "lisa". detection: what every evaluation detects with.
    anchor: a model to stay near. average_steps: weights of which steps are averaged. trainer: the arguments of the
    stage's trainer, TRL's SFTConfig unless it has another.
    """

    arguments: ClassVar[type[TrainingArguments]] = SFTConfig

    train: Paths
    validation: Paths | None = None
    detector: str = Field(default_factory=_photo_detector)
    max_length: int | None = Field(default=None, ge=2)
    lora: Lora = Lora()
    lisa: LisaSettings = LisaSettings()
    detection: DetectionSettings | None = None
    anchor: AnchorSettings | None = None
    average_steps: AverageSettings | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("trainer")
    @classmethod
    def _known(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        return checked(cls.arguments, trainer)

    @model_validator(mode="before")
    @classmethod
    def _anchored_where_it_starts(cls, values: Any) -> Any:
        """Unless the anchor is a model of its own: `of_iteration` then keeps the first iteration's."""
        anchor = values.get("anchor")
        if not isinstance(anchor, Mapping) or "model" in anchor:
            return values
        own = {name: values[name] for name in Checkpoint.model_fields if name in values}
        return {**values, "anchor": {**own, **anchor}}

    @model_validator(mode="after")
    def _goes_together(self) -> ReasonerConfig:
        if self.anchor is not None and self.anchor.kind == "distill":
            if self.arguments is not SFTConfig:
                raise InputError(
                    f"anchor.kind: distill is for stages that learn given answers, which {self.stage} does not: take "
                    "l1 or l2"
                )
            for setting, usual in (("loss_type", "nll"), ("label_smoothing_factor", 0)):
                if self.trainer.get(setting, usual) != usual:
                    raise InputError(f"anchor.kind: distill goes with the usual loss: leave trainer.{setting} out")
        if self.average_steps is not None and self.trainer.get("load_best_model_at_end"):
            raise InputError(
                "either the average is the result, or the best step: leave average_steps or "
                "trainer.load_best_model_at_end out"
            )
        return self


class PartsConfig(ReasonerConfig):
    """vision, projector, language: how each part is trained.

    language: "qlora" is "lora" on 4-bit weights (a GPU); "lisa" trains in full, a few layers at a time.
    """

    vision: Tune = "frozen"
    projector: Tune = "full"
    language: Tune | Literal["qlora", "lisa"] = "lora"

    @property
    def how(self) -> dict[Group, Tune]:
        language = TUNE.get(self.language) or cast(Tune, self.language)
        return {Group.VISION: self.vision, Group.PROJECTOR: self.projector, Group.LANGUAGE: language}

    @property
    def quantized(self) -> tuple[Group, ...]:
        """The parts whose weights get 4 bits."""
        return (Group.LANGUAGE,) if self.language == "qlora" else ()

    @property
    def layers(self) -> LisaSettings | None:
        """Which layers train at a time, if not all."""
        return self.lisa if self.language == "lisa" else None


def sft(
    model: Any, processor: Any, args: Any, examples: Dataset, validation: Dataset | None, *, packing: bool = False
) -> Trainer:
    """TRL's trainer for encoded examples. packing: several of them in a row of a batch."""
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=validation,
        processing_class=processor,
        data_collator=collator(model, processor, packing=packing),
    )


SFT_ARGUMENTS = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}


def train(
    config: ReasonerConfig,
    how: Mapping[Group, Tune],
    prepare: Prepare,
    *,
    build: Build = sft,
    ours: Mapping[str, Any] = SFT_ARGUMENTS,
    lisa: LisaSettings | None = None,
    quantized: tuple[Group, ...] = (),
    by_length: bool = False,
    defaults: Mapping[str, Any] | None = None,
    after: After | None = None,
) -> None:
    """Train the parts as `how` says, on what `prepare` makes of the records, and write the result to `config.output`.

    build: makes the trainer. Its arguments are of the class `config.arguments`: `defaults`, over them the recipe's, and
    `ours`, which the recipe may not set. after: what is done to the trained model before it is kept. A finished run is
    left as it is; one that was interrupted goes on from its last checkpoint.
    """
    args = _arguments(config, defaults or {}, ours)
    if rundir.is_finished(config):
        return
    folder = rundir.start(config)
    set_seed(config.seed)
    model, processor = load(config, _dtype(config, how), quantized=quantized)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = tuned(model, how, config.lora)
    if not has_adapters(model):
        # The Trainer loads a checkpoint by the model's own names and passes over all others without a word, while
        # families that were renamed since (LLaVA, Qwen2.5-VL) are saved by their former ones.
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    examples = prepare(model, processor, config.train)
    validation = prepare(model, processor, config.validation) if config.validation is not None else None
    trainer = build(model, processor, args, examples, validation)
    if by_length:
        _draw_by_length(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder / rundir.TENSORBOARD)
    callbacks.attach(trainer, lisa=lisa, detection=config.detection, average=config.average_steps)
    if config.anchor is not None:
        trainer.callback_handler.callbacks.insert(0, Anchor(trainer, config.anchor, config, _dtype(config, how)))
    callbacks.train(trainer)
    if config.average_steps is not None and validation is not None:
        trainer.evaluate()  # the last numbers are those of the result
    told = after(trainer) if after is not None else {}
    _keep(config, trainer, processor)
    if trainer.is_world_process_zero():
        rundir.finish(folder, {**_metrics(trainer), **told})


def _draw_by_length(trainer: Any) -> None:
    """By the characters of each conversation: its tokens are known only when its picture is read."""
    talks = trainer.train_dataset.with_format(None)["messages"]
    draw_by_length(trainer, [sum(len(turn["content"]) for turn in talk) for talk in talks])


def _arguments(config: ReasonerConfig, defaults: Mapping[str, Any], ours: Mapping[str, Any]) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    usual: dict[str, Any] = {
        "bf16": _has_bfloat16(),
        "gradient_checkpointing": gpu,
        "dataloader_num_workers": 4 if gpu else 0,
        "dataloader_pin_memory": gpu,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # of all steps
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "no" if config.validation is None else "epoch",
    }
    of_the_run = {
        "output_dir": str(config.output / rundir.CHECKPOINTS),
        "seed": config.seed,
        "remove_unused_columns": False,
    }
    return arguments(config.arguments, config.trainer, defaults={**usual, **defaults}, ours={**of_the_run, **ours})


def _dtype(config: ReasonerConfig, how: Mapping[Group, Tune]) -> str:
    if config.dtype is not None:
        return config.dtype
    return "bfloat16" if _has_bfloat16() and how[Group.LANGUAGE] != "full" else "float32"


def _has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _keep(config: ReasonerConfig, trainer: Any, processor: Any) -> None:
    """Write the model, whole and in the base model's precision, and the pair that it makes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    if has_adapters(model):
        adapter = config.output / rundir.ADAPTER
        rundir.write_folder(adapter, lambda place: model.save_pretrained(place, state_dict=state))
        model, state = merged(config, adapter), None
    write_reasoner(config, model, processor, state)


def write_reasoner(config: ReasonerConfig, model: Any, processor: Any, state: Mapping[str, Any] | None = None) -> None:
    """Write `<output>/reasoner` and the pair that it makes, or `<output>/reward_model`.

    state: the weights, where the model has but a shard.
    """

    def write(place: Path) -> None:
        whole = model if state is not None else model.to(stored_dtype(config))
        whole.save_pretrained(place, state_dict=state, save_original_format=True)
        processor.save_pretrained(place)

    rundir.write_folder(config.output / (REWARD_MODEL if config.scores else REASONER), write)
    if not config.scores and hasattr(processor, "image_processor"):
        rundir.write_pair(config.output, reasoner=REASONER, detector=config.detector)


def merged(config: Checkpoint, adapter: Path) -> Any:
    """The model of `config` with the trained `adapter` worked into its weights, in the base model's precision."""
    from peft import PeftModel

    model, _ = load(config, "auto")
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _metrics(trainer: Any) -> dict[str, float]:
    """The last number of each kind that the run logged."""
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        last.update({name: value for name, value in entry.items() if isinstance(value, (int, float))})
    return last
