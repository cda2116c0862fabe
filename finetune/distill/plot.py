"""The pictures of distillation, as .png and .svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from detgpt import terminal
from detgpt.evaluation.calibration import calibration_bins

FORMATS = ("png", "svg")
SIZE = 3.4, 3.4  # inches, of a panel
GREY, BLUE, RED = "0.6", "tab:blue", "tab:red"


def save(figure: Figure, file: Path) -> None:
    """Write `file` as .png and .svg; the same picture gives the same bytes."""
    for kind in FORMATS:
        with terminal.replacing(file.with_suffix(f".{kind}")) as partial, matplotlib.rc_context({"svg.hashsalt": "0"}):
            figure.savefig(partial, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)


def concentration(file: Path, found: Mapping[str, Any], enough: float, title: str) -> None:
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
    save(figure, file)


def reliability(file: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]], bins: int = 10) -> None:
    """A diagram for each title: how often answers of a confidence were right, of (confidences, whether right)."""
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    edges = np.linspace(0, 1, bins + 1)[:-1]
    for axes, (title, (confidences, right)) in zip(every, panels.items(), strict=False):
        counts, sums, hits = calibration_bins(confidences, right, bins)
        there = counts > 0
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        axes.bar(edges[there], hits[there] / counts[there], width=1 / bins, align="edge", color=BLUE, alpha=0.7)
        axes.plot(sums[there] / counts[there], hits[there] / counts[there], ".", color=RED)
        for edge, count in zip(edges[there], counts[there], strict=True):
            axes.annotate(f"{int(count):,}", (edge + 0.5 / bins, 0.01), ha="center", fontsize=5, rotation=90)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="right")
        axes.set_title(title, fontsize="small")
    for axes in list(every):  # that are left over
        axes.remove()
    save(figure, file)


def compared(file: Path, panels: Mapping[str, Mapping[str, tuple[float, float]]], columns: Sequence[str]) -> None:
    """Rows of methods, a panel for each number: {method: {number: (mean, half of its interval)}}."""
    figure = Figure(figsize=(3.2 * len(columns), 0.42 * len(panels) + 1.1), layout="constrained")
    every = figure.subplots(1, len(columns), squeeze=False, sharey=True).flat
    names = list(panels)[::-1]
    for axes, column in zip(every, columns, strict=True):
        means, halves = zip(*(panels[name][column] for name in names), strict=True)
        axes.errorbar(means, range(len(names)), xerr=halves, fmt="o", color=BLUE, capsize=3, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(column, fontsize="medium")
        axes.grid(alpha=0.25)
    save(figure, file)
