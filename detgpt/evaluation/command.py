"""The command line of evaluation: `detgpt eval` and `detgpt bench-build`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation import comparing, evaluate, measuring_safety, table, trust
from detgpt.evaluation.building import Plan, build
from detgpt.evaluation.diagrams import FIGURE
from detgpt.evaluation.harness import Harness
from detgpt.evaluation.metrics import load_extra
from detgpt.evaluation.readers import FORMATS, read_dataset
from detgpt.evaluation.samples import Samples
from detgpt.evaluation.vision_harness import VisionHarness
from detgpt.flags import Choice
from detgpt.models import load_reasoner
from detgpt.reasoners import Reasoner

KEY = "DETGPT_REASONER_KEY"

Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="Number format of the reasoner's weights.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def eval_command(
    data: Annotated[
        list[Path] | None, typer.Argument(metavar="DATA...", help="Folders or files.", show_default=False)
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Pairs to compare; else picto.")] = None,
    format: Annotated[str | None, typer.Option(help=f"{', '.join(FORMATS)}; found from the data unless given.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="The COCO annotation file, if it lies elsewhere.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of the pictures, if they lie elsewhere.")] = None,
    split: Annotated[str | None, typer.Option(help="The part to read, such as testA of RefCOCO.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many wishes of each.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Wishes that go through the models together.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all numbers as JSON.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Write every wish and its result as JSON lines.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page (.html) with the worst cases drawn.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="Cases to draw of each run.")] = 24,
    tiles: Annotated[int | None, typer.Option(help="Look at so many parts along a side too.")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Also measure outlines, by SAM 2.")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Judge confidences and scores instead; numbers and diagrams go into this folder."),
    ] = None,
    abilities: Annotated[bool, typer.Option("--abilities", help="DATA are questions to the reasoners alone.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASK[,TASK…]", help="With --abilities: tasks of the lm-evaluation-harness too."),
    ] = None,
    vision_harness: Annotated[
        str | None, typer.Option(metavar="TASK[,TASK…]", help="With --abilities: tasks of lmms-eval too.")
    ] = None,
    harness_tasks: Annotated[Path | None, typer.Option(help="A folder with task files of your own for these.")] = None,
    safety: Annotated[
        bool, typer.Option("--safety", help="DATA are attacks, which one model meets without a guard and with it.")
    ] = False,
    guard_model: Annotated[
        str | None, typer.Option(help="With --safety: the guard, as for `detgpt detect`; else picto.")
    ] = None,
    picture_text: Annotated[
        str | None, typer.Option(help="With --safety: ocr, reasoner or off; else as the model says.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="With --safety: another guard that says which answers do harm.")
    ] = None,
    utility: Annotated[
        Path | None, typer.Option(help="With --safety: wishes whose F1 is measured without the guard and with it.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Measure models on annotated images; print a Markdown table.

    detgpt eval finetune/picto/splits/seen --report report.html

    detgpt eval wishes.jsonl --annotations instances_val2017.json --images val2017/ -m base

    detgpt eval "refcoco/refs(unc).p" --split testA --images train2014/ -m base

    detgpt eval finetune/picto/splits/* --calibration trust/

    detgpt eval --abilities abilities/ -m before/ -m after/

    detgpt eval --abilities --harness arc_easy,piqa -m before/ -m after/

    detgpt eval --safety finetune/protector/splits/attacks --utility finetune/picto/splits/seen
    """
    with terminal.reporting(debug):
        tasks = _harnesses(harness, vision_harness, harness_tasks, abilities)
        data = data or []
        if not data and not tasks:
            raise typer.BadParameter("give a folder or a file", param_hint="DATA")
        for_safety: dict[str, Any] = {
            "guard_model": guard_model,
            "picture_text": picture_text,
            "judge": judge,
            "utility": utility,
        }
        if not safety:
            _refuse("they go with --safety", **for_safety)
        else:
            _refuse(
                "--safety asks one reasoner and draws nothing",
                **{"format": format, "annotations": annotations, "images": images, "split": split, "report": report},
                **{"tiles": tiles, "masks": masks, "calibration": calibration, "abilities": abilities},
            )
            measured = measuring_safety.measure(
                data, model or ["picto"], limit, {"device": device, "dtype": dtype}, debug, **for_safety
            )
            typer.echo(measured.table())
            if output:
                _write(output, json.dumps(measured.to_dict(), indent=2) + "\n")
            if samples:
                _write(samples, measured.lines())
            return
        if abilities:
            for_wishes = {"format": format, "annotations": annotations, "images": images, "split": split}
            about_boxes = {"report": report, "tiles": tiles, "masks": masks, "calibration": calibration}
            _refuse("--abilities asks questions and finds nothing", **for_wishes, **about_boxes)
            loading = {"device": device, "dtype": dtype}
            compared = comparing.compare(data, model or ["picto"], limit, batch_size, loading, debug, tasks)
            typer.echo(compared.table())
            if output:
                _write(output, json.dumps(compared.to_dict(), indent=2) + "\n")
            if samples:
                _write(samples, compared.lines())
            return
        places: dict[str, Any] = {"annotations": annotations, "images": images, "split": split}
        datasets = {path: read_dataset(path, format=format, limit=limit, **places) for path in data}
        for note in (note for dataset in datasets.values() for note in dataset.notes):
            terminal.note(note)
        settings = {"masks": masks} if tiles is None else {"masks": masks, "tiles": tiles}
        if calibration:
            others = {"output": output, "samples": samples, "report": report, "masks": masks}
            _refuse("--calibration judges confidences and scores alone", **others)
            load_extra(FIGURE)
        results: dict[str, dict[str, Any]] = {}
        claimed: dict[str, trust.Claims] = {}
        runs: list[Samples] = []
        for name in model or ["picto"]:
            loaded = Choice(model=name, device=device, dtype=dtype, debug=debug).load(settings)
            judged = loaded.uncalibrated() if calibration else loaded
            for path, dataset in datasets.items():
                title = f"{name} · {_title(path, data, split)}"
                runs.append(Samples(title))
                with terminal.progress(title) as progress:
                    results[title] = evaluate(
                        judged,
                        dataset,
                        progress=progress,
                        batch_size=batch_size,
                        each=runs[-1].add,
                        detector_alone=not calibration,
                    )
                claimed[title] = trust.claims(runs[-1], loaded.calibration)
        if calibration:
            typer.echo(trust.table(trust.numbers(claimed)))
            for path in trust.write(claimed, calibration):
                terminal.note(f"wrote {path}")
            return
        typer.echo(table(results))
        if output:
            _write(output, json.dumps(results, indent=2) + "\n")
        if samples:
            _write(samples, "".join(run.lines() for run in runs))
        if report:
            from detgpt.evaluation.report import html

            _write(report, html(results, runs, worst))


def bench_build_command(
    annotations: Annotated[Path, typer.Argument(metavar="COCO.json", help="The annotation file.", show_default=False)],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="The folder of its pictures.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    reasoner: Annotated[
        str, typer.Option(help="The writer: hub id, folder, or the model's name on --base-url.", show_default=False)
    ],
    base_url: Annotated[
        str | None, typer.Option(help=f"An OpenAI-compatible server to ask; the key is taken from {KEY}.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, drawn by the seed; else all.")] = None,
    wishes: Annotated[int, typer.Option(min=1, help="Wishes to ask for, a picture.")] = Plan.wishes,
    absent: Annotated[int, typer.Option(min=0, help="Wishes that nothing fulfils, a picture.")] = Plan.absent,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = Plan.seed,
    check: Annotated[bool, typer.Option(help="Keep only what the writer answers alike when asked again.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go to the writer together.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Make an instruction set from a COCO-format annotation, with a reasoner as its writer.

    detgpt bench-build instances_val2017.json val2017/ -o bench/ --reasoner Qwen/Qwen3-VL-8B-Instruct --limit 500

    Started again after an interruption, it goes on where it was. `detgpt eval` reads the result. The built-in
    reasoner can only name things and cannot write wishes.
    """
    with terminal.reporting(debug):
        plan = Plan(limit, wishes, absent, seed, check)
        if not images.is_dir():
            raise InputError(f"there is no folder {images}: give the folder of the pictures")
        writer = load_writer(reasoner, base_url, device, dtype, debug)
        with terminal.progress(f"wishes by {reasoner}") as progress:
            about = build(writer, annotations, images, output, plan, batch_size=batch_size, progress=progress)
        terminal.note(f"wrote {output}")
        terminal.print_json(about["counts"])


def _harnesses(
    tasks: str | None, vision_tasks: str | None, folder: Path | None, abilities: bool
) -> list[Harness | VisionHarness]:
    if not (tasks or vision_tasks):
        if folder is not None:
            raise InputError(f"--harness-tasks {folder}: say with --harness or --vision-harness which of its tasks")
        return []
    if not abilities:
        raise InputError("--harness and --vision-harness measure what a model can do: give --abilities too")
    text = [Harness(tasks.split(","), folder)] if tasks else []
    return [*text, *([VisionHarness(vision_tasks.split(","), folder)] if vision_tasks else [])]


def _refuse(reason: str, **options: Any) -> None:
    """Raise `InputError` for options that are given, with the reason why they cannot be."""
    if given := [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]:
        raise InputError(f"{reason}: leave {', '.join(given)} out")


def _title(path: Path, data: list[Path], split: str | None) -> str:
    """A set's name in the table: the last part of its path where that tells it from the others."""
    names = [other.resolve().name for other in data]
    name = path.resolve().name
    return " ".join([name if names.count(name) == 1 else str(path), *([split] if split else [])])


def load_writer(reasoner: str, base_url: str | None, device: str | None, dtype: str | None, debug: bool) -> Reasoner:
    """A local reasoner, or one on a server with the key of the environment."""
    if base_url:
        return load_reasoner(reasoner, base_url=base_url, api_key=os.environ.get(KEY))
    with terminal.loading(reasoner, [reasoner], debug):
        return load_reasoner(reasoner, device=device, dtype=dtype)


def _write(path: Path, text: str) -> None:
    with terminal.replacing(path) as file:
        file.write_bytes(text.encode("utf-8", "backslashreplace"))  # a file name may be no UTF-8
    terminal.note(f"wrote {path}")
