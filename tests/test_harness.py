"""`detgpt eval --abilities --harness`: tasks of the lm-evaluation-harness, here of a local file, without network."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from detgpt.cli import app
from detgpt.errors import InputError, MissingExtraError
from detgpt.evaluation.harness import Harness, load

QUESTIONS = [
    {"question": "Cups are made of", "choices": ["clay", "jugs and more plates"], "label": 0},
    {"question": "Plates are", "choices": ["cups", "clay clay clay"], "label": 0},
    {"question": "Jugs are made of", "choices": ["a cup", "clay"], "label": 1},
    {"question": "On the desk is", "choices": ["a plate", "a cup, a jug"], "label": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc_norm}, {metric: acc}]
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: bleu}]
"""
NO_SHARE = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


def task(folder: Path, name: str, kind: str, rows: list[dict[str, Any]] = QUESTIONS) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + kind)


def test_a_missing_harness_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[harness\]'"):
        Harness(["arc_easy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harness", "arc_easy"], "give --abilities too"),
        (
            ["--abilities", "--harness-tasks", "mine"],
            "--harness-tasks mine: say with --harness or --vision-harness which",
        ),
    ],
)
def test_half_a_command_is_told(arguments: list[str], message: str) -> None:
    ran = CliRunner().invoke(app, ["eval", *arguments])
    assert ran.exit_code == 1 and message in ran.stderr


def test_something_to_measure_by_is_asked_for() -> None:
    ran = CliRunner().invoke(app, ["eval", "--abilities"])
    assert ran.exit_code == 2 and "DATA" in ran.stderr


pytest.importorskip("lm_eval")  # from here on


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def nats(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """How likely the model itself holds the answer."""
    before, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (question, f"{question} {answer}"))
    with torch.inference_mode():
        likely = model(input_ids=whole).logits.log_softmax(-1)
    places = range(before.shape[1] - 1, whole.shape[1] - 1)
    return sum(float(likely[0, place, whole[0, place + 1]]) for place in places)


def test_a_reasoner_is_asked_and_scored(tmp_path: Path, tiny_reasoner_folder: Path) -> None:
    model, tokenizer = load(tiny_reasoner_folder, "cpu", None)
    likelihoods = [[nats(model, tokenizer, q["question"], choice) for choice in q["choices"]] for q in QUESTIONS]
    right = [row.index(max(row)) == q["label"] for row, q in zip(likelihoods, QUESTIONS, strict=True)]
    assert 0 < sum(right) < 4  # else the order of the choices would not matter
    task(tmp_path / "tasks", "local_choice", CHOICE)
    found = Harness(["local_choice"], tmp_path / "tasks").measure(tiny_reasoner_folder, device="cpu", batch_size=2)
    [(name, result)] = found.items()
    share = sum(right) / 4
    error = math.sqrt(share * (1 - share) / 3)
    assert name == "local_choice · acc" and (result.value, result.n) == (share, 4)
    assert result.low == pytest.approx(max(share - 1.96 * error, 0))
    assert result.high == pytest.approx(min(share + 1.96 * error, 1))


def test_a_number_in_percent_becomes_a_share(tmp_path: Path, tiny_reasoner_folder: Path) -> None:
    model, tokenizer = load(tiny_reasoner_folder, "cpu", None)
    asked = [q["question"] for q in QUESTIONS[:2]]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in asked]
    written = [model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :] for ids in prompts]
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    rows = [{"question": question, "said": text} for question, text in zip(asked, said, strict=True)]
    task(tmp_path / "tasks", "local_written", WRITTEN, rows)
    found = Harness(["local_written"], tmp_path / "tasks").measure(tiny_reasoner_folder, device="cpu")
    assert found["local_written · bleu"].value == pytest.approx(1)


def test_models_stand_side_by_side_with_abilities(tmp_path: Path, tiny_pair_folder: Path) -> None:
    task(tmp_path / "tasks", "local_choice", CHOICE)
    (tmp_path / "talk").mkdir()
    row = {"question": "drink", "targets": ["cup"], "score": "targets"}
    (tmp_path / "talk/data.jsonl").write_text(json.dumps(row))
    models = ["-m", tiny_pair_folder, "-m", tiny_pair_folder / "reasoner", "--device", "cpu"]
    options = ["--harness", "local_choice", "--harness-tasks", tmp_path / "tasks", "--limit", 2]
    numbers = tmp_path / "numbers.json"
    ran = CliRunner().invoke(
        app, ["eval", "--abilities", *map(str, [tmp_path / "talk", *options, *models, "-o", numbers])]
    )
    assert ran.exit_code == 0, ran.output
    shown = [line.split(" | ")[:2] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert shown[2:4] == [["| talk", "1"], ["| local_choice · acc", "2"]]
    written = json.loads(numbers.read_text())
    assert [found["local_choice · acc"]["n"] for found in written.values()] == [2, 2]


def test_a_language_model_is_asked_too(tmp_path: Path) -> None:
    from families import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(end="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    task(tmp_path / "tasks", "local_choice", CHOICE)
    found = Harness(["local_choice"], tmp_path / "tasks").measure(tmp_path / "llama", device="cpu")
    assert found["local_choice · acc"].n == 4


def test_what_cannot_be_measured_is_told(tmp_path: Path, tiny_reasoner_folder: Path) -> None:
    with pytest.raises(InputError, match=r"no task 'arc_eazy': did you mean .*arc_easy"):
        Harness(["arc_eazy"])
    with pytest.raises(InputError, match="there is no folder nowhere"):
        Harness(["arc_easy"], "nowhere")
    (tmp_path / "detgpt.json").write_text('{"reasoner": "vlm", "detector": "d", "base_url": "http://gpu-box/v1"}')
    with pytest.raises(InputError, match="runs at http://gpu-box/v1, and the harness needs its weights here"):
        Harness(["arc_easy"]).measure(tmp_path)
    task(tmp_path / "tasks", "local_text", NO_SHARE)
    with pytest.raises(InputError, match="'local_text' measures word_perplexity, none of acc, f1"):
        Harness(["local_text"], tmp_path / "tasks").measure(tiny_reasoner_folder, device="cpu")


def test_the_tasks_of_the_paper_are_there() -> None:
    paper = ["arc_easy", "arc_challenge", "race", "piqa", "squadv2", "squad_completion", "drop", "wmt14-fr-en"]
    assert Harness(paper).tasks == paper
