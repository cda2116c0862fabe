"""Alignment by a model's own answers, as a user runs it: the built-in model on a few wishes, recipe to folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detgpt import DetGPT
from detgpt.errors import InputError
from detgpt.reasoners.chat import is_bare
from finetune.batching import IGNORED
from finetune.data.records import load_records
from finetune.encoding import RecordEncoder
from finetune.loading import load
from finetune.preference.encoding import load_preferences
from finetune.preference.iterations import of_iteration
from finetune.preference.pairs import pairs
from finetune.preference.raft import best, top
from finetune.preference.rewards import RewardSettings
from finetune.preference.samples import fallen, measured
from finetune.recipe import find_recipe, read_recipe, run_recipe
from finetune.rundir import read_run
from finetune.stages import instruct

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/needs"
UNSURE = (23, 57, 81, 92, 96, 103, 125, 129, 152, 164, 176, 201)  # wishes answered now right and now wrong
ITERATIONS = ("01", "02", "03")
TRAINER = ["trainer.report_to=[]", "trainer.learning_rate=3e-4", "trainer.per_device_train_batch_size=4"]


@pytest.fixture(scope="module")
def wishes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wishes")
    shutil.copytree(SPLIT / "images", folder / "images")
    lines = (SPLIT / "data.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join(lines[i] for i in UNSURE))
    return folder


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, wishes):
    """A finished run and the overrides that it had."""
    run = tmp_path_factory.mktemp("raft") / "run"
    overrides = [
        f"train={wishes}",
        f"output={run}",
        "prompts=null",
        "trainer.save_steps=1",
        "sampling.count=4",
        *TRAINER,
    ]
    run_recipe("raft-picto", overrides)
    return run, overrides


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run):
    return [json.loads((run / "iterations" / number / "metrics.json").read_text()) for number in ITERATIONS]


def weights(run):
    return load_file(run / "reasoner/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_reward_rises_and_the_best_answers_are_better_than_the_first(aligned):
    run, _ = aligned
    numbers = metrics(run)
    assert min(found["reward"] for found in numbers[1:]) > numbers[0]["reward"] + 0.2
    for number, found in zip(ITERATIONS, numbers, strict=True):
        samples = lines(run / "iterations" / number / "samples.jsonl")
        assert {key: found[key] for key in ("reward", "best_reward", "distinct_2")} == measured(samples)
        assert found["selected_reward"] == found["best_reward"] >= found["reward"]
        assert [len(row["answers"]) for row in samples] == [len(row["rewards"]) for row in samples] == [4] * len(UNSURE)
    result = json.loads((run / "run.json").read_text())["metrics"]
    assert (result["reward"], result["answers"]) == (numbers[-1]["reward"], 3 * 4 * len(UNSURE))


def test_every_answer_has_the_reward_of_its_own_wish(aligned, wishes):
    run, _ = aligned
    records, reward = load_records(wishes), RewardSettings().build()
    for row in lines(run / "iterations/01/samples.jsonl"):
        record = records[row["record"]]
        assert row["instruction"] == record["instruction"] and row["image"] == record["image"]
        assert reward(row["answers"], [record] * 4) == row["rewards"]


def test_an_iteration_is_a_pair_and_the_last_one_is_the_result(aligned, wishes):
    run, _ = aligned
    record = load_records(wishes)[0]
    answers = [
        DetGPT.from_pretrained(place).detect(record["image"], record["instruction"]).answer
        for place in (run, run / "iterations/03")
    ]
    assert answers[0] == answers[1]
    assert same(weights(run), weights(run / "iterations/03"))
    assert not same(weights(run), weights(run / "iterations/02"))
    assert not list(run.rglob("checkpoint-*"))  # nothing is left of what only a training in progress needs


def test_answers_that_grow_alike_are_told(aligned):
    """On so few wishes they do."""
    run, _ = aligned
    first, *later = metrics(run)
    assert "warning" not in first
    for found in later:
        assert found["distinct_2"] < 0.8 * first["distinct_2"]
        assert f"distinct-2 fell from {first['distinct_2']:.3f} to {found['distinct_2']:.3f}" in found["warning"]
    assert fallen({"distinct_2": 0.5}, {"distinct_2": 0.4}) is None
    assert fallen({"distinct_2": 0.5}, {"distinct_2": 0.399}) is not None


def test_the_best_answers_are_learned_and_the_question_is_not(aligned):
    run, _ = aligned
    chosen = run / "iterations/01/chosen"
    samples = lines(run / "iterations/01/samples.jsonl")
    config = read_recipe(find_recipe("instruct-picto"))
    model, processor = load(config, "float32")
    encoder = RecordEncoder(processor, bare=is_bare(model.config))
    for record, sampled in zip(load_records(chosen), samples, strict=True):
        best_answer = sampled["answers"][sampled["rewards"].index(max(sampled["rewards"]))]
        example = encoder.encode(record)
        learned = example["labels"] != IGNORED
        assert processor.tokenizer.decode(example["input_ids"][learned]) == best_answer + processor.tokenizer.eos_token
        assert sampled["instruction"] in processor.tokenizer.decode(example["input_ids"][~learned])


def remove(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def unscored(run: Path) -> None:
    """The answers are there, their rewards are not."""
    file = run / "iterations/03/samples.jsonl"
    rows = [{key: value for key, value in row.items() if key != "rewards"} for row in lines(file)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.mark.parametrize("done", ["answers", "rewards", "chosen", "learned"])
def test_a_run_goes_on_with_the_step_that_is_missing(done, aligned, tmp_path):
    whole, overrides = aligned
    run = shutil.copytree(whole, tmp_path / "run")
    third = run / "iterations/03"
    result = [run / "reasoner", run / "detgpt.json"]
    learning = [third / name for name in ("reasoner", "detgpt.json", "run.json", "recipe.yaml")]
    choosing = [third / "metrics.json", third / "chosen"]
    lost = {"answers": learning + choosing, "rewards": learning + choosing, "chosen": learning}
    for place in result + lost.get(done, []):
        remove(place)
    if done == "answers":
        unscored(run)
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**described, "finished": None, "metrics": {}}))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name != "recipe.yaml"}
    run_recipe("raft-picto", [*overrides, f"output={run}"])
    again = {file for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert again == {run / "run.json"} | ({third / "samples.jsonl"} if done == "answers" else set())
    assert same(weights(run), weights(whole)) and metrics(run) == metrics(whole)


def test_a_run_that_was_killed_while_it_learned_goes_on_from_there(aligned, tmp_path):
    whole, overrides = aligned
    run = tmp_path / "run"
    overrides = [*overrides, "iterations=1", f"output={run}"]
    command = [sys.executable, "-m", "finetune.cli", "run", "raft-picto", *overrides]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (run / "iterations/01/checkpoints/checkpoint-2/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "iterations/01/reasoner").exists()
    run_recipe("raft-picto", overrides)
    assert same(weights(run), weights(whole / "iterations/01"))


def sampled(answers: dict[str, float], instruction: str = "a cup"):
    return {"instruction": instruction, "image": "1.png", "answers": list(answers), "rewards": list(answers.values())}


SAMPLES = [
    sampled({"a": 0.5, "b": 1.0, "c": 1.0, "d": 0.0}),
    sampled({"e": 0.2, "f": 0.2, "g": 0.2, "h": 0.2}),
    sampled({"": 2.0, "i": 0.9, "j": 0.1, " ": -9.0}),  # an answer without a word is nothing to learn
]


def said(chosen):
    return [row["answers"][i] for row, i in chosen]


def test_the_best_of_each_wish_or_of_all():
    assert said(best(SAMPLES)) == ["b", "e", "i"]
    assert said(top(SAMPLES, 0.3)) == ["b", "c", "i"]
    assert said(top(SAMPLES, 0.01)) == ["b"]
    assert measured(SAMPLES)["reward"] == pytest.approx((0.5 + 0.2 + 2) / 3)  # of the first answers
    assert measured(SAMPLES)["best_reward"] == pytest.approx((1 + 0.2 + 2) / 3)


def test_pairs_of_a_better_and_a_worse_answer():
    rows = pairs(SAMPLES, "max_min")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "d"), ("i", "j")]  # all alike makes no pair
    drawn = [pairs(SAMPLES, "max_random", seed=seed)[0] for seed in range(20)]
    assert {(row["chosen"], row["rejected"]) for row in drawn} == {("b", "a"), ("b", "d")}
    assert pairs(SAMPLES, "max_random", seed=3) == pairs(SAMPLES, "max_random", seed=3)


def test_iterative_dpo_prefers_the_better_of_its_own_answers(wishes, tmp_path):
    run = tmp_path / "run"
    settings = [
        "prompts=6",
        "iterations=2",
        "trainer.num_train_epochs=3",
        "trainer.logging_steps=1",
        "sampling.count=4",
        *TRAINER,
    ]
    run_recipe("iterative-dpo-picto", [f"train={wishes}", f"output={run}", *settings])
    drawn = [[row["record"] for row in lines(run / f"iterations/{n}/samples.jsonl")] for n in ("01", "02")]
    assert [len(set(records)) for records in drawn] == [6, 6] and drawn[0] != drawn[1]  # none twice, others each time
    for number in ("01", "02"):
        place = run / "iterations" / number
        samples = {row["instruction"]: row for row in lines(place / "samples.jsonl")}
        worth = {key: dict(zip(row["answers"], row["rewards"], strict=True)) for key, row in samples.items()}
        for pair in load_preferences(place / "chosen"):
            assert worth[pair["instruction"]][pair["chosen"]] > worth[pair["instruction"]][pair["rejected"]]
        assert json.loads((place / "run.json").read_text())["metrics"]["rewards/margins"] > 0
    assert same(weights(run), weights(run / "iterations/02"))
    assert json.loads((run / "run.json").read_text())["metrics"]["answers"] == 2 * 6 * 4


def test_what_changes_the_first_checkpoint_is_not_done_twice():
    overrides = ["rope_scaling.factor=2", "revision=main", "language=lora", "lora.r=4"]
    config = read_recipe(find_recipe("raft-picto"), overrides)
    settings = {"train": Path("chosen"), "output": Path("01")}
    first = of_iteration(instruct.Config, config, config.model, **settings)
    later = of_iteration(instruct.Config, config, "runs/01", **settings)
    assert first.rope_scaling == config.rope_scaling and first.revision == "main"
    assert later.rope_scaling is None and later.revision is None
    assert later.model == "runs/01" and later.lora.r == 4 and later.stage == "instruct"


def test_what_cannot_be_done_is_said_before_anything_is(wishes, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(InputError, match="prompts=13, but there are 12 wishes"):
        run_recipe("raft-picto", [f"train={wishes}", f"output={output}", "prompts=13"])
    (tmp_path / "data.jsonl").write_text('{"text": "Cups are made of clay."}')
    with pytest.raises(InputError, match="line 1: only a wish about an image"):
        run_recipe("raft-picto", [f"train={tmp_path}", f"output={output}", "prompts=null"])
    assert not output.exists()


def test_where_no_answer_is_better_there_is_nothing_to_prefer(wishes, tmp_path):
    settings = [f"train={wishes}", f"output={tmp_path / 'run'}", "prompts=1", "sampling.count=1"]
    with pytest.raises(InputError, match="of no wish is one answer better than another"):
        run_recipe("iterative-dpo-picto", settings)


def test_replayed_records_are_learned_beside_the_chosen_answers_none_twice_before_all_have_come(wishes, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    asked = [{"role": "user", "content": "Is tea hot?"}, {"role": "assistant", "content": "Yes."}]
    wish = {"image": str(SPLIT / "images/0000.webp"), "instruction": "A cup", "targets": ["cup"]}
    (old / "data.jsonl").write_text("\n".join(map(json.dumps, [{"messages": asked}, wish])))
    run_recipe(
        "raft-picto",
        [
            f"train={wishes}",
            f"output={tmp_path / 'run'}",
            "prompts=6",
            "iterations=1",
            "sampling.count=2",
            f"replay={old}",
            "replay_ratio=0.5",
            *TRAINER,
        ],
    )
    learned = lines(tmp_path / "run/iterations/01/chosen/data.jsonl")
    assert len(learned) == 9
    *chosen, one, two, three = learned
    assert all("answer" in row for row in chosen)
    assert {"messages" in one, "messages" in two} == {True, False} and three in (one, two)
    assert read_run(tmp_path / "run")["data"].keys() == {"train", "replay"}
