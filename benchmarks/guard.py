"""How good the built-in guard is when it is made anew: the recipe's data, detector and threshold with several seeds.

    python -m benchmarks.guard --seeds 3

Every seed draws its own training set, weights and order; what is measured is always the splits that come along
(`finetune/protector/splits`). Runs that are finished stay as they are. Writes `benchmarks/results/guard.json` and
`guard.md`, the mean of the seeds with Student's 95% interval.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.stats import t as student

from finetune.protector.splits import FOLDER
from finetune.recipe import run_recipe

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "test_auroc": "AUROC, known kinds of harm",
    "test_caught": "of these caught",
    "test_held_back": "exchanges held back, by the question or the answer",
    "test_false_positives": "false positives",
    "test_over_refusal": "over-refusal of look-alikes",
    "strangers_auroc": "AUROC, known kinds in a stranger's words",
    "strangers_held_back": "of these exchanges held back",
    "strangers_false_positives": "false positives beside these",
    "categories_auroc": "AUROC, unknown kinds of harm",
    "categories_caught": "of these caught",
    "categories_false_positives": "false positives beside these",
}


def main(
    seeds: Annotated[int, typer.Option(min=2, help="How many.")] = 3,
    build: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("build/guard-seeds"),
) -> None:
    """Train with every seed, and write the table."""
    metrics = [_run(seed, build / str(seed)) for seed in range(seeds)]
    rows = {key: interval([run[key] for run in metrics]) for key in SHOWN}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guard.json").write_text(json.dumps({"runs": metrics, "cores": os.cpu_count()}, indent=2) + "\n")
    lines = [f"| percent, {seeds} seeds | mean | 95% interval |", "|---|---:|---:|"]
    lines += [f"| {SHOWN[key]} | {mean:.1f} | {low:.1f} to {high:.1f} |" for key, (mean, low, high) in rows.items()]
    text = "\n".join(lines) + "\n"
    (RESULTS / "guard.md").write_text(f"`python -m benchmarks.guard --seeds {seeds}`\n\n{text}")
    typer.echo(text)


def _run(seed: int, place: Path) -> dict[str, float]:
    """The metrics of the recipe's steps but the detoxifier, with this seed."""
    steps = {
        "data": {"output": place / "data"},
        "fresh": {"output": place / "fresh", "train": place / "data/train"},
        "detector": {
            "output": place / "detector",
            "model": place / "fresh/detector",
            "train": place / "data/train",
            "validation": place / "data/validation",
        },
        "guard": {
            "output": place / "assembled",
            "detector": place / "detector/detector",
            "detoxifier": "null",
            "validation": place / "data/validation",
            "test": FOLDER / "test",
            "strangers": FOLDER / "strangers",
            "categories": FOLDER / "categories",
            "attacks": FOLDER / "attacks",
        },
    }
    for step, settings in steps.items():
        run_recipe(f"guard-picto/{step}", [f"{key}={value}" for key, value in {**settings, "seed": seed}.items()])
    run = json.loads((place / "assembled/run.json").read_text(encoding="utf-8"))
    return dict(run["metrics"])


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95% interval, in percent; shares end at 0 and 100."""
    percent = 100 * np.array(values)
    half = float(student.ppf(0.975, len(values) - 1) * percent.std(ddof=1) / np.sqrt(len(values)))
    mean = float(percent.mean())
    return mean, max(mean - half, 0.0), min(mean + half, 100.0)


if __name__ == "__main__":
    typer.run(main)
