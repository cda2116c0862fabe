"""A checkpoint is loaded by what its config.json says it is, wherever it is named."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from clip_detectors import save_omdet, save_owl
from test_grounding_dino import picture, save_checkpoint
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from detgpt import DetGPT, InputError, ModelError
from detgpt.cli import app
from detgpt.flags import Choice
from detgpt.models import DETECTORS, load_detector

SAVE = {
    "grounding-dino": lambda folder: save_checkpoint(folder, "grounding-dino"),
    "mm-grounding-dino": lambda folder: save_checkpoint(folder, "mm-grounding-dino"),
    "omdet-turbo": save_omdet,
    "owlv2": lambda folder: save_owl(folder, "owlv2"),
    "owlvit": lambda folder: save_owl(folder, "owlvit"),
}


@pytest.fixture(scope="module", params=DETECTORS)
def folder(request, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("detector")
    SAVE[request.param](made)
    assert json.loads((made / "config.json").read_text())["model_type"] == request.param
    return made


def test_a_folder_is_loaded_by_its_model_type(folder):
    for source in (folder, str(folder)):
        detector = load_detector(source, device="cpu")
        assert detector.name == str(folder)
        assert len(detector.detect([picture()], [["cup"]], box_threshold=0)[0].boxes) > 0


def test_a_pair_may_name_any_detector(folder, tiny_reasoner_folder, tmp_path):
    shutil.copytree(folder, tmp_path / "detector")
    described = {"reasoner": str(tiny_reasoner_folder), "detector": "detector", "options": {"box_threshold": 0.0}}
    (tmp_path / "detgpt.json").write_text(json.dumps(described))
    result = DetGPT.from_pretrained(tmp_path, device="cpu").detect(picture(), "drink")
    assert set(result.labels) == {"cup"}


def test_the_command_line_takes_any_detector(folder, tmp_path):
    picture().save(tmp_path / "a.png")
    command = ["detect", str(tmp_path / "a.png"), "--names", "cup", "--detector", str(folder), "--box-threshold", "0"]
    ran = CliRunner().invoke(app, [*command, "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["targets"][0]["found"]


SAID = {"precision": "fast", "prompt": "bare"}


def loaded_as_said(model: DetGPT) -> bool:
    """Whether both parts of the tiny pair heard `SAID`: the prompt, and the dtype of a large product."""
    heard = model.reasoner._bare
    layer = model.detector.model.model.encoder.layers[0].deformable_layer
    return heard and layer.fc1.weight.dtype == torch.bfloat16


@pytest.fixture
def fast_in_bfloat16(monkeypatch):
    monkeypatch.setattr("detgpt.detectors.grounding_dino.bfloat16_is_faster", lambda: True)


def test_how_parts_are_loaded_may_be_said_in_python(fast_in_bfloat16, tiny_pair_folder):
    assert loaded_as_said(DetGPT.from_pretrained(tiny_pair_folder, device="cpu", **SAID))
    parts = {"reasoner": tiny_pair_folder / "reasoner", "detector": tiny_pair_folder / "detector"}
    assert loaded_as_said(DetGPT(**parts, device="cpu", **SAID))
    assert not loaded_as_said(DetGPT.from_pretrained(tiny_pair_folder, device="cpu"))


def test_and_in_the_pair_file_where_python_goes_before_it(fast_in_bfloat16, tiny_pair_folder, tmp_path):
    shutil.copytree(tiny_pair_folder, tmp_path / "pair")
    described = json.loads((tmp_path / "pair" / "detgpt.json").read_text())
    (tmp_path / "pair" / "detgpt.json").write_text(json.dumps({**described, **SAID}))
    assert loaded_as_said(DetGPT.from_pretrained(tmp_path / "pair", device="cpu"))
    assert not loaded_as_said(DetGPT.from_pretrained(tmp_path / "pair", device="cpu", precision="exact"))
    (tmp_path / "pair" / "detgpt.json").write_text(json.dumps({**described, "precison": "fast"}))
    with pytest.raises(ModelError, match=r"precison.*may have.*'precision'"):
        DetGPT.from_pretrained(tmp_path / "pair", device="cpu")


def test_and_on_the_command_line(fast_in_bfloat16, tiny_pair_folder):
    choice = Choice(str(tiny_pair_folder), device="cpu", **SAID)
    assert loaded_as_said(choice.load({}))
    parts = {name: str(tiny_pair_folder / name) for name in ("reasoner", "detector")}
    assert loaded_as_said(Choice(**parts, device="cpu", **SAID).load({}))


def test_on_a_cpu_a_half_dtype_is_the_reasoners_alone(tiny_pair_folder):
    model = DetGPT.from_pretrained(tiny_pair_folder, device="cpu", dtype="bfloat16")
    assert (model.reasoner._model.dtype, model.detector.model.dtype) == (torch.bfloat16, torch.float32)


def test_elsewhere_it_is_the_detectors_too(tiny_pair_folder, monkeypatch):
    monkeypatch.setattr("detgpt.device.choose_device", lambda device: torch.device("meta"))  # as a GPU: no CPU
    monkeypatch.setattr("detgpt.detectors.grounding_dino.choose_device", lambda device: torch.device("cpu"))
    detector = load_detector(tiny_pair_folder / "detector", dtype="float16")
    assert detector.model.dtype == torch.float16
    assert len(detector.detect([picture()], [["cup"]], box_threshold=0)[0].boxes) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fats"}, "precision must be one of exact, fast, got 'fats'"),
        ({"prompt": "short"}, 'prompt must be "full" or "bare", not \'short\''),
        ({"coordinates": "thousandths"}, "coordinates='thousandths' is for detector='reasoner'"),
        ({"detector": "reasoner", "precision": "fast"}, "precision and runtime are those of a Grounding DINO"),
        ({"detector": "reasoner", "coordinates": "inches"}, "coordinates must be one of"),
    ],
)
def test_settings_that_do_not_go_together_are_named(given, message, tiny_pair_folder):
    parts = {"reasoner": tiny_pair_folder / "reasoner", "detector": tiny_pair_folder / "detector"}
    with pytest.raises(InputError, match=message):
        DetGPT(**{**parts, **given}, device="cpu")


def test_a_detector_without_precisions_says_so(tmp_path):
    save_owl(tmp_path, "owlv2")
    with pytest.raises(InputError, match=f"precision='fast' is for a Grounding DINO.*not for {tmp_path}"):
        load_detector(tmp_path, device="cpu", precision="fast")
    with pytest.raises(InputError, match="runtime='lean' is for a Grounding DINO loaded by its name"):
        load_detector(load_detector(tmp_path, device="cpu"), runtime="lean")


def test_own_boxes_of_an_unknown_family_need_their_coordinates_told(tiny_pair_folder):
    reasoner = tiny_pair_folder / "reasoner"
    with pytest.raises(InputError, match="coordinates"):
        DetGPT(reasoner, "reasoner", device="cpu")
    told = Choice(reasoner=str(reasoner), detector="reasoner", coordinates="original", device="cpu").load({})
    assert told.detector.coordinates == "original"


def test_a_model_that_is_no_detector_is_named_with_those_that_are(tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(bert).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type 'bert'.*grounding-dino, mm-grounding-dino, omdet-turbo, owlv2, owlvit"):
        load_detector(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["no config", "a broken one", "one without a type"])
def test_a_folder_without_a_usable_config_says_so(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_detector(tmp_path)


def test_the_table_names_all_that_the_backends_read():
    read = {
        (model_type, file, name)
        for file, name in DETECTORS.values()
        for model_type in import_module(f"detgpt.detectors.{file}").MODEL_TYPES
    }
    assert read == {(model_type, *backend) for model_type, backend in DETECTORS.items()}
