"""The numbers that say how good a result is: pure functions from predictions and truth.

Shares are in [0, 1], cgF1 is in percent points as published. A number without a denominator (precision where
nothing was named, rejection where every wish has a target) is None, not 0 or 1. Names are compared exactly
but for case: a model that says "mug" for "cup" is wrong by its names, and right by its boxes.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np

from detgpt.boxes import intersections, iou_matrix
from detgpt.errors import MissingExtraError
from detgpt.evaluation.calibration import expected_calibration_error

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MATCHING, COCO, COCO_EVAL = EXTRA = "scipy.optimize", "pycocotools.coco", "pycocotools.cocoeval"


class Labelled(Protocol):
    """N boxes (N, 4) xyxy, one label each: `Detections`, or a record's truth."""

    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


class Truth(Labelled, Protocol):
    """Labelled boxes, and regions (M, 4) where a box is neither right nor wrong."""

    @property
    def ignored(self) -> np.ndarray: ...
    @property
    def ignored_labels(self) -> tuple[str, ...]: ...


class Scored(Labelled, Protocol):
    """Labelled boxes with scores (N,)."""

    @property
    def scores(self) -> np.ndarray: ...


class Boxes(NamedTuple):
    """Some of a result's boxes."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]


def outside_ignored(predicted: Scored, true: Truth) -> Scored:
    """`predicted` without the boxes that lie in ignored regions: those that no true box overlaps by an IoU of
    0.5, and of whose own area an ignored box covers at least half, which is COCO's rule for crowds."""
    if not len(true.ignored) or not len(predicted.boxes):
        return predicted
    boxes = predicted.boxes.astype(np.float64)
    right = (iou_matrix(boxes, true.boxes) >= 0.5).any(axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kept = right | (intersections(boxes, true.ignored).max(axis=1) < 0.5 * areas)
    labels = tuple(label for label, keep in zip(predicted.labels, kept, strict=True) if keep)
    return Boxes(predicted.boxes[kept], predicted.scores[kept], labels)


def name_metrics(
    named: Sequence[Collection[str] | None],
    true: Sequence[Collection[str]],
    present: Sequence[Collection[str]],
) -> dict[str, float | None]:
    """The reasoner by itself, one entry a wish; `named` is None for an answer that could not be read.

    f1, precision, recall: named against true targets, counts pooled over the wishes.
    exact: share of wishes for which exactly the true targets were named.
    rejection: of the wishes without a target, the share answered with "nothing". An unreadable answer is
        neither exact nor a rejection, whatever the truth.
    hallucination: of the names given, the share of things that are not in the picture.
    parse_failure: share of answers that could not be read.
    """
    said, wanted, visible = ([_folded(names or ()) for names in column] for column in (named, true, present))
    hits = sum(len(s & w) for s, w in zip(said, wanted, strict=True))
    n_said, n_wanted = sum(map(len, said)), sum(map(len, wanted))
    read = [names is not None for names in named]
    exact = [r and s == w for r, s, w in zip(read, said, wanted, strict=True)]
    return {
        "f1": _share(2 * hits, n_said + n_wanted),
        "precision": _share(hits, n_said),
        "recall": _share(hits, n_wanted),
        "exact": _share(sum(exact), len(exact)),
        "rejection": _share(sum(e for e, w in zip(exact, wanted, strict=True) if not w), wanted.count(frozenset())),
        "hallucination": _share(sum(len(s - v) for s, v in zip(said, visible, strict=True)), n_said),
        "parse_failure": _share(read.count(False), len(read)),
    }


def box_metrics(predicted: Sequence[Scored], true: Sequence[Labelled]) -> dict[str, float | None]:
    """The whole system, one entry a wish. Boxes are matched one to one so that the sum of IoUs is greatest.

    All boxes of a wish answer one question, so a box may match whatever its label, as in a query of SAM 3.

    f1_50, f1: counts pooled over the wishes; at IoU 0.5, and the mean over IoU 0.50:0.05:0.95.
    f1_50_labelled: f1_50 where a box matches only a box of its own label.
    acc_50: RefCOCO's Acc@0.5: of the wishes with exactly one true box, the share whose best-scored box overlaps
        it by an IoU over 0.5.
    ece: calibration error of the scores, where a box is right if it is matched at IoU 0.5.
    pm_f1: `f1` over the wishes that have a target.
    il_mcc: Matthews correlation of "any box predicted" with "any box true". 0 where the prediction is the
        same for every wish, None where the truth is: nothing can correlate with it (SAM 3's code gives 0).
    cgf1: 100 · pm_f1 · il_mcc, SAM 3's classification-gated F1.
    rejection: of the wishes without a target, the share without a box.
    """
    n_predicted = np.array([len(p.boxes) for p in predicted], dtype=int)
    n_true = np.array([len(t.boxes) for t in true], dtype=int)
    pairs = list(zip(predicted, true, strict=True))
    matched = [match(p, t) for p, t in pairs]
    reached = [(ious[:, None] >= IOU_THRESHOLDS).sum(axis=0) for ious in matched]
    hits = np.array(reached).reshape(-1, len(IOU_THRESHOLDS))
    own_label = sum((match(p, t, same_label=True) >= 0.5).sum() for p, t in pairs)
    scores = [score for p in predicted for score in p.scores.tolist()]
    positive = n_true > 0
    f1, pm_f1 = (
        _share(2 * hits[rows].mean(axis=1).sum(), (n_predicted + n_true)[rows].sum())
        for rows in (np.ones_like(positive), positive)
    )
    il_mcc = matthews_correlation(n_predicted > 0, positive)
    return {
        "f1_50": _share(2 * hits[:, 0].sum(), (n_predicted + n_true).sum()),
        "f1": f1,
        "f1_50_labelled": _share(2 * own_label, (n_predicted + n_true).sum()),
        "acc_50": _mean([best_box_is_right(p, t) for p, t in pairs if len(t.boxes) == 1]),
        "ece": expected_calibration_error(scores, [iou >= 0.5 for ious in matched for iou in ious]),
        "pm_f1": pm_f1,
        "il_mcc": il_mcc,
        "cgf1": None if pm_f1 is None or il_mcc is None else 100 * pm_f1 * il_mcc,
        "rejection": _share((n_predicted[~positive] == 0).sum(), (~positive).sum()),
    }


def best_box_is_right(predicted: Scored, true: Labelled) -> bool:
    """Whether the best-scored box overlaps a true one by an IoU over 0.5."""
    if not len(predicted.boxes):
        return False
    best = predicted.boxes[[int(np.argmax(predicted.scores))]].astype(np.float64)
    return bool((iou_matrix(best, true.boxes.astype(np.float64)) > 0.5).any())


def match(predicted: Labelled, true: Labelled, same_label: bool = False) -> np.ndarray:
    """Each predicted box's IoU (N,) with the true box that it is matched to, 0 where with none."""
    ious = iou_matrix(predicted.boxes.astype(np.float64), true.boxes.astype(np.float64))
    if same_label:
        said, wanted = ([label.casefold() for label in side.labels] for side in (predicted, true))
        ious = ious * np.array([[s == w for w in wanted] for s in said], dtype=bool).reshape(ious.shape)
    rows, columns = load_extra(MATCHING).linear_sum_assignment(ious, maximize=True)
    matched = np.zeros(len(ious))
    matched[rows] = ious[rows, columns]
    return matched


def matthews_correlation(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Of two boolean arrays, in [-1, 1]; 0 where `predicted` never changes, None where `true` never does."""
    if true.all() or not true.any():
        return None
    if predicted.all() or not predicted.any():
        return 0.0
    tp, fp = int((predicted & true).sum()), int((predicted & ~true).sum())
    fn, tn = int((~predicted & true).sum()), int((~predicted & ~true).sum())
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def average_precision(predicted: Sequence[Scored], true: Sequence[Truth]) -> dict[str, float | None]:
    """COCO's AP (IoU 0.50:0.05:0.95) and AP50 by pycocotools, one entry an image; at most 100 boxes a label.

    Ignored regions are COCO's crowds. Raises `MissingExtraError` without pycocotools.
    """
    coco, evaluator = load_extra(COCO).COCO, load_extra(COCO_EVAL).COCOeval
    names = sorted({label for truth in true for label in truth.labels})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        evaluation = evaluator(_coco(coco(), true, names), _coco(coco(), predicted, names), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50 = (float(value) if value >= 0 else None for value in evaluation.stats[:2])
    return {"ap": ap, "ap50": ap50}


def load_extra(module: str) -> Any:
    """The optional `module`, or `MissingExtraError`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], "eval") from error


def _coco(empty: Any, images: Sequence[Any], names: list[str]) -> Any:
    """Fill and index an empty `COCO`; not by its `loadRes`, which cannot load an empty list of results."""
    category = {name: number for number, name in enumerate(names, start=1)}
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for box, label, score, crowd in _rows(image):
            if label not in category:  # of a name that is nowhere in the truth there is no AP
                continue
            x0, y0, x1, y1 = np.asarray(box, np.float64).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would mean "unmatched" to COCOeval
                    "image_id": image_id,
                    "category_id": category[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": crowd,
                    "score": score,
                }
            )
    empty.dataset = {
        "images": [{"id": image_id} for image_id in range(1, len(images) + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in category.items()],
    }
    empty.createIndex()
    return empty


def _rows(image: Any) -> Iterator[tuple[np.ndarray, str, float, int]]:
    """(box, label, score, is it a crowd) of a result or of a truth, whose boxes are all certain."""
    scores = getattr(image, "scores", np.ones(len(image.labels)))
    yield from zip(image.boxes, image.labels, scores.tolist(), repeat(0), strict=False)
    if hasattr(image, "ignored"):
        yield from zip(image.ignored, image.ignored_labels, repeat(1.0), repeat(1), strict=False)


def _folded(names: Collection[str]) -> frozenset[str]:
    return frozenset(name.casefold() for name in names)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return _share(sum(values), len(values))
