"""Named pairs of a reasoner and a detector, and how their parts are found and loaded.

A pair is named ("picto", "small", "base", "large") or is a folder with a `detgpt.json`:

    {"reasoner": "reasoner", "detector": "detector", "options": {"box_threshold": 0.3}}

Paths in it are relative to the folder; anything else is a hub id. With "base_url" the reasoner is the name of a model
that a server runs; the detector "reasoner" means the reasoner's own boxes. How they are loaded may be said as well:
"prompt", "precision", "runtime" and "coordinates", see `ModelPair`. A `calibration.json` beside it makes confidences
and scores of the pair into probabilities, see `detgpt.calibration`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.calibration import CALIBRATION_FILE, Calibration, check_fits, identity, read_calibration
from detgpt.errors import InputError, ModelError

if TYPE_CHECKING:
    from detgpt.detectors import Detector
    from detgpt.reasoners import Reasoner
    from detgpt.segmenters import Segmenter

_PACKAGE = Path(__file__).parent
PAIR_FILE = "detgpt.json"
SEGMENTER = "facebook/sam2.1-hiera-small"  # asked only for masks, so one serves every pair
OWN_BOXES = "reasoner"  # in a detector's place
AUTO, NONE = "auto", "none"  # of a calibration: the pair's own if it has one; leave the numbers as they are
LOADING = ("base_url", "prompt", "precision", "runtime", "coordinates")  # how a pair's parts are loaded


@dataclass(frozen=True)
class ModelPair:
    """A reasoner and a detector that go together, with what a user should know before choosing them.

    base_url: address of the OpenAI-compatible server that runs the reasoner; None: it runs here.
    prompt, precision, runtime, coordinates: as in `DetGPT`; None: as these decide by themselves.
    calibration: the file that lies beside its `detgpt.json`, None where there is none.
    """

    reasoner: str
    detector: str
    knows: str = ""
    needs: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    base_url: str | None = None
    prompt: str | None = None
    precision: str | None = None
    runtime: str | None = None
    coordinates: str | None = None
    calibration: str | None = None

    @property
    def loading(self) -> dict[str, str]:
        """What it says of `LOADING`: arguments of `DetGPT`."""
        return {name: value for name in LOADING if (value := getattr(self, name)) is not None}

    @property
    def identities(self) -> dict[str, str]:
        """What tells the weights of its two parts from others, see `detgpt.calibration.identity`."""
        return {
            "reasoner": self.reasoner if self.base_url else identity(self.reasoner),
            "detector": self.detector if self.detector == OWN_BOXES else identity(self.detector),
        }


def _weights_folder() -> Path:
    """`weights/` of the installed package, or of the checkout that it is installed from."""
    installed = _PACKAGE / "weights"
    return installed if installed.is_dir() else _PACKAGE.parent / "weights"


PAIRS: dict[str, ModelPair | Path] = {
    "picto": _weights_folder() / "picto",
    "small": ModelPair(
        "Qwen/Qwen3-VL-2B-Instruct",
        "IDEA-Research/grounding-dino-tiny",
        knows="photographs",
        needs="5 GB download, 6 GB memory",
    ),
    "base": ModelPair(
        "Qwen/Qwen3-VL-4B-Instruct",
        "IDEA-Research/grounding-dino-base",
        knows="photographs, better",
        needs="10 GB download, 12 GB GPU memory",
    ),
    "large": ModelPair(
        "Qwen/Qwen3-VL-8B-Instruct",
        "iSEE-Laboratory/llmdet_large",
        knows="photographs, best",
        needs="20 GB download, 24 GB GPU memory",
    ),
}


def resolve(model: str | Path) -> ModelPair:
    """The pair of that name, or of that folder. Raises `ModelError` where there is none."""
    pair = PAIRS.get(str(model), Path(model))
    if isinstance(pair, ModelPair):
        return pair
    file = pair / PAIR_FILE
    if not file.is_file():
        known = ", ".join(PAIRS)
        raise ModelError(
            f"no model pair {str(model)!r}: choose one of {known}, give a folder that holds {PAIR_FILE}, "
            "or name both parts with DetGPT(reasoner=…, detector=…)"
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        found = ModelPair(**described)
        return replace(
            found,
            reasoner=found.reasoner if found.base_url else _local_or_hub(pair, found.reasoner),
            detector=found.detector if found.detector == OWN_BOXES else _local_or_hub(pair, found.detector),
            calibration=str(pair / CALIBRATION_FILE) if (pair / CALIBRATION_FILE).is_file() else None,
        )
    except (json.JSONDecodeError, TypeError) as error:
        raise ModelError(
            f"{file} is not a description of a model pair ({error}): it needs 'reasoner' and 'detector', "
            f"and may have 'options', 'knows', 'needs', {', '.join(map(repr, LOADING))}"
        ) from error


def describe_pair(pair: ModelPair, settings: Mapping[str, Any]) -> str:
    """What a `detgpt.json` in another folder says of this pair, `settings` becoming its options."""
    parts = {name: getattr(pair, name) for name in ("reasoner", "detector")}
    described = {
        **{name: str(Path(part).resolve()) if Path(part).is_dir() else part for name, part in parts.items()},
        "options": {**pair.options, **settings},
        "knows": pair.knows,
        "needs": pair.needs,
        **pair.loading,
    }
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def load_calibration(calibration: Calibration | str | Path | None, pair: ModelPair) -> Calibration | None:
    """The calibration of a pair: "auto", the pair's own if it has one; a file; or None or "none".

    Raises `ModelError` for a file that cannot be read, is no calibration, or was fitted for other weights.
    """
    if isinstance(calibration, Calibration) or calibration is None:
        return calibration
    file = {AUTO: pair.calibration, NONE: None}.get(str(calibration), str(calibration))
    if file is None:
        return None
    read = read_calibration(file)
    check_fits(read, file, **pair.identities)
    return read


def _local_or_hub(folder: Path, part: str) -> str:
    return str(folder / part) if (folder / part).is_dir() else part


def load_reasoner(
    reasoner: str | Path | Reasoner,
    *,
    base_url: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **loading: Any,
) -> Reasoner:
    """A reasoner as it is, the model of that name at the server `base_url`, or the checkpoint of a hub id or folder.

    A server has its own device and dtype. Raises what the backend raises for an argument it does not take.
    """
    if not isinstance(reasoner, (str, Path)):
        return _with_verb(reasoner, "reasoner", "reason")
    if base_url:
        from detgpt.reasoners.openai import OpenAIReasoner

        return OpenAIReasoner(str(reasoner), base_url, **loading)
    from detgpt.reasoners.huggingface import HuggingFaceReasoner

    return HuggingFaceReasoner(reasoner, device=device, dtype=dtype, **loading)


# What a checkpoint's config.json calls its model_type → the file in detectors/ and the class that load it.
DETECTORS = {
    "grounding-dino": ("grounding_dino", "GroundingDinoDetector"),
    "mm-grounding-dino": ("grounding_dino", "GroundingDinoDetector"),  # also LLMDet
    "omdet-turbo": ("omdet_turbo", "OmDetTurboDetector"),
    "owlv2": ("owlv2", "Owlv2Detector"),
    "owlvit": ("owlv2", "Owlv2Detector"),
}


def load_detector(
    detector: str | Path | Detector,
    *,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    revision: str | None = None,
) -> Detector:
    """A detector as it is, or the checkpoint of that hub id or folder, whose config.json says which of `DETECTORS`.

    dtype: of its weights on a GPU. A CPU is slower with half of it: there it is float32, and `precision` chooses.
    precision, runtime: as in `GroundingDinoDetector`, for the families it reads.
    Raises `ModelError` for a checkpoint of another kind or one that does not load, and `InputError` for a `precision`
    or `runtime` where there is none to choose.
    """
    chosen = {name: value for name, value in (("precision", precision), ("runtime", runtime)) if value is not None}
    if not isinstance(detector, (str, Path)):
        _check_takes(chosen, repr(detector), "")
        return _with_verb(detector, "detector", "detect")
    from detgpt.detectors.checkpoint import read_model_type
    from detgpt.device import choose_device

    model_type = read_model_type(str(detector), revision)
    if model_type not in DETECTORS:
        raise ModelError(
            f"{detector} is a model of type {model_type!r}, which is no detector known here: "
            f"give a checkpoint of type {', '.join(DETECTORS)}"
        )
    file, name = DETECTORS[model_type]
    _check_takes(chosen, str(detector), file)
    place = choose_device(device)
    backend: Detector = getattr(import_module(f"detgpt.detectors.{file}"), name)(
        detector, device=place, dtype=None if place.type == "cpu" else dtype, revision=revision, **chosen
    )
    return backend


def _check_takes(chosen: Mapping[str, str], detector: str, file: str) -> None:
    """Only Grounding DINO has a precision and a runtime of its own."""
    if chosen and file != "grounding_dino":
        told = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        raise InputError(f"{told} is for a Grounding DINO loaded by its name, not for {detector}: leave it out")


def load_segmenter(segmenter: str | Path | Segmenter, *, now: bool, **loading: Any) -> Segmenter:
    """A segmenter as it is, or the checkpoint of that hub id or folder: loaded `now`, or at its first picture."""
    if not isinstance(segmenter, (str, Path)):
        return _with_verb(segmenter, "segmenter", "segment")
    from detgpt.segmenters import LazySegmenter

    lazy = LazySegmenter(str(segmenter), **loading)
    return lazy.load() if now else lazy


def own_boxes(reasoner: Reasoner, coordinates: str | None = None) -> Detector:
    """The detector that asks `reasoner` for its boxes, `coordinates` as in `ReasonerDetector`."""
    from detgpt.detectors.reasoner import ReasonerDetector

    return ReasonerDetector(reasoner, coordinates=coordinates)


def _with_verb(part: Any, kind: str, verb: str) -> Any:
    if not callable(getattr(part, verb, None)):
        raise InputError(f"{kind}={part!r} has no method {verb!r}: give a hub id, a folder or a {kind} object")
    return part
