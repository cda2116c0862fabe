"""OmDet-Turbo, on tiny random checkpoints saved to and loaded from a folder."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_detectors import save_omdet
from PIL import Image
from safetensors.torch import load_file, save_file
from test_grounding_dino import assert_same, of_name, picture
from transformers import AutoProcessor, BertConfig, BertModel, OmDetTurboForObjectDetection

from detgpt.boxes import within_image
from detgpt.detectors import Grounding
from detgpt.detectors.omdet_turbo import OmDetTurboDetector
from detgpt.errors import InputError, MissingExtraError, ModelError

LONG = "cold glass of wine"  # four tokens
NAMES = ["cup", LONG, "bottle", "table", "red glasses"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("omdet")
    save_omdet(made)
    return made


@pytest.fixture(scope="module")
def detector(folder) -> OmDetTurboDetector:
    return OmDetTurboDetector(folder, device="cpu", max_prompts_per_pass=4)


def plain_forward(folder: Path, image: Image.Image, names: list[str]) -> tuple[object, object]:
    processor = AutoProcessor.from_pretrained(folder)
    model = OmDetTurboForObjectDetection.from_pretrained(folder)
    with torch.inference_mode():
        return processor, model(**processor(images=image, text=[names], return_tensors="pt"))


def transformers_own(folder: Path, image: Image.Image, name: str, threshold: float) -> Grounding:
    """What the checkpoint's makers' code finds for one name, with nothing suppressed."""
    processor, output = plain_forward(folder, image, [name])
    found = processor.post_process_grounded_object_detection(
        output, threshold=threshold, nms_threshold=1.0, target_sizes=[image.size[::-1]]
    )[0]
    whole = Grounding(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy())
    return within_image(whole, image.size)


@pytest.mark.parametrize("size", [(160, 80), (64, 96)], ids=str)
def test_separate_finds_for_each_name_what_transformers_finds_for_it_alone(detector, folder, size):
    image = picture(*size)
    together = detector.detect([image], [NAMES], box_threshold=0)[0]
    threshold = float(np.median(together.scores))
    kept = detector.detect([image], [NAMES], box_threshold=threshold)[0]
    assert 0 < len(kept.scores) < len(together.scores)
    for index, name in enumerate(NAMES):
        own = transformers_own(folder, image, name, 0)
        assert_same(of_name(together, index), (own.boxes, own.scores))
        assert len(of_name(kept, index)[0]) == (own.scores >= threshold).sum()


def test_joint_gives_each_box_of_the_shared_task_to_its_best_name(detector, folder):
    image = picture(160, 80)
    _, output = plain_forward(folder, image, NAMES)
    scores = output.decoder_class_logits[0].sigmoid().numpy()  # (Q, names)
    own = np.sort(scores.max(axis=1))[::-1]
    ours = detector.detect([image], [NAMES], box_threshold=0, text_threshold=0, prompting="joint")[0]
    np.testing.assert_allclose(ours.scores, own, atol=1e-4)
    assert ours.name_index.tolist() == scores.argmax(axis=1)[np.argsort(-scores.max(axis=1))].tolist()
    assert len({*ours.name_index.tolist()}) > 1


def test_what_else_is_asked_changes_a_names_boxes_in_a_shared_task_only(detector):
    image = picture()
    for prompting, same in (("separate", True), ("joint", False)):
        options = {"box_threshold": 0, "text_threshold": 0, "prompting": prompting}
        alone = of_name(detector.detect([image], [["cup"]], **options)[0], 0)
        together = of_name(detector.detect([image], [["cup", LONG, "bottle"]], **options)[0], 0)
        if same:
            assert_same(alone, together)
        else:
            assert len(alone[0]) != len(together[0]) or not np.allclose(alone[0], together[0], atol=0.5)


def test_sixty_names_share_as_many_tasks_as_the_text_encoder_needs(detector):
    names = [f"{colour} {thing}" for colour in ("red", "cold") for thing in ("cup", "glass", "table")] * 10
    passes = []
    decoder = detector.model.decoder
    hook = decoder.register_forward_hook(lambda module, inputs, output: passes.append(output.decoder_classes.shape))
    try:
        options = {"box_threshold": 0, "text_threshold": 0, "prompting": "joint"}
        grounding = detector.detect([picture()], [names], **options)[0]
    finally:
        hook.remove()
    # 77 positions hold the two special tokens, "detect" and 24 names of two tokens and a mark.
    assert [(shape[1], shape[3]) for shape in passes] == [(3, 24)]
    assert len(grounding.boxes) == 3 * 10
    assert max(grounding.name_index) >= 48, "names of the last task are found too"


def test_the_image_encoder_runs_once_per_image_however_many_names(detector):
    seen = []
    hook = detector.model.vision_backbone.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    try:
        detector.detect([picture(), picture(seed=1), picture(64, 80)], [NAMES, NAMES, ["cup"]])
    finally:
        hook.remove()
    assert sum(seen) == 3


def test_images_in_a_batch_get_what_they_get_alone(detector):
    images = [picture(), picture(64, 96, seed=1), picture(seed=2), picture(96, 40, seed=3)]
    names = [["cup", LONG], [], ["table", "cup", "bottle"], ["cup"]]
    batch = detector.detect(images, names, box_threshold=0)
    for image, asked, together in zip(images, names, batch, strict=True):
        alone = detector.detect([image], [asked], box_threshold=0)[0]
        assert together.name_index.tolist() == alone.name_index.tolist()
        if asked:
            assert_same((alone.boxes, alone.scores), (together.boxes, together.scores))


def test_threads_may_share_a_detector(detector):
    images = [picture(seed=seed) for seed in range(4)]
    alone = [detector.detect([image], [NAMES], box_threshold=0)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: detector.detect([image], [NAMES], box_threshold=0)[0], images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_threshold": -0.1}, "text_threshold must lie in .* got -0.1"),
        ({"prompting": "both"}, "separate, joint, got 'both'"),
        ({"names": [["cup", " "]]}, "letter or digit, got ' '"),
        ({"names": ["cup"]}, "one list of names per image"),
        ({"names": [[" ".join(["cup"] * 74)]]}, "too long: the detector reads 73 tokens"),
    ],
)
def test_a_wrong_argument_is_named(detector, change, message):
    with pytest.raises(InputError, match=message):
        detector.detect([picture()], **{"names": [["cup"]]} | change)


def test_the_longest_name_that_fits_is_read(detector):
    assert len(detector.detect([picture()], [[" ".join(["cup"] * 73)]], box_threshold=0)[0].boxes) > 0


def break_another_kind(folder: Path) -> None:
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(bert).save_pretrained(folder)


def break_tensor_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["language_backbone.text_projection"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "Check the hub id or the folder"),
        (break_another_kind, "type 'bert'; this detector reads omdet-turbo"),
        (break_tensor_missing, "lack 1 tensors .* language_backbone.text_projection"),
    ],
)
def test_a_checkpoint_that_cannot_work_says_so_at_loading(folder, tmp_path, damage, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken)
    with pytest.raises(ModelError, match=message):
        OmDetTurboDetector(broken, device="cpu")


def test_the_public_checkpoints_image_encoder_comes_from_timm(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="needs the extra detgpt[omdet]")
    save_omdet(tmp_path, backbone="swin_tiny_patch4_window7_224")  # as in the public config.json
    image = picture(160, 80)
    found = OmDetTurboDetector(tmp_path, device="cpu").detect([image], [["cup"]], box_threshold=0)[0]
    own = transformers_own(tmp_path, image, "cup", 0)
    assert_same((found.boxes, found.scores), (own.boxes, own.scores))

    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[omdet\]'"):
        OmDetTurboDetector(tmp_path, device="cpu")
