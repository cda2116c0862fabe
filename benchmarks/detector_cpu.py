"""Grounding DINO Swin-T side by side: transformers, its pipeline, groundingdino-py and ours.

    python -m benchmarks.detector_cpu                                   # full size, some minutes
    python -m benchmarks.detector_cpu --short-side 240 --repeats 1 --pictures 12   # a look

Every contender is a process of its own with the same random weights (the original package has its own: only
its time is compared) and the same picture. They take turns, one call each, so that a busy moment of the machine
hits all of them. Runs on the GPU where there is one. Writes `benchmarks/results/detector_cpu.json` and `.md`.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.detector_contenders import CONTENDERS, Process, save_checkpoint

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEPARATE = (1, 3, 10)
OURS = ("ours, exact", "ours, fast")
BOX_TOLERANCE, SCORE_TOLERANCE, PIXELS = 0.5, 0.005, 1066  # pixels; probability; boxes are scaled to this width


def gemm_rate() -> float:
    """Fp32 GFLOP/s of a plain matrix product on this machine, the best of three shapes and ten tries each."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = []
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 256, 2048), (4096, 2048, 2048)):
        left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
        for _ in range(10):
            start = time.perf_counter()
            (left @ right)[0, 0].item()
            rates.append(2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
    return max(rates)


def take_turns(processes: dict[str, Process], tasks: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """Median seconds of every task of every contender, one call of each after the other in every round."""
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for contender, chosen in tasks.items():
            for task in chosen:
                seconds.setdefault(f"{contender}: {task}", []).append(processes[contender](task)[1])
    return {key: statistics.median(values) for key, values in seconds.items()}


def differences(wanted: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Query by query. Queries whose proposals are nearly tied may change places; those are counted apart."""
    scores = np.abs(wanted[0] - found[0]).max(axis=1)
    boxes = np.abs(wanted[1] - found[1]).max(axis=1) * PIXELS
    within = (scores <= SCORE_TOLERANCE) & (boxes <= BOX_TOLERANCE)
    return {
        "queries_outside": int((~within).sum()),
        "max_score": float(scores[within].max(initial=0)),
        "max_box_pixels": float(boxes[within].max(initial=0)),
    }


def built_in_quality(limit: int) -> dict[str, Any]:
    """The trained built-in detector on its test pictures: AP50 by runtime, and what became of the clear boxes."""
    import torch
    from torchvision.ops import box_iou

    from detgpt.detectors.grounding_dino import GroundingDinoDetector
    from detgpt.evaluation import _ground_true_names
    from detgpt.evaluation.data import truth_by_image
    from detgpt.evaluation.metrics import average_precision
    from detgpt.evaluation.readers import read_dataset
    from detgpt.images import load_image
    from detgpt.pipeline import Options

    truths = truth_by_image(read_dataset(ROOT / "finetune" / "picto" / "splits" / "seen").records)[:limit]
    truths = [truth for truth in truths if truth.names]
    images = [load_image(truth.image) for truth in truths]
    measured: dict[str, Any] = {"pictures": len(truths)}
    plain = None
    runtimes: dict[str, dict[str, Any]] = {
        "transformers": {"runtime": "torch"},
        "ours, exact": {},
        "ours, fast": {"precision": "fast"},
    }
    for name, options in runtimes.items():
        detector = GroundingDinoDetector(ROOT / "weights" / "picto" / "detector", **options)
        ap = average_precision(_ground_true_names(detector, truths, Options()), truths)
        found = detector.detect(images, [truth.names for truth in truths])
        plain = plain or found
        # A box whose score rounding took just below the threshold is still the same box.
        near = detector.detect(images, [truth.names for truth in truths], box_threshold=0.2)
        overlaps, shifts = [], []
        for one, other in zip(plain, near, strict=True):
            alike = torch.from_numpy(one.name_index[:, None] == other.name_index[None])
            if len(one.boxes):
                overlap = (box_iou(torch.from_numpy(one.boxes), torch.from_numpy(other.boxes)) * alike).max(dim=1)
                overlaps += overlap.values.tolist()
                shifts += np.abs(one.scores - other.scores[overlap.indices]).tolist()
        measured[name] = {
            "ap": ap,
            "boxes": sum(len(grounding.boxes) for grounding in found),
            "min_iou": min(overlaps),
            "max_score_change": max(shifts),
        }
    return measured


def one_prompt(processes: dict[str, Process], repeats: int) -> dict[str, Any]:
    """Seconds and memory of every contender with the same joint prompt, and the share of the machine used."""
    tasks = {name: ["joint"] for name in CONTENDERS}
    measured: dict[str, Any] = {"gemm_gflops": gemm_rate(), "seconds": take_turns(processes, tasks, repeats)}
    measured["memory_gib"] = {name: process("memory")[0] for name, process in processes.items()}
    measured["gflop"] = {name: processes[name]("flops")[0] for name in ("transformers", "ours, exact")}
    return measured


def questions(processes: dict[str, Process], repeats: int) -> dict[str, Any]:
    """Seconds of ours with names asked separately, and about an image seen before, against one name at a time."""
    tasks = {"transformers": ["one_name"]}
    for name in OURS:
        tasks[name] = ["joint", "joint_again", *(f"separate_{count}" for count in SEPARATE)]
    return {"seconds": take_turns(processes, tasks, repeats)}


def batch(processes: dict[str, Process], repeats: int, size: int = 4) -> dict[str, Any]:
    """Images per second when several are given at once."""
    return {"size": size, "images_per_second": {name: size / p("joint", size)[1] for name, p in processes.items()}}


def parity(processes: dict[str, Process], repeats: int) -> dict[str, Any]:
    """How far the raw outputs are from transformers', and as a measure of that, transformers' from its own."""
    plain = processes["transformers"]
    wanted, _ = plain("numbers")
    found = {"transformers, one thread": plain("numbers_on_one_thread")[0]}
    found |= {name: processes[name]("numbers")[0] for name in OURS}
    return {name: differences(wanted, numbers) for name, numbers in found.items()}


SECTIONS = {"one_prompt": one_prompt, "questions": questions, "batch": batch, "parity": parity}
ALL_TAKE_PART = {"one_prompt", "batch"}


def main(
    short_side: Annotated[int, typer.Option(help="Pixels of the picture's shorter side.")] = 800,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join([*SECTIONS, 'built_in'])}.")] = None,
    pictures: Annotated[int, typer.Option(help="Test pictures for the built-in detector.")] = 120,
) -> None:
    """Measure and write the table; with `--only`, the other sections stay as an earlier run measured them."""
    results = RESULTS / "detector_cpu.json"
    measured: dict[str, Any] = json.loads(results.read_text()) if only and results.is_file() else {}
    chosen = only or [*SECTIONS, "built_in"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        processes = {}
        if set(chosen) & set(SECTIONS):
            save_checkpoint(folder, short_side)
            names = CONTENDERS if set(chosen) & ALL_TAKE_PART else ("transformers", *OURS)
            processes = {name: Process(name, folder, short_side) for name in names}
        for section in chosen:
            if section in SECTIONS:
                measured[section] = SECTIONS[section](processes, repeats)
        for process in processes.values():
            process.close()
    if "built_in" in chosen:
        measured["built_in"] = built_in_quality(pictures)
    if set(chosen) & set(SECTIONS):
        measured |= {"short_side": short_side, "repeats": repeats, "machine": describe_machine()}
    RESULTS.mkdir(exist_ok=True)
    results.write_text(json.dumps(measured, indent=2) + "\n")
    (RESULTS / "detector_cpu.md").write_text(report(measured))
    print(report(measured))


def describe_machine() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(measured: dict[str, Any]) -> str:
    """What was measured as Markdown."""
    parts = [write(measured) for section, write in REPORTS.items() if section in measured]
    if "machine" in measured:
        parts.append(f"{measured['machine']}, short side {measured['short_side']}, {measured['repeats']} rounds.")
    return "\n\n".join(parts) + "\n"


def as_table(head: str, *rows: list[str]) -> str:
    columns = [cell.strip() for cell in head.split("|")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def report_one_prompt(measured: dict[str, Any]) -> str:
    part = measured["one_prompt"]
    took = {name: part["seconds"][f"{name}: joint"] for name in CONTENDERS}
    fastest = min(seconds for name, seconds in took.items() if name not in OURS)
    rows = [
        [name, f"{took[name]:.2f}", f"{fastest / took[name]:.2f}", f"{part['memory_gib'][name]:.2f} GiB"]
        for name in CONTENDERS
    ]
    share = {name: gflop / took[name] / part["gemm_gflops"] for name, gflop in part["gflop"].items()}
    return (
        as_table("three names in one prompt | seconds (median) | fastest peer / this | peak memory", *rows)
        + f"\n\nA plain fp32 matrix product reached {part['gemm_gflops']:.0f} GFLOP/s in this run. torch counts "
        f"{part['gflop']['transformers']:.0f} GFLOP in transformers' pass and {part['gflop']['ours, exact']:.0f} in "
        f"ours; of that rate transformers used {share['transformers']:.0%} and ours {share['ours, exact']:.0%}."
    )


def report_questions(measured: dict[str, Any]) -> str:
    seconds = measured["questions"]["seconds"]
    kinds = {"joint": "three names in one prompt", "joint_again": "the same about an image seen before"}
    kinds |= {f"separate_{count}": f"{count} name{'s' * (count > 1)}, a prompt each" for count in SEPARATE}
    rows = []
    for task, kind in kinds.items():
        count = task.removeprefix("separate_")
        theirs = f"{int(count) * seconds['transformers: one_name']:.2f} s" if count.isdigit() else "–"
        rows.append([kind, *(f"{seconds[f'{name}: {task}']:.2f} s" for name in OURS), theirs])
    return as_table(
        "question | ours, exact | ours, fast | transformers once per name (one measured, times names)", *rows
    )


def report_batch(measured: dict[str, Any]) -> str:
    part = measured["batch"]
    rows = [[name, f"{rate:.3f}"] for name, rate in part["images_per_second"].items()]
    return as_table(f"{part['size']} images at once | images per second", *rows)


def report_parity(measured: dict[str, Any]) -> str:
    rows = [
        [name, str(d["queries_outside"]), f"{d['max_box_pixels']:.4f} px", f"{d['max_score']:.6f}"]
        for name, d in measured["parity"].items()
    ]
    head = "900 raw queries against transformers | outside 0.5 px or 0.005 | of the others, box | score"
    return as_table(head, *rows)


def report_built_in(measured: dict[str, Any]) -> str:
    part = measured["built_in"]
    rows = [
        [name, f"{100 * d['ap']['ap50']:.2f}", str(d["boxes"]), f"{d['min_iou']:.4f}", f"{d['max_score_change']:.5f}"]
        for name, d in part.items()
        if name != "pictures"
    ]
    head = "AP50 | boxes at 0.25 or more | smallest IoU with transformers' box | largest change of its score"
    return as_table(f"built-in detector, {part['pictures']} pictures | {head}", *rows)


REPORTS = {
    "one_prompt": report_one_prompt,
    "questions": report_questions,
    "batch": report_batch,
    "parity": report_parity,
    "built_in": report_built_in,
}


if __name__ == "__main__":
    typer.run(main)
