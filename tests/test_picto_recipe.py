"""The built-in model is made by a recipe, from pictograms to a pair that loads; here in two steps of each training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model
from transformers import AutoModelForImageTextToText

import detgpt
from finetune.picto.dense import pixels
from finetune.picto.knowledge import load_knowledge
from finetune.picto.tower import WEIGHTS, DenseTower
from finetune.picto.world import World
from finetune.recipe import run_recipe

TRAININGS = ("cuts", "backbone", "detector", "tower", "captions", "conversations")
SMALL = [
    *("world.scenes=16", "world.workers=1", "world-validation.scenes=6", "world-validation.workers=1"),
    *(f"{step}.trainer.{key}" for step in TRAININGS for key in ("max_steps=2", "per_device_train_batch_size=4")),
    *("detector.trainer.eval_steps=2", "detector.trainer.save_steps=2", "export.output=picto"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picto")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_recipe("picto", SMALL)
    return folder


def test_the_recipe_makes_a_model_that_answers(built):
    model = detgpt.DetGPT.from_pretrained(built / "picto")
    result = model.detect(built / "build/world/images/000000.webp", "I am thirsty")
    assert result.answer
    assert [*model.detect(built / "build/world/images/000000.webp", names=["cup"]).targets]


def test_the_shipped_weights_have_the_shape_that_the_recipe_makes(built):
    from safetensors import safe_open

    for part in ("reasoner", "detector"):
        shapes = []
        for folder in (built / "picto", detgpt.models.PAIRS["picto"]):
            with safe_open(folder / part / "model.safetensors", "pt") as weights:
                shapes.append({name: weights.get_slice(name).get_shape() for name in weights.keys()})  # noqa: SIM118
        assert shapes[0].keys() == shapes[1].keys()
        embedding = {name for name in shapes[0] if name.endswith("embed_tokens.weight")}  # as many as the words read
        assert all(shapes[0][name] == shapes[1][name] for name in shapes[0].keys() - embedding)


def test_steps_that_are_done_are_not_done_again(built, monkeypatch):
    monkeypatch.chdir(built)
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing may be trained
    run_recipe("picto", SMALL)


def test_a_model_is_taken_further_from_where_it_is(built, monkeypatch):
    """New scenes, and the tower and the language model go on from the trained ones."""
    monkeypatch.chdir(built)
    (built / "weights").mkdir()
    (built / "weights/picto").symlink_to(built / "picto")
    trainings = [
        f"{step}.trainer.{key}"
        for step in ("tower", "conversations")
        for key in ("max_steps=2", "learning_rate=0", "per_device_train_batch_size=4")
    ]
    run_recipe("picto-further", [*SMALL[:4], *trainings])
    before, after = (load_file(f"{folder}/reasoner/model.safetensors") for folder in ("picto", "build/further/picto"))
    learned = [name for name in before if "running_" not in name and "num_batches" not in name]
    assert learned and all(torch.equal(before[name], after[name]) for name in learned)
    assert (
        detgpt.DetGPT.from_pretrained("build/further/picto")
        .detect("build/world/images/000000.webp", "I am thirsty")
        .answer
    )


def test_an_anchored_tower_keeps_its_tokens_near_where_they_were(built, monkeypatch):
    """So that a language model which has learned to read them need not learn it anew."""
    monkeypatch.chdir(built)
    scene = pixels(np.stack([World(Path("build/world"))[0]["image"]]))

    def moved(anchor: float) -> float:
        output = Path(f"build/anchored-{anchor}")
        places = ["world=build/world", "validation_world=build/world-validation", f"output={output}"]
        start = ["start=picto/reasoner", "detector=picto/detector", f"anchor={anchor}"]
        trainer = ["max_steps=8", "warmup_steps=0", "per_device_train_batch_size=4"]
        run_recipe("picto-further/tower", [*places, *start, *(f"trainer.{setting}" for setting in trainer)])
        model = DenseTower(len(load_knowledge().classes))
        before = AutoModelForImageTextToText.from_pretrained("picto/reasoner", dtype=torch.float32).model.vision_tower
        load_model(model, str(output / WEIGHTS))
        with torch.inference_mode():
            old, new = (
                tower.eval()(scene, output_hidden_states=True).hidden_states[-1] for tower in (before, model.tower)
            )
        return float((new - old).square().mean())

    assert moved(1e3) < 0.5 * moved(0.0)
