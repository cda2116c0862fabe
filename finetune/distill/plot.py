"""The pictures of distillation that `detgpt.evaluation.diagrams` does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from finetune.distill.verdict import TEACHER

GREY, BLUE = "0.6", "#2469b3"


def concentration(found: Mapping[str, Any], enough: float, title: str) -> Figure:
    """What `finetune.distill.concentration` counted."""
    counts = range(1, len(found["mass"]) + 1)
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(counts, found["mass"], marker="o", label="mean mass")
    axes.plot(counts, found["share"], marker="s", label=f"positions with {enough:.0%} of the mass")
    axes.axhline(enough, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="likeliest tokens", xticks=list(counts), ylim=(min(0.5, *found["share"]), 1.01))
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    return figure


def compared(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], columns: Sequence[str]) -> Figure:
    """A line for each method, a panel for each number: {method: {number: (mean, low, high)}}, in percent."""
    names = [*rows][::-1]
    figure = Figure(figsize=(2.2 + 2.2 * len(columns), 0.4 * len(names) + 1), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True).flat
    for panel, column in zip(panels, columns, strict=True):
        for place, name in enumerate(names):
            mean, low, high = (100 * value for value in rows[name][column])
            colour = GREY if name == TEACHER else BLUE
            panel.plot(mean, place, "o", color=colour)
            panel.plot([low, high], [place, place], color=colour, linewidth=1)  # not drawn where there is no interval
        panel.set_yticks(range(len(names)), names)
        panel.set_title(f"{column} (%)", fontsize="medium")
        panel.grid(alpha=0.25)
    return figure
