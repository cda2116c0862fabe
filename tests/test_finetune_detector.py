"""Fine-tuning a detector by recipe, as a user runs it: new names, every way of training, going on, and the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_sets import NAMES, write_set
from safetensors.torch import load_file
from test_grounding_dino import FAMILIES, save_checkpoint
from transformers import ResNetBackbone, ResNetConfig

from detgpt import DetGPT
from detgpt.detectors.grounding_dino import GroundingDinoDetector
from detgpt.errors import InputError, ModelError
from detgpt.images import load_image
from detgpt.models import PAIRS
from finetune.grounding.data import Source
from finetune.grounding.model import load_trained, make_fresh
from finetune.grounding.parts import Parts, set_trainable
from finetune.grounding.predict import predict
from finetune.grounding.questions import INPUTS, Asking, Collator, PromptMaker, TrainingQuestions
from finetune.recipe import run_recipe
from finetune.tuning import Lora

PICTO = str(PAIRS["picto"] / "detector")


def recipe(folder: Path, **settings: object) -> Path:
    """A recipe file (JSON is YAML)."""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"stage": "detector", "output": folder / "run", **settings}, default=str))
    return file


def history(run: Path) -> list[dict]:
    """What the last checkpoint of a run says was logged."""
    last = max(run.glob("checkpoints/checkpoint-*"), key=lambda place: int(place.name.partition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("sets")
    return {"train": write_set(folder / "train", 40, seed=1), "validation": write_set(folder / "val", 16, seed=2)}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, Path]:
    """A few pictures whose names the small random networks have in their vocabulary."""
    return write_set(tmp_path_factory.mktemp("known") / "train", 8, seed=3, names=("cup", "bottle"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, sets) -> Path:
    """The built-in detector after 16 steps on 40 pictures of things whose names it can only spell."""
    folder = tmp_path_factory.mktemp("taught")
    trainer = {"learning_rate": 5e-4, "max_steps": 16, "per_device_train_batch_size": 8, "eval_strategy": "steps"}
    trainer |= {"eval_steps": 16, "save_strategy": "steps", "save_steps": 16, "eval_on_start": True, "logging_steps": 4}
    parts = {"backbone": {"tune": "frozen"}, "text_encoder": {"rate": 1.0}}
    run_recipe(recipe(folder, model=PICTO, **sets, parts=parts, trainer={**trainer, "warmup_steps": 2}))
    return folder / "run"


def test_names_that_a_detector_did_not_know_are_found_after_a_short_training(taught):
    ap50 = [row["eval_ap50"] for row in history(taught) if "eval_ap50" in row]
    assert ap50[0] < 0.65
    assert ap50[-1] > 0.8


def test_the_result_answers_through_the_pair_that_the_run_wrote(taught, sets):
    model = DetGPT.from_pretrained(str(taught))
    annotations = json.loads(sets["validation"]["annotations"].read_text())
    hits = 0
    for number in range(6):
        things = [thing for thing in annotations["annotations"] if thing["image_id"] == number]
        image = load_image(sets["validation"]["images"] / f"{number}.png")
        found = model.detect(image, names=list(NAMES))
        x, y, width, height = things[0]["bbox"]
        mine = found.boxes[[label == NAMES[things[0]["category_id"]] for label in found.labels]]
        hits += bool(len(mine)) and np.abs(mine - [x, y, x + width, y + height]).max(1).min() < 12
    assert hits >= 4


def test_what_is_frozen_stays_and_what_is_not_does_not(taught):
    before, after = load_file(PICTO + "/model.safetensors"), load_file(taught / "detector" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name].float())}
    assert not any(name.startswith("model.backbone.") for name in moved)
    assert any(name.startswith("model.text_backbone.") for name in moved)
    assert "bbox_embed.0.layers.2.weight" in moved


def test_parts_learn_at_their_own_rates(taught):
    state = torch.load(next(taught.glob("checkpoints/*/optimizer.pt")), weights_only=True)
    rates = {group["initial_lr"] for group in state["param_groups"]}
    assert rates == {5e-4}, "the text encoder's share is 1 and the image encoder is frozen"


@pytest.mark.parametrize(("family", "tune"), [("grounding-dino", "full"), ("mm-grounding-dino", "lora")])
def test_an_interrupted_run_ends_with_the_same_weights_bit_by_bit(tmp_path, known, family, tune):
    save_checkpoint(tmp_path / "model", family)
    trainer = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True}
    trainer |= {"save_strategy": "steps", "learning_rate": 1e-3}
    settings = {
        "model": tmp_path / "model",
        "train": known,
        "parts": {part: {"tune": tune} for part in ("backbone", "text_encoder", "transformer")},
        "asking": {"max_names": 1},
        "trainer": trainer,
    }
    run_recipe(recipe(tmp_path, **settings))
    whole = load_file(tmp_path / "run" / "detector" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "detector")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "finished": None}))
    run_recipe(recipe(tmp_path, **settings))
    resumed = load_file(tmp_path / "run" / "detector" / "model.safetensors")
    fresh = load_file(tmp_path / "model" / "model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert any(not torch.equal(whole[name], fresh[name]) for name in whole if name in fresh)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_say_what_they_said_before(tmp_path, known, family):
    save_checkpoint(tmp_path / "model", family)
    processor, model = load_trained(str(tmp_path / "model"))
    lora = {part: {"tune": "lora"} for part in ("backbone", "text_encoder", "transformer")}
    wrapper = set_trainable(model, Parts.model_validate(lora), Lora(r=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = a_batch(processor, model, known)
    with torch.no_grad():
        before = predict(model.eval(), batch)
    wrapper.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    loaded = GroundingDinoDetector(tmp_path / "merged", device="cpu", runtime="torch").model
    original = load_trained(str(tmp_path / "model"))[1].eval()
    with torch.no_grad():
        after, untrained = predict(loaded, batch), predict(original, batch)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.boxes, before.boxes, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after.boxes, untrained.boxes, atol=1e-3)


def a_batch(processor, model, source: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Four pictures of a set, asked for both of its names."""
    examples = Source.model_validate(source).read()
    prompts = PromptMaker(processor.tokenizer, model.config.max_text_len)
    asked = TrainingQuestions(examples, prompts, Asking(alone=0), None, (0, 0, 0), seed=0)
    batch = Collator(processor)([asked[i] for i in range(4)])
    return {key: batch[key] for key in INPUTS}


def test_a_new_detector_learns_from_its_first_steps(tmp_path, sets):
    trainer = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    run_recipe(recipe(tmp_path, from_config=PICTO, train=sets["train"], trainer={**trainer, "save_steps": 6}))
    loss = [row["loss"] for row in history(tmp_path / "run") if "loss" in row]
    assert loss[-1] < loss[0] / 2


def test_a_new_detector_takes_a_trained_backbone_of_its_shape_and_no_other(tmp_path):
    _, trained = load_trained(PICTO)
    resnet = ResNetBackbone(trained.config.backbone_config)
    resnet.load_state_dict(trained.model.backbone.conv_encoder.model.state_dict(), strict=False)
    resnet.save_pretrained(tmp_path / "resnet")
    _, model = make_fresh(PICTO, str(tmp_path / "resnet"))
    for name, value in trained.model.backbone.state_dict().items():
        torch.testing.assert_close(model.model.backbone.state_dict()[name], value)
    other = ResNetBackbone(ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 16, 16], depths=[1] * 4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not load into this detector"):
        make_fresh(PICTO, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either 'model'"),
        ({"model": "a", "from_config": "b"}, "either 'model'"),
        ({"model": "a", "backbone": "b"}, "'backbone' is for a new detector"),
        ({"model": "a", "parts": {"neck": {}}}, "there is no setting 'parts.neck'"),
        ({"model": "a", "trainer": {"learning_rat": 1}}, "learning_rat"),
        ({"model": "a", "trainer": {"output_dir": "x"}}, "trainer.output_dir is not yours to set"),
        ({"model": "nowhere/to/be/found"}, "nowhere/to/be/found"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, sets, settings, message):
    with pytest.raises((InputError, ModelError), match=message):
        run_recipe(recipe(tmp_path, **sets, **settings))
    assert not (tmp_path / "run").exists()
