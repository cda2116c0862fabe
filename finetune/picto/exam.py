"""What the built-in model can do besides granting wishes, as questions with answers for `detgpt eval --abilities`.

    python -m finetune.picto.exam finetune/picto/abilities

    captions      what is in a picture
    counting      how many there are of something
    attributes    what in the picture has an attribute
    needs         what in the picture fulfils a need that was never trained
    facts         whether something is true of a thing; without a picture

The pictures are those of `finetune.picto.splits`, which training never saw; nothing is asked in held-out words.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from finetune.picto import splits
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes, WishSampler, as_typed
from finetune.picto.questions import counting, fact
from finetune.picto.scenes import Scene
from finetune.picto.world import scene_for

FOLDER = Path(__file__).parent / "abilities"
SEED = 1101
FACTS = 240

Ask = Callable[[np.random.Generator, Scene], dict[str, Any]]  # a question about a scene


def captions(rng: np.random.Generator, scene: Scene) -> dict[str, Any]:
    wish = Wishes(load_knowledge()).of_everything(rng)
    return {"question": as_typed(rng, wish.text), "targets": list(scene.names), "score": "names"}


def how_many(rng: np.random.Generator, scene: Scene) -> dict[str, Any]:
    counts = Counter(thing.name for thing in scene.objects)
    question = counting(rng, load_knowledge(), {name: counts[name] for name in scene.names})
    return {"question": as_typed(rng, question.text), "answer": question.value, "score": "number"}


def granting(kind: str) -> Ask:
    """Wishes of a kind."""
    sampler = WishSampler(Wishes(load_knowledge()))

    def ask(rng: np.random.Generator, scene: Scene) -> dict[str, Any]:
        wish = sampler.draw(rng, scene.names, kind)
        fits = [name for name in scene.names if name in wish.fits]
        return {"question": as_typed(rng, wish.text), "targets": fits, "score": "targets"}

    return ask


def asked(ability: str, ask: Ask, split: str, folder: Path, each: int) -> Iterator[dict[str, Any]]:
    """`each` questions about every picture of a split, whose files stay where they are."""
    pictures = sorted((splits.FOLDER / split / "images").iterdir())
    for index, picture in enumerate(pictures):
        scene = scene_for(splits.SPLITS[split].seed, index, splits.SPLITS[split].styles)
        rng = np.random.default_rng((SEED, index, *ability.encode()))
        for _ in range(each):
            yield {"image": os.path.relpath(picture, folder / ability), **ask(rng, scene)}


def facts() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(SEED)
    for _ in range(FACTS):
        question = fact(rng, load_knowledge())
        yield {"question": as_typed(rng, question.text), "answer": question.value, "score": "yes_no"}


def main(folder: Annotated[Path, typer.Argument(help="Where the questions go.")] = FOLDER) -> None:
    """Write the questions of all abilities."""
    abilities = {
        "captions": asked("captions", captions, "seen", folder, 1),
        "counting": asked("counting", how_many, "seen", folder, 2),
        "attributes": asked("attributes", granting("attribute"), "seen", folder, 2),
        "needs": asked("needs", granting("held_out_need"), "needs", folder, 2),
        "facts": facts(),
    }
    for ability, questions in abilities.items():
        (folder / ability).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(question) + "\n" for question in questions)
        (folder / ability / "data.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
