"""Does trustworthy distillation give a small reasoner that is more often right, and knows better when? `stage: first`.

    detgpt-finetune run first-picto

With each seed a fresh student of the teacher (`distill.fresh`) is taught by every method on the same records, steps
and settings, and asked wishes that none has learned:

    SFT                       the true tokens alone
    SFT + temperature         the same, its temperature fitted on held-out records afterwards
    full vocabulary           the teacher's whole distribution, as it reads along
    top-k                     its k likeliest tokens and the tail, as they are
    FIRST                     the same, with a temperature fitted on held-out records
    FIRST (smoothing)         the same, with a smoothed first choice
    random draws              k draws from the teacher (arXiv:2503.16870)

    runs/first/
      points.csv              a student and a set of wishes a row
      table.md                the methods, means over sets and seeds with 95% intervals, and what of FIRST's claim holds
      compared.png .svg       the same as a picture; reliability.png .svg: of the targets that were named
      teacher/                the caches, with the concentration of the teacher's knowledge
      seed-0/                 the students, each a run of `stage: distill`

A run that was interrupted goes on with the first student that is not there.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from torch.utils.data import DataLoader

from detgpt import terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from detgpt.evaluation.calibration import summary
from detgpt.evaluation.diagrams import reliability, save_figure
from detgpt.evaluation.judging import Judged
from detgpt.evaluation.trust import RAW
from detgpt.reasoners.chat import is_bare
from finetune import rundir
from finetune.batching import collator
from finetune.data.records import fingerprint, load_records, read_records
from finetune.distill import fresh, plot, student, teacher
from finetune.distill.cache import read_header
from finetune.distill.measures import true_answers, wishes_answered
from finetune.distill.verdict import COMPARED, TEACHER, averaged, table
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load, load_reader
from finetune.recipe import StageConfig
from finetune.stages.reasoner import REASONER

# What each method has: the teacher itself, or a cache of its likeliest tokens or of its draws.
METHODS: dict[str, dict[str, str]] = {
    "SFT": {},
    "SFT + temperature": {},  # of the same weights
    "full vocabulary": {"teacher": "teacher"},
    "top-k": {"cache": "top"},
    "FIRST": {"cache": "top", "recalibrate": "temperature"},
    "FIRST (smoothing)": {"cache": "top", "recalibrate": "smoothing"},
    "random draws": {"cache": "random"},
}
TOP, RANDOM, HELD_OUT = "top", "random", "held-out"
STUDENT = "student"
SCALED = "SFT + temperature"


class Config(StageConfig):
    """teacher: a model's name. detector: the other half of the students' pairs. student: `language` of stage
    `distill.fresh`. train: what all learn. validation: held-out records, on which temperatures and smoothing are
    fitted. answers: new records, whose true tokens are measured. wishes: folders of wishes by name, each with its
    targets; `limit` of each. k: tokens that are kept. distill: further settings of stage `distill`.
    """

    stage: Literal["first"] = "first"
    teacher: str
    detector: str
    student: dict[str, int]
    train: Path
    validation: Path
    answers: Path
    wishes: dict[str, Path] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    k: int = Field(default=5, ge=2)
    distill: dict[str, Any] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    methods: list[str] = Field(default=[*METHODS], min_length=1)

    @field_validator("methods")
    @classmethod
    def _are_known(cls, methods: list[str]) -> list[str]:
        if other := [method for method in methods if method not in METHODS]:
            raise InputError(f"there is no method {other[0]!r}: choose of {', '.join(METHODS)}")
        if SCALED in methods and "SFT" not in methods:
            raise InputError(f"{SCALED!r} scales the student of 'SFT': name both")
        return methods

    @field_validator("distill")
    @classmethod
    def _is_a_distillation(cls, distill: dict[str, Any]) -> dict[str, Any]:
        student.Config.model_validate({"output": "", "model": "", "train": "", **distill})
        return distill

    def place(self, seed: int, method: str) -> Path:
        words = "".join(letter if letter.isalnum() else " " for letter in method).split()
        return self.output / f"seed-{seed}" / "-".join(words)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    folders = {"train": config.train, "validation": config.validation, "answers": config.answers, **config.wishes}
    folder = rundir.start(config, {name: fingerprint(path) for name, path in folders.items()})
    caches = _caches(config)
    points, judged = _measured(config, TEACHER, None, config.teacher)
    every = {TEACHER: judged}
    for seed in config.seeds:
        fresh_student = config.output / f"seed-{seed}" / STUDENT
        fresh.run(fresh.Config(model=config.teacher, language=config.student, seed=seed, output=fresh_student))
        for method in config.methods:
            _taught(config, method, seed, fresh_student, caches)
            rows, judged = _measured(config, method, seed, str(config.place(seed, method)))
            points += rows
            every.setdefault(method, judged)
    _write_csv(folder / "points.csv", points)
    means = averaged(points)
    text = table(means, points, _storage(config, caches))
    with terminal.replacing(folder / "table.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    save_figure(plot.compared(means, COMPARED), folder / "compared")
    save_figure(
        reliability({name: {"targets": {RAW: claims}} for name, claims in every.items()}), folder / "reliability"
    )
    terminal.note(text)
    known = {f"{name} {key}": value[0] for name, of in means.items() for key, value in of.items()}
    rundir.finish(folder, {name: value for name, value in known.items() if not isnan(value)})


def _caches(config: Config) -> dict[str, Path]:
    """What the teacher says, cached once for all students; only what the methods need."""
    wanted = {TOP: (config.train, "top"), RANDOM: (config.train, "random"), HELD_OUT: (config.validation, "top")}
    used = {METHODS[method].get("cache") for method in config.methods}
    used |= {HELD_OUT for method in config.methods if "recalibrate" in METHODS[method]}
    places = {name: config.output / "teacher" / name for name in wanted if name in used}
    for name, place in places.items():
        records, kept = wanted[name]
        settings = {"model": config.teacher, "train": records, "kept": kept, "k": config.k, "output": place}
        teacher.run(teacher.Config.model_validate(settings))
    return places


def _taught(config: Config, method: str, seed: int, fresh_student: Path, caches: Mapping[str, Path]) -> None:
    """The student of this method and seed, where it is not there yet."""
    if method == SCALED:
        _scaled(config, seed)
        return
    has = METHODS[method]
    settings = {
        **config.distill,
        "model": str(fresh_student),
        "detector": config.detector,
        "train": config.train,
        "validation": config.validation,
        "seed": seed,
        "output": config.place(seed, method),
        **({"teacher": config.teacher} if "teacher" in has else {}),
        **({"cache": caches[has["cache"]]} if "cache" in has else {}),
        **({"recalibrate": has["recalibrate"], "validation_cache": caches[HELD_OUT]} if "recalibrate" in has else {}),
    }
    student.run(student.Config.model_validate(settings))
    shutil.rmtree(config.place(seed, method) / rundir.CHECKPOINTS, ignore_errors=True)


def _scaled(config: Config, seed: int) -> None:
    """SFT's student at the temperature that suits the held-out records."""
    place = config.place(seed, SCALED)
    if rundir.is_pair(str(place)):
        return
    model, processor = load(Checkpoint(model=str(config.place(seed, "SFT"))), "float32")
    encoder = RecordEncoder(processor, bare=is_bare(model.config))
    records: Any = load_records(config.validation).with_transform(encoder)
    found = student.scale(model, DataLoader(records, batch_size=16, collate_fn=collator(model, processor)))

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)

    place.mkdir(parents=True, exist_ok=True)
    rundir.write_folder(place / REASONER, write)
    rundir.write_json(place / "temperature.json", found)
    rundir.write_pair(place, reasoner=REASONER, detector=config.detector)


def _measured(config: Config, method: str, seed: int | None, model: str) -> tuple[list[dict[str, Any]], Judged]:
    """A row of points.csv for each set of wishes, and all targets that were named."""
    folder = config.output / "measured"
    file = folder / f"{config.place(seed or 0, method).name}{'' if seed is None else f'-{seed}'}.json"
    if not file.is_file():
        loaded, processor = load(Checkpoint(model=model), "float32")
        loaded = loaded.to(choose_device(None))
        found: dict[str, Any] = {"tokens": true_answers(loaded, processor, config.answers), "wishes": {}}
        for name, path in config.wishes.items():
            records = [*read_records(path)][: config.limit]
            numbers, judged = wishes_answered(loaded, processor, records)
            found["wishes"][name] = {
                "numbers": numbers,
                "confidences": judged.confidences.tolist(),
                "correct": judged.correct.tolist(),
            }
        rundir.write_json(file, found)
    found = json.loads(file.read_text(encoding="utf-8"))
    tokens = {f"tokens_{key}": value for key, value in found["tokens"].items()}
    rows = [
        {"method": method, "seed": seed, "wishes": name, **said["numbers"], **_named(said), **tokens}
        for name, said in found["wishes"].items()
    ]
    sure = np.concatenate([said["confidences"] for said in found["wishes"].values()])
    right = np.concatenate([np.array(said["correct"], bool) for said in found["wishes"].values()])
    return rows, Judged(sure, right, np.zeros(len(sure), np.int64))


def _named(said: Mapping[str, Any]) -> dict[str, Any]:
    return {f"targets_{key}": value for key, value in summary(said["confidences"], said["correct"]).items()}


def _storage(config: Config, caches: Mapping[str, Path]) -> dict[str, float]:
    """Bytes a token that each method keeps of its teacher; the whole vocabulary in half precision."""
    stored = {}
    for method in config.methods:
        cache = METHODS[method].get("cache")
        stored[method] = float(read_header(caches[cache]).bytes_of_row) if cache else 0.0
    if "full vocabulary" in stored:
        model_config, _ = load_reader(Checkpoint(model=config.teacher))
        stored["full vocabulary"] = 2.0 * model_config.get_text_config(decoder=True).vocab_size
    return stored


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with terminal.replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
