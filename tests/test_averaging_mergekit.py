"""The same average for mergekit: what its rule reads from our file is what we write ourselves."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from families import LANGUAGE
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from finetune.averaging.ratios import of_tensors
from finetune.cli import app

RATIOS = {"language.0-1": 0.1, "language.2-9": 0.55, "language.10-11": 0.9}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mergekit")
    for name in ("base", "tuned"):
        model = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "num_hidden_layers": 12}, vocab_size=32))
        model.bfloat16().save_pretrained(folder / name)
    (folder / "ratios.json").write_text(json.dumps(RATIOS))
    places = [str(folder / name) for name in ("base", "tuned", "ours")]
    arguments = ["--ratios", str(folder / "ratios.json"), "--mergekit", str(folder / "merge.yaml")]
    result = CliRunner().invoke(app, ["average", *places, *arguments])
    assert result.exit_code == 0, result.output
    return folder


def weight_of(name, filters):
    """mergekit's own rule: the first filter that is a part of the name."""
    return next(entry["value"] for entry in filters if entry.get("filter", "") in name)


def test_every_tensor_has_its_ratio(exported):
    base, tuned = yaml.safe_load((exported / "merge.yaml").read_text())["models"]
    assert (base["model"], tuned["model"]) == (str(exported / "base"), str(exported / "tuned"))
    shapes = {name: value.shape for name, value in load_file(exported / "base/model.safetensors").items()}
    for name, ratio in of_tensors(shapes, RATIOS).items():
        assert weight_of(name, tuned["parameters"]["weight"]) == ratio
        assert weight_of(name, base["parameters"]["weight"]) == pytest.approx(1 - ratio)


def test_mergekit_makes_the_same_model(exported):
    pytest.importorskip("mergekit", reason="mergekit is optional")
    command = ["-m", "mergekit.scripts.run_yaml", "merge.yaml", "theirs", "--no-write-model-card"]
    subprocess.run([sys.executable, *command], cwd=exported, check=True, capture_output=True)
    ours = load_file(exported / "ours/model.safetensors")
    theirs = {k: v for f in (exported / "theirs").glob("*.safetensors") for k, v in load_file(f).items()}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2**-7, atol=1e-6, msg=name)  # one unit in the last place
