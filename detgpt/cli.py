"""The command line: `detgpt detect`, `batch`, `chat`, `demo`, `serve`, `models`, `convert`, `eval`,
`calibrate` and `bench-build`.

    detgpt detect kitchen.png "I am thirsty" --output out.png

Results go to stdout; progress, notes and errors go to stderr. This file reads arguments and prints; what lies
in between is `DetGPT`. Nothing heavy is imported before a command needs a model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from PIL import Image
from rich.table import Table

from detgpt import __version__, batch_ray, terminal
from detgpt import batch as batches
from detgpt.answer import ParsedAnswer
from detgpt.cluster import Cluster
from detgpt.errors import DetGPTError, InputError, ModelError
from detgpt.evaluation.calibrating import calibrate_command
from detgpt.evaluation.command import bench_build_command, eval_command
from detgpt.flags import Choice, with_model
from detgpt.images import PICTURE_SUFFIXES, load_image
from detgpt.models import PAIRS, resolve
from detgpt.pipeline import DetGPT
from detgpt.reasoners import Turn
from detgpt.results import Detections, coco_document
from detgpt.serve import Serving
from detgpt.serve import run as run_service
from detgpt.serve.ray import run as run_service_on_ray
from detgpt.web import demo

PICTO_NOTE = "picto knows pictograms only; for photographs add --model base"

EXITS = "Exit status: 0 answered, if only that nothing fits; 1 an error; 2 wrong usage; 130 interrupted."
app = typer.Typer(
    help="Detect what you need by saying why you need it.",
    epilog=EXITS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a letter
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"detgpt {__version__}")
        raise typer.Exit


@app.callback()
def _detgpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# --------------------------------------------------------------------------------------------------- commands


@app.command(no_args_is_help=True, epilog=EXITS)
@with_model
def detect(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar='IMAGE... "WISH"',
            help="Images (path, URL, or - for standard input), then what you need, in quotes.",
            show_default=False,
        ),
    ],
    names: Annotated[
        str | None,
        typer.Option(help="Look for these things without reasoning: cup,bottle. All arguments are images then."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write the picture with boxes: a file, for several images a folder."),
    ] = None,
    legend: Annotated[bool, typer.Option("--legend", help="Write wish and reasoning under the picture.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object and line per image.")] = False,
    as_coco: Annotated[bool, typer.Option("--coco", help="Print one COCO document for all images.")] = False,
    *,
    choice: Choice,
    settings: dict[str, Any],
) -> None:
    """Find what a wish needs in one or more images.

    detgpt detect kitchen.png "I am thirsty" -o out.png

    detgpt detect a.png b.png "I am thirsty" --json

    detgpt detect kitchen.png --names cup,bottle
    """
    images, query = _images_and_query(arguments, names)
    paths = _picture_paths(output, images)
    if as_json and as_coco:
        raise typer.BadParameter("--json and --coco exclude each other: choose one")
    model = choice.load(settings, reasons=names is None)
    found: list[tuple[str, Detections]] = []
    failed = False
    for source, path in zip(images, paths, strict=True):
        title = _title(source)
        try:
            with terminal.status(f"looking at {title}", choice.debug):
                result = model.detect(sys.stdin.buffer if source == "-" else source, **query)
            if as_json:
                terminal.print_json({"image": title, **result.to_dict()})
            elif as_coco:
                found.append((title, replace(result, image=None)))  # thousands of pictures would fill the memory
            else:
                terminal.print_result(title, result)
            if path:
                terminal.save(result, path, legend)
        except DetGPTError as error:
            if len(images) == 1 or choice.debug:
                raise
            failed = True
            terminal.print_error(str(error) if title in str(error) else f"{title}: {error}")
    if as_coco:
        terminal.print_json(coco_document(found))
    if choice.model == "picto" and choice.detector is None and not (as_json or as_coco):
        terminal.hint(PICTO_NOTE)
    if failed:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
@with_model
def batch(
    source: Annotated[
        str,
        typer.Argument(help="A folder, a quoted pattern such as 'photos/*.jpg', or a list.jsonl.", show_default=False),
    ],
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="What you need.")] = None,
    names: Annotated[str | None, typer.Option(help="Look for these things without reasoning: cup,bottle.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results: .jsonl, .json (COCO) or .parquet.")] = Path(
        "detections.jsonl"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the models together.")] = 8,
    *,
    choice: Choice,
    cluster: Cluster,
    settings: dict[str, Any],
) -> None:
    """Answer a wish for many images; started again, it goes on where it was interrupted.

    detgpt batch photos/ -i "I am thirsty" -o found.jsonl

    A line of a list is {"image": "a.jpg"}, and may have an "instruction" or "names" of its own. A picture that
    cannot be read is noted in the results, and the rest goes on. On a Ray cluster every machine needs detgpt, the
    pictures and the folder that this is started in.
    """
    if instruction and names:
        raise typer.BadParameter("--instruction and --names exclude each other: choose one")
    with terminal.usage():
        jobs = batches.read_jobs(source, names.split(",") if names else instruction)
    reasons = any(isinstance(job.wish, str) for job in jobs)
    load = partial(choice.load, settings, reasons=reasons)
    if cluster.ray:
        choice.pair(reasons)  # a wrong name is told before a cluster is troubled
        answer = partial(batch_ray.run, load, cluster=cluster, device=choice.device, debug=choice.debug)
    else:
        answer = partial(batches.run, load())
    with terminal.progress(f"{len(jobs)} images") as progress:
        outcome = answer(jobs, output, batch_size=batch_size, progress=progress)
    unreadable = f", {outcome.unreadable} could not be read" if outcome.unreadable else ""
    earlier = f", {outcome.earlier} were there already" if outcome.earlier else ""
    terminal.note(f"wrote {output}: {outcome.answered} images answered{unreadable}{earlier}")
    if outcome.unreadable:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
@with_model
def chat(
    image: Annotated[str, typer.Argument(help="The image to talk about: path or URL.", show_default=False)],
    *,
    choice: Choice,
    settings: dict[str, Any],
) -> None:
    """Talk about one image: each wish knows those before it.

    /save out.png saves the picture of the last answer, /quit or the end of the input ends.
    """
    if image == "-":
        raise typer.BadParameter("the wishes come from standard input: give the image as a path or URL")
    picture = load_image(image)
    model = choice.load(settings)
    turns: list[Turn] = []
    result: Detections | None = None
    terminal.hint("say what you need; /save out.png, /quit")
    for line in _lines():
        command, _, path = line.partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/save":
                _save_last(result, path.strip())
            elif command.startswith("/"):
                terminal.note(f"there is no {command}: /save out.png or /quit")
            else:
                result = _answer(model, picture, line, turns)
                if not result.refused:
                    turns.append(Turn(line, result.answer))
        except DetGPTError as error:
            if choice.debug:
                raise
            terminal.print_error(str(error))


@app.command()
@with_model
def serve(*, choice: Choice, serving: Serving, cluster: Cluster, settings: dict[str, Any]) -> None:
    """Answer over HTTP: POST /v1/detect. Ctrl-C or SIGTERM lets running requests finish.

    The guard is on; --no-guard turns it off.

    detgpt serve --port 8000

    curl -F image=@kitchen.png -F instruction="I am thirsty" http://127.0.0.1:8000/v1/detect
    """
    if choice.guard is None:
        choice = replace(choice, guard=True)
    load = partial(choice.load, settings)
    if cluster.ray:
        choice.pair(reasons=True)
        run_service_on_ray(load, serving, cluster, device=choice.device, debug=choice.debug)
    else:
        run_service(load, serving)


app.command()(demo)


@app.command()
def models() -> None:
    """List the model pairs, what they know and what they need."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 1, 0))
    for heading in ("model", "knows", "needs", "here", "reasoner and detector"):
        table.add_column(heading, overflow="fold")
    for name in PAIRS:
        try:
            pair = resolve(name)
        except ModelError:
            table.add_row(name, "", "", "no", "built in, but left out of this installation")
            continue
        here = all(terminal.is_here(part) for part in (pair.reasoner, pair.detector))
        parts = "built in" if isinstance(PAIRS[name], Path) else f"{pair.reasoner}\n{pair.detector}"
        table.add_row(f"[bold]{name}[/]", pair.knows, pair.needs, "yes" if here else "no", parts)
    terminal.out.print(table)
    terminal.out.print(f"{PICTO_NOTE}.", style="dim")


app.command("eval", no_args_is_help=True)(eval_command)
app.command("calibrate", no_args_is_help=True)(calibrate_command)
app.command("bench-build", no_args_is_help=True)(bench_build_command)


@app.command(no_args_is_help=True)
def convert(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.py", help="Its config, read and not run.", show_default=False)
    ],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pth", help="Its weights, read as tensors only.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT_FOLDER", help="A new folder.", show_default=False)],
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the BERT whose config and tokenizer to use; else the config's."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Convert an original Grounding DINO checkpoint to a safetensors folder for transformers.

    detgpt convert GroundingDINO_SwinT_OGC.py groundingdino_swint_ogc.pth gdino-tiny

    detgpt detect photo.jpg --names cup,bottle --detector gdino-tiny

    The folder appears only when transformers has loaded it with every tensor in its place.
    """
    with terminal.reporting(debug), terminal.loading(str(checkpoint), [], debug):
        from detgpt.convert import convert as run_conversion

        run_conversion(config, checkpoint, folder, text_encoder=text_encoder)
    terminal.note(f"wrote {folder}: detgpt detect photo.jpg --names cup --detector {folder}")


# -------------------------------------------------------------------------------------------------- arguments


def _images_and_query(arguments: list[str], names: str | None) -> tuple[list[str], dict[str, Any]]:
    """The images, and what `DetGPT.detect` is to look for: the last argument, unless there are names."""
    images, query = arguments, dict[str, Any]()
    if names is None:
        *images, wish = arguments
        if not images:
            raise typer.BadParameter(f'give an image and a wish: detgpt detect {wish} "I am thirsty"')
        if wish.lower().endswith(PICTURE_SUFFIXES):
            raise typer.BadParameter(f"the last argument is the wish, but {wish!r} names a picture")
        if not wish.strip():
            raise typer.BadParameter("the wish is empty: say what you need")
        query = {"instruction": wish}
    else:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        with terminal.usage():
            ParsedAnswer.of_names(wanted)
        query = {"names": wanted}
    if images.count("-") > 1:
        raise typer.BadParameter("- is given twice, but standard input can be read only once")
    if "-" in images and sys.stdin.isatty():
        raise typer.BadParameter("- reads an image from standard input: pipe one in, as with < cup.png")
    return images, query


def _picture_paths(output: str | None, images: Sequence[str]) -> list[Path | None]:
    """Where each image's picture goes: `output` itself, or `<stem>-detgpt.png` in it if that is a folder."""
    if output is None:
        return [None] * len(images)
    folder = Path(output)
    if len(images) == 1 and not (folder.is_dir() or output.endswith(("/", os.sep))):
        return [_picture_path(output)]
    taken: list[Path | None] = []
    for image in images:
        stem = Path(urlsplit(image).path if "://" in image else _title(image)).stem or "image"
        path, number = folder / f"{stem}-detgpt.png", 1
        while path in taken:
            number += 1
            path = folder / f"{stem}-detgpt-{number}.png"
        taken.append(path)
    return taken


def _picture_path(path: str) -> Path:
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        raise typer.BadParameter(f"{path!r} names no picture: end it in one of {' '.join(PICTURE_SUFFIXES)}")
    return Path(path)


def _title(source: str) -> str:
    """An image's name in the output."""
    if source == "-":
        return "stdin"
    return "data-url" if source[:5].lower() == "data:" else source


# ------------------------------------------------------------------------------------------------------- chat


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in, without empty lines."""
    while True:
        try:
            line = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(model: DetGPT, picture: Image.Image, wish: str, turns: list[Turn]) -> Detections:
    """Print the answer as it is written, then the boxes."""
    for event in model.stream(picture, wish, history=turns):
        if isinstance(event, Detections):
            terminal.out.print("\n")
            terminal.print_boxes(event)
            return event
        terminal.out.print(terminal.plain(event), end="", soft_wrap=True)
    raise AssertionError("a stream ends with its result")


def _save_last(result: Detections | None, path: str) -> None:
    if result is None:
        raise InputError("there is nothing to save yet: say what you need first")
    try:
        terminal.save(result, _picture_path(path), legend=True)
    except typer.BadParameter as error:
        raise InputError(error.message) from error
