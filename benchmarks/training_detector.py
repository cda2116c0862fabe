"""AP50 against steps and seconds of a detector's fine-tuning: `python -m benchmarks.training_detector`.

The built-in detector learns a drawing style that it never met (OpenMoji) from a few hundred scenes of the built-in
world: trained in full, with its image encoder frozen, by adapters (LoRA) in all parts; and, for comparison, a new
network of the same shape on the same scenes. Every way is a run of the recipe `detector-picto`, as a user starts it;
seconds are what the user waits, with the measurements in between. Writes `benchmarks/results/training_detector.json`
and `.md`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.picto import sprites
from finetune.picto.knowledge import load_knowledge
from finetune.picto.world import scene_for
from finetune.recipe import RECIPES, read_yaml
from finetune.rundir import TENSORBOARD
from finetune.stages import detector

RESULTS = Path(__file__).parent / "results"
PARTS = ("backbone", "text_encoder", "transformer")
LORA = {part: {"tune": "lora"} for part in PARTS}
FULL = {"backbone": {"tune": "full", "rate": 0.2}}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"parts": FULL},
    "image encoder frozen": {"parts": {"backbone": {"tune": "frozen"}}},
    "LoRA": {"parts": LORA, "trainer": {"learning_rate": 1e-3}},
    "new network": {"model": None, "from_config": "picto", "parts": FULL, "trainer": {"learning_rate": 1e-3}},
}


def write_scenes(folder: Path, scenes: int, seed: int, styles: tuple[str, ...]) -> Path:
    """Rendered scenes as a COCO set, with the names that the world has for each class as its synonyms."""
    classes = load_knowledge().classes
    number = {name: index for index, name in enumerate(classes)}
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(scenes):
        scene = scene_for(seed, index, styles)
        scene.image.save(folder / "images" / f"{index:06}.webp", quality=90)
        images.append({"id": index, "file_name": f"{index:06}.webp"})
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": number[thing.name],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                }
            )
    categories = [{"id": number[name], "name": name, "synonyms": list(known.names)} for name, known in classes.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def train(way: dict[str, Any], sets: dict[str, str], output: Path, steps: int, every: int) -> list[dict[str, float]]:
    """Steps, seconds since the beginning, AP and AP50 of a run."""
    recipe = read_yaml(RECIPES / "detector-picto.yaml")
    trainer = {"max_steps": steps, "eval_steps": every, "save_steps": every, "eval_on_start": True}
    trainer = {**recipe["trainer"], **trainer, **way.get("trainer", {})}
    parts = {**recipe["parts"], **way["parts"]}
    settings = {**recipe, **way, **sets, "parts": parts, "trainer": trainer, "output": output}
    detector.run(detector.Config.model_validate(settings))
    curves = EventAccumulator(str(output / TENSORBOARD))
    curves.Reload()
    ap, ap50 = curves.Scalars("eval/ap"), curves.Scalars("eval/ap50")
    return [
        {"step": b.step, "seconds": round(b.wall_time - ap50[0].wall_time, 1), "ap": a.value, "ap50": b.value}
        for a, b in zip(ap[:-1], ap50[:-1], strict=True)  # the last is of the best checkpoint once more
    ]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """AP50 by steps, and the seconds of the whole run."""
    steps = [int(row["step"]) for row in next(iter(results.values()))]
    lines = [f"| | {' | '.join(f'{step} steps' for step in steps)} | seconds |", "|---|" + "---:|" * (len(steps) + 1)]
    for way, rows in results.items():
        numbers = " | ".join(f"{row['ap50']:.3f}" for row in rows)
        lines.append(f"| {way} | {numbers} | {rows[-1]['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main(
    scenes: Annotated[int, typer.Option(help="Scenes to learn from.")] = 300,
    validation: Annotated[int, typer.Option(help="Scenes to measure on.")] = 60,
    steps: Annotated[int, typer.Option(help="Of 8 scenes each.")] = 120,
    every: Annotated[int, typer.Option(help="Steps between two measurements.")] = 40,
) -> None:
    """Measure and write the table."""
    styles = (sprites.HELD_OUT_STYLE,)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sets = {
            "train": str(write_scenes(place / "train", scenes, 51, styles)),
            "validation": str(write_scenes(place / "validation", validation, 52, styles)),
        }
        for way, settings in WAYS.items():
            results[way] = train(settings, sets, place / way.replace(" ", "-"), steps, every)
            print(way, results[way], flush=True)
    setting = {"scenes": scenes, "validation": validation, "threads": torch.get_num_threads(), "ap50": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_detector.json").write_text(json.dumps(setting, indent=1) + "\n")
    (RESULTS / "training_detector.md").write_text(table(results))


if __name__ == "__main__":
    typer.run(main)
