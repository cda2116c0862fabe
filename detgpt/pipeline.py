"""The method: ask the reasoner what the wish needs, ground its targets with the detector, give back one result.

    ask → (guard) → parse → ground → (segment) → result

This is the only module that knows both models. Everything else either feeds it an image and a wish or formats the
`Detections` that it returns.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.answer import RETRY_INSTRUCTION, ParsedAnswer, parse_answer
from detgpt.boxes import nms_per_target, one_target_per_box
from detgpt.calibration import Calibration
from detgpt.confidence import name_confidence
from detgpt.errors import InputError, UnreadableNameError
from detgpt.guards.guarded import GuardedReasoner
from detgpt.guards.reading import choose_reader
from detgpt.images import ImageSource, load_image
from detgpt.models import (
    AUTO,
    OWN_BOXES,
    SEGMENTER,
    load_calibration,
    load_detector,
    load_guard,
    load_reasoner,
    load_segmenter,
    own_boxes,
    resolve,
)
from detgpt.reasoners import RawAnswer, Request, Turn
from detgpt.results import Detections, Target, less_sure
from detgpt.tiles import MAX_TILES, in_tiles

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from detgpt.detectors import Detector, Grounding
    from detgpt.guards import Guard
    from detgpt.guards.reading import TextReader
    from detgpt.reasoners import Reasoner
    from detgpt.segmenters import Segmenter

SAME_THING = 0.8  # two names whose boxes overlap more than this IoU name one thing


@dataclass(frozen=True)
class Options:
    """What may be set for one call or for a whole model.

    box_threshold: least score of a box, in [0, 1]; of its score before calibration, as the detector gives it.
    text_threshold: least score of a box for its own name where several names share a prompt, in [0, 1].
    min_confidence: leave out targets that the reasoner is less sure of, in [0, 1]; they are not looked for, and
        `unsure` lists them.
    nms_threshold: boxes of one target that overlap more than this IoU are one thing; in (0, 1].
    prompting: "separate" asks for each name by itself, so no name disturbs another;
        "joint" puts all names into one prompt, as the original did: cheaper with many names.
    share_boxes: let two targets have the same box; otherwise the better-scored one keeps it.
    max_new_tokens: the longest answer of the reasoner, in tokens.
    tiles: for small things, also look at tiles x tiles overlapping parts of the picture; 1 to 8, 1 looks only at the
        whole.
    masks: also give the outline of each thing, by the model's segmenter.
    """

    box_threshold: float = 0.25
    text_threshold: float = 0.25
    min_confidence: float = 0.0
    nms_threshold: float = 0.6
    prompting: str = "separate"
    share_boxes: bool = False
    max_new_tokens: int = 512
    tiles: int = 1
    masks: bool = False

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "min_confidence", "nms_threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value!r} is outside [0, 1]: give a fraction such as 0.25")
        if self.prompting not in ("separate", "joint"):
            raise InputError(f"prompting={self.prompting!r} is unknown: choose 'separate' or 'joint'")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens!r} leaves no room for an answer: give 1 or more")
        if self.tiles not in range(1, MAX_TILES + 1):
            raise InputError(f"tiles={self.tiles!r} is no number of parts along a side: give 1 to {MAX_TILES}")

    def updated(self, changes: dict[str, Any]) -> Options:
        """These options with `changes`; a name that is no option raises `InputError`."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            known = ", ".join(f.name for f in fields(self))
            raise InputError(f"unknown option {', '.join(sorted(unknown))}: the options are {known}")
        return replace(self, **changes)


class DetGPT:
    """A reasoner and a detector, loaded once; safe to call from several threads.

    `reasoner` and `detector` are hub ids, local folders, or objects with the one verb of their protocol
    (`detgpt.reasoners.Reasoner.reason`, `detgpt.detectors.Detector.detect`); `detector="reasoner"` takes the boxes that
    the reasoner itself writes. `options` are the model's defaults. `segmenter` (`detgpt.segmenters.Segmenter.segment`)
    outlines things for `masks=True`; it loads when that is first asked for, or at once where it is the model's default.

    device: where all of them run, such as "cpu" or "cuda:1"; a GPU where there is one unless given.
    dtype: number format of the reasoner's weights, and of the detector's on a GPU.
    precision: "exact" or "fast", and runtime: "auto", "lean" or "torch", of a Grounding DINO on a CPU; see
        `detgpt.detectors.grounding_dino`.
    coordinates: what the numbers in a reasoner's own boxes mean, with `detector="reasoner"`; see
        `detgpt.detectors.reasoner`.
    calibration: makes confidences and scores into probabilities (`detgpt.calibration`); None leaves them as they are.
    guard: what keeps harmful wishes and answers away: "picto", which comes with the package, a guard's folder, the
        address of a server that runs a guard model, or an object with `detgpt.guards.Guard.check`; None: nothing does.
    guard_key: for that server.
    picture_text: how a guard learns what is written in a picture: "ocr" (unless given), "reasoner", which asks for a
        copy of it, "off", or an object with `detgpt.guards.reading.TextReader.read`.
    loading: goes to the reasoner's backend: `prompt`, quantization, device_map, revision, … of
        `detgpt.reasoners.huggingface.HuggingFaceReasoner`; with `base_url` the reasoner is a model that a server runs,
        and these are those of `detgpt.reasoners.openai.OpenAIReasoner`.

    Raises `InputError` for settings that do not go together and `ModelError` for a part that does not load.
    """

    def __init__(
        self,
        reasoner: str | Path | Reasoner,
        detector: str | Path | Detector,
        *,
        segmenter: str | Path | Segmenter = SEGMENTER,
        device: str | None = None,
        dtype: str | None = None,
        precision: str | None = None,
        runtime: str | None = None,
        coordinates: str | None = None,
        calibration: Calibration | None = None,
        options: Options | None = None,
        guard: str | Path | Guard | None = None,
        guard_key: str | None = None,
        picture_text: str | TextReader | None = None,
        **loading: Any,
    ):
        own = detector == OWN_BOXES
        if own and (precision or runtime):
            raise InputError("precision and runtime are those of a Grounding DINO: with detector='reasoner' give dtype")
        if coordinates and not own:
            raise InputError(f"coordinates={coordinates!r} is for detector='reasoner': leave it out with {detector}")
        self.options = options or Options()
        self.calibration = calibration or Calibration()
        self.guard = None if guard is None else load_guard(guard, api_key=guard_key, device=device)
        reader = None if guard is None else choose_reader(picture_text or "ocr", lambda: own_reasoner)
        self.segmenter = load_segmenter(segmenter, now=self.options.masks, device=device)
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "precision": precision, "runtime": runtime}
        loaded = None if own else load_detector(detector, **settings)
        own_reasoner = load_reasoner(reasoner, device=device, dtype=dtype, **loading)
        self.reasoner = own_reasoner if self.guard is None else GuardedReasoner(own_reasoner, self.guard, reader)
        self.detector = own_boxes(own_reasoner, coordinates) if loaded is None else loaded

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "picto",
        *,
        device: str | None = None,
        dtype: str | None = None,
        calibration: Calibration | str | Path | None = AUTO,
        **loading: Any,
    ) -> DetGPT:
        """Load a pair by name (`detgpt models` lists them) or from a folder that holds `detgpt.json`.

        calibration: "auto", the one that lies beside the pair, if any; None, which leaves confidences and scores as
            the models give them; or a file that `detgpt calibrate` has written for these weights.
        `loading`: other arguments of `DetGPT`; what is given here goes before what the pair's `detgpt.json` says.
        Raises `ModelError` where there is no such pair or its parts do not load, or its calibration does not fit it.
        """
        pair = resolve(model)
        options = Options().updated(dict(pair.options))
        loading = {**pair.loading, **loading}
        loading["calibration"] = load_calibration(calibration, replace(pair, base_url=loading.get("base_url")))
        return cls(pair.reasoner, pair.detector, device=device, dtype=dtype, options=options, **loading)

    def uncalibrated(self) -> DetGPT:
        """The same model, loaded once, whose confidences and scores are as its parts give them."""
        other = copy.copy(self)
        other.calibration = Calibration()
        return other

    def __repr__(self) -> str:
        return f"DetGPT(reasoner={self.reasoner.name!r}, detector={self.detector.name!r})"

    def detect(
        self,
        image: ImageSource,
        instruction: str | None = None,
        *,
        names: Sequence[str] | None = None,
        history: Sequence[Turn] = (),
        **options: Any,
    ) -> Detections:
        """Find what `instruction` needs in `image`; or, without any reasoning, the things called `names`.

        image: path, http(s) URL, bytes, PIL image, NumPy array (RGB) or tensor; see `detgpt.images.load_image`.
        history: earlier turns about the same image. `options`: see `Options`.
        """
        picture = load_image(image)
        if names is not None:
            if instruction is not None:
                raise InputError("both an instruction and names were given: give one of the two")
            return self._detect_names([(picture, ParsedAnswer.of_names(names))], self.options.updated(options))[0]
        if instruction is None:
            raise InputError("nothing to look for: give an instruction, or names=[…] to detect without reasoning")
        return self._detect([Request(picture, instruction, tuple(history))], self.options.updated(options))[0]

    def detect_batch(
        self, items: Iterable[tuple[ImageSource, str | Sequence[str]]], **options: Any
    ) -> list[Detections]:
        """`detect` for many pairs of an image and an instruction, batched through both models; results in order.

        A list of names in an instruction's place is looked for without reasoning.
        """
        chosen = self.options.updated(options)
        pairs = [(load_image(image), wish) for image, wish in items]
        asked = [Request(image, wish) for image, wish in pairs if isinstance(wish, str)]
        named = [(image, ParsedAnswer.of_names(wish)) for image, wish in pairs if not isinstance(wish, str)]
        reasoned, plain = iter(self._detect(asked, chosen)), iter(self._detect_names(named, chosen))
        return [next(reasoned if isinstance(wish, str) else plain) for _, wish in pairs]

    def stream(
        self, image: ImageSource, instruction: str, *, history: Sequence[Turn] = (), **options: Any
    ) -> Iterator[str | Detections]:
        """The reasoner's text piece by piece as it is written, then the `Detections`."""
        chosen = self.options.updated(options)
        request = Request(load_image(image), instruction, tuple(history))
        raw = yield from self.reasoner.stream(request, max_new_tokens=chosen.max_new_tokens)
        yield self._finish([request], [raw], chosen)[0]

    def chat(self, image: ImageSource, **options: Any) -> Chat:
        """A conversation about one image: every answer knows the turns before it."""
        return Chat(self, load_image(image), self.options.updated(options))

    def _detect(self, requests: list[Request], options: Options) -> list[Detections]:
        raws = self.reasoner.reason(requests, max_new_tokens=options.max_new_tokens) if requests else []
        return self._finish(requests, raws, options)

    def _detect_names(self, items: Sequence[tuple[Image.Image, ParsedAnswer]], options: Options) -> list[Detections]:
        images, answers = [image for image, _ in items], [answer for _, answer in items]
        return self._ground(images, [None] * len(items), answers, [RawAnswer("")] * len(items), options)

    def _finish(self, requests: list[Request], raws: Sequence[RawAnswer], options: Options) -> list[Detections]:
        """From raw answers to results: parse (one retry for an answer without targets), then ground."""
        raws = list(raws)
        parsed = [parse_answer(raw.text) for raw in raws]
        failed = [i for i, answer in enumerate(parsed) if answer.problem]
        if failed:
            retries = [_restated(requests[i], raws[i]) for i in failed]
            second = self.reasoner.reason(retries, max_new_tokens=options.max_new_tokens)
            for i, raw in zip(failed, second, strict=True):
                answer = parse_answer(raw.text)
                if not answer.problem:
                    parsed[i] = replace(answer, reasoning=answer.reasoning or parsed[i].reasoning)
                    raws[i] = raw
        images, instructions = [r.image for r in requests if r.image], [r.instruction for r in requests]
        unsure = [self._unsure(answer, raw, options) for answer, raw in zip(parsed, raws, strict=True)]
        parsed = [answer.without([t.name for t in left_out]) for answer, left_out in zip(parsed, unsure, strict=True)]
        while True:
            try:
                results = self._ground(images, instructions, parsed, raws, options)
                return [
                    replace(result, unsure=left) if left else result
                    for result, left in zip(results, unsure, strict=True)
                ]
            except UnreadableNameError as error:
                # The reasoner's mistake, not the caller's: look for its other names. Detectors read names first.
                readable = [answer.without([error.name], str(error)) for answer in parsed]
                if readable == parsed:
                    raise
                parsed = readable

    def _unsure(self, answer: ParsedAnswer, raw: RawAnswer, options: Options) -> tuple[Target, ...]:
        """The targets of an answer that are less sure than `options.min_confidence`."""
        if not options.min_confidence:
            return ()
        confidences = [self.calibration.of_target(name_confidence(raw, span)) for span in answer.spans]
        if None in confidences:
            raise InputError(
                f"min_confidence={options.min_confidence!r} needs to know how sure the reasoner is, but "
                f"{self.reasoner.name!r} gives no token probabilities: leave it out"
            )
        return less_sure(map(Target, answer.names, confidences), options.min_confidence)

    def _ground(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str | None],
        answers: Sequence[ParsedAnswer],
        raws: Sequence[RawAnswer],
        options: Options,
    ) -> list[Detections]:
        groundings = in_tiles(self.detector, options.tiles).detect(
            images,
            [answer.names for answer in answers],
            box_threshold=options.box_threshold,
            text_threshold=options.text_threshold,
            prompting=options.prompting,
        )
        found = [tidy(grounding, options) for grounding in groundings]
        masks = [
            self.segmenter.segment(image, grounding.boxes) if options.masks else None
            for image, grounding in zip(images, found, strict=True)
        ]
        return [
            _result(self.calibration, *parts)
            for parts in zip(images, instructions, answers, raws, found, masks, strict=True)
        ]


class Chat:
    """A conversation about one image. `ask` answers; `turns` are what was said so far."""

    def __init__(self, model: DetGPT, image: Image.Image, options: Options):
        self._model = model
        self._options = options
        self.image = image
        self.turns: list[Turn] = []

    def ask(self, instruction: str, **options: Any) -> Detections:
        """Detect with the conversation so far in mind, and remember this turn, unless a guard refused it."""
        request = Request(self.image, instruction, tuple(self.turns))
        result = self._model._detect([request], self._options.updated(options))[0]
        if not result.refused:
            self.turns.append(Turn(instruction, result.answer))
        return result


def detect(image: ImageSource, instruction: str | None = None, *, model: str = "picto", **arguments: Any) -> Detections:
    """Find what `instruction` needs in `image` with the model pair `model`, loaded at the first call and kept.

    Other arguments as in `DetGPT.detect`. The built-in "picto" needs no download but knows pictograms only:
    for photographs choose "small", "base" or "large".
    """
    return _kept(model).detect(image, instruction, **arguments)


@functools.lru_cache(maxsize=2)
def _kept(model: str) -> DetGPT:
    return DetGPT.from_pretrained(model)


def _restated(request: Request, raw: RawAnswer) -> Request:
    """The same request once more, with the answer that could not be read and the format restated."""
    return replace(
        request,
        instruction=RETRY_INSTRUCTION,
        history=(*request.history, Turn(request.instruction, raw.text)),
    )


def tidy(grounding: Grounding, options: Options) -> Grounding:
    """Each thing once: per target, and (unless boxes may be shared) across targets."""
    grounding = nms_per_target(grounding, options.nms_threshold)
    return grounding if options.share_boxes else one_target_per_box(grounding, SAME_THING)


def _result(
    calibration: Calibration,
    image: Image.Image,
    instruction: str | None,
    answer: ParsedAnswer,
    raw: RawAnswer,
    found: Grounding,
    masks: np.ndarray | None,
) -> Detections:
    boxed = set(found.name_index.tolist())
    targets = tuple(
        Target(name, calibration.of_target(name_confidence(raw, span)), found=i in boxed)
        for i, (name, span) in enumerate(zip(answer.names, answer.spans, strict=True))
    )
    return Detections(
        boxes=found.boxes,
        scores=calibration.of_boxes(found.scores),
        labels=tuple(answer.names[i] for i in found.name_index),
        targets=targets,
        reasoning=answer.reasoning,
        answer=raw.text,
        problem=answer.problem,
        instruction=instruction,
        image=image,
        masks=masks,
        guard=raw.guard,
    )
