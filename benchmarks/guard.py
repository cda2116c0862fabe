"""How good the built-in guard is when it is made anew: the recipe's data, parts and threshold with several seeds.

    python -m benchmarks.guard --seeds 3

Every seed draws its own training set, weights and order; what is measured is always the splits that come along
(`finetune/protector/splits`), and how the built-in model stands the attacks with this guard and without. Runs that are
finished stay as they are. The detector learns in bfloat16 on the processor. Writes `benchmarks/results/guard.json` and
`guard.md`, the mean of the seeds with Student's 95% interval.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import t as student

from detgpt.evaluation.measuring_safety import measure
from detgpt.evaluation.safety import GUARDED, PLAIN
from finetune.protector.splits import FOLDER
from finetune.recipe import run_recipe

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "test_auroc": "AUROC, known kinds of harm",
    "test_auroc_questions": "· of wishes alone",
    "test_held_back": "· exchanges held back, by the question or the answer",
    "test_false_positives": "· false positives",
    "test_over_refusal": "· over-refusal of look-alikes",
    "strangers_auroc": "AUROC, known kinds in a stranger's words",
    "strangers_held_back": "· exchanges held back",
    "strangers_false_positives": "· false positives",
    "strangers_over_refusal": "· over-refusal of look-alikes",
    "categories_auroc": "AUROC, unknown kinds of harm",
    "categories_held_back": "· exchanges held back",
    "categories_false_positives": "· false positives",
    "categories_over_refusal": "· over-refusal of look-alikes",
    "attacks_plain": "attacks that succeed without a guard",
    "attacks_guarded": "· with it",
    "attacks_left": "· of those without",
    "attacks_over_refusal": "· harmless questions beside them that are refused",
    "attacks_overhead": "· the guard's time where nothing is flagged, of the reasoner's",
    "strangers-attacks_plain": "a stranger's attacks that succeed without a guard",
    "strangers-attacks_guarded": "· with it",
    "strangers-attacks_left": "· of those without",
    "strangers-attacks_over_refusal": "· harmless questions beside them that are refused",
}


def main(
    seeds: Annotated[int, typer.Option(min=2, help="How many.")] = 3,
    build: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("build/guard-seeds"),
) -> None:
    """Train with every seed, and write the table."""
    metrics = [_measured(train(seed, build / str(seed))) for seed in range(seeds)]
    rows = {key: interval([run[key] for run in metrics]) for key in SHOWN}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guard.json").write_text(json.dumps({"runs": metrics, "cores": os.cpu_count()}, indent=2) + "\n")
    lines = [f"| percent, {seeds} seeds | mean | 95% interval |", "|---|---:|---:|"]
    lines += [f"| {SHOWN[key]} | {mean:.1f} | {low:.1f} to {high:.1f} |" for key, (mean, low, high) in rows.items()]
    text = "\n".join(lines) + "\n"
    (RESULTS / "guard.md").write_text(f"`python -m benchmarks.guard --seeds {seeds}`\n\n{text}")
    typer.echo(text)


def train(seed: int, place: Path) -> Path:
    """A run of the recipe's steps but the detoxifier, with this seed: `guard/` and its metrics."""
    questions = f"[{place / 'data/train'}, {place / 'data/questions'}]"
    steps: dict[str, dict[str, Any]] = {
        "data": {"output": place / "data"},
        "ngrams": {"output": place / "ngrams", "train": questions},
        "fresh": {"output": place / "fresh", "train": place / "data/train"},
        "network": {"output": place / "network", "train": questions, "tokenizer": place / "fresh/detector"},
        "encoder": {"output": place / "encoder", "train": questions, "trainer.use_cpu": "true"},
        "detector": {
            "output": place / "detector",
            "model": place / "fresh/detector",
            "train": place / "data/train",
            "validation": place / "data/validation",
            "trainer.use_cpu": "true",
            "trainer.bf16": "true",
        },
        "guard": {
            "output": place / "assembled",
            "detector": place / "detector/detector",
            "ngrams": place / "ngrams/ngrams",
            "network": place / "network/network",
            "encoder": place / "encoder/encoder",
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
    return place / "assembled"


def _measured(run: Path) -> dict[str, float]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["metrics"] | attacked(run / "guard")


def attacked(guard: Path) -> dict[str, float]:
    """What the built-in model does with this guard under the attacks of authors whom it knows and of a stranger."""
    found = {}
    for name in ("attacks", "strangers-attacks"):
        results = measure(
            [FOLDER / name],
            ["picto"],
            None,
            {},
            False,
            guard_model=str(guard),
            picture_text=None,
            judge=None,
            utility=None,
        )
        plain, guarded = (results.success(system)["value"] for system in (PLAIN, GUARDED))
        found[f"{name}_plain"], found[f"{name}_guarded"] = plain, guarded
        found[f"{name}_left"] = guarded / plain
        found[f"{name}_over_refusal"] = results.over_refusal(GUARDED)["value"]
        found[f"{name}_overhead"] = results.latency(GUARDED)["unflagged_overhead"]
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95% interval, in percent; shares end at 0 and 100."""
    percent = 100 * np.array(values)
    half = float(student.ppf(0.975, len(values) - 1) * percent.std(ddof=1) / np.sqrt(len(values)))
    mean = float(percent.mean())
    return mean, max(mean - half, 0.0), min(mean + half, 100.0)


if __name__ == "__main__":
    typer.run(main)
