"""GRPO and RLOO as a user runs them: wishes in, a reasoner out whose answers are worth more."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from PIL import Image
from test_finetune_stages import as_killed_after, recipe, same_weights, text_model, trainer  # noqa: F401
from test_preference_dpo import history
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.data.records import load_records
from finetune.loading import Checkpoint, load
from finetune.picto.splits import FOLDER
from finetune.preference.online import Prompter, trainer_for
from finetune.recipe import run_recipe

SPLIT = FOLDER / "seen"
COLOURS = ("red", "blue")
KINDS = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """The same wish about pictures of two colours."""
    folder = tmp_path_factory.mktemp("colours")
    for colour in COLOURS:
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
    lines = [{"image": f"{c}.png", "instruction": "say it", "targets": [c], "kind": c} for c in COLOURS]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def wishes(tmp_path_factory):
    """A few wishes of the built-in world."""
    folder = tmp_path_factory.mktemp("wishes")
    lines = (SPLIT / "data.jsonl").read_text().splitlines()[:4]
    rows = [{**json.loads(line), "image": str(SPLIT / json.loads(line)["image"])} for line in lines]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(kind, folder, **settings):
    usual = {"per_device_train_batch_size": 32, "num_generations": 16, "max_completion_length": 1, "beta": 0.0}
    quiet = {"report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    return kind(str(folder), remove_unused_columns=False, **usual, **quiet, **settings)


def in_capitals_if_red(answers, records):
    """1 for an answer in capitals about the red picture, or in small letters about the blue one."""
    wanted = {"red": str.isupper, "blue": str.islower}
    return [float(wanted[Path(r["image"]).stem](answer)) for answer, r in zip(answers, records, strict=True)]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_an_answer_that_hangs_on_the_picture_is_learned(kind, settings, tmp_path, llava, colours):
    model, processor = load(Checkpoint(model=str(llava), prompt="bare"), "float32")
    examples = load_records(colours).with_transform(Prompter(processor, bare=True))
    args = arguments(settings, tmp_path, max_steps=30, learning_rate=5e-3, lr_scheduler_type="constant")
    learner = trainer_for(kind, in_capitals_if_red)(model, processor, args, examples, None)
    learner.train()
    rewards = [entry["reward"] for entry in learner.state.log_history if "reward" in entry]
    assert rewards[0] < 0.5 and sum(rewards[-5:]) / 5 > 0.9  # who cannot see gets 0.5 at best


@pytest.mark.parametrize("prompt", ["bare", "full"])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_model_is_asked_as_at_inference_and_the_reward_gets_the_whole_record(
    kind, settings, prompt, tmp_path, llava, colours
):
    model, processor = load(Checkpoint(model=str(llava), prompt=prompt), "float32")
    records = load_records(colours)
    texts, pictures, judged = [], [], []
    model.register_forward_pre_hook(lambda _, args, inputs: texts.append(inputs["input_ids"]), with_kwargs=True)
    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: pictures.append(inputs[0]))

    def reward(answers, records):
        judged.extend(records)
        return [float(i) for i, _ in enumerate(answers)]

    examples = records.with_transform(Prompter(processor, bare=prompt == "bare"))
    args = arguments(settings, tmp_path, max_steps=1, shuffle_dataset=False)
    trainer_for(kind, reward)(model, processor, args, examples, None).train()
    assert processor.tokenizer.padding_side == "right"  # the result's, which is as it was
    assert judged == [record for record in records for _ in range(16)]
    reasoner = HuggingFaceReasoner.of(model, processor, "asked")
    wishes = [Request(load_image(record["image"]), "say it") for record in records for _ in range(16)]
    asked = reasoner._encode(wishes)
    length = asked["input_ids"].shape[1]
    for seen in (texts[0], texts[-1][:, :length]):  # when it writes and when it learns; all wishes are the same …
        assert torch.equal(seen, asked["input_ids"])
    assert torch.equal(pictures[0], asked["pixel_values"])
    is_red = pictures[-1][:, 0].mean((1, 2)) > pictures[-1][:, 2].mean((1, 2))
    assert is_red.sum() == 16  # … and answers are learned from in another order, each with its picture


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_run_is_rewarded_and_goes_on_where_it_was(stage, tmp_path, wishes):
    file = recipe(
        tmp_path,
        stage=stage,
        model="picto",
        detector="picto",
        train=wishes,
        validation=wishes,
        output=tmp_path / "run",
        projector="frozen",
        language="full",
        trainer=trainer(
            max_steps=3,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=2,
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=32,
            learning_rate=1e-4,
            beta=0.1,
            save_total_limit=9,
        ),
    )
    run_recipe(file)  # a step an epoch, each in another order
    metrics = json.loads((tmp_path / "run/run.json").read_text())["metrics"]
    assert metrics["reward"] == history(tmp_path / "run")[-1]["reward"] and metrics["kl"] != 0
    assert metrics["eval_reward"] >= -1 and metrics["answers"] == 3 * 8  # those of the evaluation teach nothing
    copy = as_killed_after(tmp_path / "run", 2, tmp_path / "killed")
    run_recipe(file, [f"output={copy}"])
    assert same_weights(copy / "reasoner/model.safetensors", tmp_path / "run/reasoner/model.safetensors")
    assert json.loads((copy / "run.json").read_text())["metrics"]["answers"] == 3 * 8


def test_text_alone_is_rewarded_too(tmp_path, text_model):  # noqa: F811
    tokens = AutoTokenizer.from_pretrained(text_model)
    tokens.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "data.jsonl").write_text(json.dumps({"instruction": "say it", "targets": []}))
    model, _ = load(Checkpoint(model=str(text_model), prompt="bare"), "float32")
    examples = load_records(tmp_path).with_transform(Prompter(tokens, bare=True))
    args = arguments(GRPOConfig, tmp_path, max_steps=20, learning_rate=5e-3, generation_batch_size=32)

    def in_capitals(answers, records):
        return [float(answer.isupper()) for answer in answers]

    args.per_device_train_batch_size = args.generation_batch_size = 16
    learner = trainer_for(GRPOTrainer, in_capitals)(model, tokens, args, examples, None)
    learner.train()
    rewards = [entry["reward"] for entry in learner.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.per_device_train_batch_size=160", "there are 4 wishes, but 20 are answered together"),
        ("max_length=100", "no wish is cut here"),
        ("reward.acuracy=1", "there is no setting 'reward.acuracy'"),
        ("trainer.num_generations=3", "trainer: "),
    ],
)
def test_settings_that_could_not_work_are_refused(override, said, tmp_path, wishes):
    file = recipe(tmp_path, stage="grpo", model="picto", train=wishes, output=tmp_path / "run", language="full")
    with pytest.raises(InputError, match=said):
        run_recipe(file, [override])
