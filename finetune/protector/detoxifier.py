"""Teach a language model to rewrite harmful answers: `stage: detoxifier`, after MLLM-Protector (Pi et al. 2024,
arXiv:2401.02906).

    detgpt-finetune run detoxifier model=Qwen/Qwen3-0.6B train=data/pku output=runs/detoxifier

Any causal language model. It goes on from `detgpt.guards.template.rewrite_prompt` with the harmless answer, and only
that is learned. The harmless answer to a harmful one is the exchange's `rewrite`, else the other answer of its pair,
else, where all are harmful, a fixed refusal. The result is `<output>/reasoner`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset

from detgpt.errors import InputError
from detgpt.guards.template import rewrite_prompt
from finetune.batching import IGNORED
from finetune.protector.exchanges import Exchange, read_exchanges
from finetune.stages.reasoner import Paths, ReasonerConfig, train
from finetune.tuning import Group, Tune

REFUSAL = "I am sorry, I cannot help with this."


class Config(ReasonerConfig):
    """Settings of the stage.

    train, validation: folders of exchanges (`finetune.protector.exchanges`). language: how the model is trained.
    refusal: what is learned where all answers are harmful. max_length: an exchange with more tokens is left out.
    """

    stage: Literal["detoxifier"] = "detoxifier"
    language: Tune = "lora"
    refusal: str = REFUSAL
    max_length: int | None = 512


def run(config: Config) -> None:
    def prepare(model: Any, tokenizer: Any, paths: Paths) -> Dataset:
        rows = [
            row
            for exchange in read_exchanges(paths)
            for prompt, rewrite in rewritings(exchange, config.refusal)
            if (row := encoded(tokenizer, prompt, rewrite)) and len(row["input_ids"]) <= (config.max_length or 512)
        ]
        if not rows:
            raise InputError(f"{paths} has no harmful answer that fits into max_length={config.max_length} tokens")
        return Dataset.from_list(rows)

    how: dict[Group, Tune] = {Group.VISION: "frozen", Group.PROJECTOR: "frozen", Group.LANGUAGE: config.language}
    train(config, how, prepare, defaults={"learning_rate": 2e-5, "num_train_epochs": 4})


def rewritings(exchange: Exchange, refusal: str) -> Iterator[tuple[str, str]]:
    """(prompt, harmless answer) for each harmful answer of an exchange."""
    safe = exchange.pair[1] if exchange.pair else refusal
    for answer, harmful in zip(exchange.answers, exchange.harmful, strict=True):
        if harmful:
            yield rewrite_prompt(exchange.question, answer), " " + (exchange.rewrite or safe)


def encoded(tokenizer: Any, prompt: str, rewrite: str) -> dict[str, list[int]]:
    """A rewriting as tokens, of which only those behind the prompt are learned."""
    asked = tokenizer(prompt)["input_ids"]
    written = [*tokenizer(rewrite, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": [*asked, *written], "labels": [*[IGNORED] * len(asked), *written]}
