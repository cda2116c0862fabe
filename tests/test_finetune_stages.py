"""Training a reasoner as a user does: a recipe in, a folder out that DetGPT loads, whatever comes between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from families import FAMILIES, LANGUAGE, tokenizer
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from detgpt import DetGPT
from detgpt.errors import InputError, MissingExtraError
from finetune.export import export
from finetune.loading import Checkpoint, load
from finetune.parts import part_of
from finetune.recipe import run_recipe
from finetune.stages.pretrain import rows

LESSONS = {"I am thirsty": '["cup"]', "I am cold": "[]", "I collect": '["bottle", "cup"]', "I store oil": '["bottle"]'}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for i in range(4):
        Image.effect_noise((40, 32), 60 + 20 * i).convert("RGB").save(folder / f"{i}.png")
    wishes = [
        {"image": f"{i}.png", "instruction": wish, "targets": json.loads(names)}
        for i, (wish, names) in enumerate(LESSONS.items())
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, wishes)))
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


def recipe(folder: Path, **settings) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}))
    return file


def trainer(**settings):
    usual = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "report_to": []}
    return {**usual, "warmup_steps": 0, **settings}


def losses(output: Path) -> list[float]:
    last = max((output / "checkpoints").glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def instructed(tmp_path_factory, records, llava, tiny_detector_folder):
    """A finished run, in which everything trained."""
    folder = tmp_path_factory.mktemp("instructed")
    file = recipe(
        folder,
        stage="instruct",
        model=llava,
        detector=str(tiny_detector_folder),
        train=records,
        output=folder / "run",
        prompt="bare",
        language="full",
        trainer=trainer(max_steps=60, save_steps=60, report_to=["tensorboard"]),
    )
    run_recipe(file)
    return file, folder / "run"


def test_the_loss_falls_and_the_result_answers_as_it_was_taught(instructed, records):
    _, run = instructed
    curve = losses(run)
    assert curve[-1] < curve[0] / 2
    model = DetGPT.from_pretrained(run)
    for i, (wish, names) in enumerate(LESSONS.items()):
        result = model.detect(records / f"{i}.png", wish)
        assert [target.name for target in result.targets] == json.loads(names)


def test_a_run_keeps_what_it_took(instructed, records):
    _, run = instructed
    described = json.loads((run / "run.json").read_text())
    assert described["finished"] and described["seed"] == 0 and described["versions"]["torch"] == version("torch")
    assert described["metrics"]["loss"] == losses(run)[-1]
    assert len(described["data"]["train"]) == 64
    assert yaml.safe_load((run / "recipe.yaml").read_text())["trainer"]["max_steps"] == 60
    assert list((run / "tensorboard").iterdir())
    assert not list((run / "reasoner").glob("*.bin"))
    assert AutoModelForImageTextToText.from_pretrained(run / "reasoner").config.detgpt_prompt == "bare"


def test_a_finished_run_is_not_trained_again_and_not_overwritten(instructed, records, capsys):
    file, run = instructed
    before = (run / "run.json").read_bytes()
    run_recipe(file)
    assert "is finished: nothing to do" in " ".join(capsys.readouterr().err.split())
    assert (run / "run.json").read_bytes() == before
    with pytest.raises(InputError, match="holds a run with another 'seed'"):
        run_recipe(file, ["seed=1"])


def as_killed_after(output: Path, step: int, copy: Path) -> Path:
    """What was there when the run in `output` had written its checkpoint of `step`, and no more."""
    shutil.copytree(output, copy)
    for later in ("reasoner", "adapter", "detgpt.json"):
        shutil.rmtree(copy / later, ignore_errors=True)
    (copy / "detgpt.json").unlink(missing_ok=True)
    for checkpoint in (copy / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            (checkpoint / "trainer_state.json").write_text('{"cut sho')  # and the next one was being written
    described = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**described, "finished": None, "metrics": {}}))
    return copy


@pytest.mark.parametrize(
    "settings",
    [
        {"language": "full", "vision": "full"},
        {"language": "lora", "lora": {"r": 2, "dropout": 0.2}},
        {"language": "lisa", "lisa": {"layers": 1, "every": 1}},
    ],
    ids=["full", "lora", "lisa"],
)
def test_a_run_that_goes_on_ends_with_the_very_same_weights(settings, tmp_path, records, llava):
    file = recipe(
        tmp_path,
        stage="instruct",
        model=llava,
        train=records,
        output=tmp_path / "run",
        prompt="bare",
        trainer=trainer(max_steps=5, save_steps=2, per_device_train_batch_size=2, save_total_limit=9),
        **settings,
    )
    run_recipe(file)
    for step in (2, 5):  # on the way, and between the last step and the result
        copy = as_killed_after(tmp_path / "run", step, tmp_path / f"killed at {step}")
        run_recipe(file, [f"output={copy}"])
        assert same_weights(copy / "reasoner/model.safetensors", tmp_path / "run/reasoner/model.safetensors")
        assert len(losses(copy)) == 5


def test_a_process_that_was_killed_goes_on_where_it_was(tmp_path, records, llava):
    file = recipe(
        tmp_path,
        stage="instruct",
        model=llava,
        train=records,
        output=tmp_path / "killed",
        prompt="bare",
        language="full",
        trainer=trainer(max_steps=40, save_steps=10),
    )
    command = [sys.executable, "-m", "finetune.cli", "run", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed/checkpoints/checkpoint-10/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/reasoner").exists()
    run_recipe(file)
    run_recipe(file, [f"output={tmp_path / 'straight'}"])
    assert same_weights(
        tmp_path / "killed/reasoner/model.safetensors", tmp_path / "straight/reasoner/model.safetensors"
    )


def test_merged_adapters_are_the_adapted_model(tmp_path, records, llava):
    file = recipe(
        tmp_path,
        stage="instruct",
        model=llava,
        train=records,
        output=tmp_path / "run",
        language="lora",
        vision="lora",
        trainer=trainer(max_steps=3),
    )
    run_recipe(file)
    base, processor = load(Checkpoint(model=str(llava)), "auto")
    inputs = processor(text="<image>USER: hello", images=Image.new("RGB", (32, 32), "red"), return_tensors="pt")
    before = base.eval()(**inputs).logits
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/reasoner").eval()
    with torch.inference_mode():
        theirs, ours = adapted(**inputs).logits, merged(**inputs).logits
    assert (theirs - before).abs().max() > 0.01  # it has learned something
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_alignment_trains_the_projector_alone(tmp_path, records, llava):
    file = recipe(
        tmp_path,
        stage="align",
        model=llava,
        train=records,
        validation=records,
        output=tmp_path / "run",
        by_length=True,
        packing=True,
        trainer=trainer(max_steps=2, eval_strategy="steps", eval_steps=1),
    )
    run_recipe(file)
    before, after = load_file(llava / "model.safetensors"), load_file(tmp_path / "run/reasoner/model.safetensors")
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector"}
    assert "eval_loss" in json.loads((tmp_path / "run/run.json").read_text())["metrics"]
    run_recipe(
        file, ["stage=instruct", f"model={tmp_path / 'run'}", f"output={tmp_path / 'second'}"]
    )  # goes on from it
    assert (tmp_path / "second/reasoner").is_dir()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokens = tokenizer(end="</s>")
    config = LlamaConfig(vocab_size=len(tokens), **LANGUAGE, max_position_embeddings=64, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def test_text_is_cut_into_whole_rows_and_all_of_it_is_learned(text_model):
    tokens = AutoTokenizer.from_pretrained(text_model)
    texts = ["cups " * 10, "", "plates " * 20, "jugs"]
    cut = rows(Dataset.from_dict({"text": texts}), tokens, 32)
    assert {len(row) for row in cut["input_ids"][:-1]} == {32} and list(cut["labels"]) == list(cut["input_ids"])
    joined = tokens.decode([token for row in cut["input_ids"] for token in row])
    assert joined == "".join(f"{text}</s>" for text in texts if text)
    with pytest.raises(InputError, match="no record with 'text'"):
        rows(Dataset.from_dict({"text": [None, ""]}), tokens, 32)


def test_pretraining_learns_text_in_whole_rows(tmp_path, text_model):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "cups are made of clay. " * n}) for n in (1, 9)))
    file = recipe(
        tmp_path,
        stage="pretrain",
        model=text_model,
        train=tmp_path,
        output=tmp_path / "run",
        trainer=trainer(max_steps=30),
    )
    run_recipe(file)
    curve = losses(tmp_path / "run")
    assert curve[-1] < curve[0] / 2
    assert not (tmp_path / "run/detgpt.json").exists()  # it sees nothing, so it makes no pair


@pytest.mark.parametrize(("rope_type", "longest"), [("yarn", 256), ("linear", 256), ("dynamic", 64)])
def test_a_longer_context_is_trained_and_kept(rope_type, longest, tmp_path, text_model):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "cups are made of clay. " * 20}))
    file = recipe(
        tmp_path,
        stage="pretrain",
        model=text_model,
        train=tmp_path,
        output=tmp_path / "run",
        max_length=256,
        rope_scaling={"rope_type": rope_type, "factor": 4},
        trainer=trainer(max_steps=1),
    )
    run_recipe(file)
    config = AutoConfig.from_pretrained(tmp_path / "run/reasoner")
    assert config.rope_parameters["rope_type"] == rope_type and config.max_position_embeddings == longest
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/reasoner")
    assert model(torch.ones(1, 200, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(InputError, match=f"already has '{rope_type}'"):
        run_recipe(file, [f"model={tmp_path / 'run/reasoner'}", f"output={tmp_path / 'twice'}"])


def test_four_bits_need_a_gpu_and_bitsandbytes(tmp_path, records, llava):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = recipe(tmp_path, stage="instruct", model=llava, train=records, output=tmp_path / "run", language="qlora")
    with pytest.raises((InputError, MissingExtraError), match=r"needs a GPU|pip install 'detgpt\[quantization\]'"):
        run_recipe(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.lerning_rate=1", "SFTConfig has no such setting; the nearest is 'learning_rate'"),
        ("trainer.max_steps=many", "trainer.max_steps = 'many'"),
        ("trainer.output_dir=here", "trainer.output_dir is not yours to set"),
        ("trainer.lr_scheduler_type=zigzag", "zigzag"),
        ("vision=half", "vision = 'half'"),
        ("rope_scaling.factor=1", "rope_scaling.factor = 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(override, said, tmp_path, records, llava):
    file = recipe(tmp_path, stage="instruct", model=llava, train=records, output=tmp_path / "run")
    with pytest.raises(InputError, match=said):
        run_recipe(file, [override])
    assert not (tmp_path / "run").exists()


def test_data_that_changed_since_is_noticed(instructed, records, tmp_path):
    file, run = instructed
    copy = as_killed_after(run, 60, tmp_path / "run")
    others = shutil.copytree(records, tmp_path / "records")
    settings = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**settings, "train": str(others)}))
    (others / "data.jsonl").write_text((others / "data.jsonl").read_text().replace("thirsty", "hungry"))
    with pytest.raises(InputError, match="what 'train' names has changed since"):
        run_recipe(file, [f"output={copy}", f"train={others}"])


def test_an_exported_run_is_a_pair_by_itself_with_a_card(instructed, records, tmp_path):
    _, run = instructed
    out = export(run, tmp_path / "kitchen")
    assert (out / "reasoner/model.safetensors").is_file() and (out / "detector/model.safetensors").is_file()
    result = DetGPT.from_pretrained(out).detect(records / "0.png", "I am thirsty")
    assert [target.name for target in result.targets] == ["cup"]
    card = (out / "README.md").read_text()
    described = json.loads((run / "run.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == yaml.safe_load((run / "recipe.yaml").read_text())["model"]
    for said in (described["data"]["train"], f"{described['metrics']['loss']:.6g}", described["versions"]["trl"]):
        assert said in card
    with pytest.raises(InputError, match="exists already"):
        export(run, out)
    with pytest.raises(InputError, match="is not finished"):
        export(as_killed_after(run, 60, tmp_path / "run"), tmp_path / "other")
    with pytest.raises(InputError, match="no run's folder"):
        export(tmp_path, tmp_path / "other")
