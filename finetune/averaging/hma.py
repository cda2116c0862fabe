"""Heterogeneous Model Averaging (Lin et al. 2024, arXiv:2309.06256): `stage: hma`.

    stage: hma
    base: runs/instructed                               # before alignment
    tuned: runs/aligned                                 # after
    samples: runs/aligned/iterations/03/samples.jsonl   # answers of the tuned model that were scored high
    mean: 0.2                                           # of the tuned model's share
    output: runs/averaged

Averaging an aligned model with the one before gives back what alignment cost; where in the depth of the model it is
averaged more or less matters. Groups of blocks get ratios with the given mean that make the tuned model's own best
answers likeliest. Nothing of the abilities that are to be kept is looked at.

    runs/averaged/
      ratios.json    the tuned model's share by group of blocks: `detgpt-finetune average BASE TUNED OUT --ratios …`
      reasoner/      the average
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from detgpt import terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.reasoners.chat import is_bare
from finetune import rundir
from finetune.averaging.average import Merge
from finetune.averaging.likelihood import Averaged, weights
from finetune.averaging.ratios import count_blocks, groups
from finetune.averaging.simplex import grid, project
from finetune.batching import Batch, collator
from finetune.data.records import features, fingerprint, load_records, read_record
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.parts import part_of
from finetune.recipe import StageConfig
from finetune.stages.reasoner import REASONER

RATIOS = "ratios.json"
GRID_POINTS = 7  # of a ratio's range
GRID_GROUPS = 3
LogLikelihood = Callable[[torch.Tensor, Batch], torch.Tensor]  # ratios, batch → sum over the batch's examples


class Config(StageConfig):
    """base, tuned: checkpoints, as `finetune.loading.Checkpoint.model`. samples: a folder of records whose answers are
    the tuned model's, or a file of scored samples, of which each wish's best is taken, and of those the `best` ones.

    groups: of consecutive blocks, with a ratio each. mean: of the ratios. epsilon: see `finetune.averaging.simplex`.
    penalty: of every ratio's distance from the mean, in units of the log-likelihood. check_grid: also try ratios all
    over the simplex, and report the best.
    """

    stage: Literal["hma"] = "hma"
    base: str
    tuned: str
    samples: Path
    best: int | None = Field(default=None, ge=1)
    mean: float = Field(gt=0, lt=1)
    groups: int = Field(default=3, ge=1)
    epsilon: float = Field(default=0.0, ge=0)
    penalty: float = Field(default=0.0, ge=0)
    max_steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    max_length: int | None = Field(default=None, ge=2)
    check_grid: bool = False

    @model_validator(mode="after")
    def _has_a_grid(self) -> Config:
        if self.check_grid and self.groups != GRID_GROUPS:
            raise InputError(f"check_grid is for {GRID_GROUPS} groups, not for {self.groups}: leave it out")
        return self


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    folder = rundir.start(config, {"samples": _fingerprint(config.samples)})
    ratios, metrics = choose(config)
    rundir.write_json(folder / RATIOS, ratios)
    rundir.write_folder(folder / REASONER, Merge(config.base, config.tuned, ratios).write)
    if rundir.is_pair(config.tuned):
        rundir.write_pair(folder, reasoner=REASONER, detector=config.tuned)
    rundir.finish(folder, metrics)


def choose(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """The ratios, and how likely they make an answer of the samples (mean logarithm of its probability)."""
    device = choose_device(None)
    base, _ = load(Checkpoint(model=config.base), "float32")
    tuned, processor = load(Checkpoint(model=config.tuned), "float32")
    names = groups(count_blocks(map(part_of, weights(base))), config.groups)
    averaged = Averaged(base.to(device), tuned.to(device), names, config.mean)
    records = read_samples(config.samples, config.best)
    encoded = records.with_transform(RecordEncoder(processor, bare=is_bare(tuned.config), max_length=config.max_length))
    collate = collator(tuned, processor)

    def batches(generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Of all samples once; in random order with a generator."""
        loader: Any = DataLoader(
            encoded, config.batch_size, shuffle=generator is not None, generator=generator, collate_fn=collate
        )
        for batch in loader:
            yield {name: value.to(device) for name, value in batch.items()}

    @torch.no_grad()
    def measured(ratios: Sequence[float] | torch.Tensor) -> float:
        """The mean log-likelihood of all samples."""
        given = torch.as_tensor(ratios, device=device)
        return sum(float(averaged.log_likelihood(given, batch)) for batch in batches()) / len(records)

    uniform = [config.mean] * config.groups
    found = uniform if config.groups == 1 else solve(averaged.log_likelihood, batches, config)
    metrics = {"log_likelihood": measured(found), "log_likelihood_uniform": measured(uniform)}
    if config.check_grid:
        metrics |= _checked(config, measured, metrics["log_likelihood"])
    ratios = dict(zip(names, found, strict=True))
    return ratios, {**metrics, **{f"ratio_{name}": ratio for name, ratio in ratios.items()}}


def solve(
    log_likelihood: LogLikelihood, batches: Callable[[torch.Generator], Iterator[Batch]], config: Config
) -> list[float]:
    """The ratios that make the samples likeliest (Eqs. 8 and 9), by projected gradient ascent from equal ones.

    Steps go straight uphill, `learning_rate` long at first, then shorter, so the likelihood's scale does not matter.
    """
    ratios = torch.full((config.groups,), config.mean, dtype=torch.float64)
    with terminal.progress("ratios") as move:
        for step, batch in enumerate(islice(_orders(batches, config.seed), config.max_steps)):
            ratios.requires_grad_()
            mean = log_likelihood(ratios, batch).cpu() / len(batch["labels"])
            (uphill,) = torch.autograd.grad(mean - config.penalty * (ratios - config.mean).abs().sum(), ratios)
            along = torch.nn.functional.normalize(uphill - uphill.mean(), dim=0)  # within the plane of the mean
            length = config.learning_rate * (1 - step / config.max_steps)
            ratios = project(ratios.detach() + length * along, config.mean, config.epsilon)
            move(step + 1, config.max_steps)
    found: list[float] = ratios.tolist()
    return found


def read_samples(path: Path, best: int | None = None) -> Dataset:
    """The records of a folder, or the best answer to each wish of a samples file; of those the `best` ones.

    Raises `InputError` for a file that holds no scored samples, or fewer than `best`.
    """
    if path.is_dir():
        if best is not None:
            raise InputError(f"best={best} is for a file of scored samples, and {path} is a folder: leave it out")
        return load_records(path)
    rows = []
    for where, row in fields.read_rows(path, "samples are JSON lines, as `stage: raft` writes them"):
        answers, rewards = row.get("answers"), row.get("rewards")
        if not isinstance(answers, list) or not isinstance(rewards, list) or not 0 < len(answers) == len(rewards):
            raise InputError(f"{where}: a scored sample has 'answers' and as many 'rewards'")
        reward = max(rewards)
        said = {"image": row.get("image"), "instruction": row.get("instruction")}
        rows.append((reward, read_record({**said, "answer": answers[rewards.index(reward)]}, Path(), where)))
    if len(rows) < (best or 1):
        raise InputError(f"{path} has {len(rows)} samples, and best={best or 1} are to be taken: give fewer")
    rows.sort(key=lambda row: -row[0])
    return Dataset.from_list([record for _, record in rows[:best]], features=features())


def _checked(config: Config, measured: Callable[[Sequence[float]], float], found: float) -> dict[str, float]:
    """The best of the grid, and a note where it is clearly better than what was `found`."""
    tried = {ratios: measured(ratios) for ratios in grid(config.groups, config.mean, GRID_POINTS)}
    ratios = max(tried, key=tried.__getitem__)
    best = tried[ratios]
    if found < best - 0.01 * abs(best):
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        terminal.note(
            f"warning: the ratios {shown} of the grid make the samples likelier, {best:.4f} against {found:.4f}: "
            "give more max_steps, a higher learning_rate, or less epsilon and penalty"
        )
    return {"grid_log_likelihood": best, **{f"grid_ratio_{i}": ratio for i, ratio in enumerate(ratios)}}


def _orders(batches: Callable[[torch.Generator], Iterator[Batch]], seed: int) -> Iterator[Batch]:
    """Batches without end, in a new order every time that all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(generator)


def _fingerprint(samples: Path) -> str:
    """Of a folder of records, or of a samples file."""
    if samples.is_file():
        return sha256(samples.read_bytes()).hexdigest()
    return fingerprint(samples)
