"""A run's settings as one YAML file: read, overridden from the command line, checked, and kept with the result.

    stage: instruct                     # a file of finetune/stages/, or one of STAGES' other places
    output: runs/kitchen
    model: weights/picto/reasoner
    trainer: {learning_rate: 2e-4}

Every stage declares its settings once, as a `Settings` class named `Config`; keys that it does not have are errors.
A recipe may also be a list of steps, recipes beside it that run one after the other:

    steps: [picto/world, picto/detector, picto/instruct]    # overridden as "detector.trainer.max_steps=100"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from detgpt.errors import InputError

Kind = TypeVar("Kind", bound=BaseModel)
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML has it

RECIPES = Path(__file__).parent / "recipes"
RECIPE_FILE = "recipe.yaml"  # in a run's folder: the settings it really had

# What a recipe calls a stage → the module that has its Config and its run(config).
STAGES = {
    "align": "finetune.stages.align",
    "instruct": "finetune.stages.instruct",
    "pretrain": "finetune.stages.pretrain",
    "detector": "finetune.stages.detector",
    "hma": "finetune.averaging.hma",
    "distill": "finetune.distill.student",
    "distill.cache": "finetune.distill.teacher",
    "distill.fresh": "finetune.distill.fresh",
    "first": "finetune.distill.study",
    "pareto": "finetune.averaging.pareto",
    "compare": "finetune.preference.compare",
    **{name: f"finetune.protector.{name}" for name in ("harm_detector", "detoxifier", "guard")},
    **{f"protector.{step}": f"finetune.protector.{step}" for step in ("data", "fresh", "ngrams", "network", "encoder")},
    **{name: f"finetune.preference.{name}" for name in ("reward", "dpo", "iterative_dpo", "raft", "grpo", "rloo")},
    **{
        f"picto.{step}": f"finetune.picto.{step}"
        for step in ("world", "backbone", "tower", "lessons", "export", "talks", "wishes")
    },
}


def run_recipe(name: str | Path, overrides: Sequence[str] = ()) -> None:
    """Run the recipe at `name`, or the shipped one of that name, with `overrides` such as "trainer.max_steps=100".

    Raises `InputError` for settings that are wrong; of all steps before the first one runs.
    """
    for path, own in _steps(find_recipe(name), overrides):
        config = read_recipe(path, own)
        stage_module(config.stage, path).run(config)


def _steps(path: Path, overrides: Sequence[str]) -> list[tuple[Path, list[str]]]:
    """The recipe itself, or its steps, each with its overrides; all are checked."""
    names = read_yaml(path).get("steps")
    if names is None:
        read_recipe(path, overrides)
        return [(path, list(overrides))]
    steps = []
    left = list(overrides)
    for step in names:
        prefix = f"{Path(step).name}."
        mine = [text for text in left if text.startswith(prefix)]
        left = [text for text in left if text not in mine]
        steps += _steps(path.parent / f"{step}.yaml", [text.removeprefix(prefix) for text in mine])
    if left:
        raise InputError(f"{left[0]!r} names no step of {path}: write STEP.KEY=VALUE, a step being one of {names}")
    return steps


class Settings(BaseModel):
    """Settings of a stage or of a part of one: frozen, typed, no key but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageConfig(Settings):
    """What every stage is told.

    stage: its name. output: the folder of the result; a run that finds its own checkpoints there goes on from them.
    seed: of everything that is drawn.
    """

    stage: str
    output: Path
    seed: int = 0


def find_recipe(name: str | Path) -> Path:
    """The file at `name`, or the recipe of that name that comes with the package. Raises `InputError`."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")))
    raise InputError(f"there is no recipe {str(name)!r}: give a YAML file, or one of {known}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The settings of the stage in the file at `path`, with `overrides` such as "trainer.learning_rate=1e-4".

    Raises `InputError`, which names the file and the key, for one that cannot be read, an unknown stage or key, or a
    value of another type.
    """
    values = _with_overrides(read_yaml(path), overrides)
    return checked_settings(stage_module(values.get("stage"), path).Config, values, where=f"{path}: ")


def checked_settings(kind: type[Kind], values: Mapping[str, Any], where: str = "") -> Kind:
    """An instance of the settings `kind`. Raises `InputError` that starts with `where` and names the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}{_in_words(error, kind)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold settings, one 'key: value' a line")
    return values


def stage_module(name: Any, path: Path) -> ModuleType:
    if name not in STAGES:
        raise InputError(f"{path}: stage {name!r} is none of {', '.join(STAGES)}")
    return import_module(STAGES[name])


def write_recipe(config: StageConfig, folder: Path) -> Path:
    """Keep the effective settings in `folder`; the file can be run again."""
    file = folder / RECIPE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    partial.replace(file)
    return file


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"{override!r} is no override: write KEY=VALUE, as in trainer.learning_rate=1e-4")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            inner = place.get(parent)
            place[parent] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[parent]
        place[last] = yaml.safe_load(text)
    return values


def _in_words(error: ValidationError, config: type[BaseModel]) -> str:
    """What is wrong, one key after the other, with the keys that there are where one is unknown."""
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = f"; there are {', '.join(config.model_fields)}" if len(problem["loc"]) == 1 else ""
            sentences.append(f"there is no setting {key!r}{known}")
        elif problem["type"] == "missing":
            sentences.append(f"{key!r} is missing")
        elif isinstance(said := problem.get("ctx", {}).get("error"), InputError):
            sentences.append(str(said))
        else:
            sentences.append(f"{key} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(sentences)
