"""Wishes from boxes and a small YAML file of what fits what: instruction data without a language model as its writer.

    write_wishes("train/annotations.json", "train/images", "needs.yaml", "data/train")

The annotation is COCO's. The YAML file says of every class which needs it fits, and of every need how people put it:

    classes:
      violin: [strings, orchestra]
    needs:
      strings:
        fact: has strings                                  # the reason that an answer gives
        says: [show me what has strings]                   # wishes to train on
        held_out: [a string broke and I have a spare one]  # other ways, for evaluation only

Every wish is right as far as the file is: a class that does not list a need is taken not to fit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Picture, read_annotations
from detgpt.evaluation.readers.folder import DATA_FILE, to_row

DIRECT, HELD_OUT_DIRECT = "Find every {}.", "Where is the {}?"


class Need(BaseModel):
    """How one asks for it, and the fact that the things that fit have in common."""

    model_config = ConfigDict(extra="forbid")

    fact: str = Field(min_length=1)
    says: list[str] = Field(min_length=1)
    held_out: list[str] = []


class Needs(BaseModel):
    """What `needs.yaml` holds: the needs that each class fits, and the needs themselves."""

    model_config = ConfigDict(extra="forbid")

    classes: dict[str, list[str]]
    needs: dict[str, Need]


@dataclass(frozen=True)
class Wish:
    text: str
    fits: frozenset[str]
    fact: str
    kind: str


def read_needs(file: Path) -> Needs:
    """Read and check the YAML file. Raises `InputError` that names what is wrong."""
    try:
        found = Needs.model_validate(yaml.safe_load(fields.read_text(file, "needs are a YAML file in UTF-8")))
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{file}: {place}: {first['msg']}. It holds 'classes' and 'needs', see {__name__}") from error
    for name, fitting in found.classes.items():
        if unknown := sorted(set(fitting) - set(found.needs)):
            raise InputError(f"{file}: {name!r} fits {unknown}, which 'needs' does not explain: add them there")
    return found


def write_wishes(
    annotations: str | Path,
    images: str | Path,
    needs: str | Path,
    output: str | Path,
    *,
    wishes: int = 10,
    absent: int = 3,
    seed: int = 0,
    held_out: bool = False,
) -> int:
    """Write `data.jsonl` in the folder `output` and return how many records it has.

    Every picture gets up to `wishes` that something in it fulfils, and up to `absent` that nothing does, drawn by
    `seed`. `held_out` takes the wishes that are kept for evaluation instead of those to train on. The pictures stay
    where they are. Raises `InputError` for a file that is wrong, or a class that the needs leave out.
    """
    annotated, known = read_annotations(Path(annotations)), read_needs(Path(needs))
    if left_out := sorted({name for picture in annotated.pictures for name in picture.boxed} - set(known.classes)):
        raise InputError(f"{needs} says nothing of {left_out}, which {annotations} has boxes of: add them to 'classes'")
    everything = list(_wishes(known, held_out))
    folder, output = Path(images), Path(output)
    lines = []
    for number, picture in enumerate(annotated.pictures):
        rng = np.random.default_rng((seed, number))
        for wish in _draw(rng, everything, picture, wishes, absent):
            lines.append(json.dumps(_row(wish, picture, folder, output), ensure_ascii=False))
    with terminal.replacing(output / DATA_FILE) as file:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _wishes(known: Needs, held_out: bool) -> Iterator[Wish]:
    for key, need in known.needs.items():
        fits = frozenset(name for name, fitting in known.classes.items() if key in fitting)
        for text in need.held_out if held_out else need.says:
            yield Wish(text, fits, need.fact, "need")
    for name in known.classes:
        text = (HELD_OUT_DIRECT if held_out else DIRECT).format(name)
        yield Wish(text, frozenset([name]), f"is called {name}", "direct")


def _draw(
    rng: np.random.Generator, everything: Sequence[Wish], picture: Picture, wishes: int, absent: int
) -> Iterator[Wish]:
    """Some wishes of either sort, and none that only a crowd would fulfil: it has no box of its own."""
    order = [everything[i] for i in rng.permutation(len(everything))]
    yield from [wish for wish in order if wish.fits & set(picture.boxed)][:wishes]
    yield from [wish for wish in order if not wish.fits & set(picture.present)][:absent]


def _row(wish: Wish, picture: Picture, images: Path, output: Path) -> dict[str, Any]:
    targets = tuple(name for name in picture.boxed if name in wish.fits)
    record = picture.record(images, wish.text, targets, str(picture.id), kind=wish.kind if targets else "absent")
    marked = [f"{name} (fits)" if name in targets else name for name in record.present]
    seen = f"I see {_listed(marked)}." if marked else "I see nothing that I know."
    fact = f"{wish.fact[0].upper()}{wish.fact[1:]}."
    nothing = [] if targets else ["Nothing here fits."]
    image = Path(os.path.relpath(record.image, output)).as_posix()
    return {**to_row(record, image), "reasoning": " ".join([fact, seen, *nothing])}


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
