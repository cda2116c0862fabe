"""What several models can do, side by side: `detgpt eval --abilities`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detgpt import terminal
from detgpt.evaluation.abilities import (
    BY_TARGETS,
    Ability,
    AbilityResult,
    Question,
    answering,
    evaluate_abilities,
    load_answering,
    read_abilities,
)
from detgpt.evaluation.harness import Harness
from detgpt.evaluation.tables import markdown
from detgpt.evaluation.vision_harness import VisionHarness


@dataclass
class Comparison:
    """What each ability came to for each model, {model: {ability: result}}, and every answer."""

    results: dict[str, dict[str, AbilityResult]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """Markdown: an ability a row, a model a column; percent, with the interval. The mean weighs abilities alike."""
        first, *_ = columns = list(self.results.values())
        rows = [["ability", "n", *self.results]]
        for ability, result in first.items():
            rows.append([ability, str(result.n), *(_cell(column[ability]) for column in columns)])
        means = (sum(result.value for result in column.values()) / len(column) for column in columns)
        rows.append(["mean", "", *(f"{100 * mean:.1f}" for mean in means)])
        return markdown(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, safe for JSON."""
        return {
            model: {ability: asdict(result) for ability, result in column.items()}
            for model, column in self.results.items()
        }

    def lines(self) -> str:
        """Every question with its answer and score, one JSON object a line."""
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.samples)

    def add(self, model: str, ability: str, question: Question, text: str, score: float) -> None:
        by_targets = question.score in BY_TARGETS
        self.samples.append(
            {
                "model": model,
                "ability": ability,
                "where": question.where,
                "image": question.image and str(question.image),
                "question": question.question,
                "true": list(question.targets) if by_targets else question.answer,
                "said": text,
                "score": round(score, 4),
            }
        )


def compare(
    places: Sequence[Path],
    models: Sequence[str],
    limit: int | None,
    batch_size: int,
    loading: Mapping[str, Any],
    debug: bool,
    harnesses: Sequence[Harness | VisionHarness] = (),
) -> Comparison:
    """Ask every model about the abilities in the folders `places`, then by the tasks of `harnesses`.

    loading: device and dtype.
    """
    abilities = _read(places, limit)
    comparison = Comparison()
    for model in models:
        comparison.results[model] = (
            _asked(comparison, model, abilities, batch_size, loading, debug) if abilities else {}
        )
        for harness in harnesses:
            tasks = harness.measure(model, limit=limit, batch_size=batch_size, **loading)
            comparison.results[model] |= tasks
    return comparison


def _asked(
    comparison: Comparison,
    model: str,
    abilities: Mapping[str, Ability],
    batch_size: int,
    loading: Mapping[str, Any],
    debug: bool,
) -> dict[str, AbilityResult]:
    with terminal.loading(model, [answering(model)[0]], debug):
        reasoner = load_answering(model, **loading)
    with terminal.progress(model) as progress:
        return evaluate_abilities(
            reasoner,
            abilities,
            batch_size=batch_size,
            progress=progress,
            each=functools.partial(comparison.add, model),
        )


def _read(places: Sequence[Path], limit: int | None) -> dict[str, Ability]:
    """The abilities of all places; those of several are told apart by their folder."""
    abilities: dict[str, Ability] = {}
    for place in places:
        prefix = "" if len(places) == 1 else f"{place} · "
        abilities |= {f"{prefix}{name}": ability for name, ability in read_abilities(place, limit=limit).items()}
    return abilities


def _cell(result: AbilityResult) -> str:
    if result.low is None or result.high is None:
        return f"{100 * result.value:.1f}"
    return f"{100 * result.value:.1f} ({100 * result.low:.1f}–{100 * result.high:.1f})"
