"""How much of what a model could do before does each way of aligning it give away? `stage: pareto`.

    stage: pareto
    align: {model: runs/instructed, detector: picto, train: data/wishes, iterations: 3}     # settings of stage raft
    held_out: data/held-out-wishes
    abilities: finetune/picto/abilities
    replay: data/talks
    output: runs/pareto

With each seed the model is aligned, and again or afterwards by every one of `finetune.averaging.methods`. Every model
that comes out is a point: what its answers to wishes that nobody learned are worth, and what it still can do of
`abilities`, which no method looked at.

    runs/pareto/
      points.csv         a model a row: seed, method, setting, reward, each ability, their mean
      hypervolume.csv    a method a row, for each ability and their mean; with 95% intervals over the seeds
      pareto.png .svg    the plot: reward and the mean ability
      abilities.png .svg reward and each ability
      seed-0/            all models, and what was measured of each

A run that was interrupted goes on with the first model that is not there.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, field_validator

from detgpt import terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from detgpt.evaluation.abilities import evaluate_abilities, read_abilities
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune import rundir
from finetune.averaging.front import Point, front, hypervolume, interval
from finetune.averaging.methods import METHODS, Aligned
from finetune.data.records import Row, fingerprint, read_records
from finetune.loading import Checkpoint, load
from finetune.preference import raft
from finetune.preference.iterations import ITERATIONS, SAMPLES, sampled
from finetune.preference.sampling import sample
from finetune.recipe import StageConfig

BEFORE, AFTER = "before", "after"  # the two models that every method lies between
MEAN = "mean"  # of all abilities
Measured = dict[str, Any]


class Config(StageConfig):
    """align: settings of `stage: raft`, from which every method starts. held_out: wishes whose answers are rewarded, in
    the likeliest words. abilities: as of `detgpt eval --abilities`, `limit` questions of each. replay: records of what
    was learned before. seeds: of an alignment each. methods: of `finetune.averaging.methods`. means, strengths: see
    `Aligned` there.
    """

    stage: Literal["pareto"] = "pareto"
    align: dict[str, Any]
    held_out: Path
    abilities: Path
    replay: Path
    limit: int | None = Field(default=None, ge=1)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    methods: list[str] = Field(default=[*METHODS], min_length=1)
    means: list[float] = Field(default=[0.2, 0.4, 0.6, 0.8], min_length=1)
    strengths: list[float] = Field(default=[1.0], min_length=1)

    @field_validator("align")
    @classmethod
    def _is_an_alignment(cls, align: dict[str, Any]) -> dict[str, Any]:
        raft.Config.model_validate({"output": "", **align})
        return align

    @field_validator("methods")
    @classmethod
    def _are_known(cls, methods: list[str]) -> list[str]:
        if other := [method for method in methods if method not in METHODS]:
            raise InputError(f"there is no method {other[0]!r}: choose of {', '.join(METHODS)}")
        return methods

    def alignment(self, seed: int) -> raft.Config:
        place = self.output / f"seed-{seed}" / AFTER
        return raft.Config.model_validate({**self.align, "seed": seed, "output": place})


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    abilities = read_abilities(config.abilities, limit=config.limit)
    held_out = [*read_records(config.held_out)]
    folders = {"train": config.alignment(0).train, "held_out": config.held_out, "replay": config.replay}
    folder = rundir.start(config, {name: fingerprint(path) for name, path in folders.items()})
    points = []
    for seed in config.seeds:
        for method, setting, model in _models(config, seed):
            about = {"seed": seed, "method": method, "setting": setting}
            file = folder / f"seed-{seed}" / "measured" / f"{method} {setting}.json"
            if not file.is_file():
                rundir.write_json(file, about | _measured(model, config.alignment(seed), held_out, abilities))
            points.append(json.loads(file.read_text(encoding="utf-8")))
            terminal.note(", ".join(f"{key} {_short(value)}" for key, value in points[-1].items()))
    volumes = hypervolumes(points)
    _write_csv(folder / "points.csv", points)
    _write_csv(folder / "hypervolume.csv", volumes)
    from finetune.averaging.plot import draw

    draw(folder / "pareto", points, [MEAN])
    draw(folder / "abilities", points, [*abilities])
    terminal.note(table(volumes))
    rundir.finish(folder, {f"hypervolume_{row['method']}": row["mean"] for row in volumes if row["ability"] == MEAN})


def hypervolumes(points: Sequence[Measured]) -> list[Measured]:
    """What each method's front is worth: in mean over the seeds, with its interval, and beside plain averaging's.

    points: rows of points.csv. The area between a front and what is worst, the reward before alignment and the ability
    after it, in units of reward times share of the ability. The models before and after belong to every front.
    `more` is the mean difference to plain averaging with the same seed.
    """
    rows = []
    for ability in _abilities(points):
        areas = {method: _areas(points, method, ability) for method in _methods(points)}
        plain = areas.get("plain averaging")
        for method, found in areas.items():
            low, high = interval(found)
            row = {"ability": ability, "method": method, "mean": fmean(found), "low": low, "high": high}
            if plain is not None:
                more = [one - other for one, other in zip(found, plain, strict=True)]
                low, high = interval(more)
                row |= {"more": fmean(more), "more_low": low, "more_high": high}
            rows.append(row)
    return rows


def table(volumes: Sequence[Measured]) -> str:
    """Markdown of the hypervolumes of the mean ability, the largest first."""
    rows = sorted((row for row in volumes if row["ability"] == MEAN), key=lambda row: -row["mean"])
    lines = ["| method | hypervolume | 95% | more than plain averaging | 95% |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["method"], f"{row['mean']:.4f}", _range(row["low"], row["high"], ".4f")]
        if "more" in row:
            cells += [f"{row['more']:+.4f}", _range(row["more_low"], row["more_high"], "+.4f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _models(config: Config, seed: int) -> Iterator[tuple[str, str, str | Path]]:
    """(method, setting, model) of one seed, each made when it is its turn."""
    align = config.alignment(seed)
    yield BEFORE, "", align.model
    raft.run(align)
    yield AFTER, "", align.output
    records = [*read_records(align.train)]
    number = align.iterations + 1
    sampled(align, str(align.output), records, number)
    samples = align.output / ITERATIONS / f"{number:02d}" / SAMPLES
    for method in config.methods:
        place = config.output / f"seed-{seed}" / method.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        aligned = Aligned(align, samples, place, config.means, config.strengths, config.replay)
        yield from ((method, setting, model) for setting, model in METHODS[method](aligned))


def _measured(
    model: str | Path, align: raft.Config, held_out: Sequence[Row], abilities: Mapping[str, Any]
) -> dict[str, float]:
    """reward: mean over the held-out wishes. Each ability, and their mean; in [0, 1]."""
    loaded, processor = load(Checkpoint(model=str(model)), "float32")
    loaded = loaded.to(choose_device(None))
    answers = sample(loaded, processor, held_out, count=1, temperature=0, batch_size=16)
    rewards = align.reward.build()([texts[0] for texts in answers], held_out)
    reasoner = HuggingFaceReasoner.of(loaded.eval(), processor, str(model))
    with terminal.progress("abilities") as progress:
        results = evaluate_abilities(reasoner, abilities, progress=progress)
    values = {name: result.value for name, result in results.items()}
    return {"reward": fmean(rewards), **values, MEAN: fmean(values.values())}


def _areas(points: Sequence[Measured], method: str, ability: str) -> list[float]:
    """Of every seed."""
    areas = []
    for seed in dict.fromkeys(row["seed"] for row in points):
        of: dict[str, list[Point]] = {
            name: [(row["reward"], row[ability]) for row in points if (row["seed"], row["method"]) == (seed, name)]
            for name in (BEFORE, AFTER, method)
        }
        reference = of[BEFORE][0][0], of[AFTER][0][1]
        areas.append(hypervolume(front([point for found in of.values() for point in found]), reference))
    return areas


def _methods(points: Iterable[Measured]) -> list[str]:
    return [method for method in dict.fromkeys(row["method"] for row in points) if method not in (BEFORE, AFTER)]


def _abilities(points: Sequence[Measured]) -> list[str]:
    return [key for key in points[0] if key not in ("seed", "method", "setting", "reward")]


def _write_csv(file: Path, rows: Sequence[Measured]) -> None:
    with terminal.replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _range(low: float, high: float, form: str) -> str:
    """Nothing where there was one seed."""
    return "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
