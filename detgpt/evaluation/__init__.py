"""How good a model pair is on pictures, wishes and truths, stage by stage.

    results = {"needs": evaluate(DetGPT.from_pretrained("picto"), "splits/needs")}
    print(table(results))

`readers/` says which formats of data are read, `metrics.py` and `overlap.py` what each number means. The extra
is `detgpt[eval]`.
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
from detgpt.evaluation.calibration import expected_calibration_error
from detgpt.evaluation.data import Dataset, ImageTruth, Record, truth_by_image
from detgpt.evaluation.judging import judged_targets
from detgpt.evaluation.metrics import (
    EXTRA,
    average_precision,
    box_metrics,
    load_extra,
    name_metrics,
    outside_ignored,
)
from detgpt.evaluation.overlap import Overlap, box_overlap, mask_overlap, overlap_metrics
from detgpt.evaluation.readers import read_dataset
from detgpt.evaluation.tables import NO_NUMBER, markdown, percent
from detgpt.images import load_image
from detgpt.results import Detections, Target
from detgpt.tiles import in_tiles

if TYPE_CHECKING:
    from detgpt.pipeline import DetGPT

__all__ = ["evaluate", "read_dataset", "table"]

T = TypeVar("T")

AP_THRESHOLD = 0.01  # AP ranks boxes by score, so it needs the weak ones too


def evaluate(
    model: DetGPT,
    data: str | Path | Dataset,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[Record, Detections], None] | None = None,
    detector_alone: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Run `model` on the records of `data` (the first `limit`) and measure it; the result is safe for JSON.

    n, images: how many wishes, and distinct pictures.
    reasoner: its name and `metrics.name_metrics`, a synonym counting as its target; ece, the calibration error
        of the targets' confidences (None where it gives none); by_kind: {kind: {n, f1}}. Where the data does not
        say what a reasoner should name (`Record.named`), only what needs no names: rejection and parse_failure.
    detector: its name, and ap and ap50 where it is told the true names: asked in each picture for every name
        that is a target of any wish about it, with thresholds of 0.01, in the tiles that are asked for, and with
        the pipeline's suppression of duplicates. Boxes of names that are not in a picture do not count here.
    end_to_end: `metrics.box_metrics` of what a user gets; box_giou and box_ciou, see `overlap`; by_kind.
    masks: {n, giou, ciou} over the wishes with true outlines, where the option `masks` is set.
    seconds: {reasoner, detector} of answering the wishes, and {detector_ap} of the pass for AP.

    data: a path that `read_dataset` knows by itself, or what it gave.
    progress: called with (done, total) after each batch. `options`: see `detgpt.pipeline.Options`.
    each: called with every record and its result (without image and masks), in order.
    detector_alone: whether to make the pass for ap and ap50, which the reasoner has no part in.
    Raises `InputError` for wrong data or arguments, `MissingExtraError` without pycocotools or scipy.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} is no batch: give 1 or more")
    for module in EXTRA:  # a missing one should show now, not after hours of answers
        load_extra(module)
    if not isinstance(data, Dataset):
        data = read_dataset(data, limit=limit)
    records = data.records[:limit]
    chosen = model.options.updated(options)
    truths = truth_by_image(record for record in records if record.named) if detector_alone else []
    total = len(records) + len(truths)
    reasoner, detector = _Timed(model.reasoner, "reason"), _Timed(model.detector, "detect")
    detector_ap = _Timed(model.detector, "detect")
    timed: Any = copy.copy(model)
    timed.reasoner, timed.detector = reasoner, detector

    results: list[Detections] = []
    mask_overlaps: list[Overlap] = []
    for batch in _batches(records, batch_size):
        answers = timed.detect_batch([(record.image, record.instruction) for record in batch], **options)
        for record, answer in zip(batch, answers, strict=True):
            if chosen.masks and record.outlines:
                mask_overlaps.append(mask_overlap(answer.masks, *record.outlines.masks(answer.image_wh)))
            results.append(replace(answer, image=None, masks=None))  # or memory would fill with pictures
            if each:
                each(record, results[-1])
        if progress:
            progress(len(results), total)
    found: list[Detections] = []
    for images in _batches(truths, batch_size):
        found += _ground_true_names(detector_ap, images, chosen)
        if progress:
            progress(len(results) + len(found), total)
    parts = {"reasoner": reasoner, "detector": detector, "detector_ap": detector_ap}
    return {
        "n": len(records),
        "images": len({record.image for record in records}),
        "reasoner": {"name": reasoner.name, **_reasoner_metrics(results, records)},
        "detector": {"name": detector.name, **average_precision(found, truths)},
        "end_to_end": _end_to_end_metrics(results, records),
        **({"masks": {"n": len(mask_overlaps), **overlap_metrics(mask_overlaps)}} if chosen.masks else {}),
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
    "Acc@0.5": ("end_to_end", "acc_50"),
    "box gIoU": ("end_to_end", "box_giou"),
    "box cIoU": ("end_to_end", "box_ciou"),
    "gIoU": ("masks", "giou"),
    "cIoU": ("masks", "ciou"),
    "no box": ("end_to_end", "rejection"),
    "cgF1": ("end_to_end", "cgf1"),
}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of `cells`."""
    return markdown(cells(results))


def cells(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The headings, and one row for each split of {split: what `evaluate` gave}; numbers in percent.

    A number that no split has gets no column.
    """
    columns = {head: [_cell(result, path) for result in results.values()] for head, path in COLUMNS.items()}
    columns = {head: values for head, values in columns.items() if set(values) != {NO_NUMBER}}
    return [["split", *columns], *map(list, zip(results, *columns.values(), strict=True))]


def _cell(result: Mapping[str, Any], path: tuple[str, ...]) -> str:
    value: Any = result
    for key in path:
        value = value.get(key) if value else None
    if value is None:
        return NO_NUMBER
    if isinstance(value, int):
        return str(value)
    return percent(value / 100 if path[-1] == "cgf1" else value)


def _reasoner_metrics(results: Sequence[Detections], records: Sequence[Record]) -> dict[str, Any]:
    everyone = list(zip(results, records, strict=True))
    named = [(result, record) for result, record in everyone if record.named]
    confidences, correct, _ = judged_targets(zip(records, results, strict=True))
    without_names = {key: value for key, value in _name_metrics(everyone).items() if key in NEED_NO_NAMES}
    return {
        **_name_metrics(named),
        **without_names,
        "ece": expected_calibration_error(confidences, correct),
        "by_kind": {
            kind: {"n": len(rows), "f1": _name_metrics([everyone[i] for i in rows if records[i].named])["f1"]}
            for kind, rows in _kinds(records).items()
        },
    }


NEED_NO_NAMES = ("rejection", "parse_failure")


def _name_metrics(pairs: Sequence[tuple[Detections, Record]]) -> dict[str, float | None]:
    return name_metrics(
        [_said(result, record) for result, record in pairs],
        [record.targets for _, record in pairs],
        [record.present for _, record in pairs],
    )


def _said(result: Detections, record: Record) -> list[str] | None:
    unread = result.problem is not None and not result.targets
    return None if unread else [record.canonical(target.name) for target in result.targets]


def _end_to_end_metrics(results: Sequence[Detections], records: Sequence[Record]) -> dict[str, Any]:
    found = [outside_ignored(result, record) for result, record in zip(results, records, strict=True)]
    overlaps = [
        box_overlap(result.boxes, record.boxes, record.ignored) for result, record in zip(results, records, strict=True)
    ]

    def metrics(rows: Sequence[int]) -> dict[str, float | None]:
        giou, ciou = overlap_metrics([overlaps[i] for i in rows]).values()
        numbers = box_metrics([found[i] for i in rows], [records[i] for i in rows])
        return {**numbers, "box_giou": giou, "box_ciou": ciou}

    return {
        **metrics(range(len(records))),
        "by_kind": {kind: {"n": len(rows), **metrics(rows)} for kind, rows in _kinds(records).items()},
    }


def _kinds(records: Sequence[Record]) -> dict[str, list[int]]:
    """The rows of each kind, kinds in order of appearance."""
    kinds: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        kinds.setdefault(record.kind, []).append(row)
    return kinds


def _ground_true_names(detector: Any, truths: Sequence[ImageTruth], options: Any) -> list[Detections]:
    images = [load_image(truth.image) for truth in truths]
    groundings = in_tiles(detector, options.tiles).detect(
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
