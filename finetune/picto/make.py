"""The built-in model from nothing: `make picto`. Each step is skipped where its result is there already.

    python -m finetune.picto.make --build build --out weights/picto

About four hours on two CPU cores, and 20 GB of disk. To redo a step, delete its file in the build folder and those
after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from finetune.picto import detector, export, reasoner, scenebank, splits, tower


def main(
    build: Annotated[Path, typer.Option(help="Scenes and checkpoints go here.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="The finished model goes here.")] = Path("weights/picto"),
    scenes: Annotated[int, typer.Option(help="Scenes to train on.")] = 80_000,
    share: Annotated[float, typer.Option(help="Share of the steps of each training; a small one tries the way.")] = 1.0,
) -> None:
    """Render the world, train tower, detector and reasoner, and write the model and its evaluation splits."""
    say = Console().rule
    banks = {"train": (scenes, 1), "val": (1500, 2)}
    for name, (count, seed) in banks.items():
        if not (build / name / "places.json").exists():
            say(f"scenes: {name}")
            scenebank.build(build / name, count, seed)

    def steps(number: int) -> int:
        return max(1, round(share * number))

    train, val = build / "train", build / "val"
    say("tower")
    tower.train(train, val, build / "dense.pt", cut_steps=steps(700), steps=steps(2400))
    say("detector")
    detector.train(train, val, build / "dense.pt", build / "detector.pt", steps=steps(3000))
    say("tower, with the detector's ResNet")
    tower.train(
        train,
        val,
        build / "tower.pt",
        steps=steps(4500),
        lr=1e-3,
        start=build / "dense.pt",
        detector=build / "detector.pt",
    )
    say("reasoner")
    reasoner.train(train, val, build / "tower.pt", build / "reasoner.pt", steps=steps(5000))
    say("export")
    export.export(build, out)
    if not splits.FOLDER.exists():
        splits.main()


if __name__ == "__main__":
    typer.run(main)
