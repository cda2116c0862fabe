"""The lean runtime gives the boxes of transformers, and asking again about an image does not encode it again."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_grounding_dino import NAMES, assert_same, detector, folders, picture  # noqa: F401  (fixtures)
from torchvision.ops import box_iou
from transformers import GroundingDinoConfig, SwinBackbone, SwinConfig
from transformers.models.grounding_dino import modeling_grounding_dino as theirs

from detgpt.detectors.grounding_dino import GroundingDinoDetector
from detgpt.detectors.lean import BagDeformableAttention, LowRankFusion, WindowAttention, make_lean, make_swin_lean
from detgpt.detectors.remembered import Remembered
from detgpt.errors import InputError

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "weights" / "picto" / "detector"
PICTURES = sorted((ROOT / "finetune" / "picto" / "splits" / "seen" / "images").iterdir())[:6]
ASKED = ["cup", "book", "dog", "chair", "television", "hat", "battery", "banana"]
SHAPES = [(7, 9), (4, 5), (2, 3)]


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("coordinates", [2, 4])
def test_deformable_attention_samples_what_transformers_samples(coordinates):
    config = GroundingDinoConfig(d_model=32, num_feature_levels=len(SHAPES))
    attention = randomised(theirs.GroundingDinoMultiscaleDeformableAttention(config, num_heads=4, n_points=4))
    tokens = sum(height * width for height, width in SHAPES)
    batch, queries = 2, 50
    # Also far outside the image, on its very edge, and on the centres of its pixels.
    points = torch.rand(batch, queries, len(SHAPES), coordinates) * 1.6 - 0.3
    points[:, :3, :, :2] = torch.tensor([0.0, 1.0, 0.5 / 9])[:, None, None]
    inputs = {
        "hidden_states": torch.randn(batch, queries, 32),
        "encoder_hidden_states": torch.randn(batch, tokens, 32),
        "position_embeddings": torch.randn(batch, queries, 32),
        "attention_mask": torch.rand(batch, tokens) > 0.2,
        "reference_points": points,
        "spatial_shapes": torch.tensor(SHAPES),
        "spatial_shapes_list": SHAPES,
    }
    with torch.inference_mode():
        wanted, _ = attention(**inputs)
        found, _ = BagDeformableAttention(attention, torch.float32)(**inputs)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [3, 40])
def test_fusion_attends_as_in_transformers(tokens):
    config = GroundingDinoConfig(d_model=32, encoder_ffn_dim=128, encoder_attention_heads=8)
    fusion = randomised(theirs.GroundingDinoBiMultiHeadAttention(config))
    padded_image, padded_text = torch.zeros(2, 60, dtype=torch.bool), torch.zeros(2, tokens, dtype=torch.bool)
    padded_image[1, 50:], padded_text[0, 2:] = True, True
    inputs = (torch.randn(2, 60, 32) / 4, torch.randn(2, tokens, 32) / 4, padded_image, padded_text)
    with torch.inference_mode():
        (wanted_image, _), (wanted_text, _) = fusion(*inputs)
        (found_image, _), (found_text, _) = LowRankFusion(fusion)(*inputs)
    torch.testing.assert_close(found_image, wanted_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_text, wanted_text, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (72, 100)])
def test_swin_with_shifted_and_padded_windows_is_that_of_transformers(size):
    config = SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, out_indices=[1, 2])
    plain = randomised(SwinBackbone(config))
    lean = copy.deepcopy(plain)
    make_swin_lean(lean)
    assert any(isinstance(module, WindowAttention) for module in lean.modules())
    pixels = torch.randn(2, 3, *size)
    with torch.inference_mode():
        for found, wanted in zip(lean(pixels).feature_maps, plain(pixels).feature_maps, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompting", ["separate", "joint"])
def test_exact_gives_the_boxes_of_the_plain_model(detector, prompting):  # noqa: F811
    plain = GroundingDinoDetector(detector.name, device="cpu", runtime="torch")
    assert (detector.runtime, plain.runtime) == ("lean", "torch")
    options = {"box_threshold": 0, "text_threshold": 0, "prompting": prompting}
    images = [picture(), picture(64, 96, seed=1), picture(96, 40, seed=3)]
    names = [NAMES[:3], NAMES[2:5], NAMES[:1]]
    for one, other in zip(
        detector.detect(images, names, **options), plain.detect(images, names, **options), strict=True
    ):
        assert one.name_index.tolist() == other.name_index.tolist()
        assert_same((one.boxes, one.scores), (other.boxes, other.scores))


@pytest.fixture(scope="module")
def built_in() -> dict[str, GroundingDinoDetector]:
    made = {runtime: GroundingDinoDetector(BUILT_IN, device="cpu", runtime=runtime) for runtime in ("torch", "lean")}
    # Not by precision="fast", which stays in float32 where that is the faster one.
    made["bfloat16"] = GroundingDinoDetector(BUILT_IN, device="cpu", runtime="torch")
    make_lean(made["bfloat16"].model, torch.bfloat16)
    return made


@pytest.mark.parametrize("prompting", ["separate", "joint"])
def test_the_built_in_detector_finds_the_same_in_either_runtime(built_in, prompting):
    images = [Image.open(file).convert("RGB") for file in PICTURES]
    names = [ASKED] * len(images)
    plain, lean, fast = (d.detect(images, names, prompting=prompting) for d in built_in.values())
    assert sum(len(found.boxes) for found in plain) >= len(images), "an empty comparison proves nothing"
    for one, other, rough in zip(plain, lean, fast, strict=True):
        assert one.name_index.tolist() == other.name_index.tolist()
        np.testing.assert_allclose(other.boxes, one.boxes, atol=0.05)
        np.testing.assert_allclose(other.scores, one.scores, atol=5e-4)
        clear = one.scores >= 0.3  # a score within rounding of the threshold may fall on either side of it
        if clear.any():
            overlap = box_iou(torch.from_numpy(one.boxes[clear]), torch.from_numpy(rough.boxes))
            same_name = torch.from_numpy(one.name_index[clear][:, None] == rough.name_index[None])
            assert (overlap * same_name).amax(dim=1).min() >= 0.95


def counted_calls(module: torch.nn.Module) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    sizes: list[int] = []
    return sizes, module.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))


def test_asking_again_encodes_neither_the_image_nor_the_names_again(folders):  # noqa: F811
    fresh = GroundingDinoDetector(folders["grounding-dino"], device="cpu", remembered_images=2)
    images, _ = counted_calls(fresh.model.model.backbone.conv_encoder)
    texts, _ = counted_calls(fresh.model.model.text_backbone.text_backbone)
    first = fresh.detect([picture(seed=1)], [["cup"]], box_threshold=0)[0]
    fresh.detect([picture(seed=1)], [["bottle"]], box_threshold=0)
    again = fresh.detect([picture(seed=1)], [["cup"]], box_threshold=0)[0]  # another object, the same pixels
    assert (images, texts) == ([1], [1, 1])
    np.testing.assert_array_equal(first.boxes, again.boxes)
    np.testing.assert_array_equal(first.scores, again.scores)

    both = [picture(seed=2), picture(seed=1), picture(seed=2)]
    fresh.detect(both, [["cup"]] * 3, box_threshold=0)
    assert images == [1, 1], "only the one not seen yet, and that once"
    alone = GroundingDinoDetector(folders["grounding-dino"], device="cpu").detect([both[0]], [["cup"]], box_threshold=0)
    assert_same((alone[0].boxes, alone[0].scores), of_first(fresh.detect([both[0]], [["cup"]], box_threshold=0)))


def of_first(groundings):
    return groundings[0].boxes, groundings[0].scores


def test_only_the_last_images_are_remembered(folders):  # noqa: F811
    fresh = GroundingDinoDetector(folders["grounding-dino"], device="cpu", remembered_images=2)
    sizes, _ = counted_calls(fresh.model.model.backbone.conv_encoder)
    fresh.detect([picture(seed=seed) for seed in range(5)], [["cup"]] * 5)
    held = sum(maps.untyped_storage().nbytes() for e in fresh._images.values() for maps, _ in e.feature_maps)
    assert held == 2 * sum(maps.nbytes for maps, _ in next(iter(fresh._images.values())).feature_maps)
    fresh.detect([picture(seed=4)], [["cup"]])
    fresh.detect([picture(seed=0)], [["cup"]])
    assert sizes == [4, 1, 1]

    none = GroundingDinoDetector(folders["grounding-dino"], device="cpu", remembered_images=0)
    sizes, _ = counted_calls(none.model.model.backbone.conv_encoder)
    for _ in range(2):
        none.detect([picture()], [["cup"]])
    assert sizes == [1, 1] and not list(none._images.values())


def test_the_least_recently_asked_for_is_forgotten_first():
    remembered: Remembered[str] = Remembered(2)
    computed = []

    def compute(positions: list[int]) -> list[str]:
        computed.extend(positions)
        return ["computed"] * len(positions)

    for keys in (["a"], ["b"], ["a"], ["c"], ["a"]):
        remembered.get(keys, compute)
    assert len(computed) == 3
    remembered.get(["a", "b"], compute)
    assert computed[3:] == [1]
    remembered.get(["d", "e", "f"], compute)
    assert len(list(remembered.values())) == 2


def test_threads_may_share_what_is_remembered(built_in):
    images = [Image.open(file).convert("RGB") for file in PICTURES]
    alone = [built_in["lean"].detect([image], [ASKED])[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: built_in["lean"].detect([image], [ASKED])[0], images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_where_lean_cannot_run_transformers_does(folders):  # noqa: F811
    folder = folders["grounding-dino"]
    asked = GroundingDinoDetector(folder, device="cpu", dtype="bfloat16")
    assert asked.runtime == "torch"
    assert type(asked.model.model.encoder.layers[0].deformable_layer) is theirs.GroundingDinoDeformableLayer
    with pytest.raises(InputError, match="runtime='lean' is for float32 on a CPU"):
        GroundingDinoDetector(folder, device="cpu", dtype="bfloat16", runtime="lean")


def test_fast_is_bfloat16_only_where_that_is_faster(folders, monkeypatch, caplog):  # noqa: F811
    seen = {}
    for faster in (True, False):
        monkeypatch.setattr("detgpt.detectors.grounding_dino.bfloat16_is_faster", lambda faster=faster: faster)
        made = GroundingDinoDetector(folders["grounding-dino"], device="cpu", precision="fast")
        seen[faster] = made.model.model.encoder.layers[0].deformable_layer.fc1.weight.dtype
        assert len(made.detect([picture()], [["cup"]], box_threshold=0)[0].boxes) > 0
    assert seen == {True: torch.bfloat16, False: torch.float32}
    assert "not faster in bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runtime": "onnx"}, "runtime must be one of auto, torch, lean, got 'onnx'"),
        ({"precision": "int8"}, "precision must be one of exact, fast, got 'int8'"),
        (
            {"precision": "fast", "runtime": "torch"},
            "precision='fast' is for the lean.*runtime='torch', not both",
        ),
        ({"precision": "fast", "dtype": "bfloat16"}, "precision='fast' is for the lean.*dtype='bfloat16', not both"),
        ({"remembered_images": -1}, "remembered_images must be at least 0, got -1"),
    ],
)
def test_a_wrong_choice_is_named(folders, wrong, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        GroundingDinoDetector(folders["grounding-dino"], device="cpu", **wrong)
