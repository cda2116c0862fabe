"""Which way of alignment is worth what it takes? `stage: compare`: several of them, from one model, side by side.

    stage: compare
    model: picto
    train: data/wishes
    held_out: data/held-out-wishes
    tunings:
      RAFT: {stage: raft, iterations: 3}
      GRPO: {stage: grpo, trainer: {max_steps: 100}}
    output: runs/compared

Every tuning is run with every seed, with the same wishes and the same reward, and measured on wishes that none has
learned:

    reward          mean, of the likeliest answers
    F1              of the boxes at an IoU of 0.5, end to end
    hallucination   names that are not in the picture, as a share of all names
    rejection       wishes that nothing fulfils, for which no name is given, as a share of them
    distinct_2      how varied answers are that are drawn by chance (`finetune.preference.sampling`)
    answers         that were written to learn from; seconds: of the run, its own sampling included

Besides the models and `measured/` the folder holds `table.md` and `table.json`. A run that was interrupted goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from detgpt import DetGPT, terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from detgpt.evaluation import evaluate
from detgpt.results import Detections
from finetune import rundir
from finetune.averaging.front import interval
from finetune.data.records import fingerprint, read_records
from finetune.loading import Checkpoint, load
from finetune.preference.rewards import RewardSettings
from finetune.preference.sampling import SamplingSettings, distinct_2, sample
from finetune.recipe import StageConfig, stage_module

START = "start"
GIVEN = {"model", "detector", "train", "reward", "seed", "output"}  # to every tuning
COLUMNS = {  # how many decimals each has in the table
    "reward": 3,
    "F1": 3,
    "hallucination": 3,
    "rejection": 3,
    "distinct_2": 3,
    "answers": 0,
    "seconds": 0,
}


class Config(StageConfig):
    """model, detector: the pair that all begin with; `detector` as in `ReasonerConfig`. train, held_out: wishes with
    their truth. reward: of every tuning. tunings: settings of stages by the names that they have in the table. seeds:
    of one run each. diversity: of how many answers to each held-out wish, and how they are drawn.
    """

    stage: Literal["compare"] = "compare"
    model: str
    detector: str
    train: Path
    held_out: Path
    reward: RewardSettings = RewardSettings()
    tunings: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    diversity: SamplingSettings = SamplingSettings(count=4)

    @model_validator(mode="after")
    def _are_stages(self) -> Config:
        for name, settings in self.tunings.items():
            if given := GIVEN & set(settings):
                raise InputError(f"tunings.{name}: {sorted(given)[0]!r} is the same for all: set it beside 'tunings'")
            self.tuning(name, 0)
        return self

    def tuning(self, name: str, seed: int) -> StageConfig:
        """The settings of one run."""
        settings = self.tunings[name]
        module = stage_module(settings.get("stage"), Path(f"tunings.{name}"))
        shared = self.model_dump(include=GIVEN - {"seed", "output"})
        output = self.output / f"seed-{seed}" / name
        config: StageConfig = module.Config.model_validate({**shared, **settings, "seed": seed, "output": output})
        return config


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    runs = [(seed, name, config.tuning(name, seed)) for seed in config.seeds for name in config.tunings]
    folder = rundir.start(config, {name: fingerprint(getattr(config, name)) for name in ("train", "held_out")})
    (folder / "measured").mkdir(exist_ok=True)
    start = _kept(folder / "measured" / f"{START}.json", lambda: _measured(config, config.model))
    rows = {START: [start]}
    for seed, name, tuning in runs:
        stage_module(tuning.stage, folder).run(tuning)
        row = _kept(
            folder / "measured" / f"{name} {seed}.json",
            lambda tuning=tuning: {**_measured(config, str(tuning.output)), **_taken(tuning.output)},
        )
        rows.setdefault(name, []).append(row)
    rundir.write_json(folder / "table.json", rows)
    with terminal.replacing(folder / "table.md") as partial:
        partial.write_text(table(rows) + "\n", encoding="utf-8")
    terminal.note(table(rows))
    rundir.finish(folder, {f"reward_{name}": fmean(row["reward"] for row in of) for name, of in rows.items()})


def table(rows: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    """Markdown: {name: a row for each seed} as means with their 95% intervals over the seeds."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for name, of in rows.items():
        cells = (_cell([row.get(column) for row in of], digits) for column, digits in COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{fmean(known):,.{digits}f}"
    if len(known) < 2 or not digits:
        return mean
    low, high = interval(known)
    return f"{mean} ({low:.{digits}f}–{high:.{digits}f})"


def _measured(config: Config, model: str) -> dict[str, Any]:
    wishes = [*read_records(config.held_out)]
    results: list[Detections] = []
    pair = DetGPT.from_pretrained(model)
    with terminal.progress(f"measuring {model}") as progress:
        found = evaluate(
            pair,
            config.held_out,
            progress=progress,
            each=lambda _, result: results.append(result),
            detector_alone=False,
        )
    rewards = config.reward.build()([result.answer for result in results], wishes)
    loaded, processor = load(Checkpoint(model=model), "float32")
    how = config.diversity.model_dump()
    answers = sample(loaded.to(choose_device(None)), processor, wishes, **how, seed=config.seed)
    return {
        "reward": fmean(rewards),
        "F1": found["end_to_end"]["f1_50"],
        **{key: found["reasoner"][key] for key in ("hallucination", "rejection")},
        "distinct_2": distinct_2([*chain.from_iterable(answers)]),
    }


def _taken(output: Path) -> dict[str, Any]:
    """What a finished run took."""
    run = rundir.read_run(output)
    begun, ended = (datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    return {"answers": run["metrics"].get("answers"), "seconds": (ended - begun).total_seconds()}


def _kept(file: Path, measure: Any) -> dict[str, Any]:
    """What is in the file, or what `measure` gives, which is then written down there."""
    if not file.is_file():
        rundir.write_json(file, measure())
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return kept
