"""From a model's own confidences and scores to probabilities: a confidence of 0.8 is right 80% of the time.

    my-model/
      detgpt.json        the pair
      calibration.json   what `detgpt calibrate pictures/ -m my-model` has fitted for exactly these weights

Two curves, one for the reasoner's confidence in a target, one for the detector's score of a box; both rise, so what was
surer stays surer. `detgpt/evaluation/fitting.py` fits them; here they are read and applied, which takes numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from detgpt.errors import ModelError

if TYPE_CHECKING:
    from detgpt.results import Detections

CALIBRATION_FILE = "calibration.json"
SCHEMA = 1
SMALLEST = 1e-7  # of a probability whose logit is taken
SAMPLE = 4096  # bytes of each tensor that tell one training from another


class Curve(Protocol):
    """A rising function from [0, 1] to [0, 1]."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(N,) float64 → (N,) float64."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Logistic:
    """sigmoid(logit(p) / temperature + bias): Platt scaling (1999), temperature scaling (Guo et al. 2017) where the
    bias is 0. `temperature` over 0; above 1 it makes less extreme."""

    temperature: float
    bias: float = 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(logit(values) / self.temperature + self.bias)))

    def to_dict(self) -> dict[str, Any]:
        return {"method": "logistic", "temperature": self.temperature, "bias": self.bias}


@dataclass(frozen=True)
class Isotonic:
    """Straight lines between knots, level outside of them.

    raw, calibrated: at least one knot; raw rises, and calibrated does not fall.
    """

    raw: tuple[float, ...]
    calibrated: tuple[float, ...]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.interp(values, self.raw, self.calibrated)

    def to_dict(self) -> dict[str, Any]:
        return {"method": "isotonic", "raw": list(self.raw), "calibrated": list(self.calibrated)}


def logit(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), of 0 and 1 that of the `SMALLEST` distance from them."""
    p = np.clip(np.asarray(probabilities, np.float64), SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


@dataclass(frozen=True)
class Calibration:
    """What turns a pair's own numbers into probabilities; without a curve they stay as they are.

    confidence: for `Target.confidence`, how likely the target is among the true ones.
    score: for `Detections.scores`, how likely a box overlaps a thing of its name by an IoU of 0.5 or more.
    reasoner, detector: `identity` of the weights that the curves were fitted for.
    fitted: on what, and how good it is; for people.
    """

    confidence: Curve | None = None
    score: Curve | None = None
    reasoner: str = ""
    detector: str = ""
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def of_target(self, confidence: float | None) -> float | None:
        """The calibrated confidence; unknown stays None."""
        if confidence is None or self.confidence is None:
            return confidence
        return float(self.confidence(np.array([confidence]))[0])

    def of_boxes(self, scores: np.ndarray) -> np.ndarray:
        """The calibrated scores, (N,) float32 → (N,) float32."""
        return scores if self.score is None else self.score(scores.astype(np.float64)).astype(np.float32)

    def apply(self, result: Detections) -> Detections:
        """The result of an uncalibrated model as this makes it."""
        targets = tuple(replace(target, confidence=self.of_target(target.confidence)) for target in result.targets)
        return replace(result, targets=targets, scores=self.of_boxes(result.scores))

    def for_weights(self, reasoner: str, detector: str) -> Calibration:
        """The same for weights of this `identity`."""
        return replace(self, reasoner=reasoner, detector=detector)

    def to_json(self) -> str:
        curves = {"confidence": self.confidence, "score": self.score}
        described = {
            "schema": SCHEMA,
            "reasoner": self.reasoner,
            "detector": self.detector,
            **{name: curve and curve.to_dict() for name, curve in curves.items()},
            "fitted": dict(self.fitted),
        }
        return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


def read_calibration(file: str | Path) -> Calibration:
    """The calibration in `file`. Raises `ModelError` where it cannot be read or is not one."""
    try:
        described = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the calibration {str(file)!r} cannot be read ({error}): {_REMEDY}") from error
    try:
        if described["schema"] != SCHEMA:
            raise ValueError(f"its schema is {described['schema']!r}, this version reads {SCHEMA}")
        return Calibration(
            confidence=_curve(described["confidence"]),
            score=_curve(described["score"]),
            reasoner=str(described["reasoner"]),
            detector=str(described["detector"]),
            fitted=dict(described["fitted"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ModelError(f"{str(file)!r} is no calibration ({told}): {_REMEDY}") from error


def check_fits(calibration: Calibration, file: str, *, reasoner: str, detector: str) -> None:
    """Raise `ModelError` where the calibration in `file` was fitted for other weights than those of this `identity`;
    an empty one is not asked for anything."""
    for part, now in (("reasoner", reasoner), ("detector", detector)):
        fitted_for = getattr(calibration, part)
        if now and fitted_for != now:
            raise ModelError(
                f"{file} was fitted for another {part} ({fitted_for}, here is {now}), "
                f"so its numbers would mean nothing: {_REMEDY}"
            )


_REMEDY = (
    "fit one with 'detgpt calibrate', or load the model with calibration=None (--calibration none), which leaves "
    "confidences and scores as the model gives them"
)


def identity(part: str) -> str:
    """What tells the weights of a reasoner or detector from others: a hash for a local folder of safetensors; the
    name itself for a hub id, or a model on a server.

    The hash is of all names, shapes and places of tensors and of a piece from the middle of each: another training
    changes them, and nobody waits for the hash of 20 GB.
    """
    files = sorted(Path(part).glob("*.safetensors"))
    if not files:
        return part
    digest = hashlib.sha256()
    for file in files:
        try:
            _hash_tensors(file, digest.update)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(f"the weights {str(file)!r} cannot be read ({error}): download them again") from error
    return f"sha256:{digest.hexdigest()}"


def _hash_tensors(file: Path, update: Callable[[bytes], None]) -> None:
    """A safetensors file is the size of its header, the header in JSON, and the tensors' bytes."""
    with file.open("rb") as weights:
        size = int.from_bytes(weights.read(8), "little")
        header = weights.read(size)
        update(header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                middle = (begin + end) // 2
                weights.seek(8 + size + middle)
                update(weights.read(min(SAMPLE, end - middle)))


def _curve(described: Any) -> Curve | None:
    """Raises `KeyError`, `TypeError` or `ValueError` for what is no curve."""
    if described is None:
        return None
    if described["method"] == "logistic":
        temperature, bias = float(described["temperature"]), float(described["bias"])
        if not (0 < temperature < np.inf and np.isfinite(bias)):
            raise ValueError(f"temperature {temperature} and bias {bias} are no rising curve")
        return Logistic(temperature, bias)
    if described["method"] == "isotonic":
        raw, calibrated = (tuple(float(knot) for knot in described[side]) for side in ("raw", "calibrated"))
        rises = all(a < b for a, b in pairwise(raw)) and all(a <= b for a, b in pairwise(calibrated))
        within = all(0 <= knot <= 1 for knot in (*raw, *calibrated))
        if not (raw and len(raw) == len(calibrated) and rises and within):
            raise ValueError("its knots must be equally many in raw and calibrated, within [0, 1], and rise")
        return Isotonic(raw, calibrated)
    raise ValueError(f"its method {described['method']!r} is unknown")
