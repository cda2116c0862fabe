"""Teach a reasoner by what its own answers are worth: `stage: grpo` and `stage: rloo`, through TRL's trainers.

    detgpt-finetune run grpo-picto train=data/wishes output=runs/rewarded

At every step the model answers some wishes several times, a reward (`finetune.preference.rewards`) values the answers,
and those above the others to the same wish become likelier. It is asked as at inference, pictures included. The run's
metrics count the `answers` that were written to learn from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from PIL import Image
from pydantic import field_validator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer, RLOOTrainer

from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.reasoners.chat import is_bare
from finetune.data.records import load_records
from finetune.encoding import conversation, worded
from finetune.preference.encoding import asked
from finetune.preference.rewards import Reward, RewardSettings
from finetune.stages.reasoner import Build, PartsConfig, Paths, has_adapters, train
from finetune.tuning import Group

Kind = type[GRPOTrainer] | type[RLOOTrainer]


class OnlineConfig(PartsConfig):
    """Settings of the stages that learn from rewards.

    reward: what an answer is worth. trainer: TRL's GRPOConfig or RLOOConfig, where `num_generations` says how often a
    wish is answered, `max_completion_length` how long, and `beta` how dear it is to move away from the model that the
    run begins with.
    """

    reward: RewardSettings = RewardSettings()

    @field_validator("max_length")
    @classmethod
    def _cuts_nothing(cls, max_length: int | None) -> None:
        if max_length is not None:
            raise InputError("max_length: no wish is cut here; trainer.max_completion_length is that of the answers")


def run(config: OnlineConfig, kind: Kind) -> None:
    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        prompter = Prompter(processor, bare=is_bare(model.config))
        return load_records(paths).with_transform(prompter)

    def build(model: Any, *rest: Any) -> Any:
        return trainer_for(kind, config.reward.build())(model, *rest)

    train(
        config,
        config.how,
        prepare,
        build=build,
        ours={},
        lisa=config.layers,
        quantized=config.quantized,
        defaults={"learning_rate": 1e-5 if config.how[Group.LANGUAGE] == "lora" else 1e-6},
    )


class Prompter:
    """Records as TRL's trainers take them, as they are drawn: `load_records(…).with_transform(Prompter(…))`.

    {"prompt": chat messages, "image": the picture, whose place they mark, "record": the record}. The picture must not
    stand in the messages: TRL's RLOOTrainer writes answers to one that does, but then learns without it. A batch
    without pictures has no "image".
    """

    def __init__(self, processor: Any, *, bare: bool) -> None:
        self._processor = processor
        self._bare = bare

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        by_path = {path: load_image(path) for path in {record["image"] for record in records} if path is not None}
        images = [by_path.get(record["image"]) for record in records]
        prompts = [self._prompt(record, image) for record, image in zip(records, images, strict=True)]
        return {"prompt": prompts, "record": records, **({"image": images} if by_path else {})}

    def _prompt(self, record: Mapping[str, Any], image: Image.Image | None) -> list[dict[str, Any]]:
        messages = worded({**record, "messages": asked(record)}, bare=self._bare)
        turns = conversation(self._processor, messages, image)
        for turn in turns if image is not None else []:
            turn["content"] = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
        return turns


def trainer_for(kind: Kind, reward: Reward) -> Build:
    """What makes a trainer of this kind whose answers are valued by `reward`."""

    def build(model: Any, processor: Any, args: Any, examples: Dataset, validation: Dataset | None) -> Any:
        together = args.generation_batch_size // args.num_generations
        if len(examples) < together:
            raise InputError(
                f"there are {len(examples)} wishes, but {together} are answered together: give more of them, a smaller "
                "trainer.per_device_train_batch_size, or a larger trainer.num_generations"
            )
        answers = Answers()

        def valued(completions: Sequence[Any], record: Sequence[Mapping[str, Any]], **_: Any) -> list[float | None]:
            if model.training:  # else they are written for an evaluation
                answers.written += len(completions) * args.world_size
            return [*reward([completion[0]["content"] for completion in completions], record)]

        valued.__name__ = "reward"  # in TRL's logs
        if args.beta and not has_adapters(model):
            args.model_init_kwargs = _as_loaded(model.config)
        asking = copy.deepcopy(processor)
        getattr(asking, "tokenizer", asking).padding_side = "left"  # of prompts; the result keeps its own
        trainer = kind(
            model=model,
            reward_funcs=valued,
            args=args,
            train_dataset=examples,
            eval_dataset=validation,
            processing_class=asking,
            callbacks=[answers],
        )
        args.model_init_kwargs = None  # a configuration is nothing for TensorBoard, which writes the arguments down
        _draw_by_epoch(trainer)
        return trainer

    return build


class Answers(TrainerCallback, ExportableState):
    """How many answers were written to learn from, by all processes, and in a resumed run before it was interrupted."""

    def __init__(self) -> None:
        self.written = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"written": self.written}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.written = state.stateful_callbacks[type(self).__name__]["attributes"]["written"]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history.append({"answers": self.written, "step": state.global_step})


def _draw_by_epoch(trainer: Any) -> None:
    """Let the order of the wishes hang on the seed and the epoch alone, so that a resumed run sees the same ones."""
    theirs = trainer._get_train_sampler

    def sampler(dataset: Any = None) -> Any:
        repeating = theirs(dataset)
        if repeating.shuffle:
            repeating.set_epoch = lambda epoch: repeating.generator.manual_seed(trainer.args.seed + epoch)
        return repeating

    trainer._get_train_sampler = sampler


def _as_loaded(config: Any) -> dict[str, Any]:
    """How TRL is to load the reference, which it does itself: the same revision, with what the recipe has changed.

    The configuration says which attention each part takes, and TRL's one for all would not do for some towers.
    """
    revision = getattr(config, "_commit_hash", None) or "main"
    return {"config": copy.deepcopy(config), "revision": revision, "attn_implementation": None}
