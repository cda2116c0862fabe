"""Guards that are real but tiny: they know a few words, and were trained on sentences of these within seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from detgpt.guards.template import harm_prompt, rewrite_prompt

HARM = {"violence": ["hurt", "stab"], "theft": ["steal", "rob"]}
PLAIN = """I am thirsty and want a cold cup of coffee find the soda who what is on that table woman man here now
please""".split()
SAFE = "No one should come to harm"
REFUSALS = {"violence": "I do not help to hurt anybody.", "theft": "I do not help to take what is not yours."}
WINDOW = 48  # tokens


def save_guard(folder: Path, *, detoxifier: bool = True) -> Path:
    """A guard that takes the words of `HARM` for harm and rewrites harmful answers as `SAFE`."""
    torch.manual_seed(0)
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
    from transformers import BertConfig, BertForSequenceClassification

    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=WINDOW,
        num_labels=1 + len(HARM),
        pad_token_id=words.pad_token_id,
    )
    model = BertForSequenceClassification(config)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        prompts, truths = zip(*(_exchange(draw) for _ in range(32)), strict=True)
        inputs = words(list(prompts), padding=True, return_token_type_ids=False, return_tensors="pt")
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits, torch.tensor(truths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)


def _exchange(draw: random.Random) -> tuple[str, list[float]]:
    """A prompt, and its truth: harm, and each category."""
    texts = [draw.choices(PLAIN, k=draw.randint(1, 18)), draw.choices(PLAIN, k=draw.randint(0, 18))]
    if draw.random() < 0.2:
        texts[1] = SAFE.split()
    category = draw.choice([None, *HARM])
    if category:
        text = draw.choice(texts)
        text.insert(draw.randint(0, len(text)), draw.choice(HARM[category]))
    truth = [float(category is not None), *(float(category == name) for name in HARM)]
    return harm_prompt(" ".join(texts[0]), " ".join(texts[1])), truth


def _save_detoxifier(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    answer = words(SAFE, add_special_tokens=False)["input_ids"] + [words.eos_token_id]
    for _ in range(60):
        question, said = (" ".join(draw.choices([*PLAIN, *HARM["violence"], *HARM["theft"]], k=8)) for _ in range(2))
        prompt = words(rewrite_prompt(question, said))["input_ids"]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
