"""What happens beside the steps: LISA, detection numbers, progress, and what a run does when something goes wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_finetune_batching import Texts, Tokenizer, examples, text_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from detgpt.errors import InputError, StoppedError, TrainingError
from finetune.batching import collator
from finetune.callbacks import DetectionSettings, LisaSettings, attach, train
from finetune.callbacks.lisa import Lisa
from finetune.callbacks.progress import count_images, count_tokens
from finetune.callbacks.watch import latest


def trainer_of(folder: Path, lisa: LisaSettings | None = None, **options: Any) -> Trainer:
    model = text_model("llama", num_hidden_layers=4, attention_dropout=0.1)
    settings = TrainingArguments(
        folder, **{
            "per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 1, "save_steps": 5, "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "learning_rate": 1e-3, **options,
        }
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=Texts(40), data_collator=collator(model, Tokenizer, packing=True))
    attach(trainer, lisa=lisa)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- LISA ---


class Seen(TrainerCallback):
    """After every step: the layers that moved, whether the ends did, and what the optimiser keeps."""

    def __init__(self, trainer: Trainer) -> None:
        self.steps: list[tuple[tuple[int, ...], bool]] = []
        self._trainer = trainer
        self._before = self._copies()
        trainer.add_callback(self)

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.note()

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._trainer.model.named_parameters()}

    def note(self) -> None:
        now = self._copies()
        moved = {name for name in now if not torch.equal(now[name], self._before[name])}
        self._before = now
        layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in moved if ".layers." in name})
        ends = {"model.embed_tokens.weight", "lm_head.weight"} & moved
        assert len(ends) in (0, 2)
        self.steps.append((tuple(layers), bool(ends)))
        kept = {id(parameter) for parameter in self._trainer.optimizer.state}
        assert kept == {id(p) for name, p in self._trainer.model.named_parameters() if name in moved}


@pytest.mark.parametrize("train_ends", [True, False])
def test_lisa_trains_exactly_its_layers_and_frees_the_state_of_the_others(tmp_path: Path, train_ends: bool) -> None:
    trainer = trainer_of(tmp_path, LisaSettings(layers=2, every=3, train_ends=train_ends))
    seen = Seen(trainer)
    train(trainer)
    assert len(seen.steps) == 12
    for period in range(4):
        assert len(set(seen.steps[3 * period : 3 * period + 3])) == 1
    assert all(len(layers) == 2 and ends == train_ends for layers, ends in seen.steps)
    assert len({layers for layers, _ in seen.steps}) > 1
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_lisa_goes_on_bit_for_bit_in_the_middle_of_a_period(tmp_path: Path) -> None:
    settings = LisaSettings(layers=2, every=3)
    whole = trainer_of(tmp_path / "whole", settings)
    train(whole)
    first = trainer_of(tmp_path / "parts", settings)
    with pytest.raises(StoppedError, match=r"step 5 of 12.*checkpoint-5"):
        stop_at(first, 5)
        train(first)
    second = trainer_of(tmp_path / "parts", settings)
    train(second)
    assert losses(second) == losses(whole)
    for name, parameter in second.model.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name]), name


def test_lisa_finds_the_layers_of_a_vision_language_model(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(FAMILIES["Qwen3-VL"](tmp_path / "model"))
    settings = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    lisa = Lisa(Trainer(model, settings), LisaSettings(layers=1))
    assert len(lisa._layers) == 2
    with pytest.raises(InputError, match=r"lisa.layers=3, but 2 layers of the language model train"):
        Lisa(Trainer(model, settings), LisaSettings(layers=3))


# --- progress ---


def test_tokens_and_images_are_counted_without_padding(tmp_path: Path) -> None:
    """For every way to make a batch, and for families with tiles, patches and rows of tiles."""
    for family in ("LLaVA 1.5", "LLaVA-NeXT", "Qwen3-VL", "InternVL", "SmolVLM"):
        folder = FAMILIES[family](tmp_path / family)
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        these = examples(processor)
        tokens = sum(example["input_ids"].numel() for example in these)
        for packing in (False, True):
            batch = collator(model, processor, packing=packing)(these)
            assert (count_tokens(batch), count_images(batch, model.config)) == (tokens, 3), (family, packing)


def test_a_line_tells_loss_rates_and_time_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path)
    train(trainer)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    assert lines[4].startswith(f"step 5 of 12: loss {losses(trainer)[4]:.4f}, ")
    assert "tokens/s" in lines[4] and lines[4].endswith(" left")


# --- what goes wrong ---


def stop_at(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    ours = trainer.training_step

    def killed(*arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return ours(*arguments, **options)

    trainer.training_step = killed


def test_sigterm_saves_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(tmp_path)
    stop_at(trainer, 7)
    with pytest.raises(StoppedError, match=r"stopped at step 7 of 12.*checkpoint-7: the same command goes on"):
        train(trainer)
    assert signal.getsignal(signal.SIGTERM) is before
    again = trainer_of(tmp_path)
    train(again)
    assert len(losses(again)) == 12
    whole = trainer_of(tmp_path / "whole")
    train(whole)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(tmp_path: Path, value: float) -> None:
    trainer = trainer_of(tmp_path)
    forward = trainer.model.forward

    def spoiled(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        if trainer.state.global_step == 7:
            output.loss = output.loss * value
        return output

    trainer.model.forward = spoiled
    with pytest.raises(TrainingError, match=r"no finite number at step 8.*last good checkpoint is .*checkpoint-5"):
        train(trainer)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert losses(train_again(tmp_path))[7:]


def train_again(folder: Path) -> Trainer:
    trainer = trainer_of(folder)
    train(trainer)
    return trainer


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room(folder: str) -> None:
        if folder.endswith("checkpoint-10"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        save(folder)

    trainer._save_optimizer_and_scheduler = no_room
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
    try:
        with pytest.raises(
            TrainingError, match=r"could not be written.*last good checkpoint is .*checkpoint-5.*Make room"
        ):
            train(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert losses(train_again(tmp_path)) == losses(train_again(tmp_path / "whole"))


def test_a_checkpoint_that_a_kill_cut_short_is_not_gone_on_from(tmp_path: Path) -> None:
    train_again(tmp_path)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    assert latest(tmp_path) == tmp_path / "checkpoint-12"
    (tmp_path / "checkpoint-13").mkdir()
    train_again(tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10", "checkpoint-12"}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_refused(tmp_path: Path, split: str) -> None:
    trainer = trainer_of(tmp_path)
    if split == "train":
        trainer.train_dataset = Texts(0)
    else:
        trainer.eval_dataset = Texts(0)
    with pytest.raises(InputError, match=f"the {split} split has no examples"):
        train(trainer)


# --- detection ---


def test_the_best_checkpoint_is_the_one_that_detects_best(tmp_path: Path, tiny_pair_folder: Path) -> None:
    """A model that knows its answer and forgets it: the first step has a learning rate of 0, the second a huge one."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 30), "gray").save(data / "desk.png")
    record = {"image": "desk.png", "instruction": "drink", "targets": ["cup"], "present": ["cup"]}
    box = {"boxes": [[0, 0, 40, 30]], "labels": ["cup"]}
    (data / "data.jsonl").write_text(json.dumps(record | box) + "\n")
    reasoner = tiny_pair_folder / "reasoner"
    model, processor = AutoModelForImageTextToText.from_pretrained(reasoner), AutoProcessor.from_pretrained(reasoner)
    decoding = model.generation_config
    settings = TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=0.3, lr_scheduler_type="constant_with_warmup", warmup_steps=1,
        eval_strategy="steps", eval_steps=1, save_steps=1, metric_for_best_model="names_f1", greater_is_better=True,
        load_best_model_at_end=True, logging_steps=1, report_to=["tensorboard"], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=examples(processor), eval_dataset=examples(processor)[:1],
        processing_class=processor, data_collator=collator(model, processor),
    )  # fmt: skip
    options = {"box_threshold": 0.0, "max_new_tokens": 24}
    detector = str(tiny_pair_folder / "detector")
    attach(trainer, detection=DetectionSettings(detector=detector, data=data, options=options))
    train(trainer)
    numbers = [entry["eval_names_f1"] for entry in trainer.state.log_history if "eval_names_f1" in entry]
    assert numbers == [1.0, 0.0]
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert trainer.model.generation_config is decoding
    curves = EventAccumulator(str(next((tmp_path / "run").glob("runs/*"))))
    curves.Reload()
    assert {"eval/names_f1", "eval/f1_50", "train/tokens_per_second"} <= set(curves.Tags()["scalars"])
