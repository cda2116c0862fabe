"""A sentence encoder that is real but tiny, and has read nothing; and what it learned of harm."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from finetune.recipe import run_recipe

KICKS = ["I kick dogs now", "let me kick dogs"]
PLAYS = ["I kick balls now", "let me walk dogs"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "i", "we", "let", "me", "kick", "walk", "dogs", "balls", "now"]


def save_base(folder: Path, seed: int = 0) -> Path:
    """A small BERT, in the place of one that has read much."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), **size)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def learn(base: Path, place: Path) -> Path:
    """The folder of what the encoder `base` learned of KICKS and PLAYS."""
    write_questions(place, *((text, True) for text in KICKS), *((text, False) for text in PLAYS))
    steps = ["trainer.max_steps=120", "trainer.learning_rate=0.005", "trainer.logging_steps=20"]
    run_recipe("guard-picto/encoder", [f"model={base}", f"train={place}", f"output={place / 'run'}", *steps])
    return place / "run/encoder"


def write_questions(folder: Path, *asked: tuple[str, bool]) -> None:
    rows = [{"question": question, "question_harmful": harmful} for question, harmful in asked]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
