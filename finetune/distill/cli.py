"""The command line of distillation: `detgpt-finetune distill cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from detgpt import terminal
from finetune.processes import parted

app = typer.Typer(no_args_is_help=True)


@app.callback()
def distill() -> None:
    """Distil a large reasoner into a small one: cache its distributions, then run a recipe with `stage: distill`."""


@app.command("cache")
def cache_command(
    model: Annotated[str, typer.Argument(help="The teacher: a folder, a hub id, a named pair or a run.")],
    train: Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Folders of records with answers.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, for the cache.", show_default=False)],
    k: Annotated[int, typer.Option("--k", min=1, help="Tokens of each distribution that are kept.")] = 5,
    random: Annotated[bool, typer.Option("--random", help="Keep k random draws, not the likeliest tokens.")] = False,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="At which the mass of all other tokens is kept; may come several times. [default: 1 and 2]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records that the teacher reads at once.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Records of a file.")] = 512,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a record, the rest is cut off.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server that has the teacher.")] = None,
    served_model: Annotated[str | None, typer.Option(help="What that server calls it; MODEL unless given.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Let a teacher read records, and keep the likeliest tokens of what it would have said.

    detgpt-finetune distill cache picto data/train -o runs/teacher
    """
    settings: dict[str, Any] = {
        "model": model,
        "train": train,
        "output": output,
        "k": k,
        "kept": "random" if random else "top",
        "batch_size": batch_size,
        "shard_size": shard_size,
        "max_length": max_length,
        "dtype": dtype,
        "seed": seed,
        **({"temperatures": temperature} if temperature else {}),
        **({"server": {"base_url": base_url, "model": served_model or model}} if base_url else {}),
    }
    with terminal.reporting(debug), parted():
        from finetune.distill import teacher
        from finetune.recipe import checked_settings

        teacher.run(checked_settings(teacher.Config, settings))
