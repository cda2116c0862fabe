"""What an answer is worth, as a plain function: rewards to sample by, to train with, and to hold learned ones against.

    reward = RewardSettings(detector="picto").build()
    reward(['A desk.\\nTargets: ["cup"]'], [record])      # [1.0] where the cup is the only thing that fits

A reward takes as many answers as records, of `finetune.data.records`, and gives a number for each; higher is better.
That of detection needs no model of taste, for it can be checked. With the default weights

    reward = F1 − 0.2 · malformed − 0.1 · too long − 0.5 · share of the names that are not in the picture

where each of the four is in [0, 1]: 1 is the best there is and −0.8 the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from detgpt import DetGPT
from detgpt.answer import answer_is_complete, parse_answer
from detgpt.errors import InputError
from detgpt.evaluation.data import Record, box_array
from detgpt.evaluation.metrics import Boxes, Scored, box_metrics, name_metrics, outside_ignored
from detgpt.models import resolve
from detgpt.pipeline import Options
from detgpt.reasoners.scripted import ScriptedReasoner
from finetune.recipe import Settings
from finetune.rundir import is_pair

Reward = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], list[float]]

BATCH = 16  # pictures that a detector looks at together


class RewardSettings(Settings):
    """Weights of a reward's terms; 0 leaves a term out.

    accuracy: of F1 (`Accuracy`): of the names, or with a `detector` (a hub id, a folder, or a pair such as "picto",
    whose thresholds then count) of the boxes. format, length, hallucination: of the penalties `malformed`, `excess`
    beyond `max_words`, and `hallucinated`. model: the folder of a learned reward, which is added `learned` times.
    """

    accuracy: float = Field(default=1.0, ge=0)
    format: float = Field(default=0.2, ge=0)
    length: float = Field(default=0.1, ge=0)
    hallucination: float = Field(default=0.5, ge=0)
    max_words: int = Field(default=100, ge=1)
    detector: str | None = None
    model: Path | None = None
    learned: float = Field(default=1.0, gt=0)

    def build(self) -> Reward:
        """The reward itself. Raises `InputError` where every weight is 0, `ModelError` for what does not load."""
        rewards: list[tuple[Reward, float]] = []
        if self.accuracy or self.format or self.length or self.hallucination:
            rewards.append((DetectionReward(self), 1.0))
        if self.model is not None:
            from finetune.preference.reward_model import LearnedReward

            rewards.append((LearnedReward(self.model), self.learned))
        if not rewards:
            raise InputError("reward: every weight is 0 and there is no model: nothing would be better than anything")
        return combined(rewards)


def combined(rewards: Sequence[tuple[Reward, float]]) -> Reward:
    """The sum of rewards, each times its weight."""

    def reward(answers: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        columns = [[weight * value for value in one(answers, records)] for one, weight in rewards]
        return [sum(values) for values in zip(*columns, strict=True)]

    return reward


class DetectionReward:
    """How right an answer is, less the penalties; in [-(format + length + hallucination), accuracy].

    Needs records with `targets`, with a detector `boxes` too; else it raises `InputError`.
    """

    def __init__(self, settings: RewardSettings | None = None) -> None:
        self._weights = settings or RewardSettings()
        self._boxer = _boxer(self._weights.detector) if self._weights.detector is not None else None

    def __call__(self, answers: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        names, boxer = [named(answer) for answer in answers], self._boxer
        truths = [_truth(record, with_boxes=boxer is not None) for record in records]
        if boxer is None:
            accuracy = [name_f1(said, truth) for said, truth in zip(names, truths, strict=True)]
        else:
            found = _found(boxer, answers, names, truths)
            accuracy = [box_f1(*parts) for parts in zip(found, names, truths, strict=True)]
        weights = self._weights
        return [
            weights.accuracy * right
            - weights.format * malformed(answer)
            - weights.length * excess(answer, weights.max_words)
            - weights.hallucination * hallucinated(said, truth)
            for right, answer, said, truth in zip(accuracy, answers, names, truths, strict=True)
        ]


def named(answer: str) -> tuple[str, ...] | None:
    """The names that an answer gives, () for "nothing", None where it cannot be read."""
    parsed = parse_answer(answer)
    return None if parsed.problem else parsed.names


def name_f1(names: Sequence[str] | None, truth: Record) -> float:
    """F1 of the set of names and the targets; 1 where there is none of either, and 0 for an answer that is not read."""
    metrics = name_metrics([names], [truth.targets], [truth.present])
    return _share(metrics["f1"], names)


def box_f1(found: Scored, names: Sequence[str] | None, truth: Record) -> float:
    """F1 of the boxes at an IoU of 0.5, whatever their labels; 1 where there is none of either and it was read."""
    return _share(box_metrics([outside_ignored(found, truth)], [truth])["f1_50"], names)


def malformed(answer: str) -> float:
    """1 for an answer that does not come to the end of a "Targets: […]" line, or whose line cannot be read, else 0."""
    return float(named(answer) is None or not answer_is_complete(answer))


def excess(answer: str, max_words: int) -> float:
    """Words beyond `max_words`, in parts of it: 0.5 for one and a half times as many, 1 for twice as many or more."""
    return min(max(len(answer.split()) / max_words - 1, 0.0), 1.0)


def hallucinated(names: Sequence[str] | None, truth: Record) -> float:
    """Of the names, the share that is not in the picture; 0 where none is given."""
    return name_metrics([names], [truth.targets], [truth.present])["hallucination"] or 0.0


def _share(f1: float | None, names: Sequence[str] | None) -> float:
    """F1, which is None where there is nothing to find and nothing was found."""
    return float(names is not None) if f1 is None else f1


def _truth(record: Mapping[str, Any], *, with_boxes: bool) -> Record:
    where = record.get("where") or "a record"
    needed = ["image", "targets", "boxes"] if with_boxes else ["targets"]
    if lacking := [key for key in needed if record.get(key) is None]:
        raise InputError(f"{where} has no {lacking[0]!r}, which the reward compares with: add it, or leave it out")
    targets, present = record["targets"], record.get("present")
    return Record(
        image=Path(record.get("image") or ""),
        instruction=record.get("instruction") or "",
        targets=tuple(targets),
        boxes=box_array(record.get("boxes") or []),
        labels=tuple(record.get("labels") or []),
        present=tuple(targets if present is None else present),
        ignored=box_array(record.get("ignored") or []),
        ignored_labels=tuple(record.get("ignored_labels") or []),
    )


def _boxer(detector: str) -> DetGPT:
    """A pair whose reasoner says again what it is told, so that answers become boxes as they do at inference."""
    echo = ScriptedReasoner(lambda request: request.instruction)
    if not is_pair(detector):
        return DetGPT(echo, detector)
    pair = resolve(detector)
    return DetGPT(echo, pair.detector, options=Options().updated(dict(pair.options)))


def _found(
    boxer: DetGPT, answers: Sequence[str], names: Sequence[tuple[str, ...] | None], truths: Sequence[Record]
) -> list[Scored]:
    """The boxes of each answer; the same names in the same picture are looked for once."""
    asked = {(truth.image, said): answer for truth, said, answer in zip(truths, names, answers, strict=True) if said}
    keys = list(asked)
    found: dict[Any, Scored] = {}
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        results = boxer.detect_batch([(image, asked[image, said]) for image, said in batch])
        found |= {
            key: Boxes(result.boxes, result.scores, result.labels) for key, result in zip(batch, results, strict=True)
        }
    nothing = Boxes(np.zeros((0, 4)), np.zeros(0), ())
    return [found.get((truth.image, said), nothing) for truth, said in zip(truths, names, strict=True)]
