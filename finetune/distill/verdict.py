"""What a study of distillation found: means with their intervals, and which of FIRST's claims hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan, nan
from statistics import fmean
from typing import Any

from detgpt.evaluation.tables import NO_NUMBER, markdown, percent
from finetune.averaging.front import interval

TEACHER = "teacher"
# A table's columns: the heading, the number of points.csv, and whether more of it is better.
COLUMNS = {
    "exact": ("exact", True),
    "names F1": ("f1", True),
    "ECE": ("targets_ece_10", False),
    "ECE15": ("targets_ece_15", False),
    "adaptive ECE": ("targets_ece_adaptive", False),
    "NLL": ("targets_nll", False),
    "Brier": ("targets_brier", False),
    "trust": ("trust", True),
    "token accuracy": ("tokens_accuracy", True),
    "token ECE": ("tokens_ece_10", False),
    "token NLL": ("tokens_true_nll", False),
}
COMPARED = ("exact", "ECE", "token accuracy", "token ECE")  # of the picture
NATS = ("NLL", "token NLL")  # columns that are no shares
LESS, WITHIN = 0.10, 0.01  # of FIRST's claims: mis-calibration against SFT, accuracy against the whole vocabulary

Mean = tuple[float, float, float]  # with its interval; NaN of one seed
Means = dict[str, dict[str, Mean]]


def averaged(points: Sequence[Mapping[str, Any]]) -> Means:
    """{method: {column: mean over sets and seeds, with its 95% interval over seeds}}.

    points: rows of points.csv. "trust" is ours: `exact` less ECE.
    """
    means: Means = {}
    for method in dict.fromkeys(row["method"] for row in points):
        means[method] = {}
        for column in COLUMNS:
            means[method][column] = _mean(by_seed(points, method, column).values())
    return means


def by_seed(points: Sequence[Mapping[str, Any]], method: str, column: str) -> dict[Any, float]:
    """{seed: mean over the sets of wishes}; a set without a named target has no calibration, and counts for nothing."""
    rows = [row for row in points if row["method"] == method]
    found = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        values = [_value(row, column) for row in rows if row["seed"] == seed]
        if known := [value for value in values if value is not None]:
            found[seed] = fmean(known)
    return found


def table(means: Means, points: Sequence[Mapping[str, Any]], storage: Mapping[str, float]) -> str:
    """Markdown: the methods, the best of each column in bold (the teacher aside), and the claims."""
    best = {column: _best(means, column) for column in COLUMNS}
    rows = [["method", "bytes/token", *COLUMNS]]
    for method, of in means.items():
        cells = [_cell(column, of[column], method in best[column]) for column in COLUMNS]
        kept = f"{storage[method]:,.0f}" if storage.get(method) else "–"
        rows.append([method, kept, *cells])
    lines = [
        markdown(rows),
        "",
        "Means over sets of wishes and seeds, 95% intervals over seeds; percent, NLL in nats. Bold: the best student.",
        "",
        *(f"- {line}" for line in claims(points, storage)),
    ]
    return "\n".join(lines)


def claims(points: Sequence[Mapping[str, Any]], storage: Mapping[str, float]) -> list[str]:
    """A sentence for each of FIRST's claims that the methods at hand can tell of, with the verdict."""
    methods = {row["method"] for row in points}
    said = []
    if {"FIRST", "SFT"} <= methods:
        more, low, high = _difference(points, "FIRST", "SFT", "exact")
        said.append(
            f"FIRST is right more often than SFT by {_points(more, low, high)}: {_verdict(more > 0, low, high)}."
        )
        said.append(_calibrated(*(_mean(by_seed(points, method, "ECE").values())[0] for method in ("FIRST", "SFT"))))
    if {"FIRST", "full vocabulary"} <= methods:
        more, low, high = _difference(points, "FIRST", "full vocabulary", "exact")
        share = storage["FIRST"] / storage["full vocabulary"]
        said.append(
            f"Against the full vocabulary it is right more often by {_points(more, low, high)}, with {share:.2%} of "
            f"its storage (claimed: within {100 * WITHIN:.0f} point): "
            f"{'holds' if more >= -WITHIN else 'does not hold'}."
        )
    trust = {method: _mean(by_seed(points, method, "trust").values())[0] for method in methods - {TEACHER}}
    if known := {method: value for method, value in trust.items() if not isnan(value)}:
        winner = max(known, key=lambda method: known[method])
        said.append(f"The best trust (exact less ECE, our own measure) has {winner}: {percent(known[winner])}.")
    return said


def _calibrated(first: float, sft: float) -> str:
    if isnan(first) or not sft > 0:
        return "Of its calibration against SFT's nothing can be told: one of them named no target."
    less = 1 - first / sft
    return (
        f"Its ECE is {percent(first)} against {percent(sft)}, {100 * less:.0f}% less (claimed: {LESS:.0%}): "
        f"{'holds' if less >= LESS else 'does not hold'}."
    )


def _mean(values: Iterable[float]) -> Mean:
    known = [*values]
    return (fmean(known), *interval(known)) if known else (nan, nan, nan)


def _value(row: Mapping[str, Any], column: str) -> float | None:
    if column == "trust":
        ece = row["targets_ece_10"]
        return None if ece is None else row["exact"] - ece
    value = row[COLUMNS[column][0]]
    return None if value is None else float(value)


def _best(means: Means, column: str) -> set[str]:
    """The students with the best number; none where all have the same."""
    values = {method: of[column][0] for method, of in means.items() if method != TEACHER and not isnan(of[column][0])}
    if len({*values.values()}) < 2:
        return set()
    best = (max if COLUMNS[column][1] else min)(values.values())
    return {method for method, value in values.items() if value == best}


def _cell(column: str, mean: Mean, is_best: bool) -> str:
    if isnan(mean[0]):
        return NO_NUMBER
    shown = (lambda value: f"{value:.3f}") if column in NATS else percent
    text = f"**{shown(mean[0])}**" if is_best else shown(mean[0])
    return text if isnan(mean[1]) else f"{text} ({shown(mean[1])} to {shown(mean[2])})"


def _difference(points: Sequence[Mapping[str, Any]], one: str, other: str, column: str) -> Mean:
    """Of the same seeds."""
    theirs = by_seed(points, other, column)
    return _mean([value - theirs[seed] for seed, value in by_seed(points, one, column).items() if seed in theirs])


def _points(mean: float, low: float, high: float) -> str:
    interval = "" if isnan(low) else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * mean:+.1f} points{interval}"


def _verdict(holds: bool, low: float, high: float) -> str:
    if low <= 0 <= high:
        return f"{'holds' if holds else 'does not hold'}, but the interval has 0 in it"
    return "holds" if holds else "does not hold"
