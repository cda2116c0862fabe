"""Teach a classifier to tell harmful exchanges: `stage: harm_detector`, after MLLM-Protector (Pi et al. 2024,
arXiv:2401.02906).

    detgpt-finetune run harm-detector model=Qwen/Qwen3-0.6B train=data/pku validation=data/pku-val output=runs/harm

Any checkpoint that AutoModelForSequenceClassification reads; of a language model, the head is new. Its first logit says
how harmful an exchange is, the others of which kind. Learned are

    −log σ(r_safe − r_harmful)      for two answers of which exactly one is harmful; r is the first logit, negated
    binary cross-entropy            for each text: the question alone, and with each answer
    binary cross-entropy            for each kind of harm, of the texts that are harmful

Two safe answers are not ranked: which of them is "better" says nothing of harm. The texts are those of inference
(`finetune.protector.exchanges.scored_text`). The result is `<output>/detector`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from detgpt.errors import InputError, ModelError
from detgpt.guards.parts import HarmDetector
from finetune import callbacks, rundir
from finetune.arguments import TrainerSettings, arguments
from finetune.preference.reward import pair_loss
from finetune.protector.exchanges import Exchange, read_exchanges, scored_text
from finetune.protector.measure import auroc, labelled, score
from finetune.recipe import StageConfig
from finetune.tuning import Lora

DETECTOR = "detector"  # in a run's folder: the result
HARM = "harm"  # the first label
CHUNK = 16  # texts of like length that go through the model together
Batch = dict[str, torch.Tensor]


class Config(StageConfig):
    """Settings of the stage.

    model: a hub id or a folder. train, validation: folders of exchanges. categories: the kinds of harm; unset: those of
    `train`. tune: all weights, or low-rank adapters, which are merged in the end. ranking: the weight of the first term
    of the loss. misspelled: the share of questions some of whose letters are swapped or missing, anew at each drawing.
    hidden: the share of tokens that are not seen, anew at each drawing, so that no single word decides.
    max_length: tokens of a text; the rest is cut off. trainer: transformers' TrainingArguments.
    """

    stage: Literal["harm_detector"] = "harm_detector"
    model: str
    train: Path | list[Path]
    validation: Path | list[Path] | None = None
    categories: list[str] | None = None
    tune: Literal["full", "lora"] = "lora"
    lora: Lora = Lora(r=32, alpha=64)
    ranking: float = Field(default=1.0, ge=0)
    misspelled: float = Field(default=0.1, ge=0, le=1)
    hidden: float = Field(default=0.1, ge=0, lt=1)
    max_length: int = Field(default=512, ge=8)
    trainer: TrainerSettings = Field(default_factory=dict)


def run(config: Config) -> None:
    """Train, and write the result to `config.output`; a run that was interrupted goes on from its last checkpoint."""
    args = _arguments(config)
    if rundir.is_finished(config):
        return
    exchanges = read_exchanges(config.train)
    validation = read_exchanges(config.validation) if config.validation is not None else []
    categories = config.categories or sorted({name for exchange in exchanges for name in exchange.categories})
    folder = rundir.start(config)
    set_seed(config.seed)
    model, tokenizer = load_classifier(config.model, categories)
    if config.tune == "lora":
        from peft import LoraConfig, get_peft_model

        lora = config.lora
        model = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules="all-linear",
                task_type="SEQ_CLS",
            ),
        )
    trainer = HarmTrainer(
        model=model,
        args=args,
        train_dataset=Judged(exchanges, categories, config.misspelled),
        data_collator=Collator(tokenizer, config.max_length, config.hidden),
        ranking=config.ranking,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder / rundir.TENSORBOARD)
    callbacks.attach(trainer)
    callbacks.train(trainer)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = model.merge_and_unload() if config.tune == "lora" else model
    tokenizer.model_max_length = config.max_length  # longer texts are judged in pieces
    rundir.write_folder(
        folder / DETECTOR, lambda place: (whole.save_pretrained(place), tokenizer.save_pretrained(place))
    )
    metrics = {}
    if validation:
        scored = score(HarmDetector(folder / DETECTOR, categories, model.device), validation)
        metrics["eval_auroc"] = auroc(scored.harm, scored.harmful)
    rundir.finish(folder, metrics)


def load_classifier(name: str, categories: Sequence[str]) -> tuple[Any, Any]:
    """The classifier at `name` with a logit for harm and one for each category, and its tokenizer.

    Raises `ModelError` for a checkpoint that does not load.
    """
    labels = dict(enumerate([HARM, *categories]))
    options = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}, "num_labels": len(labels)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype="float32",
            **options,
        )
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(f"{name!r} is no classifier or language model that can be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


class Judged(Dataset):
    """The texts of an exchange and what is true of them.

    Item: texts (T strings); harmful (T,) and categories (T, C), float; pair: (the safe text, the harmful one) by
    number, if there are exactly one of both among two answers.
    """

    def __init__(self, exchanges: Sequence[Exchange], categories: Sequence[str], misspelled: float = 0.0) -> None:
        self._exchanges, self._misspelled = exchanges, misspelled
        self._columns = {name: i for i, name in enumerate(categories)}

    def __len__(self) -> int:
        return len(self._exchanges)

    def __getitem__(self, index: int) -> dict[str, Any]:
        exchange = self._exchanges[index]
        question = exchange.question
        if self._misspelled:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))  # whose state a checkpoint keeps
            question = misspelled(rng, question) if rng.random() < self._misspelled else question
        kinds = torch.zeros(len(self._columns))
        kinds[[self._columns[name] for name in exchange.categories if name in self._columns]] = 1
        items = list(labelled(exchange))
        harmful = torch.tensor([float(harm) for _, harm in items])
        answers = len(items) - len(exchange.answers)
        pair = None
        if exchange.pair is not None:
            pair = (answers + exchange.harmful.index(False), answers + exchange.harmful.index(True))
        return {
            "texts": [scored_text(question, answer) for answer, _ in items],
            "harmful": harmful,
            "categories": harmful[:, None] * kinds,
            "pair": pair,
        }


class Collator:
    """Exchanges as one batch of all their texts, shortest first: harmful (T,), categories (T, C), pairs (P, 2) of rows.

    `texts` is a list of the model's inputs for CHUNK of them each, so that little is padding. hidden: the share of
    tokens that are not attended to.
    """

    def __init__(self, tokenizer: Any, max_length: int, hidden: float = 0.0) -> None:
        self._tokenizer, self._max_length, self._hidden = tokenizer, max_length, hidden

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = [text for item in items for text in item["texts"]]
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        row_of = {i: row for row, i in enumerate(order)}
        starts = np.cumsum([0, *(len(item["texts"]) for item in items)])
        pairs = [
            [row_of[start + i] for i in item["pair"]]
            for start, item in zip(starts, items, strict=False)
            if item["pair"]
        ]
        return {
            "texts": [self._chunk([ids[i] for i in order[at : at + CHUNK]]) for at in range(0, len(order), CHUNK)],
            "harmful": torch.cat([item["harmful"] for item in items])[order],
            "categories": torch.cat([item["categories"] for item in items])[order],
            "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        }

    def _chunk(self, ids: list[list[int]]) -> Batch:
        batch = dict(self._tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        if self._hidden:
            seen = torch.rand(batch["attention_mask"].shape) >= self._hidden
            seen[:, 0] = True  # never a text without any
            batch["attention_mask"] = batch["attention_mask"] * seen
        return batch


class HarmTrainer(Trainer):
    """Learns by `harm_loss`. ranking: the weight of its first term."""

    def __init__(self, *, ranking: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._ranking = ranking
        self.model_accepts_loss_kwargs = False  # each batch has a loss of its own

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = torch.cat([model(**chunk).logits for chunk in inputs["texts"]]).float()
        truth = {name: inputs[name] for name in ("harmful", "categories", "pairs")}
        loss = harm_loss(logits, **truth, ranking=self._ranking)
        return (loss, {"logits": logits}) if return_outputs else loss


def harm_loss(
    logits: torch.Tensor, harmful: torch.Tensor, categories: torch.Tensor, pairs: torch.Tensor, *, ranking: float = 1.0
) -> torch.Tensor:
    """The loss of T texts: their logits (T, 1 + C), harmful (T,) in {0, 1}, categories (T, C), pairs (P, 2).

    A pair is (the safe text, the harmful one) by number; there may be none.
    """
    harm = logits[:, 0]
    loss = binary_cross_entropy(harm, harmful)
    if len(pairs):
        loss = loss + ranking * pair_loss(-harm[pairs[:, 0]], -harm[pairs[:, 1]])
    known = categories.any(dim=1)
    if known.any():
        loss = loss + binary_cross_entropy(logits[known, 1:], categories[known])
    return loss


def misspelled(rng: np.random.Generator, text: str) -> str:
    """A text as it is typed in a hurry: in some words two letters change places, or one is missing."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and rng.random() < 0.25:
            place = int(rng.integers(1, len(word) - 2))
            kept = "" if rng.random() < 0.5 else word[place]
            words[i] = word[:place] + word[place + 1] + kept + word[place + 2 :]
    return " ".join(words)


def _arguments(config: Config) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "learning_rate": 2e-5,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # of all steps
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "no",
    }
    ours = {
        "output_dir": str(config.output / rundir.CHECKPOINTS),
        "seed": config.seed,
        "remove_unused_columns": False,
        "label_names": [],
    }
    if config.trainer.get("eval_strategy", "no") != "no":
        raise InputError("trainer.eval_strategy: the validation is measured when the training is done: leave it out")
    return arguments(TrainingArguments, config.trainer, defaults=defaults, ours=ours)
