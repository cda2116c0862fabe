"""Masks: SAM 2's real classes, small and random, as a user loads them; and how masks leave a result."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForMaskGeneration,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)

import detgpt.masks
from detgpt import Detections, DetGPT, InputError, ModelError, Options, Target
from detgpt.draw import draw, target_colours
from detgpt.masks import mask_to_rle, rle_to_mask
from detgpt.reasoners.scripted import ScriptedReasoner
from detgpt.results import coco_document
from detgpt.segmenters.sam2 import MAX_BOXES_PER_PASS, Sam2Segmenter

KITCHEN = "examples/kitchen.png"
NAMES = ["coffee", "soda", "pizza"]
SIDE = 64
PARTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [SIDE, SIDE],
            "blocks_per_stage": [1, 1, 1, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [4, 2, 2, 2],
            "global_attention_blocks": [],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": SIDE, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
MEMORY = {
    "memory_attention_hidden_size": 16,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 16,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 16,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 16,
    "memory_fuser_num_layers": 1,
    "memory_fuser_embed_dim": 16,
    "memory_fuser_intermediate_dim": 16,
}


def randomized(kind: Any, config: Any) -> Any:
    """A model with weights with which each box gets a mask that clearly differs from those of others."""
    torch.manual_seed(4)  # before it is made, for its table of positions is random too
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def save_checkpoint(folder: Path) -> None:
    randomized(Sam2Model, Sam2Config(**PARTS)).save_pretrained(folder)
    images = Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}, mask_size={"height": 16, "width": 16})
    Sam2Processor(images).save_pretrained(folder)


@pytest.fixture(scope="module")
def segmenter(tiny_segmenter_folder: Path) -> Sam2Segmenter:
    return Sam2Segmenter(tiny_segmenter_folder)


@pytest.fixture(scope="module")
def detector():
    return DetGPT.from_pretrained("picto").detector


@pytest.fixture(scope="module")
def kitchen(detector, tiny_segmenter_folder: Path) -> Detections:
    """Things of the kitchen and their masks, by the built-in detector and the segmenter from its folder."""
    model = DetGPT(ScriptedReasoner([""]), detector, segmenter=str(tiny_segmenter_folder))
    return model.detect(KITCHEN, names=NAMES, masks=True)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def some_boxes(count: int, width: int, height: int) -> np.ndarray:
    corners = np.random.default_rng(count).uniform(0, 1, (count, 2, 2))
    return (np.sort(corners, axis=1).reshape(-1, 4) * np.tile([width, height], 2)).astype(np.float32)


def with_masks(masks: Any, **changes: Any) -> Detections:
    """Two cups of 3 x 2 and a 10 x 8 picture."""
    fields: dict[str, Any] = {
        "boxes": [[1, 2, 4, 4], [5, 5, 8, 7]],
        "scores": [0.9, 0.4],
        "labels": ["cup", "cup"],
        "targets": [Target("cup", found=True)],
        "image_wh": (10, 8),
        "masks": masks,
    }
    return Detections(**{**fields, **changes})


def two_masks() -> np.ndarray:
    masks = np.zeros((2, 8, 10), bool)
    masks[0, 2:4, 1:4] = True
    masks[1, 5:7, 5:8] = True
    masks[1, 5, 5] = False
    return masks


# --- the segmenter ---


@pytest.mark.parametrize("size", [(90, 50), (50, 90), (64, 64), (301, 7)])
def test_masks_are_what_transformers_gives_for_each_box_alone(
    segmenter: Sam2Segmenter, tiny_segmenter_folder: Path, size: tuple[int, int]
) -> None:
    """Whatever the shape of the picture: at its size, in the order of the boxes."""
    image, boxes = noise(*size), some_boxes(3, *size)
    masks = segmenter.segment(image, boxes)
    assert (masks.shape, masks.dtype) == ((3, size[1], size[0]), bool)
    processor = Sam2Processor.from_pretrained(tiny_segmenter_folder)
    model = AutoModelForMaskGeneration.from_pretrained(tiny_segmenter_folder).eval()
    for number, box in enumerate(boxes):
        inputs = processor(images=image, input_boxes=[[box.tolist()]], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, multimask_output=False)
        theirs = processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0][0, 0].numpy()
        same = (masks == theirs).mean(axis=(1, 2))
        assert same[number] > 0.999  # a logit of zero may fall to either side
        assert np.delete(same, number).max() < 0.99, "another box has that mask too"


def test_many_boxes_go_through_in_parts_and_keep_their_order(segmenter: Sam2Segmenter) -> None:
    image, boxes = noise(80, 60), some_boxes(2 * MAX_BOXES_PER_PASS + 1, 80, 60)
    masks = segmenter.segment(image, boxes)
    for index in (0, MAX_BOXES_PER_PASS, len(boxes) - 1):
        assert (segmenter.segment(image, boxes[[index]])[0] == masks[index]).mean() > 0.999


def test_without_boxes_nothing_is_encoded(segmenter: Sam2Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter.model, "get_image_embeddings", None)
    assert segmenter.segment(noise(9, 7), np.empty((0, 4), np.float32)).shape == (0, 7, 9)


def test_masks_that_would_fill_the_memory_are_refused_first(
    segmenter: Sam2Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detgpt.masks, "MAX_BYTES", 3 * 90 * 50)
    assert len(segmenter.segment(noise(90, 50), some_boxes(3, 90, 50))) == 3
    with pytest.raises(InputError, match=r"4 masks of 90 x 50.*box_threshold"):
        segmenter.segment(noise(90, 50), some_boxes(4, 90, 50))


def test_several_threads_get_what_one_gets(segmenter: Sam2Segmenter) -> None:
    image, boxes = noise(70, 40), some_boxes(4, 70, 40)
    expected, found = segmenter.segment(image, boxes), list[np.ndarray]()
    threads = [threading.Thread(target=lambda: found.append(segmenter.segment(image, boxes))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(masks, expected) for masks in found)


def test_a_checkpoint_of_the_video_model_as_the_hub_has_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    video = randomized(Sam2VideoModel, Sam2VideoConfig(**PARTS, **MEMORY))
    video.save_pretrained(tmp_path)
    size = {"height": SIDE, "width": SIDE}
    Sam2VideoProcessor(Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size)).save_pretrained(tmp_path)
    loaded = Sam2Segmenter(tmp_path)
    weights = video.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert loaded.segment(noise(90, 50), some_boxes(2, 90, 50)).shape == (2, 50, 90)


def test_what_does_not_load_is_one_error_with_a_remedy(
    tiny_segmenter_folder: Path, tiny_detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"(?s)nobody/no-such-sam.*folder as segmenter"):
        Sam2Segmenter("nobody/no-such-sam")
    with pytest.raises(ModelError, match=r"grounding-dino.*reads SAM 2"):
        Sam2Segmenter(tiny_detector_folder)
    shutil.copytree(tiny_segmenter_folder, tmp_path / "half")
    Sam2Model(Sam2Config(**PARTS)).vision_encoder.save_pretrained(tmp_path / "part")
    shutil.copy(tmp_path / "part" / "model.safetensors", tmp_path / "half")
    with pytest.raises(ModelError, match=r"lack \d+ tensors"):
        Sam2Segmenter(tmp_path / "half")


# --- the pipeline ---


def test_masks_come_with_the_boxes_when_they_are_asked_for(kitchen: Detections, detector, segmenter) -> None:
    width, height = Image.open(KITCHEN).size
    assert kitchen.masks is not None
    assert kitchen.masks.shape == (len(kitchen), height, width)
    assert len(kitchen) >= 2
    with Image.open(KITCHEN) as image:
        assert np.array_equal(kitchen.masks, segmenter.segment(image.convert("RGB"), kitchen.boxes))
    plain = DetGPT(ScriptedReasoner([""]), detector).detect(KITCHEN, names=NAMES)
    assert plain.masks is None
    assert plain.labels == kitchen.labels


def test_nothing_found_has_no_masks_but_their_shape(detector, segmenter) -> None:
    model = DetGPT(ScriptedReasoner(["Nothing.\nTargets: []"]), detector, segmenter=segmenter)
    assert model.detect(noise(9, 7), "a submarine", masks=True).masks.shape == (0, 7, 9)


def test_the_segmenter_loads_at_the_first_wish_for_masks_and_only_then(detector) -> None:
    model = DetGPT(ScriptedReasoner([""]), detector, segmenter="no such folder")
    assert model.detect(KITCHEN, names=NAMES).masks is None
    with pytest.raises(ModelError, match="no such folder"):
        model.detect(KITCHEN, names=NAMES, masks=True)


def test_a_model_that_always_masks_loads_its_segmenter_first(detector) -> None:
    """So that a service, or a batch, tells at its start what is missing."""
    with pytest.raises(ModelError, match="no such folder"):
        DetGPT("no such reasoner", detector, segmenter="no such folder", options=Options(masks=True))


def test_an_object_without_the_verb_is_no_segmenter(detector) -> None:
    with pytest.raises(InputError, match=r"segmenter.*no method 'segment'"):
        DetGPT(ScriptedReasoner([""]), detector, segmenter=object())  # type: ignore[arg-type]


def test_masks_of_a_batch_belong_to_their_pictures(kitchen: Detections, detector, segmenter) -> None:
    model = DetGPT(ScriptedReasoner([""]), detector, segmenter=segmenter, options=Options(masks=True))
    park, again = model.detect_batch([("examples/park.png", ["bee"]), (KITCHEN, NAMES)])
    assert park.masks.shape[1:] == Image.open("examples/park.png").size[::-1]
    assert again.labels == kitchen.labels
    assert (again.masks == kitchen.masks).mean() > 0.99


# --- results ---


def test_masks_are_read_only_and_survive_copies() -> None:
    masks = two_masks()
    result = with_masks(masks)
    masks[:] = False
    assert np.array_equal(result.masks, two_masks())
    for copy in (result, pickle.loads(pickle.dumps(result)), replace(result, reasoning="why")):
        assert not copy.masks.flags.writeable
        assert np.array_equal(copy.masks, two_masks())
    assert replace(result, reasoning="why").masks is result.masks  # gigabytes are not copied for a word


@pytest.mark.parametrize(
    "wrong",
    [two_masks()[:1], two_masks().transpose(0, 2, 1), two_masks().astype(np.uint8), two_masks()[0]],
    ids=["too few", "turned", "numbers", "one"],
)
def test_masks_that_do_not_fit_raise(wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"masks must be bool of shape \(2, 8, 10\)"):
        with_masks(wrong)


def test_equality_sees_masks() -> None:
    assert with_masks(two_masks()) == with_masks(two_masks())
    assert with_masks(two_masks()) != with_masks(~two_masks())
    assert with_masks(two_masks()) != with_masks(None)
    nothing = {"boxes": [], "scores": [], "labels": []}
    assert with_masks(np.empty((0, 8, 10), bool), **nothing) == with_masks(None, **nothing)


def test_a_filter_keeps_the_masks_of_the_boxes_it_keeps() -> None:
    assert np.array_equal(with_masks(two_masks()).filter(min_score=0.5).masks, two_masks()[:1])
    assert with_masks(None).filter(min_score=0.5).masks is None


def test_json_round_trip(kitchen: Detections) -> None:
    for result in (with_masks(two_masks()), kitchen):
        again = Detections.from_json(result.to_json())
        assert np.array_equal(again.masks, result.masks)
        assert Detections.from_json(again.to_json()) == again
    assert "mask" not in with_masks(None).to_json()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [8, 10], "counts": [79]}, "cover 10 x 8"),
        ({"size": [8, 10], "counts": [81]}, "cover 10 x 8"),
        ({"size": [8, 10], "counts": [90, -10]}, "cover 10 x 8"),
        ({"size": [8, 10], "counts": [2**62, 2**62, 2**62, 2**62 + 80]}, "cover 10 x 8"),
        ({"size": [8, 10], "counts": [[80]]}, "cover 10 x 8"),
        ({"size": [10, 8], "counts": [80]}, "cover 10 x 8"),
        ({"size": [8, 10], "counts": "PPYo"}, "run lengths"),
        ({"size": [8, 10], "counts": [10**30]}, "run lengths"),
        ({"counts": [80]}, "run lengths"),
        (None, "not a saved result|run lengths"),
    ],
)
def test_runs_that_are_none_raise(mask: Any, message: str) -> None:
    saved = with_masks(two_masks()).to_dict()
    saved["detections"][1]["mask"] = mask
    with pytest.raises(InputError, match=message):
        Detections.from_dict(saved)


def test_a_mask_for_some_boxes_only_raises() -> None:
    saved = with_masks(two_masks()).to_dict()
    del saved["detections"][1]["mask"]
    with pytest.raises(InputError, match="mask' is missing"):
        Detections.from_dict(saved)


def test_a_saved_result_that_would_fill_the_memory_is_refused() -> None:
    saved = with_masks(two_masks()).to_dict()
    saved["image_wh"] = [10**9, 10**9]
    with pytest.raises(InputError, match="over the limit"):
        Detections.from_dict(saved)


def test_run_lengths_are_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    masks = [rng.random((7, 5)) < share for share in (0, 0.1, 0.5, 0.9, 1)] + [rng.random((1, 1)) < 2]
    for mask in masks:
        runs = mask_to_rle(mask)
        assert np.array_equal(rle_to_mask(runs, mask.shape[::-1]), mask)
        json.dumps(runs)
        theirs = coco.decode(coco.frPyObjects(runs, *mask.shape))
        assert np.array_equal(theirs.astype(bool), mask)


def test_coco_reads_the_masks(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    result = with_masks(two_masks())
    (tmp_path / "found.json").write_text(json.dumps(coco_document(iter([("a.png", result), ("b.png", result)]))))
    dataset = coco.COCO(tmp_path / "found.json")
    assert len(dataset.anns) == 4
    for number, annotation in dataset.anns.items():
        mask = two_masks()[(number - 1) % 2]
        assert np.array_equal(dataset.annToMask(annotation).astype(bool), mask)
        assert annotation["area"] == mask.sum()
    assert "segmentation" not in with_masks(None).to_coco()["annotations"][0]


def test_supervision_gets_the_masks() -> None:
    pytest.importorskip("supervision")
    theirs = with_masks(two_masks()).to_supervision()
    assert np.array_equal(theirs.mask, two_masks())
    assert with_masks(None).to_supervision().mask is None


def test_a_cut_out_is_transparent_around_the_thing() -> None:
    result = with_masks(two_masks(), image=Image.new("RGB", (10, 8), "red"), image_wh=(0, 0))
    whole, notched = result.crop(cut_out=True)
    assert whole.getcolors() == [(6, (255, 0, 0, 255))]
    assert np.asarray(notched)[..., 3].tolist() == [[0, 255, 255], [255, 255, 255]]
    assert result.crop()[0].mode == "RGB"
    with pytest.raises(InputError, match="masks=True"):
        with_masks(None).crop(cut_out=True)


# --- drawing ---


def test_a_mask_is_tinted_in_its_targets_colour_and_nothing_else_is() -> None:
    image, mask = Image.new("RGB", (500, 400), "black"), np.zeros((1, 400, 500), bool)
    mask[0, 100:300, 100:400] = True
    box = [[100, 100, 400, 300]]
    plain = np.asarray(draw(image, box, ["cup"])).astype(int)
    tinted = np.asarray(draw(image, box, ["cup"], masks=mask)).astype(int)
    colour = np.array(list(bytes.fromhex(target_colours(1)[0][1:])))
    share = tinted[200, 250] / colour
    assert np.allclose(share, share[0], atol=0.02) and 0.3 < share[0] < 0.6  # the thing below is still seen
    changed = (plain != tinted).any(axis=2)
    assert not (changed & ~mask[0]).any()
    assert changed[mask[0]].mean() > 0.9


def test_the_edge_of_a_mask_is_firm_but_not_where_the_picture_ends() -> None:
    mask = np.zeros((1, 400, 400), bool)
    mask[0, :, :200] = True
    drawn = np.asarray(draw(Image.new("RGB", (400, 400)), [[0, 0, 300, 399]], [""], masks=mask)).astype(int)
    inside, edge = drawn[200, 100], drawn[200, 199]
    assert edge.sum() > 1.8 * inside.sum()
    assert drawn[200, 20].tolist() == inside.tolist()


def test_masks_are_enlarged_with_the_picture() -> None:
    mask = np.zeros((1, 100, 100), bool)
    mask[0, 50:75, 25:75] = True
    image, box = Image.new("RGB", (100, 100)), [[25, 50, 75, 75]]
    changed = (np.asarray(draw(image, box, [""])) != np.asarray(draw(image, box, [""], masks=mask))).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert 190 <= rows[0] <= 215 and 285 <= rows[-1] <= 300
    assert 90 <= columns[0] <= 115 and 285 <= columns[-1] <= 300


def test_an_empty_mask_and_one_of_a_pixel_are_drawn() -> None:
    masks = np.zeros((2, 400, 400), bool)
    masks[1, 399, 399] = True
    draw(Image.new("RGB", (400, 400)), [[9, 9, 99, 99], [390, 390, 400, 400]], ["a", "b"], masks=masks)


def test_masks_of_another_picture_raise() -> None:
    with pytest.raises(InputError, match=r"masks must have shape \(1, 400, 500\)"):
        draw(Image.new("RGB", (500, 400)), [[9, 9, 99, 99]], ["cup"], masks=np.zeros((1, 500, 400), bool))


def test_a_result_draws_its_masks(kitchen: Detections) -> None:
    assert kitchen.draw().tobytes() != replace(kitchen, masks=None).draw().tobytes()
