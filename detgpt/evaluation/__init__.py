"""How good a model pair is on a folder of pictures, wishes and truths, stage by stage.

    results = {"needs": evaluate(DetGPT.from_pretrained("picto"), "splits/needs")}
    print(table(results))

`data.py` says what such a folder holds, `metrics.py` what each number means. The extra is `detgpt[eval]`.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from detgpt.boxes import nms_per_target
from detgpt.errors import InputError
from detgpt.evaluation.data import ImageTruth, Record, read_records, truth_by_image
from detgpt.evaluation.metrics import (
    EXTRA,
    average_precision,
    box_metrics,
    expected_calibration_error,
    load_extra,
    name_metrics,
)
from detgpt.images import load_image
from detgpt.results import Detections, Target

if TYPE_CHECKING:
    from detgpt.pipeline import DetGPT

__all__ = ["evaluate", "table"]

T = TypeVar("T")

AP_THRESHOLD = 0.01  # AP ranks boxes by score, so it needs the weak ones too


def evaluate(
    model: DetGPT,
    folder: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run `model` on the records of `folder` (the first `limit`) and measure it; the result is safe for JSON.

    n, images: how many wishes, and distinct pictures.
    reasoner: its name and `metrics.name_metrics`; ece, the calibration error of the targets' confidences
        (None where it gives none); by_kind: {kind: {n, f1}}.
    detector: its name, and ap and ap50 where it is told the true names: asked in each picture for every name
        that is a target of any wish about it, with thresholds of 0.01 and the pipeline's suppression of
        duplicates. Boxes of names that are not in a picture do not count here.
    end_to_end: `metrics.box_metrics` of what a user gets.
    seconds: {reasoner, detector} of answering the wishes, and {detector_ap} of the pass for AP.

    progress: called with (done, total) after each batch. `options`: see `detgpt.pipeline.Options`.
    Raises `InputError` for wrong data or arguments, `MissingExtraError` without pycocotools or scipy.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} is no batch: give 1 or more")
    for module in EXTRA:  # a missing one should show now, not after hours of answers
        load_extra(module)
    records = read_records(folder, limit)
    truths = truth_by_image(records)
    total = len(records) + len(truths)
    reasoner, detector = _Timed(model.reasoner, "reason"), _Timed(model.detector, "detect")
    detector_ap = _Timed(model.detector, "detect")
    timed: Any = copy.copy(model)
    timed.reasoner, timed.detector = reasoner, detector

    results: list[Detections] = []
    for batch in _batches(records, batch_size):
        answers = timed.detect_batch([(record.image, record.instruction) for record in batch], **options)
        results += [replace(answer, image=None) for answer in answers]  # or memory would fill with pictures
        if progress:
            progress(len(results), total)
    found: list[Detections] = []
    for images in _batches(truths, batch_size):
        found += _ground_true_names(detector_ap, images, model.options.updated(options))
        if progress:
            progress(len(results) + len(found), total)
    parts = {"reasoner": reasoner, "detector": detector, "detector_ap": detector_ap}
    return {
        "n": len(records),
        "images": len(truths),
        "reasoner": {"name": reasoner.name, **_reasoner_metrics(results, records)},
        "detector": {"name": detector.name, **average_precision(found, truths)},
        "end_to_end": box_metrics(results, records),
        "seconds": {part: timer.seconds for part, timer in parts.items()},
    }


COLUMNS = {
    "wishes": ("n",),
    "names F1": ("reasoner", "f1"),
    "exact": ("reasoner", "exact"),
    "rejected": ("reasoner", "rejection"),
    "hallucinated": ("reasoner", "hallucination"),
    "unread": ("reasoner", "parse_failure"),
    "ECE": ("reasoner", "ece"),
    "AP50": ("detector", "ap50"),
    "AP": ("detector", "ap"),
    "F1@0.5": ("end_to_end", "f1_50"),
    "F1": ("end_to_end", "f1"),
    "no box": ("end_to_end", "rejection"),
    "cgF1": ("end_to_end", "cgf1"),
}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, one row for each split of {split: what `evaluate` gave}; numbers in percent."""
    lines = [["split", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for split, result in results.items():
        lines.append([split.replace("|", "\\|"), *(_cell(result, path) for path in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(result: Mapping[str, Any], path: tuple[str, ...]) -> str:
    value: Any = result
    for key in path:
        value = value[key]
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value if path[-1] == 'cgf1' else 100 * value:.1f}"


def _reasoner_metrics(results: Sequence[Detections], records: Sequence[Record]) -> dict[str, Any]:
    named = [_named(result) for result in results]
    pairs = list(zip(results, records, strict=True))
    judged = [
        (target.confidence, target.name.casefold() in {name.casefold() for name in record.targets})
        for result, record in pairs
        for target in result.targets
        if target.confidence is not None
    ]
    by_kind = {}
    for kind in dict.fromkeys(record.kind for record in records):
        rows = [i for i, record in enumerate(records) if record.kind == kind]
        by_kind[kind] = {
            "n": len(rows),
            "f1": _name_metrics([named[i] for i in rows], [records[i] for i in rows])["f1"],
        }
    return {
        **_name_metrics(named, records),
        "ece": expected_calibration_error([c for c, _ in judged], [right for _, right in judged]),
        "by_kind": by_kind,
    }


def _named(result: Detections) -> list[str] | None:
    unread = result.problem is not None and not result.targets
    return None if unread else [target.name for target in result.targets]


def _name_metrics(named: list[list[str] | None], records: Sequence[Record]) -> dict[str, float | None]:
    return name_metrics(named, [r.targets for r in records], [r.present for r in records])


def _ground_true_names(detector: Any, truths: Sequence[ImageTruth], options: Any) -> list[Detections]:
    images = [load_image(truth.image) for truth in truths]
    groundings = detector.detect(
        images,
        [truth.names for truth in truths],
        box_threshold=AP_THRESHOLD,
        text_threshold=AP_THRESHOLD,
        prompting=options.prompting,
    )
    found = []
    for image, truth, grounding in zip(images, truths, groundings, strict=True):
        kept = nms_per_target(grounding, options.nms_threshold)
        labels = tuple(truth.names[i] for i in kept.name_index)
        targets = tuple(map(Target, truth.names))
        found.append(Detections(kept.boxes, kept.scores, labels, targets, image_wh=image.size))
    return found


class _Timed:
    """A reasoner or a detector by its one verb, and the seconds spent in it."""

    def __init__(self, part: Any, verb: str) -> None:
        self.name = part.name
        self.seconds = 0.0
        setattr(self, verb, functools.partial(self._spend, getattr(part, verb)))

    def _spend(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        start = time.perf_counter()
        result = call(*arguments, **options)
        self.seconds += time.perf_counter() - start
        return result


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
