"""OWLv2 and OWL-ViT, on tiny random checkpoints saved to and loaded from a folder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_detectors import OWL, save_owl
from PIL import Image
from safetensors.torch import load_file, save_file
from test_grounding_dino import assert_same, gap_near, of_name, picture
from transformers import AutoProcessor, BertConfig, BertModel

from detgpt.boxes import within_image
from detgpt.detectors import Grounding
from detgpt.detectors.owlv2 import Owlv2Detector
from detgpt.errors import InputError, ModelError

NAMES = ["cup", "cold glass of wine", "bottle", "table", "red glasses"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in OWL}
    for family, folder in made.items():
        save_owl(folder, family)
    return made


@pytest.fixture(scope="module", params=OWL)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def detector(family, folders) -> Owlv2Detector:
    return Owlv2Detector(folders[family], device="cpu", max_images_per_pass=2)


def transformers_own(folder: Path, family: str, image: Image.Image, names: list[str], threshold: float) -> Grounding:
    """What the checkpoint's makers' code finds, cut at the image's edges."""
    processor = AutoProcessor.from_pretrained(folder)
    model = OWL[family][1].from_pretrained(folder)
    texts = [[f"a photo of a {name}" for name in names]]
    with torch.inference_mode():
        output = model(**processor(text=texts, images=image, return_tensors="pt"))
    found = processor.post_process_grounded_object_detection(
        output, threshold=threshold, target_sizes=[image.size[::-1]]
    )[0]
    whole = Grounding(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy())
    return within_image(whole, image.size)


@pytest.mark.parametrize("size", [(160, 80), (80, 160), (64, 64)], ids=str)
def test_joint_finds_what_transformers_own_post_processing_finds(detector, folders, family, size):
    image = picture(*size)
    everything = transformers_own(folders[family], family, image, NAMES, threshold=0)
    assert len({*everything.name_index.tolist()}) > 1, "a comparison of one name proves nothing"
    for threshold in (0, gap_near(everything.scores, 0.5)):
        own = transformers_own(folders[family], family, image, NAMES, threshold)
        ours = detector.detect([image], [NAMES], box_threshold=threshold, text_threshold=0, prompting="joint")[0]
        assert ours.name_index.tolist() == own.name_index.tolist()
        assert_same((ours.boxes, ours.scores), (own.boxes, own.scores))
    assert len(own.boxes) < len(everything.boxes)


def test_separate_finds_for_each_name_what_transformers_finds_for_it_alone(detector, folders, family):
    image = picture(160, 80)
    together = detector.detect([image], [NAMES], box_threshold=0)[0]
    for index, name in enumerate(NAMES):
        own = transformers_own(folders[family], family, image, [name], threshold=0)
        assert_same(of_name(together, index), (own.boxes, own.scores))


def test_boxes_are_pixels_of_the_image_of_which_nothing_is_cut_off_or_added(detector, family):
    image = picture(400, 200)
    grounding = detector.detect([image], [NAMES], box_threshold=0)[0]
    assert (grounding.boxes >= 0).all() and (grounding.boxes <= [400, 200, 400, 200]).all()
    # Boxes of the lower patches, which OWLv2 has under a wide image and OWL-ViT has in it.
    patches = 16 * len(NAMES)
    assert len(grounding.boxes) == patches if family == "owlvit" else len(grounding.boxes) < patches


def test_joint_gives_a_box_to_its_best_name_alone_and_separate_to_every_name_that_fits(detector):
    separate = detector.detect([picture()], [NAMES], box_threshold=0)[0]
    joint = detector.detect([picture()], [NAMES], box_threshold=0, text_threshold=0, prompting="joint")[0]
    assert len(separate.boxes) == len(NAMES) * len(joint.boxes)
    threshold = float(np.median(joint.scores))
    for of_box, of_text in ((threshold, 0), (0, threshold)):
        options = {"box_threshold": of_box, "text_threshold": of_text, "prompting": "joint"}
        kept = detector.detect([picture()], [NAMES], **options)[0]
        np.testing.assert_array_equal(kept.scores, joint.scores[joint.scores >= threshold])


def test_the_image_tower_runs_once_per_image_and_each_name_is_read_once(detector):
    images, texts = [], []
    towers = [(detector._towers.vision_model, images), (detector._towers.text_model, texts)]
    hooks = [
        tower.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(output.pooler_output)))
        for tower, seen in towers
    ]
    try:
        detector.detect([picture(), picture(seed=1), picture(64, 80)], [NAMES, [*NAMES, "glass"], ["cup"]])
    finally:
        for hook in hooks:
            hook.remove()
    assert images == [2, 1], "two images a pass"
    assert texts == [len(NAMES) + 1]


def test_images_of_several_sizes_in_a_batch_get_what_they_get_alone(detector):
    images = [picture(), picture(64, 96, seed=1), picture(200, 40, seed=2), picture(96, 40, seed=3)]
    names = [["cup", "red glasses"], [], ["table", "cup"], ["cup"]]
    batch = detector.detect(images, names, box_threshold=0)
    for image, asked, together in zip(images, names, batch, strict=True):
        alone = detector.detect([image], [asked], box_threshold=0)[0]
        assert together.name_index.tolist() == alone.name_index.tolist()
        if asked:
            assert_same((alone.boxes, alone.scores), (together.boxes, together.scores))


def test_nothing_to_look_for_finds_nothing_without_running_the_model(detector):
    def fail(*_):
        raise AssertionError("the model ran")

    hooks = [module.register_forward_pre_hook(fail) for module in detector.model.modules()]
    try:
        (nothing,) = detector.detect([picture()], [[]], box_threshold=0)
        assert detector.detect([], []) == []
    finally:
        for hook in hooks:
            hook.remove()
    assert nothing.boxes.shape == (0, 4) and nothing.scores.shape == (0,) and nothing.name_index.shape == (0,)


def test_threads_may_share_a_detector(detector):
    images = [picture(seed=seed) for seed in range(4)]
    alone = [detector.detect([image], [NAMES], box_threshold=0)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: detector.detect([image], [NAMES], box_threshold=0)[0], images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_a_name_stands_in_the_template_that_was_chosen(detector, folders, family):
    bare = Owlv2Detector(folders[family], device="cpu", template="{}")
    named = bare.detect([picture()], [["a photo of a cup"]], box_threshold=0)[0]
    usual = detector.detect([picture()], [["cup"]], box_threshold=0)[0]
    assert_same((named.boxes, named.scores), (usual.boxes, usual.scores))
    assert not np.allclose(bare.detect([picture()], [["cup"]], box_threshold=0)[0].scores, usual.scores, atol=1e-3)


def test_any_script_is_read_byte_by_byte(detector):
    # 杯 is three bytes, of which this vocabulary has no merged token.
    one, other = (detector.detect([picture()], [[name]], box_threshold=0)[0] for name in ("杯", "瓶"))
    assert not np.allclose(one.scores, other.scores, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_threshold": 1.5}, "box_threshold must lie in .* got 1.5"),
        ({"prompting": "both"}, "separate, joint, got 'both'"),
        ({"names": [["cup", " "]]}, "letter or digit, got ' '"),
        ({"names": [["☕"]]}, "letter or digit, got '☕'"),
        ({"names": ["cup"]}, "one list of names per image"),
        ({"names": [["cup"], ["cup"]]}, "1 images but 2 lists"),
        ({"names": [[" ".join(["cup"] * 11)]]}, "too long: the detector reads 10 tokens"),
    ],
)
def test_a_wrong_argument_is_named(detector, change, message):
    with pytest.raises(InputError, match=message):
        detector.detect([picture()], **{"names": [["cup"]]} | change)


def test_the_longest_name_that_fits_is_read(detector):
    assert len(detector.detect([picture()], [[" ".join(["cup"] * 10)]], box_threshold=0)[0].boxes) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "a photo"}, "must hold {} once"),
        ({"template": "cup " * 14 + "{}"}, "leaves no room for a name"),
        ({"max_images_per_pass": 0}, "at least 1, got 0"),
        ({"dtype": "floaty"}, "'floaty'"),
    ],
)
def test_a_wrong_option_is_named(folders, options, message):
    with pytest.raises(InputError, match=message):
        Owlv2Detector(folders["owlv2"], device="cpu", **options)


def break_another_kind(folder: Path) -> None:
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(bert).save_pretrained(folder)


def break_tensor_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["class_head.dense0.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "Check the hub id or the folder"),
        (break_another_kind, "type 'bert'; this detector reads owlv2, owlvit"),
        (break_tensor_missing, "lack 1 tensors .* class_head.dense0.weight"),
        (break_shapes, "Cannot load"),
    ],
)
def test_a_checkpoint_that_cannot_work_says_so_at_loading(folders, tmp_path, damage, message):
    folder = shutil.copytree(folders["owlv2"], tmp_path / "broken")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        Owlv2Detector(folder, device="cpu")


def test_half_precision_runs_where_it_is_asked_for(folders, family):
    asked = Owlv2Detector(folders[family], device="cpu", dtype="bfloat16")
    assert asked.model.dtype == torch.bfloat16
    assert len(asked.detect([picture()], [["cup"]], box_threshold=0)[0].boxes) > 0
