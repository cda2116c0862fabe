"""Reliability diagrams and risk-coverage curves, drawn by matplotlib without a screen; PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt import terminal
from detgpt.evaluation.calibration import calibration_bins, expected_calibration_error, risk_coverage
from detgpt.evaluation.metrics import load_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from detgpt.evaluation.judging import Judged
    from detgpt.evaluation.trust import Claims

FIGURE = "matplotlib.figure"
PANEL_INCHES = 2.7, 3.0
COLOURS = {"raw": "#d1662b", "calibrated": "#2469b3"}
SETTINGS: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "detgpt",  # the same numbers give the same file
    "svg.fonttype": "none",
}


def reliability(runs: Mapping[str, Claims]) -> Figure:
    """A column for each run, a row for targets and one for boxes: how often claims of a confidence are right, in ten
    bins; a dot is as large as its bin is full. What is as sure as it is right lies on the diagonal."""
    figure, panels = _panels(runs)
    for panel, stages in panels:
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        for stage, judged in stages.items():
            counts, confidence, hits = calibration_bins(judged.confidences, judged.correct)
            full = counts > 0
            if not full.any():
                continue
            x, y, share = confidence[full] / counts[full], hits[full] / counts[full], counts[full] / counts.sum()
            ece = expected_calibration_error(judged.confidences, judged.correct) or 0.0
            panel.plot(x, y, color=COLOURS[stage], linewidth=1, alpha=0.5)
            dots: dict[str, Any] = {"s": 5 + 110 * share, "alpha": 0.8, "clip_on": False}
            panel.scatter(x, y, color=COLOURS[stage], label=f"{stage}, ECE {100 * ece:.1f}%", **dots)
        panel.set(xlabel="how sure", ylabel="how often right", aspect="equal", xlim=(0, 1), ylim=(0, 1))
        if panel.collections:  # something was claimed
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), markerscale=0.5, frameon=False, fontsize=8)
    return figure


def risk_and_coverage(runs: Mapping[str, Claims]) -> Figure:
    """The same panels: of the surest share of the claims, how many are wrong. A calibration leaves the order and with
    it the curve as it was; the level line is what claims in no order would give."""
    figure, panels = _panels(runs)
    for panel, stages in panels:
        stage, judged = list(stages.items())[-1]
        if len(judged.correct):
            coverage, risk = risk_coverage(judged.confidences, judged.correct)
            panel.axhline(100 * risk[-1], color="0.7", linewidth=1, linestyle="--")
            panel.plot(100 * coverage, 100 * risk, color=COLOURS[stage], linewidth=1.5)
        panel.set(xlim=(0, 100), xlabel="answered, surest first (%)", ylabel="wrong (%)")
        panel.set_ylim(bottom=0)
    return figure


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.png and `path`.svg, and return both."""
    written = []
    for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
        with terminal.replacing(path.with_suffix(suffix)) as file, load_extra("matplotlib").rc_context(SETTINGS):
            figure.savefig(file, dpi=120, metadata=metadata, format=suffix[1:])
        written.append(path.with_suffix(suffix))
    return written


def _panels(runs: Mapping[str, Claims]) -> tuple[Figure, list[tuple[Any, Mapping[str, Judged]]]]:
    """An empty figure, and (axes, stages) of each of its panels, which have their titles."""
    kinds = list(next(iter(runs.values())))
    with load_extra("matplotlib").rc_context(SETTINGS):
        size = PANEL_INCHES[0] * len(runs), PANEL_INCHES[1] * len(kinds)
        figure = load_extra(FIGURE).Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(kinds), len(runs), squeeze=False)
        panels: list[tuple[Any, Mapping[str, Judged]]] = []
        for column, (run, made) in enumerate(runs.items()):
            for row, kind in enumerate(kinds):
                axes[row, column].set_title(f"{run}: {kind}")
                panels.append((axes[row, column], made[kind]))
    return figure, panels
