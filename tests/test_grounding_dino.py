"""Grounding DINO through transformers, on tiny random checkpoints saved to and loaded from a folder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForZeroShotObjectDetection,
    BertConfig,
    BertModel,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from detgpt.detectors import Grounding
from detgpt.detectors.grounding_dino import GroundingDinoDetector
from detgpt.detectors.spans import make_prompts, token_positions
from detgpt.errors import InputError, ModelError

WORDS = ["cup", "bottle", "red", "wine", "glass", "##es", "table", "cold", "t", "shirt", "-", "a", "of"]
LONG = "cold glass of wine"  # four tokens
NAMES = ["cup", LONG, "bottle", "t-shirt", "table", "red glasses"]
SIZES = {"shortest_edge": 64, "longest_edge": 96}
FAMILIES = {
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}


def tokenizer() -> BertTokenizer:
    """Our words at the end of a vocabulary whose special tokens have the ids of bert-base-uncased."""
    vocab = [f"[unused{i}]" for i in range(1030)] + WORDS
    for token, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        vocab[index] = token
    return BertTokenizer(vocab={token: index for index, token in enumerate(vocab)})


def save_checkpoint(folder: Path, family: str) -> None:
    config_class, model_class = FAMILIES[family]
    bert = BertConfig(
        vocab_size=1030 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    config = config_class(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=12,
        max_text_len=24,
    )
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        # Fresh weights let the text hardly touch the image; these make every word matter to every box.
        if name.endswith(("vision_param", "text_param")):
            torch.nn.init.constant_(parameter, 1.0)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=SIZES), tokenizer()).save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        save_checkpoint(folder, family)
    return made


@pytest.fixture(scope="session", params=FAMILIES)
def detector(request, folders) -> GroundingDinoDetector:
    return GroundingDinoDetector(folders[request.param], device="cpu", max_prompts_per_pass=4)


def picture(width: int = 80, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def of_name(grounding: Grounding, index: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = grounding.name_index == index
    return grounding.boxes[chosen], grounding.scores[chosen]


def assert_same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    assert len(one[0]) > 0, "an empty comparison proves nothing"
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)
    np.testing.assert_allclose(one[0], other[0], atol=1e-2)  # pixels: 1e-4 of the image's size


def plain_forward(detector: GroundingDinoDetector, image: Image.Image, text: str) -> tuple[np.ndarray, ...]:
    """The checkpoint used as its makers show it: probabilities (Q, 24), xyxy pixel boxes (Q, 4), tokens."""
    inputs = detector.processor(images=image, text=text, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModelForZeroShotObjectDetection.from_pretrained(detector.name)(**inputs)
    centre, size = output.pred_boxes[0].split(2, dim=-1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).numpy() * np.tile(image.size, 2)
    boxes = np.clip(boxes, 0, np.tile(image.size, 2))
    tokens = detector.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    return output.logits[0].sigmoid().numpy(), boxes, tokens


@pytest.mark.parametrize("position", range(len(NAMES)))
def test_what_else_is_asked_does_not_change_a_names_boxes(detector, position):
    # Six names in passes of four, of one to four tokens, so that prompts are padded and split.
    alone = detector.detect([picture()], [[NAMES[position]]], box_threshold=0)[0]
    together = detector.detect([picture()], [NAMES], box_threshold=0)[0]
    assert_same(of_name(alone, 0), of_name(together, position))


def test_different_names_get_different_boxes(detector):
    grounding = detector.detect([picture()], [["cup", "bottle"]], box_threshold=0)[0]
    assert not np.allclose(of_name(grounding, 0)[0], of_name(grounding, 1)[0], atol=0.5)


def test_separate_prompts_give_what_the_plain_model_gives_for_one_name(detector):
    image = picture()
    probabilities, boxes, tokens = plain_forward(detector, image, f"{LONG} .")
    assert tokens == ["[CLS]", "cold", "glass", "of", "wine", ".", "[SEP]"]
    scores = probabilities[:, 1:5].max(axis=1)
    order = np.argsort(-scores, kind="stable")
    grounding = detector.detect([image], [["cup", LONG, "table"]], box_threshold=0)[0]
    assert_same(of_name(grounding, 1), (boxes[order], scores[order]))


def test_the_image_encoder_runs_once_per_image_however_many_names(detector):
    seen = []
    encoder = detector.model.model.backbone.conv_encoder
    hook = encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        # Pictures of no other test: the detector keeps the features of the last ones.
        detector.detect([picture(seed=70), picture(seed=71), picture(64, 80, seed=72)], [NAMES, NAMES, ["cup"]])
    finally:
        hook.remove()
    assert sum(seen) == 3
    assert detector.model.model.backbone.conv_encoder is encoder


def test_images_in_a_batch_get_what_they_get_alone(detector):
    images = [picture(), picture(64, 96, seed=1), picture(seed=2), picture(96, 40, seed=3)]
    names = [["cup", LONG], ["bottle"], ["table", "cup", "t-shirt"], ["cup"]]
    batch = detector.detect(images, names, box_threshold=0)
    for image, asked, together in zip(images, names, batch, strict=True):
        alone = detector.detect([image], [asked], box_threshold=0)[0]
        assert together.name_index.tolist() == alone.name_index.tolist()
        assert_same((alone.boxes, alone.scores), (together.boxes, together.scores))


def test_boxes_lie_in_the_image_and_come_best_first(detector):
    grounding = detector.detect([picture(400, 200)], [NAMES], box_threshold=0)[0]
    assert (grounding.boxes >= 0).all() and (grounding.boxes <= [400, 200, 400, 200]).all()
    assert grounding.boxes[:, 2].max() > 100, "in pixels of the given image, not of the resized one"
    assert (np.diff(grounding.scores) <= 0).all()
    assert (grounding.boxes.dtype, grounding.scores.dtype, grounding.name_index.dtype) == (
        np.float32,
        np.float32,
        np.int64,
    )


def test_the_box_threshold_keeps_exactly_the_scores_that_reach_it(detector):
    everything = detector.detect([picture()], [NAMES], box_threshold=0)[0]
    threshold = float(everything.scores[len(everything.scores) // 2])
    kept = detector.detect([picture()], [NAMES], box_threshold=threshold)[0]
    assert 0 < len(kept.scores) < len(everything.scores)
    np.testing.assert_array_equal(kept.scores, everything.scores[everything.scores >= threshold])


def gap_near(scores: np.ndarray, quantile: float) -> float:
    """A threshold near that quantile which no score is close to, so that float noise decides nothing."""
    ordered = np.sort(scores)
    middle = int(quantile * len(ordered))
    window = np.arange(max(0, middle - 2), min(len(ordered) - 1, middle + 2))
    widest = window[np.diff(ordered)[window].argmax()]
    return float(ordered[widest : widest + 2].mean())


@pytest.mark.parametrize(("box_quantile", "text_quantile"), [(0.7, 0.1), (0.1, 0.6)])
def test_joint_prompting_scores_each_box_by_the_tokens_of_its_best_name(detector, box_quantile, text_quantile):
    image = picture()
    probabilities, boxes, tokens = plain_forward(detector, image, "cup . red glasses . table .")
    assert tokens == ["[CLS]", "cup", ".", "red", "glass", "##es", ".", "table", ".", "[SEP]"]
    by_name = np.stack([probabilities[:, span].max(axis=1) for span in ([1], [3, 4, 5], [7])], axis=1)
    prompt_score = probabilities.max(axis=1)
    box_threshold = gap_near(prompt_score, box_quantile)
    text_threshold = gap_near(by_name.max(axis=1), text_quantile)
    over = prompt_score >= box_threshold, by_name.max(axis=1) >= text_threshold
    keep = over[0] & over[1]
    decisive = over[1] if box_quantile > text_quantile else over[0]
    assert keep.any() and (decisive != keep).any(), "the higher threshold must drop something by itself"
    order = np.flatnonzero(keep)[np.argsort(-by_name.max(axis=1)[keep], kind="stable")]

    grounding = detector.detect(
        [image],
        [["cup", "red glasses", "table"]],
        box_threshold=box_threshold,
        text_threshold=text_threshold,
        prompting="joint",
    )[0]
    assert grounding.name_index.tolist() == by_name.argmax(axis=1)[order].tolist()
    assert_same((grounding.boxes, grounding.scores), (boxes[order], by_name.max(axis=1)[order]))


def test_joint_names_past_the_text_limit_go_on_in_a_second_prompt(detector):
    names = [LONG] * 6  # 5 tokens each with the full stop; 22 of the 24 tokens are free: 4 + 2
    passes = []
    hook = detector.model.register_forward_hook(lambda module, inputs, output: passes.append(output.logits))
    try:
        options = {"box_threshold": 0, "text_threshold": 0, "prompting": "joint"}
        grounding = detector.detect([picture()], [names], **options)[0]
    finally:
        hook.remove()
    assert [len(logits) for logits in passes] == [2]
    assert {*grounding.name_index.tolist()} & {4, 5}, "names of the second prompt are found too"


def test_names_are_read_without_case_marks_and_line_breaks(detector):
    written = ["Red\nGlasses.", "wine,  glass", "cup?", "table [SEP] cup"]
    clean = ["red glasses", "wine glass", "cup", "table [sep] cup"]
    one, other = (detector.detect([picture()], [n], box_threshold=0)[0] for n in (written, clean))
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_threshold": 1.5}, "box_threshold must lie in .* got 1.5"),
        ({"text_threshold": -0.1}, "text_threshold must lie in .* got -0.1"),
        ({"box_threshold": float("nan")}, "box_threshold"),
        ({"prompting": "both"}, "separate, joint, got 'both'"),
        ({"names": [["cup", " "]]}, "letter or digit, got ' '"),
        ({"names": [["."]]}, "letter or digit"),
        ({"names": ["cup"]}, "one list of names per image"),
        ({"names": [["cup"], ["cup"]]}, "1 images but 2 lists"),
        ({"names": [[" ".join(["cup"] * 30)]]}, "too long"),
    ],
)
def test_a_wrong_argument_is_named(detector, change, message):
    with pytest.raises(InputError, match=message):
        detector.detect([picture()], **{"names": [["cup"]]} | change)


def test_threads_may_share_a_detector(detector):
    images = [picture(seed=seed) for seed in range(4)]
    alone = [detector.detect([image], [NAMES], box_threshold=0)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: detector.detect([image], [NAMES], box_threshold=0)[0], images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_a_half_precision_file_runs_in_float32_unless_asked(folders, tmp_path):
    folder = shutil.copytree(folders["grounding-dino"], tmp_path / "half")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert GroundingDinoDetector(folder, device="cpu").model.dtype == torch.float32
    asked = GroundingDinoDetector(folder, device="cpu", dtype="bfloat16")
    assert asked.model.dtype == torch.bfloat16
    assert len(asked.detect([picture()], [["cup"]], box_threshold=0)[0].boxes) > 0
    with pytest.raises(InputError, match="'floaty'"):
        GroundingDinoDetector(folder, dtype="floaty")


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_another_kind(folder: Path) -> None:
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(bert).save_pretrained(folder)


def break_weights_absent(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_weights_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def break_weights_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def break_tensor_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"encoder_ffn_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))


def break_special_ids(folder: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?"]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "Check the hub id or the folder"),
        (break_another_kind, "type 'bert'; this detector reads grounding-dino, mm-grounding-dino"),
        (break_weights_absent, "must hold .*model.safetensors"),
        (break_weights_pickled, "must hold .*model.safetensors"),
        (break_weights_cut, "Cannot load"),
        (break_tensor_missing, "lack 1 tensors .* model.text_projection.weight"),
        (break_shapes, "Cannot load"),
        (break_special_ids, "numbers its special tokens"),
    ],
)
def test_a_checkpoint_that_cannot_work_says_so_at_loading(folders, tmp_path, damage, message):
    folder = shutil.copytree(folders["grounding-dino"], tmp_path / "broken")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        GroundingDinoDetector(folder, device="cpu")


def test_a_token_belongs_to_the_name_whose_characters_it_covers():
    cup, glasses = make_prompts(["Cup", "Red Glasses"], "joint", lambda text: [True] * 3, 64)[0].spans
    encoded = tokenizer()("cup . red glasses . ", return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"])
    words = encoded.tokens()
    assert [words[i] for i in token_positions(offsets, cup)] == ["cup"]
    assert [words[i] for i in token_positions(offsets, glasses)] == ["red", "glass", "##es"]
