"""`detgpt-finetune`: run recipes, prepare data, export results.

    detgpt-finetune run instruct.yaml trainer.learning_rate=1e-4

Under a launcher it is the same command: `accelerate launch -m finetune.cli run …`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detgpt import terminal
from detgpt.errors import StoppedError
from finetune.averaging.cli import average
from finetune.data.cli import app as data_app
from finetune.distill.cli import app as distill_app
from finetune.processes import parted

TERMINATED = 143  # what a shell says of a process that SIGTERM ended

app = typer.Typer(
    help="Teach a reasoning detector your world: data, alignment, instruction tuning, detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(distill_app, name="distill")
app.command()(average)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with the package.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Run a recipe; a run that was interrupted goes on where it was."""
    from finetune.recipe import run_recipe

    with terminal.reporting(debug), parted():
        try:
            run_recipe(recipe, overrides or ())
        except StoppedError as stopped:
            terminal.note(str(stopped))
            raise typer.Exit(TERMINATED) from None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the model and its card.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Write a run's result as a model to hand on, with a model card."""
    from finetune.export import export

    with terminal.reporting(debug):
        terminal.note(f"wrote {export(run, out)}")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
