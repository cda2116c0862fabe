"""The way of docs/finetune.md, from pictures with boxes to a model that detects by wish, in fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import detgpt
from detgpt.evaluation import evaluate

REPOSITORY = Path(__file__).parent.parent
SAMPLE = REPOSITORY / "examples" / "finetune"
NEEDS = SAMPLE / "needs.yaml"

pytestmark = pytest.mark.slow


def finetune(*arguments: object, folder: Path) -> str:
    command = [sys.executable, "-m", "finetune.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder in which somebody has followed the document."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    fewer = ("--seed", 1, "--wishes", 3, "--absent", 1)  # to measure: it is the same, and faster
    for part, output, options in (("train", "runs/sample-wishes", ()), ("val", "runs/sample-val", fewer)):
        truth = (SAMPLE / part / "annotations.json", SAMPLE / part / "images")
        finetune("data", "wishes", *truth, "--needs", NEEDS, "-o", output, *options, folder=folder)
    steps = ("detector.trainer.max_steps=40", "detector.trainer.eval_steps=40", "detector.trainer.save_steps=40")
    finetune("run", "sample", *steps, "reasoner.trainer.max_steps=60", folder=folder)
    return folder


def test_its_data_is_found_in_order(tuned):
    said = finetune("data", "check", "runs/sample-wishes", "runs/sample-val", folder=tuned)
    assert "no errors" in said.lower() or "0 errors" in said.lower(), said


def test_it_finds_by_wish_what_the_built_in_model_does_not_know(tuned, monkeypatch):
    monkeypatch.chdir(tuned)
    before = evaluate(detgpt.DetGPT.from_pretrained("picto", device="cpu"), tuned / "runs/sample-val")
    after = evaluate(detgpt.DetGPT.from_pretrained("runs/sample", device="cpu"), tuned / "runs/sample-val")
    assert before["reasoner"]["f1"] < 0.05
    assert after["reasoner"]["f1"] > before["reasoner"]["f1"] + 0.03
    assert after["detector"]["ap50"] > before["detector"]["ap50"] + 0.2
    assert after["end_to_end"]["f1_50"] > before["end_to_end"]["f1_50"]


def test_its_settings_and_numbers_stay_with_it(tuned):
    run = json.loads((tuned / "runs/sample/run.json").read_text())
    assert run["finished"] and run["data"]["train"] and run["versions"]["torch"]
    assert (tuned / "runs/sample/recipe.yaml").is_file()
