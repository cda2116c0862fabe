"""The command line of data: `detgpt-finetune data convert`, `check`, `build` and `wishes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation.command import KEY, load_writer

app = typer.Typer(help="Convert, check and build training data.", no_args_is_help=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
MOST_NAMES = 20  # of the table on the terminal; the page has all


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="The file or folder of the other format.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.", show_default=False)],
    format: Annotated[str, typer.Option(help="What SOURCE is; a wrong one lists them all.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="The folder of the pictures, if they lie elsewhere.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="The COCO file with the boxes; of ODVG the label map.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the pictures into OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Make training data of another format.

    detgpt-finetune data convert instances_train2017.json data/boxes --format coco --images train2017/
    """
    from finetune.data.convert import convert

    with terminal.reporting(debug):
        counts, notes = convert(source, output, format=format, images=images, annotations=annotations, copy=copy)
        for note in notes:
            terminal.note(note)
        for part, count in counts.items():
            terminal.note(f"wrote {count} records to {output / part}")


@app.command("check")
def check_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders, each a part.", show_default=False)],
    annotations: Annotated[Path | None, typer.Option(help="A COCO file: its categories are the known names.")] = None,
    classes: Annotated[Path | None, typer.Option(help="A text file of the known names, one a line.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page (.html) with samples drawn.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many the page draws.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the samples that are drawn.")] = 0,
    debug: Debug = False,
) -> None:
    """Look for broken pictures, wrong boxes, unknown names, duplicates and leaks; exit with 1 if there is an error.

    detgpt-finetune data check data/train data/val --page data.html
    """
    from finetune.data import checkpage
    from finetune.data.check import PROBLEMS, check

    with terminal.reporting(debug):
        report = check(paths, _known_names(annotations, classes))
        _print_table("What is there", checkpage.parts(report))
        if any(part.labels for part in report.parts):
            _print_table("Boxes by name", checkpage.classes(report, MOST_NAMES))
        if any(report.problems.values()):
            _print_table("Problems", checkpage.problems(report))
        if page:
            with terminal.replacing(page) as file:
                file.write_text(checkpage.html(report, samples, seed), encoding="utf-8", errors="backslashreplace")
            terminal.note(f"wrote {page}")
        warnings = sum(len(places) for problem, places in report.problems.items() if not PROBLEMS[problem])
        terminal.note(f"{report.errors} errors, {warnings} warnings")
    if report.errors:
        raise typer.Exit(1)


@app.command("build")
def build_command(
    annotations: Annotated[Path, typer.Argument(metavar="COCO.json", help="The annotation file.", show_default=False)],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="The folder of its pictures.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    reasoner: Annotated[
        str, typer.Option(help="The writer: hub id, folder, or the model's name on --base-url.", show_default=False)
    ],
    base_url: Annotated[
        str | None, typer.Option(help=f"An OpenAI-compatible server to ask; the key is taken from {KEY}.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="COCO's captions of the pictures, for the writer.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, drawn by the seed; else all.")] = None,
    wishes: Annotated[int, typer.Option(min=1, help="Wishes to ask for, a picture.")] = 3,
    absent: Annotated[int, typer.Option(min=0, help="Wishes that nothing fulfils, a picture.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go to the writer together.")] = 8,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens that are read.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens that are written.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the writer is.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Number format of the reasoner's weights.")] = None,
    debug: Debug = False,
) -> None:
    """Make wishes with reasoned answers from a COCO-format annotation, with a reasoner as their writer.

    detgpt-finetune data build instances_train2017.json train2017/ -o data/wishes --captions captions_train2017.json
    --reasoner Qwen/Qwen3-VL-8B-Instruct --base-url http://localhost:8000/v1 --limit 5000

    Says first what it will take. Started again after an interruption, it goes on where it was.
    """
    from detgpt.evaluation.building import Plan, build
    from finetune.data.convert.coco_captions import read_captions
    from finetune.data.cost import estimate

    with terminal.reporting(debug):
        plan = Plan(limit, wishes, absent, seed, explain=True, distinct=True)
        if not images.is_dir():
            raise InputError(f"there is no folder {images}: give the folder of the pictures")
        said = read_captions(captions) if captions else {}
        terminal.note(estimate(annotations, images, output, plan, said).in_words(price_in, price_out))
        if not yes and not typer.confirm("Go on?", err=True):
            raise typer.Exit(1)
        writer = load_writer(reasoner, base_url, device, dtype, debug)
        with terminal.progress(f"wishes by {reasoner}") as progress:
            about = build(
                writer, annotations, images, output, plan, captions=said, batch_size=batch_size, progress=progress
            )
        terminal.note(f"wrote {output}")
        terminal.print_json(about["counts"])


def _known_names(annotations: Path | None, classes: Path | None) -> set[str] | None:
    from detgpt.evaluation import fields
    from detgpt.evaluation.coco import read_annotations

    names: set[str] = set()
    if annotations:
        of_file = read_annotations(annotations)
        names.update(of_file.categories, *of_file.synonyms.values())
    if classes:
        lines = fields.read_text(classes, "a class list has one name a line").splitlines()
        names.update(filter(None, map(str.strip, lines)))
    if (annotations or classes) and not names:
        raise InputError(f"{annotations or classes} holds no name")
    return names or None


def _print_table(title: str, rows: list[list[str]]) -> None:
    head, *body = rows
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for heading in head:
        is_text = heading in (head[0], "the first", "severity")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in body:
        table.add_row(*map(terminal.plain, row))
    terminal.out.print(table)
    terminal.out.print()


@app.command("wishes")
def wishes_command(
    annotations: Annotated[Path, typer.Argument(help="A COCO file with boxes.", show_default=False)],
    images: Annotated[Path, typer.Argument(help="The folder of its pictures.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.", show_default=False)],
    needs: Annotated[Path, typer.Option(help="A YAML file: what fits what, and how people ask.", show_default=False)],
    wishes: Annotated[int, typer.Option(min=1, help="A picture, that something fulfils.")] = 10,
    absent: Annotated[int, typer.Option(min=0, help="A picture, that nothing fulfils.")] = 3,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Take the ways kept for evaluation.")] = False,
    debug: Debug = False,
) -> None:
    """Write wishes from boxes and a small file of needs, without a language model as their writer.

    detgpt-finetune data wishes train.json images/ --needs needs.yaml -o data/train
    """
    from finetune.data.wishes import write_wishes

    with terminal.reporting(debug):
        count = write_wishes(
            annotations, images, needs, output, wishes=wishes, absent=absent, seed=seed, held_out=held_out
        )
        terminal.note(f"wrote {count} wishes to {output}")
