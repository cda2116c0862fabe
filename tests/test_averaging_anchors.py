"""Staying near the model before while tuning, and averages over a run's steps: by hand, and as a recipe has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tokenizer
from safetensors.torch import load_file
from test_finetune_batching import Tokenizer, text_model
from test_finetune_callbacks import stop_at
from test_finetune_stages import as_killed_after, losses, recipe, same_weights
from test_finetune_stages import records as records
from test_finetune_stages import trainer as trainer_settings
from transformers import Trainer, TrainerCallback, TrainingArguments

from detgpt.errors import InputError, StoppedError
from finetune.averaging.anchors import Anchor, AnchorSettings, divergence
from finetune.batching import collator
from finetune.callbacks import AverageSettings, attach, train
from finetune.loading import Checkpoint
from finetune.preference import dpo
from finetune.preference.iterations import of_iteration
from finetune.recipe import find_recipe, read_recipe, run_recipe
from finetune.stages import instruct

WEIGHTS = {"l1": 1e-3, "l2": 1e-2, "distill": 2.0}


class Examples(torch.utils.data.Dataset[Any]):
    """Of like length; their first tokens are not learned."""

    def __init__(self) -> None:
        drawn = torch.randint(3, 300, (24, 9), generator=torch.Generator().manual_seed(0))
        self._rows = [{"input_ids": ids, "labels": torch.cat([torch.full((4,), -100), ids[4:]])} for ids in drawn]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the shapes of `text_model("llama")`."""
    folder = tmp_path_factory.mktemp("before")
    text_model("llama", initializer_range=0.2).save_pretrained(folder)
    tokenizer(end="</s>").save_pretrained(folder)
    return folder


def trainer_of(folder: Path, anchor: AnchorSettings | None, start: str = "start", **options: Any) -> Trainer:
    model = text_model("llama")
    model.accepts_loss_kwargs = options.pop("counted", True)  # whether the Trainer counts the tokens of a whole step
    settings = TrainingArguments(
        folder, **{
            "per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True,
            "disable_tqdm": True, "remove_unused_columns": False, "learning_rate": 1e-2, "max_grad_norm": 0, **options,
        }
    )  # fmt: skip
    data = Examples()
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data, data_collator=collator(model, Tokenizer))
    attach(trainer)
    if anchor is not None:
        trainer.callback_handler.callbacks.insert(0, Anchor(trainer, anchor, Checkpoint(model=start), "float32"))
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def loss_and_gradients(trainer: Trainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = trainer.data_collator([Examples()[i] for i in range(8)])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(8 * 5))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_distance_of_weights_is_what_the_formula_says(kind: str, tmp_path: Path, before: Path) -> None:
    """And its gradient, wherever the model before comes from."""
    plain, plain_gradients = loss_and_gradients(trainer_of(tmp_path, None))
    loss, gradients = loss_and_gradients(trainer_of(tmp_path, AnchorSettings(model=str(before), kind=kind, weight=0.1)))
    ours, theirs = text_model("llama").state_dict(), load_file(before / "model.safetensors")
    differences = {name: ours[name].double() - theirs[name].double() for name in gradients}
    total = sum(float((d.abs() if kind == "l1" else d**2).sum()) for d in differences.values())
    assert float(loss - plain) == pytest.approx(0.1 * total, rel=1e-5)
    for name, difference in differences.items():
        added = 0.1 * (difference.sign() if kind == "l1" else 2 * difference)
        torch.testing.assert_close(gradients[name], plain_gradients[name] + added.float(), rtol=1e-4, atol=1e-5)


def test_distillation_is_the_divergence_of_the_answers_tokens(tmp_path: Path, before: Path) -> None:
    plain, plain_gradients = loss_and_gradients(trainer_of(tmp_path, None))
    settings = AnchorSettings(model=str(before), kind="distill", weight=0.5)
    loss, gradients = loss_and_gradients(trainer_of(tmp_path, settings))
    model, teacher = text_model("llama"), text_model("llama", initializer_range=0.2)
    ids = torch.stack([Examples()[i]["input_ids"] for i in range(8)])
    now, then = (one(ids).logits[:, 3:-1].log_softmax(-1) for one in (model, teacher))  # of the five that are learned
    mean = (then.exp() * (then - now)).sum(-1).mean()
    assert float(loss - plain) == pytest.approx(0.5 * mean.item(), rel=1e-4)
    (0.5 * mean).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], plain_gradients[name] + parameter.grad, rtol=1e-3, atol=1e-6)


def test_divergence_by_hand() -> None:
    before = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    now = torch.tensor([[np.log(3.0), 0.0], [2.0, 0.0]])
    by_hand = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)  # of the first; the second is as before
    assert float(divergence(before, now)) == pytest.approx(by_hand, rel=1e-6)
    assert float(divergence(before, before)) == 0


@pytest.mark.parametrize("counted", [True, False], ids=["by the step's tokens", "by the batch"])
@pytest.mark.parametrize("kind", ["l1", "l2", "distill"])
def test_a_step_of_several_batches_is_a_step_of_one(kind: str, counted: bool, tmp_path: Path, before: Path) -> None:
    runs = []
    for batches in (1, 4):
        settings = AnchorSettings(model=str(before), kind=kind, weight=WEIGHTS[kind])
        options = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
        run = trainer_of(tmp_path / str(batches), settings, counted=counted, optim="sgd", **options)
        train(run)
        runs.append(run)
    whole, parts = runs
    assert min(logged(whole, "anchor")) > 0.01
    assert logged(parts, "anchor") == pytest.approx(logged(whole, "anchor"), rel=1e-4)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_the_model_that_a_run_starts_from_is_remembered_as_it_was(tmp_path: Path) -> None:
    """Without reading it again; the loss of an evaluation is without the anchor."""
    settings = AnchorSettings(model="start", kind="l2", weight=1.0)
    run = trainer_of(tmp_path, settings, eval_strategy="steps", eval_steps=1)
    start = {name: value.clone() for name, value in run.model.named_parameters()}
    moved: list[float] = []

    class Moved(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            parameters = dict(run.model.named_parameters())
            moved.append(sum(float(((p - start[name]) ** 2).sum().detach()) for name, p in parameters.items()))

    run.add_callback(Moved())
    train(run)
    assert logged(run, "anchor") == pytest.approx([0, *moved[:-1]], rel=1e-4)
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    model = run.model.eval()
    batch = run.data_collator([Examples()[i] for i in range(24)])
    assert evaluated[-1] == pytest.approx(model(**batch).loss.item(), rel=1e-4)


# --- as recipes have it ---


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


def history(run: Path, name: str) -> list[float]:
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    entries = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries if name in entry]


def instructed(folder: Path, records: Path, llava: Path, **settings: Any) -> tuple[Path, Path]:
    """The recipe and the finished run."""
    steps = settings.pop("trainer", {})
    file = recipe(
        folder,
        stage="instruct",
        model=llava,
        train=records,
        output=folder / "run",
        prompt="bare",
        trainer=trainer_settings(**{"max_steps": 5, "save_steps": 2, "save_total_limit": 9, **steps}),
        **settings,
    )
    run_recipe(file)
    return file, folder / "run"


def moved(llava: Path, run: Path) -> float:
    start, end = load_file(llava / "model.safetensors"), load_file(run / "reasoner/model.safetensors")
    return sum(float((start[name] - end[name]).square().sum()) for name in start)


@pytest.mark.parametrize("language", ["full", "lora"])
@pytest.mark.parametrize("kind", ["l1", "l2", "distill"])
def test_an_anchor_begins_at_zero_holds_the_model_and_goes_on_after_a_kill(
    kind: str, language: str, tmp_path: Path, records: Path, llava: Path
) -> None:
    how = {"language": language, "lora": {"r": 2}}
    (tmp_path / "free").mkdir()
    _, free = instructed(tmp_path / "free", records, llava, **how)
    file, run = instructed(tmp_path, records, llava, **how, anchor={"kind": kind, "weight": WEIGHTS[kind] * 100})
    added = history(run, "anchor")
    assert added[0] == pytest.approx(0, abs=1e-6) and min(added[1:]) > 1e-3
    assert moved(llava, run) < 0.9 * moved(llava, free)
    assert json.loads((run / "run.json").read_text())["metrics"]["anchor"] == added[-1]
    copy = as_killed_after(run, 2, tmp_path / "killed")
    run_recipe(file, [f"output={copy}"])
    assert same_weights(copy / "reasoner/model.safetensors", run / "reasoner/model.safetensors")
    assert history(copy, "anchor") == added and losses(copy) == losses(run)


def test_adapters_are_held_by_the_weights_that_they_make(tmp_path: Path, records: Path, llava: Path) -> None:
    """Those of the language model's layers, and the projector, which trains whole."""
    other = tmp_path / "other"
    _, tuned = instructed(tmp_path, records, llava, language="full", trainer={"max_steps": 2})
    (tuned / "reasoner").rename(other)
    anchor = {"kind": "l2", "weight": 1.0, "model": str(other)}
    steps = {"max_steps": 2, "learning_rate": 0.0}
    (tmp_path / "lora").mkdir()
    _, run = instructed(tmp_path / "lora", records, llava, language="lora", anchor=anchor, trainer=steps)
    theirs, ours = load_file(other / "model.safetensors"), load_file(run / "reasoner/model.safetensors")
    trained = [name for name in ours if "projector" in name or (name.endswith("proj.weight") and "language" in name)]
    squares = sum(float((ours[name] - theirs[name]).square().sum()) for name in trained)
    assert history(run, "anchor")[-1] == pytest.approx(squares, rel=1e-4)


def test_the_next_iteration_stays_near_the_first_model() -> None:
    overrides = ["revision=main", "anchor.kind=l2", "anchor.weight=1"]
    config = read_recipe(find_recipe("raft-picto"), overrides)
    assert config.anchor.model == config.model and config.anchor.revision == "main"
    later = of_iteration(instruct.Config, config, "runs/01", train=Path("chosen"), output=Path("02"))
    assert later.model == "runs/01" and later.revision is None
    assert later.anchor == config.anchor
    named = read_recipe(find_recipe("raft-picto"), [*overrides, "anchor.model=runs/instructed"])
    assert named.anchor.model == "runs/instructed" and named.anchor.revision is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["anchor.kind=l3", "anchor.weight=1"], "anchor.kind = 'l3'"),
        (["anchor.kind=l2", "anchor.weight=0"], "anchor.weight = 0"),
        (["anchor.kind=l2"], "'anchor.weight' is missing"),
        (["anchor.kind=distill", "anchor.weight=1", "trainer.loss_type=dft"], "leave trainer.loss_type out"),
        (["average_steps.every=0"], "average_steps.every = 0"),
        (["average_steps.every=1", "trainer.load_best_model_at_end=true"], "either the average is the result, or"),
        (["average_steps.every=4", "average_steps.start=2"], "the first step that counts is step 6, and there are 5"),
    ],
)
def test_what_makes_no_sense_is_said(
    overrides: list[str], said: str, tmp_path: Path, records: Path, llava: Path
) -> None:
    file = recipe(
        tmp_path, stage="instruct", model=llava, train=records, output=tmp_path / "run", language="full",
        trainer=trainer_settings(max_steps=5),
    )  # fmt: skip
    with pytest.raises(InputError, match=said):
        run_recipe(file, overrides)
    assert not (tmp_path / "run/reasoner").exists()


def test_preferences_are_not_distilled() -> None:
    overrides = ["anchor.kind=distill", "anchor.weight=1"]
    with pytest.raises(InputError, match="learn given answers, which dpo does not: take l1 or l2"):
        read_recipe(find_recipe("dpo-picto"), overrides)
    config = read_recipe(find_recipe("dpo-picto"), ["anchor.kind=l1", "anchor.weight=1"])
    assert isinstance(config, dpo.Config) and config.anchor.kind == "l1"


def test_a_model_of_other_shapes_is_no_anchor(tmp_path: Path) -> None:
    text_model("llama", intermediate_size=32, vocab_size=310).save_pretrained(tmp_path)
    tokenizer(end="</s>").save_pretrained(tmp_path)
    for kind, said in (("l2", "no weight 'model.embed_tokens.weight' of the shape"), ("distill", "logits of 310 tok")):
        with pytest.raises(InputError, match=said):
            trainer_of(tmp_path / "run", AnchorSettings(model=str(tmp_path), kind=kind, weight=1.0))


# --- averages over steps ---


def averaged(folder: Path, settings: AverageSettings, stop: int | None = None) -> tuple[Trainer, dict[int, Any]]:
    """A finished run, and the weights after every step."""
    trainer = trainer_of(folder, None, max_steps=8, save_steps=3)
    attach(trainer, average=settings)
    after: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after[state.global_step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    trainer.add_callback(Keep())
    if stop is not None:
        stop_at(trainer, stop)
        with pytest.raises(StoppedError):
            train(trainer)
    else:
        train(trainer)
    return trainer, after


def test_the_result_is_the_mean_of_the_steps_that_count(tmp_path: Path) -> None:
    trainer, after = averaged(tmp_path, AverageSettings(every=2, start=3))
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, torch.stack([after[5][name], after[7][name]]).mean(0))
        assert not torch.equal(weight, after[8][name])


def test_an_exponential_average_weighs_later_steps_more(tmp_path: Path) -> None:
    trainer, after = averaged(tmp_path, AverageSettings(decay=0.75))
    for name, weight in trainer.model.named_parameters():
        expected = after[1][name]
        for step in range(2, 9):
            expected = 0.75 * expected + 0.25 * after[step][name]
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("settings", [AverageSettings(every=2), AverageSettings(decay=0.75)], ids=["alike", "decay"])
def test_an_average_goes_on_where_it_was(settings: AverageSettings, tmp_path: Path) -> None:
    whole, _ = averaged(tmp_path / "whole", settings)
    averaged(tmp_path / "parts", settings, stop=5)
    resumed, _ = averaged(tmp_path / "parts", settings)
    again, _ = averaged(tmp_path / "parts", settings)  # nothing is left to do but to take the average
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)
        assert torch.equal(again.model.state_dict()[name], weight)


@pytest.mark.parametrize("language", ["full", "lora"])
def test_a_recipe_keeps_the_average_and_its_numbers(language: str, tmp_path: Path, records: Path, llava: Path) -> None:
    file, run = instructed(
        tmp_path, records, llava, language=language, lora={"r": 2}, validation=records, average_steps={"every": 2},
        trainer={"eval_strategy": "steps", "eval_steps": 5},
    )  # fmt: skip
    described = json.loads((run / "run.json").read_text())
    assert described["metrics"]["eval_loss"] != history(run, "eval_loss")[-1]  # which is that of the last step
    for step in (2, 5):
        copy = as_killed_after(run, step, tmp_path / f"killed at {step}")
        run_recipe(file, [f"output={copy}"])
        assert same_weights(copy / "reasoner/model.safetensors", run / "reasoner/model.safetensors")
        assert json.loads((copy / "run.json").read_text())["metrics"]["eval_loss"] == described["metrics"]["eval_loss"]
