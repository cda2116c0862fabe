"""Direct preference optimisation as a user runs it: pairs in, a reasoner out that prefers the better answers."""

import json

import pytest
import torch
from families import FAMILIES
from PIL import Image
from test_finetune_stages import as_killed_after, recipe, same_weights, text_model, trainer  # noqa: F401
from transformers import AutoTokenizer

from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.batching import IGNORED
from finetune.data.records import load_records
from finetune.loading import Checkpoint, load
from finetune.preference.encoding import PairEncoder
from finetune.recipe import run_recipe

PAIRS = [("I am thirsty", '["cup"]', "[]"), ("I am cold", "[]", '["cup"]'), ("I read", '["book"]', '["bottle"]')]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    for i in range(3):
        Image.effect_noise((40, 32), 60 + 20 * i).convert("RGB").save(folder / f"{i}.png")
    lines = [
        {"image": f"{i}.png", "instruction": wish, "chosen": f"Targets: {yes}", "rejected": f"Targets: {no}"}
        for i, (wish, yes, no) in enumerate(PAIRS)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


def history(run):
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    return [entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def preferred(folder, records):
    """By how many nats the model in `folder` gives the chosen answer of each record more than the rejected one."""
    model, processor = load(Checkpoint(model=str(folder)), "float32")
    pairs = load_records(records).with_transform(PairEncoder(processor, bare=False))

    def nats(encoded):
        labels = encoded.pop("labels")
        inputs = {name: value[None] if value.ndim == 1 else value for name, value in encoded.items()}
        return -model(**inputs, labels=labels[None]).loss * (labels != IGNORED).sum()

    with torch.inference_mode():
        return torch.stack([nats(pair["chosen"]) - nats(pair["rejected"]) for pair in pairs])


@pytest.mark.parametrize("language", ["full", "lora", "lisa"])
def test_the_margin_rises_and_the_result_loads(language, tmp_path, preferences, llava):
    file = recipe(
        tmp_path,
        stage="dpo",
        model=llava,
        train=preferences,
        validation=preferences,
        output=tmp_path / "run",
        language=language,
        lora={"r": 4},
        lisa={"layers": 1, "every": 3},
        trainer=trainer(max_steps=12, learning_rate=2e-3, eval_strategy="steps", eval_steps=12),
    )
    run_recipe(file)
    curve = history(tmp_path / "run")
    assert curve[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # nothing is preferred before the first step
    assert curve[-1]["rewards/margins"] > 0.5 and curve[-1]["rewards/accuracies"] == 1
    metrics = json.loads((tmp_path / "run/run.json").read_text())["metrics"]
    assert metrics["eval_rewards/margins"] > 0.5 and metrics["rewards/accuracies"] == 1
    gain = preferred(tmp_path / "run/reasoner", preferences) - preferred(llava, preferences)
    # the logged margin is beta times the mean gain
    assert gain.min() > 0 and 0.1 * gain.mean() == pytest.approx(metrics["eval_rewards/margins"], abs=1e-3)
    if language == "lora":
        assert sorted(place.name for place in (tmp_path / "run/adapter").iterdir() if place.is_dir()) == []


def test_a_run_that_goes_on_ends_with_the_very_same_weights(tmp_path, preferences, llava):
    file = recipe(
        tmp_path,
        stage="dpo",
        model=llava,
        train=preferences,
        output=tmp_path / "run",
        projector="frozen",
        language="full",
        trainer=trainer(max_steps=4, save_steps=2, per_device_train_batch_size=2, save_total_limit=9),
    )
    run_recipe(file)
    copy = as_killed_after(tmp_path / "run", 2, tmp_path / "killed")
    run_recipe(file, [f"output={copy}"])
    assert same_weights(copy / "reasoner/model.safetensors", tmp_path / "run/reasoner/model.safetensors")


@pytest.mark.parametrize("prompt", ["bare", "full"])
def test_a_pair_is_asked_as_at_inference_and_only_the_answers_count(prompt, preferences, llava):
    model, processor = load(Checkpoint(model=str(llava), prompt=prompt), "float32")
    record = load_records(preferences)[0]
    pair = PairEncoder(processor, bare=prompt == "bare").encode(record, record["chosen"])
    answer = pair["labels"] != IGNORED
    assert processor.decode(pair["input_ids"][answer]) == 'Targets: ["cup"]</s>'
    reasoner = HuggingFaceReasoner.of(model, processor, "asked")
    asked = reasoner._encode([Request(load_image(record["image"]), "I am thirsty")])
    assert torch.equal(asked["input_ids"][0], pair["input_ids"][: int(answer.nonzero()[0])])
    assert torch.equal(asked["pixel_values"], pair["pixel_values"])


def test_text_alone_is_preferred_too_and_earlier_answers_do_not_count(tmp_path, text_model):  # noqa: F811
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2"},
    ]
    tokens = AutoTokenizer.from_pretrained(text_model)
    tokens.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens.save_pretrained(text_model)
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": talk, "chosen": "4", "rejected": "5"}))
    pair = PairEncoder(tokens, bare=True)({k: [v] for k, v in load_records(tmp_path)[0].items()})
    for side, said in (("chosen", "4</s>"), ("rejected", "5</s>")):
        encoded = pair[side][0]
        assert tokens.decode(encoded["input_ids"][encoded["labels"] != IGNORED]) == said
    settings = {"stage": "dpo", "model": text_model, "train": tmp_path, "output": tmp_path / "run"}
    file = recipe(
        tmp_path, **settings, projector="frozen", language="full", loss=["ipo", "sft"], trainer=trainer(max_steps=3)
    )
    run_recipe(file)
    curve = history(tmp_path / "run")
    assert curve[-1]["rewards/margins"] > curve[0]["rewards/margins"]


def test_records_without_two_answers_are_refused(tmp_path, llava):
    (tmp_path / "data.jsonl").write_text(json.dumps({"instruction": "I am thirsty", "targets": ["cup"]}))
    file = recipe(tmp_path, stage="dpo", model=llava, train=tmp_path, output=tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.jsonl.*1: a preference has an answer that is 'chosen'"):
        run_recipe(file)
    with pytest.raises(InputError, match=r"trainer\.beta is not yours to set"):
        run_recipe(file, ["trainer.beta=1"])
