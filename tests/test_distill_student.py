"""Distillation as a user runs it: a student of the built-in reasoner, recipe to folder, with and without its cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, chatml, tokenizer
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from detgpt import DetGPT
from detgpt.errors import InputError, ModelError
from finetune.batching import collator
from finetune.data.records import load_records
from finetune.distill import fresh, student, teacher
from finetune.distill.fresh import language_parameters, resized
from finetune.distill.loss import dense_kl
from finetune.distill.student import answered_logits
from finetune.distill.temper import temper
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.recipe import run_recipe

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/seen"
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAINER = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "warmup_steps": 0,
    "report_to": [],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """train/, held-out/: eight records each, a few without a picture; and a fresh student."""
    folder = tmp_path_factory.mktemp("distill")
    lines = [json.loads(line) for line in (SPLIT / "data.jsonl").read_text().splitlines()]
    said = [
        {"role": "user", "content": "is a cup a tool?"},
        {"role": "assistant", "content": "No. A cup holds a drink."},
    ]
    for name, rows in (("train", lines[0:18:3]), ("held-out", lines[60:78:3])):
        (folder / name).mkdir()
        about = [{**row, "image": str(SPLIT / row["image"]), "reasoning": "I see it."} for row in rows]
        (folder / name / "data.jsonl").write_text("\n".join(map(json.dumps, [*about, *[{"messages": said}] * 2])))
    fresh.run(fresh.Config(model="picto", language=SMALL, output=folder / "fresh"))
    return folder


def cached(place: Path, name: str, **settings) -> Path:
    output = place / "-".join(["cache", name, *map(str, settings.values())])
    teacher.run(teacher.Config(model="picto", train=place / name, output=output, batch_size=4, **settings))
    return output


def taught(place: Path, output: Path, *, steps: int = 12, trainer=None, **settings) -> list[float]:
    """Run the stage; the logged losses."""
    values = {"model": str(place / "fresh"), "detector": "picto", "train": place / "train", "dtype": "float32"}
    values |= {
        "language": "full",
        "trainer": {**TRAINER, "max_steps": steps, "save_steps": steps, **(trainer or {})},
    }
    student.run(student.Config.model_validate({**values, "output": output, **settings}))
    state = json.loads((output / f"checkpoints/checkpoint-{steps}/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def logits_of(model: str, records: Path) -> tuple[torch.Tensor, torch.Tensor]:
    loaded, processor = load(Checkpoint(model=model), "float32")
    rows = load_records(records).with_transform(RecordEncoder(processor, bare=True))
    return answered_logits(loaded, DataLoader(rows, batch_size=4, collate_fn=collator(loaded, processor)))


def divergence(place: Path, model: str) -> float:
    """Of the teacher and this student, in mean over the true tokens."""
    return dense_kl(logits_of(model, place / "train")[0], logits_of("picto", place / "train")[0]).mean().item()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "reasoner/model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("of", ["top", "random", "teacher"])
def test_a_student_comes_nearer_to_its_teacher(of, place, tmp_path):
    has = {"teacher": "picto"} if of == "teacher" else {"cache": cached(place, "train", kept=of, k=5)}
    taught(place, tmp_path / "run", weight=1.0, **has)
    assert divergence(place, str(tmp_path / "run")) < 0.6 * divergence(place, str(place / "fresh"))
    record = load_records(place / "train")[0]
    assert DetGPT.from_pretrained(tmp_path / "run").detect(record["image"], record["instruction"]).answer


def test_a_student_that_is_its_teacher_has_nothing_to_learn(place, tmp_path):
    """Neither loss nor gradient, but for what half precision leaves of the teacher's word."""
    settings = {"cache": cached(place, "train"), "weight": 1.0, "steps": 1}
    (own,) = taught(place, tmp_path / "own", model="picto", **settings)
    (others,) = taught(place, tmp_path / "other", **settings)
    assert own < 1e-4 and others > 1
    own, others = (
        json.loads((tmp_path / name / "run.json").read_text())["metrics"]["grad_norm"] for name in ("own", "other")
    )
    assert own < 0.02 * others


def test_all_tokens_in_a_cache_are_the_whole_vocabulary(place, tmp_path):
    """The first loss, before anything is learned, whichever way the teacher's word comes."""
    every = taught(place, tmp_path / "every", steps=1, weight=1.0, cache=cached(place, "train", k=2600))
    along = taught(place, tmp_path / "along", steps=1, weight=1.0, teacher="picto")
    assert every[0] == pytest.approx(along[0], rel=2e-3)
    few = taught(place, tmp_path / "few", steps=1, weight=1.0, cache=cached(place, "train"))
    assert few[0] < along[0]  # the tokens of the tail are not told apart


def test_the_weight_mixes_the_teacher_and_the_true_tokens(place, tmp_path):
    cache = cached(place, "train")
    losses = [taught(place, tmp_path / str(w), steps=1, weight=w, cache=cache)[0] for w in (0.0, 0.25, 1.0)]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-4)
    taught(place, tmp_path / "sft", steps=1)
    assert same(tmp_path / "sft", tmp_path / "0.0") and not same(tmp_path / "sft", tmp_path / "1.0")


def test_packed_batches_lose_the_same(place, tmp_path):
    cache = cached(place, "train")
    padded, packed = (
        taught(place, tmp_path / str(packing), steps=2, packing=packing, cache=cache) for packing in (False, True)
    )
    assert packed == pytest.approx(padded, rel=1e-3)


@pytest.mark.parametrize("way", ["temperature", "smoothing"])
def test_a_recalibration_is_fitted_on_held_out_records_and_written_down(way, place, tmp_path):
    settings = {"cache": cached(place, "train"), "validation": place / "held-out", "weight": 1.0}
    fitted = taught(
        place, tmp_path / "run", steps=1, recalibrate=way, validation_cache=cached(place, "held-out"), **settings
    )
    found = json.loads((tmp_path / "run/recalibration.json").read_text())
    assert found["way"] == way and found["calibrated"]["true_nll"] <= found["raw"]["true_nll"] + 1e-6
    assert found["raw"]["ece_10"] is not None and found["raw"]["n"] > 50
    assert (tmp_path / "run/recalibration.png").is_file() and (tmp_path / "run/recalibration.svg").is_file()
    given = taught(place, tmp_path / "given", steps=1, recalibrate=way, strength=found["strength"], **settings)
    plain = taught(place, tmp_path / "plain", steps=1, **settings)
    assert given == fitted and given != plain


def test_a_scaled_students_answers_are_the_same_and_its_true_tokens_likelier(place, tmp_path):
    settings = {"validation": place / "held-out", "trainer": {"eval_strategy": "no"}}
    taught(place, tmp_path / "run", **settings)
    taught(place, tmp_path / "scaled", scale_temperature=True, **settings)
    metrics = json.loads((tmp_path / "scaled/run.json").read_text())["metrics"]
    before, labels = logits_of(str(tmp_path / "run"), place / "held-out")
    after, _ = logits_of(str(tmp_path / "scaled"), place / "held-out")
    torch.testing.assert_close(after.float() * metrics["temperature"], before.float(), rtol=2e-2, atol=5e-2)
    assert (after.argmax(-1) == before.argmax(-1)).float().mean() > 0.98
    assert metrics["validation_nll_scaled"] < metrics["validation_nll"]
    loss = torch.nn.functional.cross_entropy(after.float(), labels).item()
    assert loss == pytest.approx(metrics["validation_nll_scaled"], rel=1e-2)


def test_a_model_whose_norm_does_not_scale_its_logits_stays_as_it_was():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    temper(model, 2.0)
    assert torch.equal(model.model.norm.weight, torch.full((16,), 0.5))
    model.lm_head.register_forward_hook(lambda module, given, logits: torch.tanh(50 * logits))  # as Gemma caps them
    with pytest.raises(ModelError, match="not scaled by its last norm"):
        temper(model, 3.0)
    torch.testing.assert_close(model.model.norm.weight, torch.full((16,), 0.5))


def test_a_fresh_student_is_smaller_and_sees_as_its_teacher_does(place):
    big, _ = load(Checkpoint(model="picto"), "float32")
    small, _ = load(Checkpoint(model=str(place / "fresh")), "float32")
    assert language_parameters(small) < language_parameters(big) / 3
    assert json.loads((place / "fresh/run.json").read_text())["metrics"]["parameters"] == language_parameters(small)
    theirs = big.state_dict()
    for name, tensor in small.state_dict().items():
        if "vision_tower" in name:
            assert torch.equal(tensor, theirs[name])
    ours = dict(small.named_parameters())["model.language_model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(ours, theirs["model.language_model.layers.3.self_attn.q_proj.weight"][:64, :64])
    with pytest.raises(InputError, match=r"language\.hidden_size=256: 192 is the other's"):
        resized(big, {"hidden_size": 256})
    with pytest.raises(InputError, match=r"language\.width: a 'llama' configuration has no such number"):
        resized(big, {"width": 2})


def test_a_deeper_teacher_begins_with_what_the_model_says_and_learns_in_every_layer(place):
    model, processor = load(Checkpoint(model="picto"), "float32")
    deeper = resized(model, {"num_hidden_layers": 6})
    assert language_parameters(deeper) > 1.3 * language_parameters(model)
    tokens = processor.tokenizer("What is in this picture?", return_tensors="pt")
    said = [one.eval()(**tokens, labels=tokens.input_ids) for one in (model, deeper)]
    torch.testing.assert_close(said[1].logits, said[0].logits, atol=1e-4, rtol=1e-4)
    said[1].loss.backward()
    layers = deeper.get_decoder().layers
    for layer in layers:
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0 and layer.mlp.down_proj.weight.grad.abs().max() > 0
    assert [bool((layer.mlp.down_proj.weight == 0).all()) for layer in layers] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_layers_are_not_added_where_they_would_change_what_is_said():
    shape = {"n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    with pytest.raises(InputError, match="layers are added to models whose blocks end in"):
        resized(GPT2LMHeadModel(GPT2Config(n_layer=2, **shape)), {"num_hidden_layers": 3})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A language model without eyes, a smaller one, and questions."""
    folder = tmp_path_factory.mktemp("texts")
    tokens = tokenizer("<|im_start|>", "<|im_end|>", end="</s>")
    tokens.chat_template = chatml("").replace("message.content %}", "[{'type': 'text', 'text': message.content}] %}")
    shape = {"vocab_size": len(tokens), "num_attention_heads": 2, "intermediate_size": 32}
    for name, width in (("large", 32), ("small", 16)):
        torch.manual_seed(width)
        model = LlamaForCausalLM(LlamaConfig(hidden_size=width, num_hidden_layers=2, initializer_range=0.3, **shape))
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    said = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, said)))
    return folder


def test_a_language_model_without_eyes_is_distilled_too(texts, tmp_path):
    cache = tmp_path / "cache"
    teacher.run(teacher.Config(model=str(texts / "large"), train=texts, output=cache, shard_size=3))
    settings = {"model": str(texts / "small"), "projector": "frozen", "train": texts, "cache": cache, "weight": 1.0}
    losses = taught(texts, tmp_path / "run", teacher=str(texts / "large"), **settings)
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(InputError, match="whose tokenizer is not the student's"):
        taught(texts, tmp_path / "other", **{**settings, "model": "picto"})
    with pytest.raises(InputError, match=r"'.*large' has another tokenizer than its student"):
        taught(texts, tmp_path / "along", train=texts, model="picto", teacher=str(texts / "large"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recalibrate": "temperature"}, "'recalibrate' is for a teacher's cache"),
        ({"recalibrate": "temperature", "cache": "top"}, "is fitted on records that the teacher did not learn from"),
        ({"scale_temperature": True}, "'scale_temperature' is fitted on 'validation'"),
        ({"scale_temperature": True, "validation": ".", "language": "lora"}, "which adapters leave: leave it out"),
        (
            {"recalibrate": "smoothing", "strength": 0.1, "cache": "random"},
            "random draws stand for the teacher as it is",
        ),
        ({"cache": "nowhere"}, "is no cache of a teacher"),
        ({"cache": "top", "k": 4}, "keeps k=5 tokens, not 4"),
        ({"cache": "held-out"}, "is a cache of other records"),
        ({"cache": "top", "teacher": "base"}, "is a cache of 'picto', not of 'base'"),
    ],
)
def test_what_does_not_go_together_is_said(settings, said, place, tmp_path):
    caches = {
        "top": lambda: cached(place, "train"),
        "random": lambda: cached(place, "train", kept="random", k=5),
        "held-out": lambda: cached(place, "held-out"),
        "nowhere": lambda: tmp_path / "nowhere",
    }
    if "cache" in settings:
        settings = {**settings, "cache": caches[settings["cache"]]()}
    with pytest.raises(ValueError, match=said):
        taught(place, tmp_path / "run", steps=1, **settings)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_stays_and_an_interrupted_one_goes_on_to_the_same_weights(place, tmp_path):
    settings = {"cache": cached(place, "train"), "trainer": {"save_steps": 2}}
    taught(place, tmp_path / "run", steps=4, **settings)
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(again / "reasoner")
    shutil.rmtree(again / "checkpoints/checkpoint-4")
    described = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**described, "finished": None}))
    taught(place, again, steps=4, **settings)
    assert same(again, tmp_path / "run")


def test_the_recipe_for_photographs_runs_on_tiny_models_of_its_family(tmp_path):
    """From a larger model of the family to a smaller one, pictures included."""
    for name in ("large", "small"):
        FAMILIES["Qwen3-VL"](tmp_path / name)
    record = {"image": "1.png", "instruction": "I am thirsty", "targets": ["cup"]}
    for name in ("train", "held-out"):
        (tmp_path / name).mkdir()
        Image.effect_noise((48, 32), 80).convert("RGB").save(tmp_path / name / "1.png")
        (tmp_path / name / "data.jsonl").write_text("\n".join([json.dumps(record)] * 4))
    run_recipe(
        "distill-qwen3-vl",
        [
            f"teacher.model={tmp_path / 'large'}",
            f"teacher.train={tmp_path / 'train'}",
            f"teacher.output={tmp_path / 'teacher'}",
            f"held-out.model={tmp_path / 'large'}",
            f"held-out.train={tmp_path / 'held-out'}",
            f"held-out.output={tmp_path / 'teacher-held-out'}",
            f"student.model={tmp_path / 'small'}",
            f"student.train={tmp_path / 'train'}",
            f"student.validation={tmp_path / 'held-out'}",
            f"student.cache={tmp_path / 'teacher'}",
            f"student.validation_cache={tmp_path / 'teacher-held-out'}",
            f"student.output={tmp_path / 'student'}",
            "student.trainer.max_steps=2",
        ],
    )
    run = json.loads((tmp_path / "student/run.json").read_text())
    assert run["finished"] and run["metrics"]["step"] == 2
    assert (tmp_path / "student/adapter").is_dir() and (tmp_path / "student/recalibration.json").is_file()
