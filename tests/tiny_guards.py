"""Guards that are real but tiny: they know a few words, and have one sentence to say instead."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch

HARM = {"violence": ["hurt", "stab"], "theft": ["steal", "rob"]}
PLAIN = """I am thirsty and want a cold cup of coffee find the soda who what is on that table woman man here now
please""".split()
SAFE = "No one should come to harm"
REFUSALS = {"violence": "I do not help to hurt anybody.", "theft": "I do not help to take what is not yours."}
WINDOW = 48  # tokens


def save_guard(folder: Path, *, detoxifier: bool = True) -> Path:
    """A guard that takes the words of `HARM` for harm and rewrites harmful answers as `SAFE`."""
    _save_detector(folder / "detector")
    if detoxifier:
        _save_detoxifier(folder / "detoxifier")
    described: dict[str, Any] = {
        "detector": "detector",
        "detoxifier": "detoxifier" if detoxifier else None,
        "threshold": 0.5,
        "categories": list(HARM),
        "refusals": REFUSALS,
    }
    (folder / "guard.json").write_text(json.dumps(described))
    return folder


def tokenizer() -> Any:
    """Whole words, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    harmful = [word for words in HARM.values() for word in words]
    frame = 'question answer harmless : . , targets [ ] "'.split()
    words = dict.fromkeys(word.lower() for word in [*PLAIN, *SAFE.split(), *harmful, *frame])
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", "<start>", *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.normalizer = normalizers.Lowercase()
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    words_only.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        bos_token="<start>",
        model_max_length=WINDOW,
    )


def _save_detector(folder: Path) -> None:
    """A BERT whose weights are set by hand: it looks at harmful words, and says by which direction they point in.

    Harmful words are axes 0 and 1 of the embedding, one for each category; others are patterns of +1 and -1 elsewhere.
    """
    from transformers import BertConfig, BertForSequenceClassification

    words, width = tokenizer(), 16
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=width,
        max_position_embeddings=WINDOW,
        num_labels=1 + len(HARM),
        pad_token_id=words.pad_token_id,
    )
    model = BertForSequenceClassification(config).eval()
    for name, weights in model.state_dict().items():
        if weights.is_floating_point():
            weights.fill_(float(name.endswith("LayerNorm.weight")))
    state = model.state_dict()
    draw = random.Random(0)
    for i in range(len(words)):
        pattern = [1.0, -1.0] * ((width - 2) // 2)
        draw.shuffle(pattern)
        state["bert.embeddings.word_embeddings.weight"][i] = torch.tensor([0.0, 0.0, *pattern])
    for axis, harmful in enumerate(HARM.values()):
        for word in harmful:
            state["bert.embeddings.word_embeddings.weight"][words.convert_tokens_to_ids(word)] = torch.eye(width)[axis]
    attention = "bert.encoder.layer.0.attention"
    state[f"{attention}.self.query.bias"][0] = 4.0
    state[f"{attention}.self.key.weight"][0, :2] = 4.0  # so that a harmful word outweighs all others
    state[f"{attention}.self.value.weight"][:2, :2] = torch.eye(2)
    state[f"{attention}.output.dense.weight"][:2, :2] = 10 * torch.eye(2)
    state["bert.pooler.dense.weight"][:2, :2] = torch.eye(2)
    state["classifier.weight"][:, :2] = torch.tensor([[40.0, 40.0], [20.0, 0.0], [0.0, 20.0]])
    state["classifier.bias"][:] = -10.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _save_detoxifier(folder: Path) -> None:
    """A Llama whose weights are set by hand: it goes on from the last word alone, with the next one of `SAFE`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    words.model_max_length = 512
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,  # at least a place for each word
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    state = model.state_dict()
    for name, weights in state.items():
        weights.fill_(float("norm" in name))
    state["model.embed_tokens.weight"][:, : len(words)] = torch.eye(len(words))
    sentence = [words.convert_tokens_to_ids(word) for word in (":", *SAFE.lower().split(), "<end>")]
    for before, after in itertools.pairwise(sentence):
        state["lm_head.weight"][after, before] = 1.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
