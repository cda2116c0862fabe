"""The loop of alignment by a model's own answers: ask, score, choose, learn, and again with what it has become.

    runs/aligned/iterations/03/
      samples.jsonl    the wishes and the answers (`finetune.preference.samples`)
      chosen/          what was learned from: a folder of records
      metrics.json     what the answers were worth, how varied they were, and what was chosen
      reasoner/        what came of it, a run like any other: DetGPT.from_pretrained("runs/aligned/iterations/03")

Each step reads files and writes files, so a run goes on with the first one that is not there. `raft` and
`iterative_dpo` say what is chosen and how it is learned. The run's metrics are those of the last iteration, and how
many `answers` were written in all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from detgpt import terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from finetune import rundir
from finetune.data.records import Row, read_records
from finetune.loading import Checkpoint, load
from finetune.preference.rewards import RewardSettings
from finetune.preference.samples import Sampled, fallen, measured, read_lines, write_lines, write_records
from finetune.preference.sampling import SamplingSettings, check_wishes, sample
from finetune.processes import processes
from finetune.stages.reasoner import REASONER, ReasonerConfig

ITERATIONS = "iterations"
SAMPLES = "samples.jsonl"
CHOSEN = "chosen"
METRICS = "metrics.json"

Kind = TypeVar("Kind", bound=Checkpoint)
# (samples, a seed) → the records to learn from, and numbers about them
Choose = Callable[[Sequence[Sampled], int], tuple[list[Row], dict[str, float]]]
# (the model's name, the records' folder, where the result goes); leaves a finished run
Learn = Callable[[str, Path, Path], None]


class IterationConfig(ReasonerConfig):
    """Settings of a stage that iterates.

    train: wishes about images; their own answers are not used. iterations: how many. prompts: wishes of each, drawn
    without repetition; unset: all of them.
    """

    iterations: int = Field(default=3, ge=1)
    prompts: int | None = Field(default=None, ge=1)
    sampling: SamplingSettings = SamplingSettings()
    reward: RewardSettings = RewardSettings()


def iterate(config: IterationConfig, choose: Choose, learn: Learn) -> None:
    """Go through all iterations that are not finished, and make the last one's model the result.

    Raises `InputError` for data or settings that do not go together, or where there is nothing to choose.
    """
    if processes().num_processes > 1:
        raise InputError(f"stage {config.stage} asks and scores in one process: run it without a launcher")
    if rundir.is_finished(config):
        return
    records = list(read_records(config.train))
    check_wishes(records)
    if config.prompts is not None and config.prompts > len(records):
        raise InputError(f"prompts={config.prompts}, but there are {len(records)} wishes in {config.train}")
    rundir.start(config)
    model = config.model
    history: list[dict[str, Any]] = []
    for number in range(1, config.iterations + 1):
        place = config.output / ITERATIONS / f"{number:02d}"
        if not (place / METRICS).is_file():
            samples = sampled(config, model, records, number)
            _choose(config, choose, samples, number, history)
        history.append(json.loads((place / METRICS).read_text(encoding="utf-8")))
        if rundir.read_run(place).get("finished") is None:
            learn(model, place / CHOSEN, place)
        shutil.rmtree(place / rundir.CHECKPOINTS, ignore_errors=True)  # the optimiser's state, of no more use
        model = str(place)
    last = Path(model) / REASONER
    rundir.write_folder(config.output / REASONER, lambda partial: shutil.copytree(last, partial, dirs_exist_ok=True))
    rundir.write_pair(config.output, reasoner=REASONER, detector=config.detector)
    metrics = {key: value for key, value in history[-1].items() if key != "warning"}
    answers = config.iterations * (config.prompts or len(records)) * config.sampling.count
    rundir.finish(config.output, {**metrics, "answers": answers})


def of_iteration(kind: type[Kind], config: IterationConfig, model: str, **own: Any) -> Kind:
    """What the settings `kind` have in common with `config`, for one iteration's `model`, and what they have besides.

    A setting that changes a checkpoint when it is loaded has changed the first one for good.
    """
    shared = config.model_dump(include=set(kind.model_fields) - {"stage"})
    later = {} if model == config.model else {"revision": None, "rope_scaling": None}
    return kind.model_validate({**shared, **later, "model": model, **own})


def sampled(config: IterationConfig, model: str, records: Sequence[Row], number: int) -> list[Sampled]:
    """The answers of `model` in an iteration, scored: those that are there already, or new ones.

    They are in `iterations/<number>/samples.jsonl`; the number after the last one's is for the finished model.
    """
    file = config.output / ITERATIONS / f"{number:02d}" / SAMPLES
    if not file.is_file():
        write_lines(file, _answered(config, model, records, number))
    samples: list[Any] = read_lines(file)
    if "rewards" not in samples[0]:
        count = config.sampling.count
        answers = [answer for row in samples for answer in row["answers"]]
        rewards = config.reward.build()(answers, [records[row["record"]] for row in samples for _ in range(count)])
        samples = [{**row, "rewards": rewards[i * count : (i + 1) * count]} for i, row in enumerate(samples)]
        write_lines(file, samples)
    return samples


def _answered(config: IterationConfig, model: str, records: Sequence[Row], number: int) -> list[Row]:
    """Answers of `model` to the wishes that the seed and the iteration's number draw."""
    chance = np.random.default_rng((config.seed, number))
    drawn = sorted(chance.choice(len(records), config.prompts or len(records), replace=False).tolist())
    device = choose_device(None)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    asked, processor = load(of_iteration(Checkpoint, config, model), dtype)
    how = config.sampling.model_dump()
    answers = sample(asked.to(device), processor, [records[i] for i in drawn], **how, seed=int(chance.integers(2**31)))
    keys = ("where", "instruction", "image")
    return [
        {"record": i, **{key: records[i][key] for key in keys}, "answers": texts}
        for i, texts in zip(drawn, answers, strict=True)
    ]


def _choose(
    config: IterationConfig,
    choose: Choose,
    samples: Sequence[Sampled],
    number: int,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write what is chosen of the samples, and then the metrics."""
    place = config.output / ITERATIONS / f"{number:02d}"
    rows, about = choose(samples, config.seed + number)
    if not rows:
        raise InputError(
            f"{place / SAMPLES}: of no wish is one answer better than another, so there is nothing to learn: raise "
            "sampling.temperature or sampling.count, or give harder wishes"
        )
    write_records(place / CHOSEN, rows)
    metrics: dict[str, Any] = {**measured(samples), **about}
    warning = fallen([*history, metrics][0], metrics)
    if warning:
        terminal.note(f"warning: {warning}")
    rundir.write_json(place / METRICS, {**metrics, **({"warning": warning} if warning else {})})
    said = ", ".join(f"{key} {value:.3g}" for key, value in metrics.items())
    terminal.note(f"iteration {number} of {config.iterations}: {said}")
