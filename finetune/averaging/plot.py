"""The plot of `stage: pareto`: what alignment won, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from detgpt import terminal

MARKERS = "osD^v<>PX*hp"
SIZE = 4.2, 3.6  # inches, of a panel
LEGEND = 1.6  # inches beside them
COLUMNS = 3
FORMATS = ("png", "svg")


def draw(file: Path, points: Sequence[Mapping[str, Any]], abilities: Sequence[str]) -> None:
    """Write `file` as .png and .svg: a panel for each ability, a line for each method through its settings.

    points: rows of points.csv. A marker is the mean over the seeds, the small dots are the seeds themselves.
    """
    columns = min(len(abilities), COLUMNS)
    rows = -(-len(abilities) // columns)
    figure = Figure(figsize=(SIZE[0] * columns + LEGEND, SIZE[1] * rows), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel, ability in zip(panels, abilities, strict=False):
        for style, (method, settings) in zip(_styles(), _grouped(points, ability).items(), strict=False):
            every = [point for found in settings for point in found]
            means = sorted((fmean(x for x, _ in found), fmean(y for _, y in found)) for found in settings)
            panel.scatter(*zip(*every, strict=True), s=6, color=style["color"], alpha=0.35, linewidths=0)
            panel.plot(*zip(*means, strict=True), label=method, linewidth=1, markersize=6, **style)
        panel.set(xlabel="reward on held-out wishes", ylabel=f"{ability} (%)")
        panel.grid(alpha=0.25)
    for panel in panels[len(abilities) :]:
        panel.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    for kind in FORMATS:
        with terminal.replacing(file.with_suffix(f".{kind}")) as partial, matplotlib.rc_context({"svg.hashsalt": "0"}):
            figure.savefig(partial, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)


def _styles() -> Iterator[dict[str, Any]]:
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return ({"marker": marker, "color": colours[2 * i % 20 + i // 10]} for i, marker in enumerate(MARKERS))


def _grouped(points: Sequence[Mapping[str, Any]], ability: str) -> dict[str, list[list[tuple[float, float]]]]:
    """{method: [the seeds' points of one setting, …]}, the ability in percent."""
    grouped: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in points:
        settings = grouped.setdefault(row["method"], {})
        settings.setdefault(row["setting"], []).append((row["reward"], 100 * row[ability]))
    return {method: list(settings.values()) for method, settings in grouped.items()}
