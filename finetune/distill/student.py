"""Teach a small reasoner what a large one would say: `stage: distill`.

    detgpt-finetune distill cache models/large data/train -o runs/teacher
    detgpt-finetune distill cache models/large data/held-out -o runs/teacher-held-out
    detgpt-finetune run distill.yaml cache=runs/teacher validation_cache=runs/teacher-held-out output=runs/student

Efficient trustworthy distillation (FIRST, Shum et al., EMNLP 2024, arXiv:2408.12168): the student learns the teacher's
few likeliest tokens and what is left to all others, recalibrated so that they are as sure as they are right, and with a
share of its own the true tokens. What it is measured against are settings of the same stage:

    cache of the likeliest tokens    FIRST; without `recalibrate` the teacher is taken at its word
    cache of random draws            Random Sampling Knowledge Distillation (arXiv:2503.16870)
    teacher, without a cache         distillation of the whole vocabulary: the teacher reads every batch, too
    neither                          instruction tuning; with `scale_temperature` scaled afterwards

The model is the student: any that `instruct` trains, whose tokenizer is the teacher's. The published settings are
AdamW, 2e-6, three epochs, a cosine with 3% of warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from detgpt.errors import InputError
from detgpt.reasoners.chat import is_bare
from finetune import rundir
from finetune.answering import answering
from finetune.batching import IGNORED, TEACHER_ROWS, collator
from finetune.data.records import load_records
from finetune.distill.cache import Cache, digest
from finetune.distill.loss import dense_kl, sparse_kl
from finetune.distill.recalibration import Recalibration, Way, fitted, recalibration, report, true_tokens
from finetune.distill.temper import temper
from finetune.distill.trust import TEMPERATURE_RANGE, fit, temperature_loss
from finetune.encoding import Encoded, RecordEncoder
from finetune.loading import Checkpoint, load, load_reader
from finetune.stages.instruct import TalkConfig
from finetune.stages.reasoner import PartsConfig, Paths, train
from finetune.tuning import Group

Soft = Callable[[torch.Tensor], torch.Tensor]  # the student's logits (N, V) → what it loses against its teacher (N,)
# (a batch without labels, rows of the cache (N,), which positions are learned (B, L − 1)) → the above
Teaching = Callable[[Mapping[str, Any], torch.Tensor | None, torch.Tensor], Soft]


class Config(TalkConfig, PartsConfig):
    """Settings of the stage: those of `instruct`, and of the teacher.

    cache: what `distill.cache` made of `train`. teacher: a model that reads along; with a cache, whose it has to be. k:
    how many tokens the cache has to keep. weight: of the teacher; the true tokens have the rest. recalibrate: how the
    teacher's word is made as sure as it is right, with a `strength`, or with one that is fitted on `validation`, of
    which `validation_cache` is its cache. scale_temperature: fit a temperature of the student on `validation` in the
    end, and write it into its weights. trainer: transformers' TrainingArguments.
    """

    arguments: ClassVar[type[TrainingArguments]] = TrainingArguments

    stage: Literal["distill"] = "distill"
    cache: Path | None = None
    teacher: str | None = None
    k: int | None = Field(default=None, ge=1)
    weight: float = Field(default=0.5, ge=0, le=1)
    recalibrate: Way | None = None
    strength: float | None = None
    validation_cache: Path | None = None
    scale_temperature: bool = False

    @model_validator(mode="after")
    def _goes_together(self) -> Config:
        if self.recalibrate is not None and self.cache is None:
            raise ValueError("'recalibrate' is for a teacher's cache: give 'cache', or leave it out")
        if self.recalibrate is not None and self.strength is None and None in (self.validation, self.validation_cache):
            raise ValueError(
                "'recalibrate' is fitted on records that the teacher did not learn from: give 'validation' and "
                "'validation_cache', or a 'strength'"
            )
        if self.scale_temperature and self.validation is None:
            raise ValueError("'scale_temperature' is fitted on 'validation': give it")
        if self.scale_temperature and "lora" in self.how.values():
            raise ValueError("'scale_temperature' is written into the last norm, which adapters leave: leave it out")
        return self


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    cache = _checked(config)

    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        records = load_records(paths)
        how: dict[str, Any] = {"bare": is_bare(model.config), "max_length": config.max_length}
        if cache is None or paths != config.train:
            return records.with_transform(RecordEncoder(processor, **how))
        numbered = records.add_column(NUMBER, list(range(len(records))))
        return numbered.with_transform(CachedEncoder(processor, cache, **how))

    def build(model: Any, processor: Any, args: Any, examples: Dataset, validation: Dataset | None) -> Trainer:
        trainer = Distiller(
            teaching=_teaching(config, cache, model, processor),
            weight=config.weight,
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=validation,
            data_collator=collator(model, processor, packing=config.packing),
        )
        if config.scale_temperature and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise InputError("scale_temperature: no process has all weights here: leave it out, and `detgpt calibrate`")
        return trainer

    train(
        config,
        config.how,
        prepare,
        build=build,
        ours={},
        lisa=config.layers,
        quantized=config.quantized,
        by_length=config.by_length,
        defaults={"learning_rate": 2e-4 if config.how[Group.LANGUAGE] == "lora" else 2e-6},
        after=_scaled if config.scale_temperature else None,
    )


def _checked(config: Config) -> Cache | None:
    """The cache, if there is one. Raises `InputError` before anything is written where it does not fit."""
    if config.cache is None:
        return None
    cache = Cache(config.cache)
    _, processor = load_reader(config)
    tokenizer = getattr(processor, "tokenizer", processor)
    cache.check(tokenizer, config.train, k=config.k, teacher=config.teacher)
    recalibration(cache.header, config.recalibrate)
    if config.recalibrate is not None and config.strength is None:
        held_out, validation = _held_out(config)
        held_out.check(tokenizer, validation, k=cache.header.k, teacher=cache.header.teacher)
    return cache


def _held_out(config: Config) -> tuple[Cache, Paths]:
    assert config.validation is not None and config.validation_cache is not None, "settings are checked"
    return Cache(config.validation_cache), config.validation


NUMBER = "number"  # of a record among its fellows


class CachedEncoder(RecordEncoder):
    """Also tells of each learned token which row of the cache it has."""

    def __init__(self, processor: Any, cache: Cache, **how: Any) -> None:
        super().__init__(processor, **how)
        self._cache = cache

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        encoded = super().encode(record)
        learned = encoded["labels"] != IGNORED
        rows = torch.full_like(encoded["labels"], -1)
        rows[learned] = self._cache.rows_of(record[NUMBER], encoded["labels"][learned], record["where"])
        return {**encoded, TEACHER_ROWS: rows}


# ------------------------------------------------------------------------------------------------- what is taught


def _teaching(config: Config, cache: Cache | None, model: Any, processor: Any) -> Teaching | None:
    if cache is not None:
        return partial(_from_cache, cache, _recalibration(config, cache, model, processor))
    if config.teacher is None:
        return None
    teacher, its_processor = load(Checkpoint(model=config.teacher), str(model.dtype).removeprefix("torch."))
    if digest(getattr(its_processor, "tokenizer", its_processor)) != digest(getattr(processor, "tokenizer", processor)):
        raise InputError(f"teacher: {config.teacher!r} has another tokenizer than its student {config.model!r}")
    return partial(_from_model, teacher.eval().requires_grad_(False))


def _recalibration(config: Config, cache: Cache, model: Any, processor: Any) -> Recalibration:
    """As the settings have it; one that is fitted is written down with what it did."""
    if config.recalibrate is None or config.strength is not None:
        return recalibration(cache.header, config.recalibrate, 1.0 if config.strength is None else config.strength)
    held_out, validation = _held_out(config)
    encoder = RecordEncoder(processor, bare=is_bare(model.config), max_length=config.max_length)
    labels = true_tokens(held_out, load_records(validation), encoder)
    found = fitted(config.recalibrate, held_out, labels)
    report(config.output, found, held_out, labels)
    return recalibration(cache.header, found.way, found.strength)


def _from_cache(
    cache: Cache, recalibrated: Recalibration, _: Mapping[str, Any], rows: torch.Tensor | None, learned: torch.Tensor
) -> Soft:
    assert rows is not None, "examples come from CachedEncoder"
    target = recalibrated(cache.kept(rows[:, 1:][learned].cpu()))
    ids, log_q, log_tail = (part if part is None else part.to(learned.device) for part in target)
    assert ids is not None and log_q is not None
    return lambda logits: sparse_kl(logits, ids, log_q, log_tail)


def _from_model(teacher: Any, inputs: Mapping[str, Any], _: torch.Tensor | None, learned: torch.Tensor) -> Soft:
    teacher.to(learned.device)
    with torch.no_grad():
        theirs = teacher(**inputs).logits[:, :-1][learned]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        shared = min(logits.shape[-1], theirs.shape[-1])  # a family's checkpoints round their vocabularies up
        return dense_kl(logits[:, :shared], theirs[:, :shared])

    return loss


class Distiller(Trainer):
    """Learns the true tokens and, with `weight`, what a teacher says; evaluates by the true tokens alone."""

    def __init__(self, *, teaching: Teaching | None, weight: float, **settings: Any) -> None:
        super().__init__(compute_loss_func=mixed, **settings)
        self._teaching, self._weight = teaching, weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = inputs.pop(TEACHER_ROWS, None)
        soft = None
        if self._teaching is not None and model.training:
            others = {name: value for name, value in inputs.items() if name != "labels"}
            soft = self._teaching(others, rows, inputs["labels"][:, 1:] != IGNORED)
        self.compute_loss_func = partial(mixed, soft=soft, weight=self._weight)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def mixed(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    soft: Soft | None = None,
    weight: float = 0.0,
) -> torch.Tensor:
    """The mean over the learned tokens of (1 − weight) · −log s(true token) + weight · soft.

    labels: (B, L). num_items_in_batch: tokens of all batches of this step; unset: of this one.
    """
    learned = labels[:, 1:] != IGNORED
    logits, true = outputs.logits[:, :-1][learned], labels[:, 1:][learned]
    loss = cross_entropy(logits.float(), true, reduction="none")
    if soft is not None:
        loss = (1 - weight) * loss + weight * soft(logits)
    return loss.sum() / (num_items_in_batch if num_items_in_batch is not None else max(len(true), 1))


# --------------------------------------------------------------------------------------------- the student's own


def _scaled(trainer: Trainer) -> dict[str, float]:
    dataset: Any = trainer.eval_dataset
    loader = DataLoader(dataset, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
    return scale(trainer.accelerator.unwrap_model(trainer.model), loader)


def scale(model: Any, batches: Any) -> dict[str, float]:
    """Write into the model's weights the temperature at which the true tokens of `batches` are likeliest."""
    logits, labels = answered_logits(model, batches)
    temperature = fit(lambda t: temperature_loss(logits, labels, t), TEMPERATURE_RANGE)
    temper(model, temperature)
    before, after = (float(temperature_loss(logits, labels, t).mean()) for t in (1.0, temperature))
    return {"temperature": temperature, "validation_nll": before, "validation_nll_scaled": after}


@torch.inference_mode()
def answered_logits(model: Any, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """((N, V) logits, (N,) true tokens) of the learned positions of all `batches` of `finetune.batching`."""
    logits, labels = [], []
    with answering(model):
        for batch in batches:
            true = batch["labels"][:, 1:]
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name not in ("labels", TEACHER_ROWS)
            }
            said = model(**inputs).logits[:, :-1].cpu()
            logits.append(said[true != IGNORED].half())
            labels.append(true[true != IGNORED])
    return torch.cat(logits), torch.cat(labels)
