"""The evaluation splits of the built-in model: small pictures and wishes that training never saw.

    python -m finetune.picto.splits finetune/picto/splits
    python -m finetune.picto.splits build/picto --only calibration --scenes 700

    seen          new scenes, ways of saying it that training used
    paraphrases   new scenes, held-out ways of saying it
    needs         new scenes, held-out needs: new combinations of known attributes
    style         new scenes in a drawing style that training never showed
    calibration   like seen, for fitting `weights/picto/calibration.json`; it evaluates nothing and is not kept here

The format is that of `detgpt eval`. Scenes come from seeds of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from finetune.picto import sprites
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wish, Wishes, WishSampler, as_typed
from finetune.picto.scenes import Scene
from finetune.picto.world import scene_for

FOLDER = Path(__file__).parent / "splits"
WISHES_PER_SCENE = 3


@dataclass(frozen=True)
class Split:
    seed: int
    styles: tuple[str, ...] = sprites.TRAIN_STYLES
    held_out_ways: bool = False
    kinds: tuple[str, ...] = ("need", "need", "need", "attribute", "category", "direct", "exclusion")


SPLITS = {
    "seen": Split(1001),
    "paraphrases": Split(1002, held_out_ways=True, kinds=("need", "need", "need", "attribute", "category", "direct")),
    "needs": Split(1003, kinds=("held_out_need",)),
    "style": Split(1004, styles=(sprites.HELD_OUT_STYLE,)),
}
FITTING = {"calibration": Split(1005)}


def draw_wish(split: Split, sampler: WishSampler, rng: np.random.Generator, scene: Scene) -> Wish:
    kind = str(rng.choice(split.kinds)) if len(split.kinds) > 1 else split.kinds[0]
    return sampler.draw(rng, scene.names, kind, held_out=split.held_out_ways)


def record(image: str, scene: Scene, wish: Wish, text: str) -> dict:
    wanted = [o for o in scene.objects if o.name in wish.fits]
    return {
        "image": image,
        "instruction": text,
        "targets": [n for n in scene.names if n in wish.fits],
        "boxes": [[round(v, 1) for v in o.box] for o in wanted],
        "labels": [o.name for o in wanted],
        "present": list(scene.names),
        "kind": wish.kind,
    }


def write_split(split: Split, folder: Path, scenes: int) -> None:
    """Render the split's scenes and write its `data.jsonl`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sampler = WishSampler(Wishes(load_knowledge()))
    lines = []
    for index in range(scenes):
        rng = np.random.default_rng((split.seed, index, 9))
        scene = scene_for(split.seed, index, split.styles)
        image = f"images/{index:04d}.webp"
        scene.image.save(folder / image, quality=92, method=6)
        for _ in range(WISHES_PER_SCENE):
            wish = draw_wish(split, sampler, rng, scene)
            lines.append(json.dumps(record(image, scene, wish, as_typed(rng, wish.text))))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the splits go.")] = FOLDER,
    scenes: Annotated[int, typer.Option(help="Scenes a split, three wishes each.")] = 120,
    only: Annotated[str | None, typer.Option(help="The one to write, such as calibration.")] = None,
) -> None:
    """Write the four splits, or one."""
    known = {**SPLITS, **FITTING}
    if only and only not in known:
        raise typer.BadParameter(f"there is no split {only!r}: choose one of {', '.join(known)}")
    for name, split in {only: known[only]}.items() if only else SPLITS.items():
        write_split(split, folder / name, scenes)


if __name__ == "__main__":
    typer.run(main)
