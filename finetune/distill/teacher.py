"""One pass of a teacher over the training data, of which a few tokens of each distribution are kept:
`stage: distill.cache`, or the command

    detgpt-finetune distill cache picto data/train -o runs/teacher
    accelerate launch -m finetune.cli distill cache Qwen/Qwen3-VL-8B-Instruct data/train -o runs/teacher

The teacher reads every record with its true answer (teacher forcing), any model of transformers that `instruct` trains,
text alone or with pictures, or one behind a server (`finetune.distill.server`). The result is a folder as
`finetune.distill.cache` describes it. Shards are whole files: interrupted, the command goes on with the next one, and
the files are the same. Several processes share them out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation.diagrams import save_figure
from detgpt.reasoners.chat import is_bare
from finetune import rundir
from finetune.batching import IGNORED, Batch, collator
from finetune.data.records import fingerprint, load_records
from finetune.distill import concentration, plot
from finetune.distill.cache import SHARDS, WIDE, Header, Shard, digest, mapped, shard_file, write_header, write_shard
from finetune.distill.server import Served, ServerSettings
from finetune.distill.sparse import NUMBERS, TEMPERATURES, Kept, drawn, narrowed, top
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.processes import processes
from finetune.recipe import StageConfig
from finetune.stages.reasoner import Paths

CONCENTRATION = "concentration"


class Config(Checkpoint, StageConfig):
    """Settings of the stage.

    model: the teacher; with `server` the checkpoint whose tokenizer and chat template the served one has. train:
    folders of records, all of which need an answer. kept: "top" for the `k` likeliest tokens, "random" for `k` random
    draws. temperatures: at which the mass of all other tokens is kept, for `recalibrate: temperature`. batch_size:
    records that the teacher reads at once. shard_size: records of a file.
    """

    stage: Literal["distill.cache"] = "distill.cache"
    train: Paths
    server: ServerSettings | None = None
    kept: Literal["top", "random"] = "top"
    k: int = Field(default=5, ge=1)
    temperatures: tuple[float, ...] = TEMPERATURES
    batch_size: int = Field(default=16, ge=1)
    shard_size: int = Field(default=512, ge=1)
    max_length: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _can_be_kept(self) -> Config:
        if 1.0 not in self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"temperatures={list(self.temperatures)}: give positive ones, and 1 among them")
        if self.server is not None and self.kept == "random":
            raise ValueError("kept=random: a server tells its likeliest tokens alone; take top")
        return self

    @property
    def known_temperatures(self) -> tuple[float, ...]:
        """At which the cache tells the tail: a server tells of no other than 1, and draws have none."""
        if self.kept == "random":
            return ()
        return self.temperatures if self.server is None else (1.0,)


class Teacher(Protocol):
    """Reads records with their answers."""

    tokenizer: Any
    vocabulary: int

    def read(self, records: Dataset, chance: torch.Generator) -> Iterator[tuple[int, torch.Tensor, Kept, np.ndarray]]:
        """(place among `records`, learned tokens (n,), what is kept of their n rows, `concentration.counted` of these)
        of each record, in any order."""


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    state = processes()
    data = fingerprint(config.train)
    records = _answered(load_records(config.train))
    teacher = _teacher(config, state)
    header = _header(config, teacher, data)
    if state.is_main_process:
        rundir.start(config, {"train": data})
        write_header(config.output, header)
    state.wait_for_everyone()
    seconds = _write_shards(config, teacher, records, state)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(config, header, len(records), seconds)


def _answered(records: Dataset) -> Dataset:
    """Raises `InputError` where there is nothing, or a record without anything said."""
    if len(records) == 0:
        raise InputError("there are no records for the teacher to read")
    for where, messages in zip(records["where"], records["messages"], strict=True):
        if not messages or messages[-1]["role"] != "assistant":
            raise InputError(f"{where}: there is no answer: a teacher reads records with 'instruction' or 'messages'")
    return records


def _teacher(config: Config, state: PartialState) -> Teacher:
    if config.server is not None:
        return Served(config, config.server)
    return Local(config, state.device)


def _header(config: Config, teacher: Teacher, data: str) -> Header:
    if teacher.vocabulary > WIDE or config.k > teacher.vocabulary:
        raise InputError(f"k={config.k} of a vocabulary of {teacher.vocabulary} tokens: give fewer")
    return Header(
        teacher=config.server.model if config.server else config.model,
        tokenizer=digest(teacher.tokenizer),
        vocabulary=teacher.vocabulary,
        data=data,
        kept=config.kept,
        k=config.k,
        temperatures=config.known_temperatures,
    )


def _write_shards(config: Config, teacher: Teacher, records: Dataset, state: PartialState) -> float:
    """This process's shards that are not there yet; the seconds that it took."""
    began = time.perf_counter()
    starts = range(0, len(records), config.shard_size)
    mine = range(state.process_index, len(starts), state.num_processes)
    with terminal.progress("reading") as move:
        move(0, len(mine) * config.shard_size)
        for done, number in enumerate(mine):
            file = config.output / SHARDS / shard_file(number)
            if not file.is_file():
                part = records.select(range(starts[number], min(starts[number] + config.shard_size, len(records))))
                chance = torch.Generator().manual_seed((config.seed << 24) + number)
                found = {}
                for place, *row in teacher.read(part, chance):
                    found[place] = row
                    move(done * config.shard_size + len(found), len(mine) * config.shard_size)
                write_rows(file, [found[place] for place in range(len(part))], teacher.vocabulary)
    return time.perf_counter() - began


def write_rows(file: Path, rows: Sequence[Any], vocabulary: int) -> None:
    """Write a shard of what `Teacher.read` gave of records, in their order."""
    labels, kept, counted = zip(*rows, strict=True)
    together = Kept(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
    write_shard(file, together, labels, vocabulary, {CONCENTRATION: np.sum(counted, axis=0)})


def _finish(config: Config, header: Header, records: int, seconds: float) -> None:
    shards, sums = [], np.zeros((2, concentration.MOST))
    for number in range(-(-records // config.shard_size)):
        tensors = mapped(config.output / SHARDS / shard_file(number))
        shards.append(Shard(file=shard_file(number), records=len(tensors["checks"]), rows=int(tensors["offsets"][-1])))
        sums += tensors[CONCENTRATION]
    header = header.model_copy(update={"shards": tuple(shards)})
    found = concentration.summary(sums, header.rows)
    rundir.write_json(config.output / f"{CONCENTRATION}.json", found)
    title = f"{header.teacher}, {header.rows:,} tokens"
    save_figure(plot.concentration(found, concentration.ENOUGH, title), config.output / CONCENTRATION)
    write_header(config.output, header)
    size = sum((config.output / SHARDS / shard.file).stat().st_size for shard in shards)
    metrics = {"records": records, "tokens": header.rows, "bytes_per_token": size / header.rows, "seconds": seconds}
    masses = {f"mass_{k}": mass for k, mass in enumerate(found["mass"], start=1)}
    rundir.finish(config.output, {**metrics, **masses})
    terminal.note(
        f"{header.rows:,} tokens of {records:,} records, {size / header.rows:.1f} bytes each; "
        f"{found['mass'][:5][-1]:.1%} of the mass is in the {len(found['mass'][:5])} likeliest"
    )


class Local:
    """A model of transformers on this process's device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        on_gpu = device.type != "cpu"
        model, self._processor = load(config, config.dtype or ("bfloat16" if on_gpu else "float32"))
        self.tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._model = model.to(device).eval()
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._loading: dict[str, Any] = {"num_workers": 4, "pin_memory": True} if on_gpu else {}

    @torch.inference_mode()
    def read(self, records: Dataset, chance: torch.Generator) -> Iterator[tuple[int, torch.Tensor, Kept, np.ndarray]]:
        for batch, places in self.batches(records):
            labels = batch.pop("labels")[:, 1:]
            learned = labels != IGNORED
            logits = self.logits(batch)[:, :-1]
            logits = logits[learned.to(logits.device)]  # (rows of all records, vocabulary)
            parts = [self._kept(part, chance) for part in logits.split(max(1, NUMBERS // self.vocabulary))]
            counts = learned.sum(-1).tolist()
            columns = [torch.cat(column).split(counts) for column in zip(*parts, strict=True)]
            for place, tokens, here, *row, likeliest in zip(places, labels, learned, *columns, strict=True):
                yield place, tokens[here], Kept(*row), concentration.counted(likeliest)

    def batches(self, records: Dataset) -> Iterator[tuple[Batch, list[int]]]:
        """Batches of `finetune.batching` and the places of their records; like with like, so that little is padding."""
        encoder = RecordEncoder(self._processor, bare=is_bare(self._model.config), max_length=self._config.max_length)
        lengths = [sum(len(turn["content"]) for turn in talk) for talk in records["messages"]]
        order = sorted(range(len(records)), key=lambda place: -lengths[place])
        size = self._config.batch_size
        places = [order[start : start + size] for start in range(0, len(order), size)]
        loader: DataLoader = DataLoader(
            records.with_transform(encoder),  # type: ignore[arg-type]
            batch_sampler=places,
            collate_fn=collator(self._model, self._processor),
            **self._loading,
        )
        return zip(loader, places, strict=True)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """(B, longest, vocabulary)."""
        model = self._model
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if name != "labels"
        }
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def _kept(self, logits: torch.Tensor, chance: torch.Generator) -> tuple[torch.Tensor, ...]:
        """The parts of `Kept`, and the log-probabilities of the likeliest tokens."""
        k, temperatures = self._config.k, self._config.known_temperatures
        most = min(concentration.MOST, self.vocabulary)
        if self._config.kept == "random":
            return (*drawn(logits.cpu(), k, chance), top(logits, most, ()).logprobs.cpu())
        more = top(logits, max(k, most), temperatures)
        return (*(part.cpu() for part in narrowed(more, k, temperatures)), more.logprobs[:, :most].cpu())
