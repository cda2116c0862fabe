"""The flags that every command with a model shares, made from the dataclasses that they fill."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from detgpt import terminal
from detgpt.described import described
from detgpt.models import AUTO, LOADING, OWN_BOXES, SEGMENTER, ModelPair, load_calibration, resolve
from detgpt.pipeline import DetGPT, Options
from detgpt.reasoners.scripted import ScriptedReasoner


@dataclass(frozen=True)
class Choice:
    """Which models run, and where.

    model: a pair of models by name (see `detgpt models`), or a folder that holds detgpt.json.
    reasoner: hub id or folder of a reasoner; goes with --detector and stands in for --model.
    detector: hub id or folder of an open-vocabulary detector, or the word reasoner for that model's own boxes;
        with --names it needs no --reasoner.
    segmenter: hub id or folder of the SAM 2 that outlines things for --masks.
    base_url: OpenAI-compatible server that runs the reasoner, such as http://localhost:8000/v1; --reasoner is its
        name there.
    reasoner_key: key for that server; without it OPENAI_API_KEY is sent, but only to the server of OPENAI_BASE_URL.
    device: where to run, such as cpu, cuda or cuda:1; a GPU where there is one unless given.
    dtype: number format of the weights, such as float32 or bfloat16; on a CPU those of the reasoner only.
    precision: exact, or fast, which lets a Grounding DINO on a CPU use bfloat16 where that gains.
    prompt: full tells the reasoner the three steps and the answer's form; bare sends the wish as it is, for a model
        trained so.
    coordinates: what the numbers of a reasoner's own boxes mean: thousandths, resized or original; by its family
        unless given.
    calibration: what makes confidences and scores into probabilities: a file of detgpt calibrate, auto for the one
        that lies beside the model, or none.
    debug: show tracebacks, and the libraries' own messages.
    """

    model: str = field(default="picto", metadata={"flags": ("--model", "-m")})
    reasoner: str | None = None
    detector: str | None = None
    segmenter: str = SEGMENTER
    base_url: str | None = None
    reasoner_key: str | None = field(default=None, repr=False, metadata={"envvar": "DETGPT_REASONER_KEY"})
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    prompt: str | None = None
    coordinates: str | None = None
    calibration: str = AUTO
    debug: bool = field(default=False, metadata={"flags": ("--debug",)})

    def pair(self, reasons: bool) -> ModelPair:
        """The chosen pair; with `reasons` False it may lack its reasoner."""
        asked = {name: value for name in LOADING if (value := getattr(self, name, None)) is not None}
        if self.reasoner is None and self.detector is None:
            return replace(resolve(self.model), **asked)
        if self.detector is None or (self.reasoner is None and (reasons or self.detector == OWN_BOXES)):
            raise typer.BadParameter("name both parts: --reasoner and --detector go together")
        return ModelPair(self.reasoner or "", self.detector, **asked)

    def load(self, settings: dict[str, Any], *, reasons: bool = True) -> DetGPT:
        pair = self.pair(reasons)
        options = Options().updated({**pair.options, **settings})
        loading: dict[str, Any] = {"device": self.device, "dtype": self.dtype, **pair.loading}
        loading["calibration"] = load_calibration(self.calibration, pair)
        if pair.base_url:
            loading["api_key"] = self.reasoner_key
        # Without reasoning nobody asks the reasoner, so the gigabytes of a real one stay where they are.
        asked = reasons or pair.detector == OWN_BOXES
        reasoner = pair.reasoner if asked else ScriptedReasoner(["Targets: []"])
        parts = [pair.detector] if pair.detector != OWN_BOXES else []
        parts += [pair.reasoner] if asked and not pair.base_url else []
        parts += [self.segmenter] if options.masks else []
        with terminal.loading(self.model if self.detector is None else self.detector, parts, self.debug):
            return DetGPT(reasoner, pair.detector, segmenter=self.segmenter, options=options, **loading)


def _flags(kind: type, heading: str) -> Iterator[inspect.Parameter]:
    """One flag per field of a dataclass; the field and the docstring give name, type, default and help."""
    helps = described(kind)
    types = get_type_hints(kind)
    for setting in fields(kind):
        option = typer.Option(
            *setting.metadata.get("flags", ()),
            help=helps.get(setting.name, ""),
            envvar=setting.metadata.get("envvar"),
            show_default=False if setting.default in (None, False, ()) else str(setting.default),
            rich_help_panel=heading,
        )
        value: Any = list[str] if get_origin(types[setting.name]) is tuple else types[setting.name]
        flag: Any = Annotated[value | None, option]
        yield inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)


def with_model(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter that is a dataclass, `choice` among them, and `settings` by flags; and report errors.

    `settings` holds only what was set of `Options`, so that the model's own options stay its defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = signature.parameters.values()
    kinds: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    own = [p for p in parameters if p.name not in (*kinds, "settings")]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {
            name: {flag.name: value for flag in fields(kind) if (value := given.pop(flag.name)) is not None}
            for name, kind in {**kinds, "settings": Options}.items()
        }
        with terminal.usage():
            Options().updated(chosen["settings"])
            filled = {name: kind(**chosen[name]) for name, kind in kinds.items()}
        with terminal.reporting(filled["choice"].debug):
            command(**given, **filled, settings=chosen["settings"])

    headings = {"choice": "Models", "serving": "Service", "cluster": "Several machines"}
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *own,
            *(flag for name, kind in kinds.items() for flag in _flags(kind, headings[name])),
            *_flags(Options, "Settings, unless the model brings its own"),
        ]
    )
    return run
