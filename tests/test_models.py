"""A checkpoint is loaded by what its config.json says it is, wherever it is named."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from clip_detectors import save_omdet, save_owl
from test_grounding_dino import picture, save_checkpoint
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from detgpt import DetGPT, ModelError
from detgpt.cli import app
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
