"""Original Grounding DINO checkpoints, on a small random model saved as a config .py and a .pth."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from detgpt.detectors import Grounding
from detgpt.detectors.groundingdino_py import GroundingDinoPyDetector, _build
from detgpt.errors import InputError, MissingExtraError, ModelError, UnreadableNameError

WORDS = ["cup", "bottle", "red", "wine", "glass", "##es", "table", "cold", "of"]
LONG = "cold glass of wine"  # four tokens
NAMES = ["cup", LONG, "bottle", "table", "red glasses"]
# The package knows the Swin-T encoder in one size and a width of 256 only; all else is as small as it goes.
CONFIG = """
modelname = "groundingdino"
backbone = "swin_T_224_1k"
position_embedding = "sine"
pe_temperatureH = 20
pe_temperatureW = 20
return_interm_indices = [1, 2, 3]
backbone_freeze_keywords = None
enc_layers = 2
dec_layers = 2
pre_norm = False
dim_feedforward = 32
hidden_dim = 256
dropout = 0.0
nheads = 4
num_queries = 12
query_dim = 4
num_patterns = 0
num_feature_levels = 4
enc_n_points = 4
dec_n_points = 4
two_stage_type = "standard"
two_stage_bbox_embed_share = False
two_stage_class_embed_share = False
transformer_activation = "relu"
dec_pred_bbox_embed_share = True
dn_box_noise_scale = 1.0
dn_label_noise_ratio = 0.5
dn_labelbook_size = 2000
embed_init_tgt = True
max_text_len = 256
text_encoder_type = "bert-base-uncased"
use_text_enhancer = True
use_fusion_layer = True
use_checkpoint = True
use_transformer_ckpt = True
use_text_cross_attention = True
text_dropout = 0.0
fusion_dropout = 0.0
fusion_droppath = 0.1
sub_sentence_present = True
"""
OPTIONS = {"device": "cpu", "shortest_edge": 64, "longest_edge": 96}


def needs_package() -> None:
    pytest.importorskip("groundingdino", reason="needs the extra detgpt[groundingdino]")


def save_text_encoder(folder: Path) -> None:
    """A tiny BERT with its tokenizer: our words at the end of a vocabulary with bert-base-uncased's special ids."""
    vocab = [f"[unused{i}]" for i in range(1030)] + WORDS
    for token, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        vocab[index] = token
    BertTokenizer(vocab={token: index for index, token in enumerate(vocab)}).save_pretrained(folder)
    bert = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(bert).save_pretrained(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """config.py, weights.pth and text/, a tiny BERT with its tokenizer."""
    needs_package()
    made = tmp_path_factory.mktemp("original")
    (made / "config.py").write_text(CONFIG)
    save_text_encoder(made / "text")
    torch.manual_seed(0)
    model = _build(made / "config.py", made / "text")
    for name, parameter in model.named_parameters():
        # Fresh weights let the text hardly touch the image; these make every word matter to every box.
        if name.endswith(("gamma_v", "gamma_l")):
            torch.nn.init.constant_(parameter, 1.0)
        elif parameter.dim() > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    # As the makers save it after training on several devices.
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, made / "weights.pth")
    return made


def load(folder: Path) -> GroundingDinoPyDetector:
    return GroundingDinoPyDetector(
        folder / "config.py", folder / "weights.pth", text_encoder=folder / "text", **OPTIONS
    )


@pytest.fixture(scope="session")
def detector(folder) -> GroundingDinoPyDetector:
    return load(folder)


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


def plain_forward(detector: GroundingDinoPyDetector, image: Image.Image, text: str) -> tuple[np.ndarray, ...]:
    """The package used as its makers show it: probabilities (Q, 256), xyxy pixel boxes (Q, 4), tokens."""
    with torch.inference_mode():
        output = detector.model(detector._transform(image, None)[0][None], captions=[text])
    centre, size = output["pred_boxes"][0].split(2, dim=-1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).numpy() * np.tile(image.size, 2)
    boxes = np.clip(boxes, 0, np.tile(image.size, 2))
    return output["pred_logits"][0].sigmoid().numpy(), boxes, detector.model.tokenizer(text).tokens()


@pytest.mark.parametrize("position", range(len(NAMES)))
def test_what_else_is_asked_does_not_change_a_names_boxes(detector, position):
    alone = detector.detect([picture()], [[NAMES[position]]], box_threshold=0)[0]
    together = detector.detect([picture()], [NAMES], box_threshold=0)[0]
    assert_same(of_name(alone, 0), of_name(together, position))


def test_separate_prompts_give_what_the_plain_model_gives_for_one_name(detector):
    image = picture()
    probabilities, boxes, tokens = plain_forward(detector, image, f"{LONG} .")
    assert tokens == ["[CLS]", "cold", "glass", "of", "wine", ".", "[SEP]"]
    scores = probabilities[:, 1:5].max(axis=1)
    order = np.argsort(-scores, kind="stable")
    grounding = detector.detect([image], [["cup", LONG, "table"]], box_threshold=0)[0]
    assert_same(of_name(grounding, 1), (boxes[order], scores[order]))
    assert not np.allclose(of_name(grounding, 0)[0], of_name(grounding, 2)[0], atol=0.5), "names matter"


def test_joint_prompting_scores_each_box_by_the_tokens_of_its_best_name(detector):
    image = picture()
    probabilities, boxes, tokens = plain_forward(detector, image, "cup . red glasses . table .")
    assert tokens == ["[CLS]", "cup", ".", "red", "glass", "##es", ".", "table", ".", "[SEP]"]
    by_name = np.stack([probabilities[:, span].max(axis=1) for span in ([1], [3, 4, 5], [7])], axis=1)
    order = np.argsort(-by_name.max(axis=1), kind="stable")
    grounding = detector.detect(
        [image],
        [["cup", "red glasses", "table"]],
        box_threshold=0,
        text_threshold=0,
        prompting="joint",
    )[0]
    assert grounding.name_index.tolist() == by_name.argmax(axis=1)[order].tolist()
    assert_same((grounding.boxes, grounding.scores), (boxes[order], by_name.max(axis=1)[order]))


def test_a_name_is_scored_by_what_is_known_of_it(detector):
    image = picture()
    probabilities, boxes, tokens = plain_forward(detector, image, "☕ cup .")
    assert tokens == ["[CLS]", "[UNK]", "cup", ".", "[SEP]"]
    order = np.argsort(-probabilities[:, 2], kind="stable")
    grounding = detector.detect([image], [["☕ cup"]], box_threshold=0)[0]
    assert_same((grounding.boxes, grounding.scores), (boxes[order], probabilities[order, 2]))
    with pytest.raises(UnreadableNameError, match="no part of the name '杯子'"):
        detector.detect([image], [["cup", "杯子"]])


def text_features(detector: GroundingDinoPyDetector, text: str) -> torch.Tensor:
    """The text encoder's output (tokens, width) under the mask that keeps phrases apart."""
    from groundingdino.models.GroundingDINO.bertwarper import generate_masks_with_special_tokens

    tokens = detector.model.tokenizer(text, return_tensors="pt")
    mask, positions = generate_masks_with_special_tokens(tokens, detector.model.specical_tokens, None)
    with torch.inference_mode():
        output = detector.model.bert(input_ids=tokens["input_ids"], attention_mask=mask, position_ids=positions)
    return output.last_hidden_state[0]


def test_the_text_encoder_reads_a_phrase_whole_and_without_its_neighbours(detector):
    cup, other_neighbour, other_phrase = (
        text_features(detector, text)[1:3] for text in ("red cup . table", "red cup . wine", "red glass . table")
    )
    torch.testing.assert_close(cup, other_neighbour)
    assert not torch.allclose(cup[0], other_phrase[0], atol=1e-4), "red reads what is red"


def test_joint_prompts_of_two_images_do_not_disturb_each_other(detector):
    names = [["cup", "red wine"], ["red wine", "cup"]]  # as long, but the full stops stand elsewhere
    options = {"box_threshold": 0, "text_threshold": 0, "prompting": "joint"}
    images = [picture(), picture(seed=1)]
    for image, asked, together in zip(images, names, detector.detect(images, names, **options), strict=True):
        alone = detector.detect([image], [asked], **options)[0]
        assert_same((alone.boxes, alone.scores), (together.boxes, together.scores))


def test_images_of_several_sizes_get_what_they_get_alone_and_are_encoded_once(detector):
    images = [picture(), picture(64, 96, seed=1), picture(seed=2)]
    names = [["cup", LONG], ["bottle"], ["table", "cup"]]
    seen = []
    encoder = detector.model.backbone[0]
    hook = encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0].tensors)))
    try:
        batch = detector.detect(images, names, box_threshold=0)
    finally:
        hook.remove()
    assert sum(seen) == 3
    assert detector.model.backbone[0] is encoder
    for image, asked, together in zip(images, names, batch, strict=True):
        alone = detector.detect([image], [asked], box_threshold=0)[0]
        assert_same((alone.boxes, alone.scores), (together.boxes, together.scores))


def test_wrong_arguments_are_named_and_nothing_asked_is_nothing_found(detector):
    assert len(detector.detect([picture()], [[]], box_threshold=0)[0].boxes) == 0
    with pytest.raises(InputError, match="box_threshold"):
        detector.detect([picture()], [["cup"]], box_threshold=2)
    with pytest.raises(InputError, match="letter or digit"):
        detector.detect([picture()], [[""]])


def test_loading_prints_nothing(folder, capsys):
    load(folder)
    assert capsys.readouterr().out == ""


def rewrite_weights(folder: Path, change) -> None:
    weights = torch.load(folder / "weights.pth", weights_only=True)
    torch.save(change(weights), folder / "weights.pth")


def without_a_tensor(checkpoint: dict) -> dict:
    return {"model": {k: v for k, v in checkpoint["model"].items() if k != "module.feat_map.weight"}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.pth").unlink(), "Cannot load the Grounding DINO weights"),
        (
            lambda f: (f / "weights.pth").write_bytes(b"no checkpoint"),
            "Cannot load the Grounding DINO weights",
        ),
        (lambda f: rewrite_weights(f, lambda c: c["model"]), "under the key 'model'"),
        (lambda f: rewrite_weights(f, without_a_tensor), "lack 1 tensors .* feat_map.weight"),
        (lambda f: torch.save({"model": {}, "code": print}, f / "weights.pth"), "Cannot load"),
        (lambda f: (f / "config.py").unlink(), "Cannot read the Grounding DINO config"),
        (lambda f: (f / "config.py").write_text("hidden_dim = 8 *"), "Cannot read the Grounding DINO config"),
        (lambda f: (f / "config.py").write_text("hidden_dim = open('x', 'w')"), "plain assignments"),
        (lambda f: (f / "config.py").write_text("hidden_dim = 32"), "describes: .* no attribute 'position_embedding'"),
        (lambda f: shutil.rmtree(f / "text"), "Pass text_encoder="),
    ],
)
def test_files_that_cannot_work_say_so_at_loading(folder, tmp_path, damage, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken)
    with pytest.raises(ModelError, match=message):
        load(broken)


def refuse_import(monkeypatch, error: ImportError) -> None:
    """Python as it is where the package, or a library under it, is not installed."""
    real_import = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == "groundingdino":
            raise error
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_without_the_package_the_error_names_the_extra_before_any_file_is_read(monkeypatch):
    refuse_import(monkeypatch, ModuleNotFoundError("No module named 'groundingdino'"))
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[groundingdino\]'"):
        GroundingDinoPyDetector("none.py", "none.pth")


def test_without_libgl_the_error_names_the_debian_package(monkeypatch):
    refuse_import(monkeypatch, ImportError("libGL.so.1: cannot open shared object file"))
    with pytest.raises(ModelError, match="apt-get install libgl1"):
        GroundingDinoPyDetector("none.py", "none.pth")
