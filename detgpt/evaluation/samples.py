"""Wish by wish: what was true, what came out, and how far apart the two are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from detgpt.evaluation.data import Record
from detgpt.evaluation.metrics import match, outside_ignored
from detgpt.evaluation.overlap import box_overlap
from detgpt.results import Detections


@dataclass(frozen=True, eq=False)
class Sample:
    """A record and its result. `run` names the model and the data."""

    run: str
    record: Record
    result: Detections

    @cached_property
    def f1_50(self) -> float:
        """F1 of this wish's boxes at IoU 0.5; 1 where nothing was to be found and nothing was."""
        found = outside_ignored(self.result, self.record)
        total = len(found.boxes) + len(self.record.boxes)
        return float(2 * (match(found, self.record) >= 0.5).sum() / total) if total else 1.0

    @cached_property
    def box_iou(self) -> float:
        """All boxes found against all true ones; see `overlap`."""
        return box_overlap(self.result.boxes, self.record.boxes, self.record.ignored).iou

    @cached_property
    def names_right(self) -> bool | None:
        """Whether exactly the true targets were named; None where names are not judged."""
        if not self.record.named:
            return None
        named = {self.record.canonical(target.name).casefold() for target in self.result.targets}
        right = named == {target.casefold() for target in self.record.targets}
        return right and not (self.result.problem and not self.result.targets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, safe for JSON."""
        record = self.record
        return {
            "run": self.run,
            "where": record.where,
            "image": str(record.image),
            "instruction": record.instruction,
            "kind": record.kind,
            "true": {"targets": list(record.targets), "boxes": record.boxes.tolist(), "labels": list(record.labels)},
            "found": {key: value for key, value in self.result.to_dict().items() if key != "instruction"},
            "f1_50": round(self.f1_50, 4),
            "box_iou": round(self.box_iou, 4),
            "names_right": self.names_right,
        }


@dataclass
class Samples:
    """Collects the samples of a run: `evaluate(..., each=samples.add)`."""

    run: str
    samples: list[Sample] = field(default_factory=list)

    def add(self, record: Record, result: Detections) -> None:
        self.samples.append(Sample(self.run, record, result))

    def worst(self, count: int) -> list[Sample]:
        """Up to `count` samples with something wrong: least F1 first, then least overlap, then as they came."""
        wrong = [sample for sample in self.samples if sample.f1_50 < 1]
        return sorted(wrong, key=lambda sample: (sample.f1_50, sample.box_iou))[:count]

    def lines(self) -> str:
        """One JSON object a line."""
        rows = (json.dumps(sample.to_dict(), ensure_ascii=False, allow_nan=False) for sample in self.samples)
        return "".join(f"{row}\n" for row in rows)
