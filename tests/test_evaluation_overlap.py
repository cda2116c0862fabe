"""gIoU and cIoU, on boxes and on masks, and the true pixels they are measured on."""

from __future__ import annotations

import numpy as np
import pytest

from detgpt.errors import InputError
from detgpt.evaluation.calibration import expected_calibration_error
from detgpt.evaluation.metrics import average_precision
from detgpt.evaluation.outlines import Outline, Outlines, checked_segmentation
from detgpt.evaluation.overlap import Overlap, box_overlap, mask_overlap, overlap_metrics
from detgpt.results import Detections, Target

NONE = np.empty((0, 4))


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, dtype=float).reshape(-1, 4)


# --- boxes ---


@pytest.mark.parametrize(
    ("found", "true", "overlap"),
    [
        (boxes((0, 0, 10, 10)), boxes((0, 0, 10, 10)), (100, 100)),
        (boxes((0, 0, 10, 10), (0, 0, 10, 10)), boxes((0, 0, 10, 10)), (100, 100)),  # twice the same is once
        (boxes((0, 0, 10, 10), (5, 0, 15, 10)), boxes((0, 0, 15, 10)), (150, 150)),
        (boxes((0, 0, 10, 10)), boxes((20, 20, 30, 30)), (0, 200)),
        (boxes((0, 0, 1.5, 2)), boxes((1, 0, 2, 2)), (1, 4)),  # halves of pixels count
        (NONE, boxes((0, 0, 10, 10)), (0, 100)),
        (boxes((0, 0, 10, 10)), NONE, (0, 100)),
        (NONE, NONE, (0, 0)),
    ],
)
def test_areas_of_boxes(found: np.ndarray, true: np.ndarray, overlap: tuple[float, float]):
    assert box_overlap(found, true, NONE) == pytest.approx(overlap)


def test_areas_of_many_boxes_are_those_of_their_pixels():
    rng = np.random.default_rng(0)

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        corner, size = rng.integers(0, 60, (count, 2)), rng.integers(1, 30, (count, 2))
        pixels = np.zeros((90, 90), bool)
        for (x, y), (width, height) in zip(corner, size, strict=True):
            pixels[y : y + height, x : x + width] = True
        return np.concatenate([corner, corner + size], axis=1).astype(float), pixels

    for _ in range(20):
        (found, found_pixels), (true, true_pixels), (ignored, ignored_pixels) = some(6), some(4), some(2)
        expected = mask_overlap(found_pixels[None], true_pixels, ignored_pixels & ~true_pixels)
        assert box_overlap(found, true, ignored) == expected


def test_what_is_ignored_costs_nothing_unless_it_is_true():
    true, ignored = boxes((0, 0, 10, 10)), boxes((5, 0, 20, 10))
    assert box_overlap(boxes((0, 0, 20, 10)), true, ignored) == (100, 100)
    assert box_overlap(boxes((0, 0, 20, 20)), true, ignored) == (100, 300)


# --- masks ---


def test_areas_of_masks():
    true, ignored, nothing = (np.zeros((4, 4), bool) for _ in range(3))
    true[:2], ignored[3] = True, True
    halves = np.zeros((2, 4, 4), bool)
    halves[0, :, :2], halves[1, 0, :] = True, True
    assert mask_overlap(halves, true, ignored) == (6, 10)  # 10 found, of which 2 are ignored, 6 true
    assert mask_overlap(None, true, ignored) == (0, 8)
    assert mask_overlap(halves, true, true) == (0, 4), "what is ignored does not count, even where it is true"
    assert mask_overlap(np.zeros((0, 4, 4), bool), nothing, nothing).iou == 1.0


def test_masks_of_another_picture_are_an_error():
    with pytest.raises(InputError, match=r"\(4, 5\), \(4, 4\) and \(4, 4\)"):
        mask_overlap(np.zeros((1, 4, 5)), np.zeros((4, 4)), np.zeros((4, 4)))


def test_giou_is_a_mean_over_wishes_and_ciou_weighs_by_area():
    overlaps = [Overlap(1, 2), Overlap(90, 100), Overlap(0, 0), Overlap(0, 10)]
    assert overlap_metrics(overlaps) == pytest.approx({"giou": (0.5 + 0.9 + 1 + 0) / 4, "ciou": 91 / 112})
    assert overlap_metrics([Overlap(0, 0)]) == {"giou": 1.0, "ciou": None}
    assert overlap_metrics([]) == {"giou": None, "ciou": None}


# --- true pixels ---


def test_outlines_are_filled_as_pycocotools_does():
    mask = pytest.importorskip("pycocotools.mask")
    triangle, code = [[2, 2, 30, 4, 12, 25]], {"size": [32, 40], "counts": [100, 64, 1116]}
    true, ignored = Outlines((Outline(code, ignored=True), Outline(triangle))).masks((40, 32))
    expected = mask.decode(mask.merge(mask.frPyObjects(triangle, 32, 40))).astype(bool)
    crowd = mask.decode(mask.frPyObjects(code, 32, 40)).astype(bool)
    assert (true == expected).all() and true.sum() > 250
    assert (ignored == crowd & ~expected).all() and 0 < ignored.sum() < crowd.sum()


def test_a_compressed_code_and_pieces_of_one_thing():
    mask = pytest.importorskip("pycocotools.mask")
    pieces = [[0, 0, 8, 0, 8, 8, 0, 8], [20, 20, 28, 20, 28, 28, 20, 28]]
    code = mask.merge(mask.frPyObjects(pieces, 32, 40))
    code = {"size": code["size"], "counts": code["counts"].decode()}
    by_polygon, by_code = (Outlines((Outline(value),)).masks((40, 32))[0] for value in (pieces, code))
    assert (by_polygon == by_code).all() and by_code.sum() == 2 * 64


def test_edges_belong_to_a_polygon_of_reasonseg_as_in_its_own_code():
    cv2 = pytest.importorskip("cv2")
    square = Outlines((Outline([[2, 3, 6, 3, 6, 5, 2, 5]]),), edges=True).masks((10, 10))[0]
    assert square.sum() == 5 * 3 and square[3:6, 2:7].all()
    rng, ious = np.random.default_rng(0), []
    for _ in range(60):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(30, 90, (9, 1))
        corners = (100 + ring).astype(np.int32)
        theirs = np.zeros((200, 200), np.uint8)
        cv2.polylines(theirs, [corners], True, 1, 1)
        cv2.fillPoly(theirs, [corners], 1)
        ours = Outlines((Outline([corners.ravel().tolist()]),), edges=True).masks((200, 200))[0]
        ious.append((ours & theirs.astype(bool)).sum() / (ours | theirs.astype(bool)).sum())
    assert np.mean(ious) > 0.995 and min(ious) > 0.98  # what differs are pixels of slanting edges


def test_the_later_outline_counts():
    big, small = [[0, 0, 9, 0, 9, 9, 0, 9]], [[3, 3, 6, 3, 6, 6, 3, 6]]
    true, ignored = Outlines((Outline(big), Outline(small, ignored=True)), edges=True).masks((10, 10))
    assert (true.sum(), ignored.sum()) == (100 - 16, 16)


def test_a_code_of_another_size_is_an_error():
    pytest.importorskip("pycocotools")
    with pytest.raises(InputError, match=r"\[32, 40\], but the picture of \[40, 32\]"):
        Outlines((Outline({"size": [32, 40], "counts": [1280]}),)).masks((32, 40))


@pytest.mark.parametrize("wrong", [[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], {"counts": 3}, "x"])
def test_what_is_no_segmentation(wrong: object):
    with pytest.raises(InputError, match=r"line 7: a segmentation is"):
        checked_segmentation(wrong, "line 7")


# --- against torchmetrics, where it is installed ---


def test_numbers_are_those_of_torchmetrics():
    torch = pytest.importorskip("torch")
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.classification import BinaryCalibrationError, BinaryJaccardIndex
    from torchmetrics.detection import MeanAveragePrecision

    rng = np.random.default_rng(1)
    confidences, correct = rng.uniform(0, 1, 500), rng.uniform(0, 1, 500) < 0.6
    theirs = BinaryCalibrationError(n_bins=10, norm="l1")(torch.tensor(confidences), torch.tensor(correct).int())
    assert expected_calibration_error(confidences.tolist(), correct.tolist()) == pytest.approx(float(theirs), abs=1e-5)

    masks = rng.uniform(0, 1, (2, 30, 30)) < 0.5
    iou = BinaryJaccardIndex()(torch.tensor(masks[0]).int(), torch.tensor(masks[1]).int())
    assert mask_overlap(masks[:1], masks[1], np.zeros((30, 30))).iou == pytest.approx(float(iou), abs=1e-6)

    metric, found, truth = MeanAveragePrecision(), [], []
    for _ in range(6):
        corners = rng.uniform(0, 100, (5, 2))
        true = np.concatenate([corners, corners + rng.uniform(10, 60, (5, 2))], axis=1)
        moved = np.sort((true + rng.normal(0, 3, true.shape)).reshape(5, 2, 2), axis=1).reshape(5, 4)
        scores, classes = rng.uniform(0, 1, 5), rng.integers(0, 2, 5)
        names = tuple("ab"[c] for c in classes)
        targets = tuple(Target(name) for name in dict.fromkeys(names))
        found.append(Detections(moved, scores, names, targets, image_wh=(200, 200)))
        truth.append(Detections(true, np.ones(5), names, targets, image_wh=(200, 200)))
        labels = torch.tensor(classes)
        metric.update(
            [{"boxes": torch.tensor(found[-1].boxes), "scores": torch.tensor(found[-1].scores), "labels": labels}],
            [{"boxes": torch.tensor(truth[-1].boxes), "labels": labels}],
        )
    theirs = metric.compute()
    ours = average_precision(found, truth)
    assert torchmetrics.__version__
    assert 0.1 < float(theirs["map"]) < 1
    assert ours == pytest.approx({"ap": float(theirs["map"]), "ap50": float(theirs["map_50"])}, abs=1e-4)
