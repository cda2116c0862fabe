"""A short run with our batches and callbacks, for tests/test_finetune_distributed.py to start in several processes.

    python tests/distributed_run.py FOLDER [lisa | l2 | distill]

Steps are of 8 examples, whatever the number of processes; the losses go into FOLDER/losses.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from families import tokenizer
from test_finetune_batching import Texts, Tokenizer, text_model
from transformers import Trainer, TrainingArguments

from finetune.averaging.anchors import Anchor, AnchorSettings
from finetune.batching import collator, draw_by_length
from finetune.callbacks import LisaSettings, attach, train
from finetune.loading import Checkpoint
from finetune.processes import parted


def main(folder: Path, *how: str) -> None:
    settings = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1, save_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, gradient_accumulation_steps=1,
    )  # fmt: skip
    settings.per_device_train_batch_size = 8 // settings.world_size
    model = text_model("llama", num_hidden_layers=4)
    data = Texts(40)  # whole steps: a last one that is not whole would be filled up with examples from the first
    trainer = Trainer(model, settings, train_dataset=data, data_collator=collator(model, Tokenizer, packing=True))
    draw_by_length(trainer, [len(text["input_ids"]) for text in data.texts])
    attach(trainer, lisa=LisaSettings(layers=2, every=3) if "lisa" in how else None)
    for kind in {"l2", "distill"} & {*how}:
        trainer.callback_handler.callbacks.insert(0, anchored(trainer, folder / "before", kind))
    train(trainer)
    if settings.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))


def anchored(trainer: Trainer, folder: Path, kind: str) -> Anchor:
    """To a model of other weights."""
    with trainer.accelerator.main_process_first():
        text_model("llama", num_hidden_layers=4, initializer_range=0.2).save_pretrained(folder)  # the first one alone
        tokenizer(end="</s>").save_pretrained(folder)
    settings = AnchorSettings(model=str(folder), kind=kind, weight={"l2": 1e-3, "distill": 0.5}[kind])
    return Anchor(trainer, settings, Checkpoint(model="another"), "float32")


if __name__ == "__main__":
    with parted():
        main(Path(sys.argv[1]), *sys.argv[2:])
