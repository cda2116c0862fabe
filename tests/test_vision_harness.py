"""`detgpt eval --abilities --vision-harness`: tasks of lmms-eval, here of a local file, without network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detgpt.cli import app
from detgpt.errors import InputError, MissingExtraError
from detgpt.evaluation.abilities import evaluate_abilities
from detgpt.evaluation.vision_harness import VisionHarness

SEEN = Path(__file__).parents[1] / "finetune/picto/splits/seen/images"
QUESTIONS = [
    {"image": str(SEEN / f"{i:04d}.webp"), "question": "What is in the picture?", "answer": answer}
    for i, answer in enumerate(["something", "I see", "nothing of this"])
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output_type}
doc_to_visual: !function functions.{visual}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 64, until: ["Targets"]}}
process_results: !function functions.scores
metric_list:
  - metric: long
    aggregation: mean
    higher_is_better: true
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def picture(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def pictures(doc):
    return 2 * picture(doc)

def scores(doc, results):
    said = results[0].lower()
    right = float(doc["answer"].lower() in said and "targets" not in said)
    return {"long": float(len(said)), "names": right, "points": 100 + right}
"""


def tasks(
    folder: Path, name: str, visual: str = "picture", output: str = "generate_until", metric: str = "names"
) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    text = TASK.format(name=name, file=file, visual=visual, output_type=output, metric=metric)
    (folder / f"{name}.yaml").write_text(text)
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def test_a_missing_harness_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[vision-harness\]'"):
        VisionHarness(["pope"])


def test_it_goes_with_abilities() -> None:
    ran = CliRunner().invoke(app, ["eval", "--vision-harness", "pope"])
    assert ran.exit_code == 1 and "give --abilities too" in ran.stderr


pytest.importorskip("lmms_eval")  # from here on


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_built_in_reasoner_is_shown_pictures_asked_and_scored(tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", "local_pictures")
    found = VisionHarness(["local_pictures"], folder).measure("picto", batch_size=2, device="cpu")
    said: list[str] = []
    (tmp_path / "own").mkdir()
    rows = [{**row, "score": "exact"} for row in QUESTIONS]
    (tmp_path / "own/data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate_abilities("picto", tmp_path / "own", each=lambda _, __, text, ___: said.append(text))
    right = [row["answer"].lower() in text.lower() for row, text in zip(QUESTIONS, said, strict=True)]
    assert 0 < sum(right) < 3  # else any answer would do
    [(name, result)] = found.items()
    assert name == "local_pictures · names"
    assert (result.value, result.n) == (pytest.approx(sum(right) / 3), 3)
    assert result.low is None or result.low <= result.value


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"visual": "pictures"}, "shows 2 pictures at once"),
        ({"metric": "points"}, "measures .*long.*points.*, of which none is a share"),
    ],
)
def test_what_cannot_be_measured_is_told(how: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", "local_odd", **how)
    with pytest.raises(InputError, match=message):
        VisionHarness(["local_odd"], folder).measure("picto", device="cpu")


def test_an_unknown_task_is_told_with_one_like_it() -> None:
    with pytest.raises(InputError, match=r"no task 'popee': did you mean .*pope"):
        VisionHarness(["popee"])
