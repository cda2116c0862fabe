"""The small models of the built-in guard before they have learned anything (`stage: protector.fresh`).

    detector/      a BERT that classifies: for `stage: harm_detector`
    detoxifier/    a Llama that writes: for `stage: detoxifier`

Both are complete checkpoints in transformers' format whose tokenizers know the words of the training data, so the
further stages are the same as for any other model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetune import rundir
from finetune.protector.detoxifier import rewritings
from finetune.protector.exchanges import Exchange, read_exchanges, scored_text
from finetune.recipe import Settings, StageConfig

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST = 512  # tokens


class Size(Settings):
    """Of a model: its vocabulary, the width of its tokens, its layers."""

    vocabulary: int = Field(default=3000, ge=300)
    width: int = Field(default=128, ge=16, multiple_of=16)
    layers: int = Field(default=2, ge=1)

    def shape(self, vocabulary: int) -> dict[str, Any]:
        """Settings of a configuration of transformers."""
        return {
            "vocab_size": vocabulary,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 32 or 1,
            "max_position_embeddings": LONGEST,
        }


class Config(StageConfig):
    """train: exchanges, for the words. detector, detoxifier: sizes."""

    stage: Literal["protector.fresh"]
    train: Path
    detector: Size = Size()
    detoxifier: Size = Size(vocabulary=2000, layers=3)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config)
    torch.manual_seed(config.seed)
    exchanges = read_exchanges(config.train)
    rundir.write_folder(config.output / "detector", lambda place: write_detector(place, exchanges, config.detector))
    rundir.write_folder(
        config.output / "detoxifier", lambda place: write_detoxifier(place, exchanges, config.detoxifier)
    )
    rundir.finish(config.output, {})


def write_detector(place: Path, exchanges: list[Exchange], size: Size) -> None:
    """WordPiece in lower case, so that capitals hide nothing; the head gets its labels in training."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN, max_input_chars_per_word=60))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size.vocabulary, special_tokens=[PAD, UNKNOWN, FIRST, LAST], show_progress=False
    )
    tokenizer.train_from_iterator(_scored(exchanges), trainer)
    ends = [(mark, tokenizer.token_to_id(mark)) for mark in (FIRST, LAST)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{FIRST} $A {LAST}", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=FIRST,
        sep_token=LAST,
        model_max_length=LONGEST,
    )
    config = BertConfig(**size.shape(len(fast)), pad_token_id=fast.pad_token_id)
    BertForSequenceClassification(config).save_pretrained(place)
    fast.save_pretrained(place)


def write_detoxifier(place: Path, exchanges: list[Exchange], size: Size) -> None:
    """A byte-level BPE: it can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[PAD, FIRST, LAST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_rewritten(exchanges), trainer)
    first = [(FIRST, tokenizer.token_to_id(FIRST))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{FIRST} $A", special_tokens=first)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=FIRST,
        eos_token=LAST,
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
    )
    ends = {"pad_token_id": fast.pad_token_id, "bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**size.shape(len(fast)), tie_word_embeddings=True, **ends))
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    model.save_pretrained(place)
    fast.save_pretrained(place)


def _scored(exchanges: list[Exchange]) -> Iterator[str]:
    for exchange in exchanges:
        for answer in exchange.answers or (None,):
            yield scored_text(exchange.question, answer)


def _rewritten(exchanges: list[Exchange]) -> Iterator[str]:
    for exchange in exchanges:
        for rewriting in rewritings(exchange, ""):
            yield "".join(rewriting)
