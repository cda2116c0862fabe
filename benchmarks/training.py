"""What training costs: our batches against padded ones and TRL's trainer, and all weights against LoRA and LISA.

    python -m benchmarks.training batches
    python -m benchmarks.training weights
    python -m benchmarks.training large      # a few steps of a model of 270 million parameters, for the memory

Every contender trains in a process of its own, one epoch on the same examples from the same weights with the same
number of examples a step, and is then asked for its loss on examples that none has seen. Writes
`benchmarks/results/training.json` and `training.md`.

The data is a mixture as LLaVA's: short answers about pictures, and texts of a few to a thousand tokens. The model is
the built-in one's tower and tokenizer under a larger, fresh language model, so that the language model is what costs,
as in the models that people train.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SPLITS = ROOT / "finetune" / "picto" / "splits"
REASONER = ROOT / "weights" / "picto" / "reasoner"
SIZES = {"batches": (256, 6), "weights": (512, 8), "large": (1024, 16)}  # width and layers of the language model
EXAMPLES = {"batches": 96, "weights": 96, "large": 12}  # that are learned
STEP = {"batches": 8, "weights": 8, "large": 2}  # of these at once
UNSEEN = 8
WITH_PICTURE = 2 / 3
MEDIAN_TEXT, MOST_TEXT = 220, 900  # tokens of the answers in texts


# ------------------------------------------------------------------------------------------------ data and model


def mixture(tokenizer: Any, examples: int) -> list[dict[str, Any]]:
    """`examples` + UNSEEN records as `finetune.data.records` has them."""
    rng = np.random.default_rng(0)
    lines = [json.loads(line) for line in (SPLITS / "seen" / "data.jsonl").read_text().splitlines()]
    sentences = [f"{line['instruction']}: {', '.join(line['targets']) or 'nothing'}." for line in lines]
    records = []
    for index in range(examples + UNSEEN):
        line = lines[int(rng.integers(len(lines)))]
        if rng.random() < WITH_PICTURE:
            answer = f"I see {', '.join(line['present'])}.\nTargets: {json.dumps(line['targets'])}"
            records.append(record(line["instruction"], answer, str(SPLITS / "seen" / line["image"]), index))
        else:
            length = int(min(MOST_TEXT, rng.lognormal(np.log(MEDIAN_TEXT), 0.9)))
            text = " ".join(sentences[int(i)] for i in rng.integers(len(sentences), size=80))
            records.append(
                record("Tell me more.", tokenizer.decode(tokenizer(text)["input_ids"][:length]), None, index)
            )
    return records


def record(wish: str, answer: str, image: str | None, index: int) -> dict[str, Any]:
    said = [{"role": "user", "content": wish}, {"role": "assistant", "content": answer}]
    return {"messages": said, "image": image, "instruction": wish, "where": f"example {index}"}


def language_model(width: int, layers: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(REASONER)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 4 * width, layers
    text.num_attention_heads = text.num_key_value_heads = width // 64
    text.head_dim = 64
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    trained = AutoModelForImageTextToText.from_pretrained(REASONER, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


# ------------------------------------------------------------------------------------------------- the contenders


class Setting:
    """The same for every contender: model, processor, examples."""

    def __init__(self, what: str) -> None:
        from datasets import Dataset
        from transformers import AutoProcessor

        from finetune.encoding import RecordEncoder

        self.processor = AutoProcessor.from_pretrained(REASONER)
        self.model = language_model(*SIZES[what])
        self.examples, self.step = EXAMPLES[what], STEP[what]
        self.records = mixture(self.processor.tokenizer, self.examples)
        encoder = RecordEncoder(self.processor, bare=True)
        data = Dataset.from_list(self.records).with_transform(encoder)
        self.train, self.unseen = data.select(range(self.examples)), [data[i] for i in range(self.examples, len(data))]
        self.folder = tempfile.mkdtemp()

    def arguments(self, kind: Any, **others: Any) -> Any:
        usual = {
            "output_dir": self.folder, "per_device_train_batch_size": self.step, "num_train_epochs": 1, "use_cpu": True,
            "learning_rate": 5e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "remove_unused_columns": False, "seed": 0,
        }  # fmt: skip
        return kind(**{**usual, **others})

    def trainer(self, *, packing: bool = False) -> Any:
        from transformers import Trainer, TrainingArguments

        from finetune.batching import collator

        batches = collator(self.model, self.processor, packing=packing)
        return Trainer(self.model, self.arguments(TrainingArguments), train_dataset=self.train, data_collator=batches)

    def loss(self) -> float:
        """On the unseen examples, of the answers' tokens."""
        import torch

        from finetune.batching import collator

        self.model.eval()
        with torch.no_grad():
            return float(self.model(**collator(self.model, self.processor)(self.unseen)).loss)


def packed(setting: Setting) -> Any:
    return setting.trainer(packing=True)


def by_length(setting: Setting) -> Any:
    from finetune.batching import draw_by_length

    trainer = setting.trainer()
    draw_by_length(trainer, [len(example["input_ids"]) for example in setting.train])
    return trainer


def padded(setting: Setting) -> Any:
    return setting.trainer()


def trl(setting: Setting) -> Any:
    """As it comes, but for gradient checkpointing, which the others do without and this image tower does not allow."""
    from datasets import Dataset
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    rows = setting.records[: setting.examples]
    data = Dataset.from_list(
        [{"prompt": r["messages"][:1], "completion": r["messages"][1:], "path": r["image"]} for r in rows]
    )

    def opened(batch: dict[str, Any]) -> dict[str, Any]:
        images = [[Image.open(path).convert("RGB")] if path else [] for path in batch["path"]]
        return {"prompt": batch["prompt"], "completion": batch["completion"], "images": images}

    settings = setting.arguments(SFTConfig, gradient_checkpointing=False)
    return SFTTrainer(
        setting.model, settings, train_dataset=data.with_transform(opened), processing_class=setting.processor
    )


def lora(setting: Setting) -> Any:
    from finetune.tuning import Group, Lora, tuned

    how = {Group.VISION: "frozen", Group.PROJECTOR: "full", Group.LANGUAGE: "lora"}
    setting.model = tuned(setting.model, how, Lora())
    return packed(setting)


def lisa(setting: Setting, train_ends: bool = True) -> Any:
    from finetune.callbacks import LisaSettings, attach

    trainer = packed(setting)
    attach(trainer, lisa=LisaSettings(layers=2, every=5, train_ends=train_ends))
    return trainer


def lisa_middle(setting: Setting) -> Any:
    return lisa(setting, train_ends=False)


CONTENDERS: dict[str, dict[str, Callable[[Setting], Any]]] = {
    "batches": {
        "ours: packed": packed,
        "ours: by length": by_length,
        "Trainer, padded (as LMFlow)": padded,
        "TRL SFTTrainer": trl,
    },
    "weights": {"all": packed, "LISA, 2 layers": lisa, "LISA, 2 layers, no ends": lisa_middle, "LoRA": lora},
    "large": {"all": packed, "LISA, 2 layers": lisa, "LoRA": lora},
}


# --------------------------------------------------------------------------------------------------- measurement


def measure(what: str, name: str) -> dict[str, float]:
    """One epoch of one contender in this process; time from the built model to the last step."""
    setting = Setting(what)
    before = setting.loss()
    examples = [setting.train[i] for i in range(setting.examples)]
    tokens = sum(len(example["input_ids"]) for example in examples)
    images = sum(example.get("pixel_values") is not None for example in examples)
    idle = peak_gib()
    start = time.perf_counter()
    trainer = CONTENDERS[what][name](setting)
    trainer.train()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "images_per_second": images / seconds,
        "peak_gib": peak_gib(),
        "peak_before_gib": idle,
        "steps": trainer.state.global_step,
        "loss_before": before,
        "loss": setting.loss(),
    }


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


AGAINST = {"batches": "Trainer, padded (as LMFlow)", "weights": "all", "large": "all"}  # what the ratios are to


def table(what: str, measured: dict[str, dict[str, float]]) -> str:
    base = measured.get(AGAINST[what], next(iter(measured.values())))["tokens_per_second"]
    lines = [
        f"| | tokens/s | against {AGAINST[what]!r} | images/s | peak memory | loss on unseen |",
        "|---|" + "---:|" * 5,
    ]
    for name, numbers in measured.items():
        ratio = numbers["tokens_per_second"] / base
        lines.append(
            f"| {name} | {numbers['tokens_per_second']:,.0f} | {ratio:.2f}x | {numbers['images_per_second']:.1f} "
            f"| {numbers['peak_gib']:.2f} GiB | {numbers['loss']:.3f} |"
        )
    return "\n".join(lines)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    what: Annotated[str, typer.Argument(help="batches, weights or large")],
    only: Annotated[str, typer.Option(help="Measure this contender alone, and keep the others' numbers.")] = "",
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure, and write the tables."""
    if here:
        print(json.dumps(measure(what, only)))
        return
    file = RESULTS / "training.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    numbers = kept.setdefault(what, {})
    for name in [only] if only else list(CONTENDERS[what]):
        command = [sys.executable, "-m", "benchmarks.training", what, "--only", name, "--here"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        numbers[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, numbers[name])
    kept[what] = {name: numbers[name] for name in CONTENDERS[what] if name in numbers}
    kept["machine"] = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    tables = [
        f"`python -m benchmarks.training {part}`\n\n{table(part, kept[part])}\n" for part in CONTENDERS if part in kept
    ]
    (RESULTS / "training.md").write_text(f"On {os.cpu_count()} cores ({platform.machine()}):\n\n" + "\n".join(tables))


if __name__ == "__main__":
    app()
