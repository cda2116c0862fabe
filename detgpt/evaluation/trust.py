"""How far a model's confidences and scores can be trusted, before and after its calibration.

    detgpt eval finetune/picto/splits/* --calibration trust/

A run is a model on a set of wishes; its claims are the targets that were named and the boxes that were given, each with
what it said of itself. `calibration` says what the numbers mean, `judging` when a claim is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from detgpt import terminal
from detgpt.calibration import Calibration
from detgpt.evaluation.calibration import summary
from detgpt.evaluation.diagrams import reliability, risk_and_coverage, save_figure
from detgpt.evaluation.judging import Judged, judged_boxes, judged_targets
from detgpt.evaluation.samples import Samples
from detgpt.evaluation.tables import markdown, percent

RAW, CALIBRATED = "raw", "calibrated"
KINDS = {"targets": judged_targets, "boxes": judged_boxes}

Claims: TypeAlias = dict[str, dict[str, Judged]]


def claims(samples: Samples, calibration: Calibration) -> Claims:
    """{"targets" or "boxes": {"raw": …, "calibrated": …}} of the results of an uncalibrated model; only "raw" where
    the calibration has no curve for it."""
    answered = [(sample.record, sample.result) for sample in samples.samples]
    after = [(record, calibration.apply(result)) for record, result in answered]
    curves = {"targets": calibration.confidence, "boxes": calibration.score}
    return {
        kind: {RAW: judge(answered), **({CALIBRATED: judge(after)} if curves[kind] else {})}
        for kind, judge in KINDS.items()
    }


def numbers(runs: Mapping[str, Claims]) -> dict[str, Any]:
    """{run: {kind: {stage: `summary`}}}, safe for JSON."""
    return {
        run: {kind: {stage: summary(*judged[:2]) for stage, judged in stages.items()} for kind, stages in made.items()}
        for run, made in runs.items()
    }


COLUMNS = {
    "right": "accuracy",
    "sure": "confidence",
    "ECE10": "ece_10",
    "ECE15": "ece_15",
    "adaptive ECE": "ece_adaptive",
    "NLL": "nll",
    "Brier": "brier",
    "trust": "trust",
    "AURC": "aurc",
    "wrong of surest 80%": "risk_80",
}


def table(measured: Mapping[str, Any]) -> str:
    """A Markdown table of what `numbers` gave, a row for each run, kind and stage. In percent, NLL in nats."""
    rows = [["run", "what", "", "claims", *COLUMNS]]
    for run, kinds in measured.items():
        for kind, stages in kinds.items():
            for stage, values in stages.items():
                cells = (
                    f"{values[key]:.3f}" if key == "nll" and values["n"] else percent(values[key])
                    for key in COLUMNS.values()
                )
                rows.append([run, kind, stage, str(values["n"]), *cells])
    return markdown(rows)


def write(runs: Mapping[str, Claims], folder: Path) -> list[Path]:
    """`trust.json`, and the diagrams as PNG and SVG: `reliability` and `risk-coverage`.

    Raises `InputError` where the folder cannot be written, `MissingExtraError` without matplotlib.
    """
    file = folder / "trust.json"
    with terminal.replacing(file) as partial:
        partial.write_text(json.dumps(numbers(runs), indent=2) + "\n", encoding="utf-8")
    figures = {"reliability": reliability(runs), "risk-coverage": risk_and_coverage(runs)}
    return [file, *(path for name, figure in figures.items() for path in save_figure(figure, folder / name))]
