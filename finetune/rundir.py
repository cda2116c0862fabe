"""A run's folder: what is kept of a training, and what lets it go on.

    runs/kitchen/
      recipe.yaml     the settings that it really had; the file can be run again
      run.json        versions, command, seed, fingerprints of the data, and at the end the metrics
      checkpoints/    to go on from; the last ones
      tensorboard/    its curves
      reasoner/       the result (or detector/), in transformers' format
      detgpt.json     the pair that it makes: DetGPT.from_pretrained("runs/kitchen")
      adapter/        the trained part alone, where adapters (LoRA) were trained

Here stands no code that is particular to a stage.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.models import PAIR_FILE, PAIRS, resolve
from finetune.data.records import fingerprint
from finetune.recipe import RECIPE_FILE, StageConfig, read_yaml, write_recipe

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
ADAPTER = "adapter"
PACKAGES = ("detgpt", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
DATA = ("train", "validation", "replay")  # settings that name records


def is_finished(config: StageConfig) -> bool:
    """Whether the run of `config` is finished, and says so. Raises `InputError` for a folder with another run."""
    _check_same(config)
    if read_run(config.output).get("finished") is None:
        return False
    terminal.note(f"{config.output} is finished: nothing to do. To train anew, give another output or remove it")
    return True


def start(config: StageConfig, data: Mapping[str, str] | None = None) -> Path:
    """The folder of a run that begins or goes on, with its settings and a `run.json` without results.

    data: fingerprints of what it learns from; unset: those of the records that the settings DATA name.
    Raises `InputError` where the folder holds a run of other settings, or its data has changed since.
    """
    _check_same(config)
    if data is None:
        data = {name: fingerprint(getattr(config, name)) for name in DATA if getattr(config, name, None) is not None}
    run = read_run(config.output)
    changed = [name for name in data if run and run["data"].get(name) != data[name]]
    if changed:
        raise InputError(
            f"{config.output} holds a run on other data: what {changed[0]!r} names has changed since. "
            "Give another output, or remove that folder"
        )
    write_recipe(config, config.output)
    if not run:
        write_run(config.output, _described(config, data))
    return config.output


def finish(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write down that the run is finished, and its metrics. What it made has to be in `folder` by now."""
    write_run(folder, {**read_run(folder), "finished": _now(), "metrics": dict(metrics)})


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of the run in `folder` that is whole: one that a kill cut short is none."""
    return latest(folder / CHECKPOINTS)


def latest(checkpoints: Path) -> Path | None:
    """The last whole checkpoint in the folder `checkpoints`."""
    whole = [place for place in checkpoints.glob("checkpoint-*") if is_whole(place)]
    return max(whole, key=lambda place: int(place.name.rpartition("-")[2]), default=None)


def is_whole(checkpoint: Path) -> bool:
    """Whether it was written to its end: the Trainer writes its state when all else is written."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says; {} where there is none. Raises `InputError` for one that cannot be read."""
    file = folder / RUN_FILE
    if not file.is_file():
        return {}
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}. Give another output, or remove that folder") from error
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    write_json(folder / RUN_FILE, run)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    with terminal.replacing(file) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a folder beside `folder`, which takes its place when it is whole, or goes if it fails."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
    except BaseException:  # also where it is interrupted: half a folder is of no use
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def write_pair(folder: Path, *, reasoner: str = "reasoner", detector: str = "detector") -> None:
    """Write `detgpt.json`, so that `DetGPT.from_pretrained(folder)` works.

    reasoner, detector: a name in `folder`, a folder elsewhere, a hub id, or a named pair or a folder of one, whose part
    is then meant; the detector's pair gives its thresholds, too.
    """
    options: dict[str, Any] = {}
    if is_pair(detector):
        pair = resolve(detector)
        detector, options = pair.detector, dict(pair.options)
    described: dict[str, Any] = {
        "reasoner": _seen_from(folder, resolve(reasoner).reasoner if is_pair(reasoner) else reasoner),
        "detector": _seen_from(folder, detector),
    }
    write_json(folder / PAIR_FILE, {**described, **({"options": options} if options else {})})


def is_pair(name: str) -> bool:
    """Whether this is a named pair, or a folder of one."""
    return name in PAIRS or (Path(name) / PAIR_FILE).is_file()


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that make the result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _described(config: StageConfig, data: Mapping[str, str]) -> dict[str, Any]:
    return {
        "stage": config.stage,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": config.seed,
        "data": dict(data),
        "versions": versions(),
        "started": _now(),
        "finished": None,
        "metrics": {},
    }


def _check_same(config: StageConfig) -> None:
    """That the folder holds no run of other settings: going on with those would be neither the one nor the other."""
    file = config.output / RECIPE_FILE
    if not file.is_file():
        return
    before, now = (_flat(values) for values in (read_yaml(file), config.model_dump(mode="json")))
    other = sorted(key for key in {*before, *now} - {"output"} if before.get(key) != now.get(key))
    if other:
        raise InputError(
            f"{config.output} holds a run with another '{other[0]}' ({before.get(other[0])!r}, here "
            f"{now.get(other[0])!r}): give another output, or remove that folder"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _seen_from(folder: Path, part: str) -> str:
    """A relative path to a folder elsewhere as it is from `folder`; anything else, such as a hub id, as it is."""
    if not Path(part).is_absolute() and not (folder / part).is_dir() and Path(part).is_dir():
        return os.path.relpath(part, folder)
    return part


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
