"""`detgpt calibrate`: fit a pair's calibration on labelled pictures, and keep it beside the pair.

Boxes are looked at down to `LEAST_SCORE`, below any threshold that somebody would set, so that the curve also holds
where a threshold is lowered. What a curve is worth is measured on pictures that it was not fitted on, fold by fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from detgpt import terminal
from detgpt.calibration import CALIBRATION_FILE, Calibration, Curve
from detgpt.errors import InputError
from detgpt.evaluation import evaluate, trust
from detgpt.evaluation.calibration import summary
from detgpt.evaluation.data import Dataset
from detgpt.evaluation.fitting import BEST, FEWEST, FOLDS, METHODS, cross_validated, enough, fit
from detgpt.evaluation.judging import Judged, judged_boxes, judged_targets
from detgpt.evaluation.readers import FORMATS, read_dataset
from detgpt.evaluation.samples import Samples
from detgpt.flags import Choice, with_model
from detgpt.models import NONE, PAIR_FILE, PAIRS, ModelPair, describe_pair, resolve
from detgpt.pipeline import DetGPT

LEAST_SCORE = 0.05
CROSS_VALIDATED = "cross-validated"


def calibrate(
    model: DetGPT,
    data: Dataset,
    *,
    method: str = BEST,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The calibration of `model` by the records of `data`, for no named weights yet.

    Its `fitted` has {"confidence" and "score": {"raw" and "cross-validated": `summary`}}, boxes as far as they reach
    the model's own threshold. A half without `enough` claims gets no curve; raises `InputError` where neither does.
    """
    samples = Samples("")
    floor = min(LEAST_SCORE, model.options.box_threshold)
    evaluate(
        model.uncalibrated(),
        data,
        batch_size=batch_size,
        progress=progress,
        each=samples.add,
        detector_alone=False,
        box_threshold=floor,
        min_confidence=0.0,
    )
    answered = [(sample.record, sample.result) for sample in samples.samples]
    targets, boxes = judged_targets(answered), judged_boxes(answered)
    confidence, of_targets = _fitted(targets, method)
    score, of_boxes = _fitted(boxes, method, least=model.options.box_threshold)
    if confidence is None and score is None:
        (right, wrong), (right_boxes, wrong_boxes) = targets.rights_and_wrongs, boxes.rights_and_wrongs
        raise InputError(
            f"{right} right and {wrong} wrong targets, {right_boxes} right and {wrong_boxes} wrong boxes are too few "
            f"to fit on: label more, for {FEWEST} of each about {FOLDS} pictures"
        )
    return Calibration(confidence, score, fitted={"wishes": len(answered), "confidence": of_targets, "score": of_boxes})


def _fitted(judged: Judged, method: str, least: float = 0.0) -> tuple[Curve | None, dict[str, Any]]:
    """The curve, None where there are too few claims, and how good those over `least` are before and after."""
    shown = judged.confidences >= least
    numbers = {trust.RAW: _rounded(judged.confidences[shown], judged.correct[shown])}
    if not enough(judged):
        return None, numbers
    after = cross_validated(judged, method)
    return fit(judged, method), {**numbers, CROSS_VALIDATED: _rounded(after[shown], judged.correct[shown])}


def _rounded(confidences: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    return {name: value and round(value, 4) for name, value in summary(confidences, correct).items()}


@with_model
def calibrate_command(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Folders or files.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder for the pair with its calibration; else that of the model."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}, or {BEST} by cross-validation.")] = BEST,
    format: Annotated[str | None, typer.Option(help=f"{', '.join(FORMATS)}; found from the data unless given.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="The COCO annotation file, if it lies elsewhere.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of the pictures, if they lie elsewhere.")] = None,
    split: Annotated[str | None, typer.Option(help="The part to read, such as testA of RefCOCO.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many wishes of each.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Wishes that go through the models together.")] = 8,
    *,
    choice: Choice,
    settings: dict[str, Any],
) -> None:
    """Make confidences and scores into probabilities, by labelled pictures like those it is for.

    detgpt calibrate shop/ -m runs/shop

    detgpt calibrate shop/ -m base -o models/base-shop

    DATA is what `detgpt eval` reads; some hundred wishes, none of them trained on. The result, calibration.json, is
    used wherever the model is loaded; a model that learns further needs a new one.
    """
    pair = choice.pair(reasons=True)
    folder = _folder(choice, pair, output, settings)
    places: dict[str, Any] = {"annotations": annotations, "images": images, "split": split}
    datasets = [read_dataset(path, format=format, limit=limit, **places) for path in data]
    for note in (note for dataset in datasets for note in dataset.notes):
        terminal.note(note)
    together = Dataset(tuple(record for dataset in datasets for record in dataset.records))
    model = replace(choice, calibration=NONE).load(settings)
    with terminal.progress(f"{len(together.records)} wishes") as progress:
        calibration = calibrate(model, together, method=method, batch_size=batch_size, progress=progress)
    calibration = calibration.for_weights(**pair.identities)
    if output:
        with terminal.replacing(folder / PAIR_FILE) as file:
            file.write_text(describe_pair(pair, settings), encoding="utf-8")
    with terminal.replacing(folder / CALIBRATION_FILE) as file:
        file.write_text(calibration.to_json(), encoding="utf-8")
    _report(calibration)
    terminal.note(f"wrote {folder / CALIBRATION_FILE}: it is used with -m {folder}")


def _folder(choice: Choice, pair: ModelPair, output: Path | None, settings: Mapping[str, Any]) -> Path:
    """Where the calibration goes: `output`, or the folder that the model was given as."""
    if output is None:
        if choice.detector or choice.model in PAIRS or settings:
            raise typer.BadParameter(
                "-o is missing: give a folder for this pair with its settings and calibration, which is then a model"
            )
        return Path(choice.model)
    if (output / PAIR_FILE).is_file():
        there = resolve(output)
        if there.identities != pair.identities:
            raise InputError(f"{output} holds another pair ({there.reasoner}, {there.detector}): give another -o")
    return output


def _report(calibration: Calibration) -> None:
    """A table of before and after; and which half was left as it is."""
    kinds = {"confidence": "targets", "score": "boxes"}
    typer.echo(trust.table({"": {kind: calibration.fitted[half] for half, kind in kinds.items()}}))
    for half, kind in kinds.items():
        if getattr(calibration, half) is None:
            terminal.note(f"{kind} stay as the model gives them: fewer than {FEWEST} were right, or wrong")
