"""A finished run as a folder to hand on: the pair, whole and in safetensors, with a model card of what was measured.

    detgpt-finetune export runs/kitchen models/kitchen
    detgpt detect kitchen.jpg "I am thirsty" -m models/kitchen

Adapters are merged already when a run ends. A part that was not trained is copied where it is a folder; where it is a
hub id it stays one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from detgpt.calibration import CALIBRATION_FILE
from detgpt.errors import InputError
from detgpt.models import OWN_BOXES, PAIR_FILE, resolve
from finetune.recipe import RECIPE_FILE, read_yaml
from finetune.rundir import RUN_FILE, read_run, write_folder, write_json

CARD = "README.md"
PASSING = ("step", "epoch", "total_flos", "learning_rate", "grad_norm")  # numbers of a run that are no result


def export(run: Path, out: Path) -> Path:
    """Write the pair of the finished run in `run` to the new folder `out`, and return it.

    Raises `InputError` for a folder that holds no finished run, or an `out` that exists; `ModelError` for a run that
    made no pair.
    """
    described = read_run(run)
    if not described:
        raise InputError(f"{run} is no run's folder: it has no {RUN_FILE}")
    if described.get("finished") is None:
        raise InputError(f"the run in {run} is not finished: run its recipe again, it goes on where it was")
    if out.exists():
        raise InputError(f"{out} exists already: give a folder that does not")
    pair = resolve(run)

    def write(place: Path) -> None:
        parts = {name: _part(getattr(pair, name), place / name) for name in ("reasoner", "detector")}
        write_json(place / PAIR_FILE, {**parts, **({"options": dict(pair.options)} if pair.options else {})})
        if pair.calibration:
            shutil.copy(pair.calibration, place / CALIBRATION_FILE)
        (place / CARD).write_text(card(out.name, described, read_yaml(run / RECIPE_FILE)), encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    return write_folder(out, write)


def card(name: str, run: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the front matter that hubs read, of a run.json and its recipe."""
    base = recipe.get("model") or recipe.get("from_config")
    front = {"base_model": base, "library_name": "transformers", "tags": ["detgpt", run["stage"]]}
    measured = {key: value for key, value in run["metrics"].items() if key not in PASSING}
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

A model of DetGPT: it detects what you need by the reason that you give. Made from `{base}` by the stage
`{run["stage"]}`, finished {run["finished"]}.

    detgpt detect picture.jpg "I am thirsty" -m {name}

## Measured

During training, on the data below ("eval" is the validation data):

{_table("metric", {key: f"{value:.6g}" for key, value in measured.items()})}

## Data

SHA-256 of the records and their pictures:

{_table("data", {key: f"`{value}`" for key, value in run["data"].items()})}

## How it was made

    {run["command"]}

seed {run["seed"]}, with

{_table("package", run["versions"])}

The whole recipe:

```yaml
{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()}
```
"""


def _part(part: str, place: Path) -> str:
    """The part as `detgpt.json` names it: copied to `place` where it is a folder."""
    if part == OWN_BOXES or not Path(part).is_dir():
        return part
    shutil.copytree(part, place)
    return place.name


def _table(head: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([f"| {head} | |", "|---|---|", *lines])
