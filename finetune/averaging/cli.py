"""`detgpt-finetune average`: two checkpoints in one.

detgpt-finetune average models/instructed runs/aligned models/averaged --base-weight 0.4
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from detgpt import terminal
from detgpt.errors import InputError


def average(
    base: Annotated[str, typer.Argument(help="The model before tuning: a folder, a hub id or a run.")],
    tuned: Annotated[str, typer.Argument(help="The same after tuning; or a LoRA adapter's folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the averaged model.")],
    base_weight: Annotated[
        float | None, typer.Option(help="Share of the base model in all parts: 0 is the tuned model, 1 the base.")
    ] = None,
    ratios: Annotated[
        Path | None, typer.Option(help="JSON with the tuned model's share by part, as `stage: hma` writes it.")
    ] = None,
    mergekit: Annotated[
        Path | None, typer.Option(help="Also write the same merge as a YAML file for mergekit, which is not needed.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Average a base model and what was tuned from it, part by part."""
    from finetune.averaging.average import average
    from finetune.averaging.mergekit import export

    with terminal.reporting(debug):
        shares = read_ratios(ratios) if ratios is not None else None
        terminal.note(f"wrote {average(base, tuned, out, base_weight=base_weight, ratios=shares)}")
        if mergekit is not None:
            uniform = 1 - base_weight if base_weight is not None else 0.0
            terminal.note(f"wrote {export(mergekit, base, tuned, shares or uniform)}")


def read_ratios(file: Path) -> dict[str, Any]:
    """The object in the JSON file. Raises `InputError`."""
    try:
        ratios = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(ratios, dict):
        raise InputError(f'{file} must hold ratios by part, as in {{"language.0-7": 0.2}}')
    return ratios
