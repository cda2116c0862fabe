"""What the command line shows: results on stdout; notes, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from detgpt.draw import target_colours
from detgpt.errors import DetGPTError, InputError
from detgpt.results import Detections

SECONDS_BETWEEN_LINES = 60.0  # of progress, where there is no terminal to draw a bar on

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


# ----------------------------------------------------------------------------------------------------- output


def print_result(title: str, result: Detections) -> None:
    out.print(plain(title, "bold"), soft_wrap=True)
    if result.reasoning:
        out.print(plain(result.reasoning), soft_wrap=not out.is_terminal)
    print_boxes(result)
    out.print()


def print_boxes(result: Detections) -> None:
    names = [target.name for target in result.targets]
    colours = dict(zip(names, target_colours(len(names)), strict=True))
    confidences = {target.name: target.confidence for target in result.targets}
    sure = None not in confidences.values()  # a reasoner without token probabilities has no confidence at all
    if result.problem:
        out.print(plain(f"warning: {result.problem}", "yellow"), soft_wrap=True)
    elif not names:
        out.print("Nothing that it is sure of." if result.unsure else "Nothing here fits.")
    if len(result):
        table = Table("target", box=None, pad_edge=False, header_style="dim")
        for heading in ("score", *["confidence"] * sure, "x0", "y0", "x1", "y1"):
            table.add_column(heading, justify="right", no_wrap=True)
        for box, score, label in result:
            numbers = [score, confidences[label]] if sure else [score]
            target = Text.assemble(("● ", colours[label]), plain(label))
            table.add_row(target, *(f"{number:.2f}" for number in numbers), *(f"{edge:.0f}" for edge in box))
        out.print(table)
    if result.unsure:
        left_out = ", ".join(f"{target.name} ({target.confidence:.2f})" for target in result.unsure)
        out.print(plain(f"left out, not sure enough: {left_out}"), soft_wrap=not out.is_terminal)
    if missed := [target.name for target in result.targets if not target.found]:
        out.print(plain(f"not found in the picture: {', '.join(missed)}"), soft_wrap=not out.is_terminal)


def print_json(value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # A file name that is no UTF-8 comes as lone surrogates; their backslash form is also JSON's own escape.
    typer.echo(text.encode("utf-8", "backslashreplace"))


def plain(text: str, style: str = "") -> Text:
    """Text of a model or a user: no markup, and no control characters for the terminal to obey."""
    return Text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text), style)


def save(result: Detections, path: Path, legend: bool) -> None:
    with replacing(path) as file:
        result.draw(legend).save(file)
    note(f"wrote {path}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path`, which takes its place when it is whole."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a picture too large for its format
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(path)!r}: {reason}. Choose another file or folder.") from error


# ------------------------------------------------------------------------------------------- notes and errors


def note(text: str) -> None:
    err.print(plain(text, "dim"), soft_wrap=True)


def hint(text: str) -> None:
    """A note for people, not for logs."""
    if err.is_terminal:
        note(text)


def print_error(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), plain(" ".join(message.split()))), soft_wrap=True)


@contextmanager
def usage() -> Iterator[None]:
    """Report an `InputError` as wrong usage."""
    try:
        yield
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Report errors of the library in one line; `debug` leaves them their traceback."""
    try:
        yield
    except DetGPTError as error:
        if debug:
            raise
        print_error(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def status(text: str, debug: bool) -> AbstractContextManager[Any]:
    """A spinner on a terminal; with `debug` none, for it would overwrite what the libraries say."""
    return err.status(plain(text, "dim")) if err.is_terminal and not debug else nullcontext()


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, moved by calls with how many are done and how many there are; else a line a minute.

    What was done at the first call counts as done before, and not for the rate.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=600)
    with bar:
        bar.add_task(title, total=None)
        task = bar.tasks[0]
        told = bar.get_time()

        def move(done: int, total: int) -> None:
            nonlocal told
            bar.update(task.id, completed=done, total=total)
            if not err.is_terminal and bar.get_time() - told >= SECONDS_BETWEEN_LINES:
                told = bar.get_time()
                left = task.time_remaining
                time_left = "" if left is None else f"{timedelta(seconds=round(left))} left"
                note(", ".join(filter(None, [f"{title}: {done} of {total}", str(_Rate().render(task)), time_left])))

        yield move


class _Rate(ProgressColumn):
    """How many a second; a minute where that is less than one."""

    def render(self, task: Task) -> Text:
        if task.speed is None:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{task.speed * 60:.1f}/min", "dim")


@contextmanager
def loading(title: str, parts: Sequence[str], debug: bool) -> Iterator[None]:
    """Keep the libraries quiet, but for the progress of a download."""
    downloads = not all(is_here(part) for part in parts)
    with status(f"loading {title}", debug or downloads):
        if not debug:
            from transformers.utils import logging

            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
            if not downloads:
                logging.disable_progress_bar()
        yield


def is_here(part: str) -> bool:
    """Whether this part of a pair is a folder, or a checkpoint in the hub's cache."""
    if Path(part).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = ("model.safetensors", "model.safetensors.index.json")
        return any(isinstance(try_to_load_from_cache(part, file), str) for file in files)
    except HFValidationError:  # no hub id: a folder that is not there
        return False
