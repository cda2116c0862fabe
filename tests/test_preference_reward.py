"""Reward models as a user makes them: pairs of answers in, a reward out that knows the better one by the picture."""

import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from test_finetune_stages import as_killed_after, recipe, same_weights, text_model, trainer  # noqa: F401
from transformers import AutoTokenizer

from detgpt.errors import InputError, ModelError
from detgpt.evaluation.calibration import expected_calibration_error
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.batching import collator
from finetune.data.records import load_records
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.preference.reward import measured, pair_loss, true_margins
from finetune.preference.reward_model import LearnedReward
from finetune.preference.rewards import RewardSettings
from finetune.recipe import run_recipe

COLOURS = ("red", "blue")
NO_WEIGHTS = {"accuracy": 0, "format": 0, "length": 0, "hallucination": 0}


class Scoring(Checkpoint):
    scores = True


def answer(colour):
    return f'Targets: ["{colour}"]'


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """The same wish and the same two answers, of which the picture says which is better."""
    folder = tmp_path_factory.mktemp("colours")
    lines = []
    for colour, other in (COLOURS, COLOURS[::-1]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        pair = {"chosen": answer(colour), "rejected": answer(other)}
        lines.append({"image": f"{colour}.png", "instruction": "say it", "targets": [colour], **pair})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def reward_recipe(folder, model, pairs, **settings):
    at_the_end = trainer(max_steps=12, learning_rate=5e-3, eval_strategy="steps", eval_steps=12)
    usual = {"validation": pairs, "language": "full", "output": folder / "run", "trainer": at_the_end}
    return recipe(folder, stage="reward", model=model, train=pairs, **usual | settings)


def batch_of(processor, *answers, image=None):
    record = {"image": image, "instruction": "Hi", "messages": [{"role": "user", "content": "Hi"}], "where": ""}
    turns = [[*record["messages"], {"role": "assistant", "content": said}] for said in answers]
    encoder = RecordEncoder(processor, bare=True)
    return [encoder.encode({**record, "messages": messages}) for messages in turns]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_what_its_language_model_reads(family, tmp_path, colours):
    """From the very weights of the reasoner; a long answer beside it does not matter; what is saved loads."""
    folder = FAMILIES[family](tmp_path / "reasoner")
    model, processor = load(Scoring(model=str(folder)), "float32")
    reasoner, _ = load(Checkpoint(model=str(folder)), "float32")
    examples = batch_of(processor, "yes", "no, not at all", image=str(colours / "red.png"))
    collate = collator(model, processor)
    together, alone = collate(examples), collate(examples[:1])
    for batch in (together, alone):
        del batch["labels"]
    model.eval()
    reasoner.eval()
    with torch.no_grad():
        scores = model(**together).logits
        read = reasoner(**alone, output_hidden_states=True).hidden_states[-1][0, -1]
        assert scores.shape == (2,)
        assert scores[0].item() == pytest.approx((model.score.weight[0] @ read).item(), abs=1e-4)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, _ = load(Checkpoint(model=str(tmp_path / "saved")), "float32")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**together).logits, scores, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in loaded.named_parameters() if name.startswith("lm_head")]


@pytest.mark.parametrize("language", ["full", "lora", "lisa"])
def test_the_picture_says_which_answer_is_better(language, tmp_path, llava, colours):
    lisa = {"layers": 1, "every": 3}
    run_recipe(reward_recipe(tmp_path, llava, colours, language=language, lora={"r": 4}, lisa=lisa))
    run = tmp_path / "run"
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert metrics["eval_accuracy"] == metrics["eval_agreement"] == 1  # who cannot see gets 0.5
    assert not (run / "detgpt.json").exists()
    reward = LearnedReward(run, device="cpu")
    records = [record for record in load_records(colours) for _ in COLOURS]
    scores = reward([*map(answer, COLOURS)] * 2, records)
    margins = np.array([scores[0] - scores[1], scores[3] - scores[2]])
    assert np.log1p(np.exp(-margins)).mean() == pytest.approx(metrics["eval_loss"], abs=1e-3)
    sure = (1 / (1 + np.exp(-margins))).tolist()
    assert metrics["eval_calibration"] == pytest.approx(expected_calibration_error(sure, [True, True]), abs=1e-3)
    settings = RewardSettings(model=run / "reward_model", learned=2, **NO_WEIGHTS)
    assert settings.build()([answer("red")], records[:1]) == pytest.approx([2 * scores[0]], abs=1e-4)


def test_the_whole_wish_is_read_as_at_inference(tmp_path, llava, colours):
    model, processor = load(Scoring(model=str(llava)), "float32")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reward, seen = LearnedReward(tmp_path, device="cpu"), []
    reward._model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    record = load_records(colours)[0]
    told = {**record, "messages": [*record["messages"], {"role": "assistant", "content": "the right answer"}]}
    reward([answer("red"), ""], [record, told])
    lm, _ = load(Checkpoint(model=str(llava)), "float32")
    asked = HuggingFaceReasoner.of(lm, processor, "asked")._encode(
        [Request(Image.open(colours / "red.png"), record["instruction"])]
    )
    length = asked["input_ids"].shape[1]
    (inputs,) = seen
    for row in inputs["input_ids"]:
        assert torch.equal(row[:length], asked["input_ids"][0])
    assert processor.decode(inputs["input_ids"][0, length:]) == 'Targets: ["red"]</s>'
    assert processor.decode(inputs["input_ids"][1, length:], skip_special_tokens=True) == ""
    assert torch.equal(inputs["pixel_values"][:1], asked["pixel_values"])


def test_text_alone_is_scored_too(tmp_path, text_model):  # noqa: F811
    tokens = AutoTokenizer.from_pretrained(text_model)
    tokens.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens.save_pretrained(text_model)
    talk = [{"role": "user", "content": "2+2"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": talk, "chosen": "4", "rejected": "five"}))
    steps = trainer(max_steps=10, learning_rate=1e-2)
    run_recipe(reward_recipe(tmp_path, text_model, tmp_path, projector="frozen", trainer=steps))
    metrics = json.loads((tmp_path / "run/run.json").read_text())["metrics"]
    assert metrics["eval_accuracy"] == 1 and "eval_agreement" not in metrics
    good, bad = LearnedReward(tmp_path / "run", device="cpu")(["4", "five"], [load_records(tmp_path)[0]] * 2)
    assert good > bad


@pytest.mark.parametrize("language", ["full", "lora"])
def test_a_run_that_goes_on_ends_with_the_very_same_weights(language, tmp_path, llava, colours):
    steps = trainer(max_steps=4, save_steps=2, per_device_train_batch_size=1, save_total_limit=9)
    file = reward_recipe(tmp_path, llava, colours, language=language, projector="frozen", trainer=steps)
    run_recipe(file)
    copy = as_killed_after(tmp_path / "run", 2, tmp_path / "killed")
    run_recipe(file, [f"output={copy}"])
    assert same_weights(copy / "reward_model/model.safetensors", tmp_path / "run/reward_model/model.safetensors")


def test_accumulated_gradients_are_those_of_the_batch(tmp_path, llava, colours):
    """The trainer must not add up what is a mean."""
    norms = []
    for size in (2, 1):
        steps = trainer(
            max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size, logging_steps=1
        )
        run_recipe(reward_recipe(tmp_path, llava, colours, output=tmp_path / f"run{size}", trainer=steps))
        norms.append(json.loads((tmp_path / f"run{size}/run.json").read_text())["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_loss_is_that_of_bradley_and_terry():
    loss = pair_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((np.log1p(np.exp(-2)) + np.log(2)) / 2)


def test_accuracy_calibration_and_agreement_are_what_they_say():
    margins = np.log([9.0, 9.0, 1.5, 1.5]) * [1, 1, 1, -1]  # 90% sure twice, and right; 60% sure twice, right once
    told = measured(margins, np.array([0.5, -0.5, 0.0, np.nan]))
    assert told["accuracy"] == 0.75
    assert told["calibration"] == pytest.approx(0.5 * (1 - 0.9) + 0.5 * (0.6 - 0.5))
    assert told["agreement"] == 0.5  # of the two that the truth tells apart
    assert "agreement" not in measured(margins, np.full(4, np.nan))


def test_the_truth_is_asked_where_there_is_one(colours):
    red, blue = load_records(colours)
    swapped = {**blue, "chosen": blue["rejected"], "rejected": blue["chosen"]}
    margins = true_margins([red, {**red, "targets": None}, swapped], RewardSettings(hallucination=0))
    assert np.array_equal(margins, [1, np.nan, -1], equal_nan=True)


def test_what_is_no_reward_model_is_refused(tmp_path, llava, colours):
    with pytest.raises(ModelError, match="holds no reward model"):
        LearnedReward(llava, device="cpu")
    file = reward_recipe(tmp_path, llava, colours)
    with pytest.raises(InputError, match="a reward model detects nothing"):
        run_recipe(file, ["detection.detector=picto", f"detection.data={colours}"])
