"""What a detection gives back: `Detections`, one frozen value, and its ways out.

Every way in (Python, command line, web, robot) only formats this value.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, floor
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from detgpt.draw import draw
from detgpt.errors import InputError, MissingExtraError
from detgpt.masks import check_room, mask_to_rle, read_only_masks, rle_to_mask

if TYPE_CHECKING:
    import pandas
    import supervision


@dataclass(frozen=True)
class Target:
    """One thing the reasoner asked for.

    name: as the reasoner wrote it.
    confidence: how sure the reasoner is of it, in [0, 1]; of a calibrated model the probability that it is right.
        None where the reasoner gives no token probabilities, and for names that the caller gave.
    found: whether the detector boxed it.
    """

    name: str
    confidence: float | None = None
    found: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """Boxes for an instruction, and the reasoning behind them.

    boxes: (N, 4) float32, xyxy in pixels of the original image.
    scores: (N,) float32 in [0, 1], the detector's; of a calibrated model the probability that the box is right.
    labels: N target names, one per box.
    targets: what the reasoner asked for, found or not; empty when nothing fits.
    reasoning, answer: what the reasoner said, and its whole raw text.
    problem: what was wrong with the answer, None when nothing was.
    instruction: the wish; None where only names were asked for.
    image: the RGB image the boxes refer to; no part of equality or of JSON.
    image_wh: its width and height; taken from `image` where that is given.
    masks: (N, H, W) bool, the pixels of each box's thing; None where they were not asked for.
    unsure: what the reasoner named but is less sure of than `min_confidence` asks; it was not looked for.

    The arrays are read-only copies. `len()` counts boxes, so an empty result is false;
    iterating gives `(box, score, label)`. Raises InputError where the parts do not fit together.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]
    targets: tuple[Target, ...]
    reasoning: str = ""
    answer: str = ""
    problem: str | None = None
    instruction: str | None = None
    image: Image.Image | None = None
    image_wh: tuple[int, int] = (0, 0)
    masks: np.ndarray | None = None
    unsure: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        normal: dict[str, Any] = {
            "boxes": _read_only(self.boxes, "boxes", columns=4),
            "scores": _read_only(self.scores, "scores"),
            "labels": tuple(self.labels),
            "targets": tuple(self.targets),
            "unsure": tuple(self.unsure),
            "image_wh": _image_wh(self.image, self.image_wh),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)  # frozen: the one way to normalise what was given
        self._check()
        if self.masks is not None:
            object.__setattr__(self, "masks", read_only_masks(self.masks, len(self), self.image_wh))

    def _check(self) -> None:
        counts = len(self.boxes), len(self.scores), len(self.labels)
        if len(set(counts)) > 1:
            raise InputError("boxes, scores and labels must be equally many, got {}, {} and {}".format(*counts))
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise InputError("boxes must be xyxy with x0 <= x1 and y0 <= y1; convert xywh boxes first")
        if ((self.scores < 0) | (self.scores > 1)).any():
            raise InputError(f"scores must lie in [0, 1], got {self.scores.min()} to {self.scores.max()}")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise InputError(f"target names must differ, got {names}")
        if strangers := set(self.labels) - set(names):
            raise InputError(f"labels {sorted(strangers)} are no target's name; targets are {names}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for array in (self.boxes, self.scores, self.masks):
            if array is not None:
                array.setflags(write=False)  # copying and pickling forget it

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, str]]:
        return zip(self.boxes, self.scores.tolist(), self.labels, strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detections):
            return NotImplemented
        return (
            np.array_equal(self.boxes, other.boxes)
            and np.array_equal(self.scores, other.scores)
            and self._same_masks(other)
            and self._without_arrays() == other._without_arrays()
        )

    def _same_masks(self, other: Detections) -> bool:
        """Without boxes there are no masks, whether or not they were asked for."""
        if self.masks is None or other.masks is None:
            return self.masks is other.masks or len(self) == len(other) == 0
        return np.array_equal(self.masks, other.masks)

    def _without_arrays(self) -> tuple[object, ...]:
        said = self.reasoning, self.answer, self.problem, self.instruction
        return self.labels, self.targets, self.unsure, said, self.image_wh

    def __repr__(self) -> str:
        tallies = Counter(self.labels)
        parts = [f"{tallies[name]} {shorten(name)}" for name in dict.fromkeys(self.labels)]
        missed = sum(target.name not in tallies for target in self.targets)
        parts += [f"{missed} of {len(self.targets)} targets not found"] if missed else []
        parts += [f"image_wh={self.image_wh}"]
        parts += [f"problem={shorten(self.problem)}"] if self.problem else []
        return f"Detections({', '.join(parts)})"

    def filter(self, min_score: float | None = None, labels: Iterable[str] | None = None) -> Detections:
        """Keep the boxes that score at least `min_score` and carry one of `labels`.

        All targets stay; `found` says whether a box of theirs is left.
        """
        keep = np.ones(len(self), dtype=bool)
        if min_score is not None:
            keep &= self.scores >= np.float32(min_score)
        if labels is not None:
            wanted = {labels} if isinstance(labels, str) else set(labels)
            keep &= np.array([label in wanted for label in self.labels], dtype=bool)
        kept = tuple(label for label, kept in zip(self.labels, keep, strict=True) if kept)
        targets = tuple(replace(target, found=target.name in kept) for target in self.targets)
        masks = None if self.masks is None else self.masks[keep]
        return replace(
            self, boxes=self.boxes[keep], scores=self.scores[keep], labels=kept, targets=targets, masks=masks
        )

    def crop(self, padding: float = 0.0, *, cut_out: bool = False) -> list[Image.Image]:
        """Cut every box out of the image, in order, each at least 1x1 pixel.

        padding: how much to add on each side, as a fraction of the box's width and height.
        cut_out: make what is outside the box's mask transparent (RGBA); needs masks.
        """
        if cut_out and self.masks is None:
            raise InputError("cut_out needs masks: detect with masks=True")
        if padding < 0:
            raise InputError(f"padding must be 0 or more, got {padding}")
        image = self._image("crop")
        (width, height), crops = image.size, []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            pad_x, pad_y = padding * (x1 - x0), padding * (y1 - y0)
            left, right = _pixel_range(x0 - pad_x, x1 + pad_x, width)
            top, bottom = _pixel_range(y0 - pad_y, y1 + pad_y, height)
            crop = image.crop((left, top, right, bottom))
            if cut_out and self.masks is not None:
                crop.putalpha(Image.fromarray(self.masks[index, top:bottom, left:right]))
            crops.append(crop)
        return crops

    def draw(
        self,
        legend: bool = False,
        *,
        line_width: int | None = None,
        text_size: int | None = None,
        min_side: int = 400,
        font: str | None = None,
    ) -> Image.Image:
        """Draw the boxes, and the masks if any, on a copy of the image; see `detgpt.draw.draw` for the settings.

        legend: add a panel with the instruction, the reasoning and every target's count and score.
        """
        return draw(
            self._image("draw on"),
            self.boxes,
            self.labels,
            self.scores,
            masks=self.masks,
            names=[target.name for target in self.targets],
            legend=self.reasoning if legend else None,
            instruction=self.instruction if legend else None,
            line_width=line_width,
            text_size=text_size,
            min_side=min_side,
            font=font,
        )

    def _image(self, verb: str) -> Image.Image:
        if self.image is None:
            remedy = "add one with dataclasses.replace(result, image=image)"
            raise InputError(f"this result holds no image to {verb}; {remedy}")
        return self.image

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, safe for JSON: boxes to 1/100 pixel, scores to 4 digits, no image.

        Masks are run lengths, see `detgpt.masks`; of a result without boxes they are forgotten.
        """
        masks: Sequence[np.ndarray | None] = [None] * len(self) if self.masks is None else list(self.masks)
        return {
            "instruction": self.instruction,
            "reasoning": self.reasoning,
            "targets": list(map(_target_to_dict, self.targets)),
            "unsure": list(map(_target_to_dict, self.unsure)),
            "detections": [
                {
                    "label": label,
                    "score": _rounded(score),
                    "xyxy": [round(value, 2) for value in box.tolist()],
                    **({} if mask is None else {"mask": mask_to_rle(mask)}),
                }
                for (box, score, label), mask in zip(self, masks, strict=True)
            ],
            "image_wh": list(self.image_wh),
            "problem": self.problem,
            "answer": self.answer,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Detections:
        """The inverse of `to_dict`, up to its rounding. Raises InputError where a part is wrong."""
        try:
            found = data["detections"]
            width, height = data["image_wh"]
            runs = [row["mask"] for row in found] if any("mask" in row for row in found) else []
            check_room(len(runs), (width, height))
            return cls(
                boxes=np.array([row["xyxy"] for row in found], dtype=np.float32),
                scores=np.array([row["score"] for row in found], dtype=np.float32),
                labels=tuple(row["label"] for row in found),
                targets=tuple(Target(**target) for target in data["targets"]),
                unsure=tuple(Target(**target) for target in data.get("unsure", ())),
                reasoning=data["reasoning"],
                answer=data["answer"],
                problem=data["problem"],
                instruction=data["instruction"],
                image_wh=(width, height),
                masks=np.stack([rle_to_mask(rle, (width, height)) for rle in runs]) if runs else None,
            )
        except KeyError as error:
            raise InputError(f"not a saved result: {error} is missing; give what to_dict returned") from error
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"not a saved result: {error}; give what to_dict returned") from error

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Detections:
        """The inverse of `to_json`, up to its rounding. Raises InputError on anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"not a saved result: {error}; give what to_json returned") from error
        return cls.from_dict(data)

    def to_coco(
        self,
        image_id: int = 1,
        *,
        file_name: str | None = None,
        categories: Sequence[str] | None = None,
        first_annotation_id: int = 1,
    ) -> dict[str, list[dict[str, Any]]]:
        """`{"images", "annotations", "categories"}` in COCO's form, boxes as xywh.

        With masks each annotation has them as its "segmentation", in uncompressed run lengths, and as its "area".
        categories: names in the order of their ids, from 1; the targets' unless given. To join the
        results of many images, give one list for all and go on counting with `first_annotation_id`.
        """
        names = [target.name for target in self.targets] if categories is None else list(categories)
        if strangers := set(self.labels) - set(names):
            raise InputError(f"labels {sorted(strangers)} are not in categories; filter them out or add them")
        image = {"id": image_id, "width": self.image_wh[0], "height": self.image_wh[1]}
        annotations = []
        for annotation_id, (box, score, label) in enumerate(self, start=first_annotation_id):
            x0, y0, x1, y1 = (round(value, 2) for value in box.tolist())
            width, height = round(x1 - x0, 2), round(y1 - y0, 2)
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": names.index(label) + 1,
                    "bbox": [x0, y0, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "score": _rounded(score),
                }
            )
        if self.masks is not None:
            for annotation, mask in zip(annotations, self.masks, strict=True):
                annotation.update(segmentation=mask_to_rle(mask), area=int(mask.sum()))
        return {
            "images": [image if file_name is None else {**image, "file_name": file_name}],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        }

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`, with the masks if any; class ids follow the order of the targets."""
        try:
            import supervision
        except ImportError as error:
            raise MissingExtraError("supervision", "supervision") from error
        ids = {target.name: number for number, target in enumerate(self.targets)}
        detections = supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=np.array([ids[label] for label in self.labels], dtype=int),
            mask=None if self.masks is None else self.masks.copy(),
        )
        if hasattr(detections, "data"):  # the release that groundingdino-py pins has no names yet
            detections.data["class_name"] = np.array(self.labels, dtype=str)
        return detections

    def to_pandas(self) -> pandas.DataFrame:
        """One row per box: label, score, x0, y0, x1, y1."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "pandas") from error
        table = pandas.DataFrame(self.boxes.copy(), columns=["x0", "y0", "x1", "y1"])
        table.insert(0, "label", list(self.labels))
        table.insert(1, "score", self.scores.copy())
        return table


def less_sure(targets: Iterable[Target], min_confidence: float) -> tuple[Target, ...]:
    """Those of which the reasoner is known to be less sure."""
    return tuple(t for t in targets if t.confidence is not None and t.confidence < min_confidence)


def coco_document(found: Iterable[tuple[str, Detections]]) -> dict[str, list[dict[str, Any]]]:
    """One COCO document of many images by file name, with common categories; takes one result at a time."""
    names: list[str] = []
    document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    for number, (title, result) in enumerate(found, start=1):
        names = list(dict.fromkeys([*names, *(target.name for target in result.targets)]))
        annotation_id = len(document["annotations"]) + 1
        part = result.to_coco(number, file_name=title, categories=names, first_annotation_id=annotation_id)
        document["images"] += part["images"]
        document["annotations"] += part["annotations"]
        document["categories"] = part["categories"]
    return document


def _read_only(values: Any, name: str, columns: int | None = None) -> np.ndarray:
    """A read-only float32 copy of shape (N,), or (N, columns)."""
    array = np.array(values, dtype=np.float32)
    if array.size == 0:
        array = array.reshape((0,) if columns is None else (0, columns))
    if array.ndim != (1 if columns is None else 2) or (columns and array.shape[1] != columns):
        raise InputError(
            f"{name} must have shape {'(N,)' if columns is None else f'(N, {columns})'}, got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite numbers, got {array[~np.isfinite(array)][0]}")
    array.setflags(write=False)
    return array


def _image_wh(image: Image.Image | None, image_wh: Sequence[int]) -> tuple[int, int]:
    width, height = image_wh
    if image is None:
        if width < 1 or height < 1:
            raise InputError(f"give an image or its (width, height), both 1 or more; got {tuple(image_wh)}")
    elif (width, height) not in ((0, 0), image.size):
        raise InputError(f"image_wh is {tuple(image_wh)}, but the image is {image.size}")
    else:
        width, height = image.size
    return int(width), int(height)


def _pixel_range(low: float, high: float, size: int) -> tuple[int, int]:
    """The whole pixels within [0, size) that [low, high] touches, at least one."""
    start = min(max(floor(low), 0), size - 1)
    return start, max(min(ceil(high), size), start + 1)


def _target_to_dict(target: Target) -> dict[str, Any]:
    return {**asdict(target), "confidence": _rounded(target.confidence)}


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(float(probability), 4)
