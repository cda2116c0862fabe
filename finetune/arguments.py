"""A recipe's `trainer:` as the arguments of a library's trainer: SFTConfig, DPOConfig, TrainingArguments …

arguments(SFTConfig, config.trainer, defaults={"learning_rate": 2e-4}, ours={"output_dir": "runs/x/checkpoints"})
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache, partial
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, TypeAdapter, ValidationError
from transformers import TrainingArguments

from detgpt.errors import InputError

T = TypeVar("T")


def arguments(kind: type[T], given: Mapping[str, Any], *, defaults: Mapping[str, Any], ours: Mapping[str, Any]) -> T:
    """An instance of the dataclass `kind`: `defaults`, over them what the recipe has, and what it may not set.

    Raises `InputError` for a key that `kind` does not have, with the nearest that it has, for a value of another type,
    for one of `ours`, and for values that do not go together.
    """
    values = checked(kind, given)
    if taken := sorted(ours.keys() & values.keys()):
        raise InputError(f"trainer.{taken[0]} is not yours to set: it follows from the recipe's other settings")
    try:
        return kind(**{**defaults, **values, **ours})
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {error}") from error


def checked(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with every value in its field's type: YAML reads 2e-5 as text. Raises `InputError`."""
    known = _types(kind)
    values = {}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise InputError(f"trainer.{key}: {kind.__name__} has no such setting; the nearest is {near[0]!r}")
        try:
            values[key] = TypeAdapter(known[key]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"trainer.{key} = {value!r}: {error.errors()[0]['msg']}") from error
    return values


@cache
def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


TrainerSettings = Annotated[dict[str, Any], AfterValidator(partial(checked, TrainingArguments))]
"""The `trainer:` of a stage whose trainer is that of transformers."""
