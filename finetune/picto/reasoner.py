"""The built-in model's reasoner: a small `LlavaForConditionalGeneration`, trained from scratch.

    python -m finetune.picto.reasoner build/train build/val --tower build/tower.pt --out build/reasoner.pt

The tower's ResNet stays as it was trained, so what it sees is computed once. The tower's attention layers, the
projector and the language model learn together: mostly captions at first (what is in the picture, in reading order),
then mostly wishes. The loss is on the answers only.

An answer that it learns from names what the tower can tell, and no more: made to name what it cannot see, a reasoner
learns to guess, and its guesses follow the wish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes, WishSampler, answer, as_typed
from finetune.picto.loop import Schedule, fit, parameter_groups
from finetune.picto.scenebank import SceneBank
from finetune.picto.tower import GRID, WIDTH, DenseTower, pixels, tower_config

VOCABULARY = 2600
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
IMAGE_TOKENS = GRID * GRID
NOTHING_FITS = 0.32  # share of wishes that nothing fulfils: more than people ask, for "no" is the hardest to learn
RECOGNISED = 0.35  # least score of the tower for a thing that an answer names
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Exchange:
    """One wish about a scene and its answer."""

    wish: str
    answer: str


class Conversations:
    """Draws conversations about the scenes of a bank. `scores` (N, C): how well the tower sees each class in each."""

    def __init__(self, bank: SceneBank, wishes: Wishes, scores: np.ndarray):
        self.bank = bank
        self.scores = scores
        self.sampler = WishSampler(wishes, nothing_fits=NOTHING_FITS)
        self.names = list(wishes.knowledge.classes)

    def draw(self, rng: np.random.Generator, scene: int, captions: float = 0.0) -> list[Exchange]:
        """Three to eight exchanges; the first of a share `captions` of conversations asks for everything.

        Many, for each is another lesson in reading from the list that the first answer begins with.
        """
        classes = self.bank.classes_in_reading_order(scene)
        recognised = [c for c in classes if self.scores[scene, c] > RECOGNISED]
        present = [self.names[c] for c in recognised or classes]
        place = self.bank.places[scene]
        kind = "everything" if rng.random() < captions else None
        wish = self.sampler.draw(rng, present, kind)
        drawn = [wish]
        for _ in range(int(rng.integers(2, 8))):
            narrower = self.sampler.follow_up(rng, drawn[-1], present) if rng.random() < 0.3 else None
            drawn.append(narrower or self.sampler.draw(rng, present))
        return [Exchange(as_typed(rng, w.text), answer(place, present, w, first=i == 0)) for i, w in enumerate(drawn)]


def make_tokenizer(conversations: Conversations, samples: int = 30_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's language: usual words are one token, any other text still has tokens."""
    wishes = conversations.sampler.wishes
    knowledge = wishes.knowledge

    def corpus() -> Iterator[str]:
        rng = np.random.default_rng(0)
        for need in knowledge.needs.values():
            yield from need.says
        for _ in range(samples):
            for exchange in conversations.draw(rng, int(rng.integers(len(conversations.bank)))):
                yield exchange.wish
                yield exchange.answer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def reasoner_config(vocabulary: int) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )
    config.detgpt_prompt = "bare"  # it was trained on the wish alone, without instructions on the form
    return config


def make_reasoner(vocabulary: int, tower: dict[str, torch.Tensor]) -> LlavaForConditionalGeneration:
    """A fresh reasoner with the trained tower of `DenseTower`'s state, of which only the attention layers learn on."""
    model = LlavaForConditionalGeneration(reasoner_config(vocabulary))
    eyes = {k.removeprefix("tower."): v for k, v in tower.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(eyes)
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower.encoder.requires_grad_(True)
    return model


@torch.inference_mode()
def look(tower: DenseTower, bank: SceneBank, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the tower sees of every scene, kept in two files beside `cache`.

    Returns its ResNet's features as its attention layers get them, (N, 50, 256) float16, and its scores of the
    classes in 0..1, (N, C) float16.
    """
    files = [cache.with_name(f"{cache.name}.{what}.npy") for what in ("features", "scores")]
    if not all(file.exists() for file in files):
        partial = [file.with_suffix(".partial") for file in files]
        features = np.lib.format.open_memmap(partial[0], "w+", np.float16, (len(bank), 1 + IMAGE_TOKENS, WIDTH))
        scores = np.lib.format.open_memmap(partial[1], "w+", np.float16, (len(bank), tower.num_classes))
        tower.eval()
        for start in track(range(0, len(bank), 64), "looking at the scenes"):
            end = start + 64
            seen, scores[start:end] = tower.look(pixels(bank.images[start:end]))
            features[start:end] = seen
        for array, file, part in zip((features, scores), files, partial, strict=True):
            array.flush()
            part.replace(file)
    return np.load(files[0], mmap_mode="r"), np.load(files[1])


def encode(tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation about one image, as the chat template writes them, and which are answers."""
    ids, learned = [BOS], [False]
    for i, exchange in enumerate(exchanges):
        asked = [
            USER,
            *([IMAGE] * IMAGE_TOKENS if i == 0 else []),
            *_ids(tokenizer, exchange.wish),
            ASSISTANT,
        ]
        said = [*_ids(tokenizer, exchange.answer), EOS]
        ids += asked + said
        learned += [False] * len(asked) + [True] * len(said)
    return ids, learned


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text.strip(), add_special_tokens=False)["input_ids"]


def answer_loss(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    encoded: Sequence[tuple[list[int], list[bool]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy and accuracy over the answers' tokens. `features` (B, 50, 256) of `look`."""
    length = max(len(ids) for ids, _ in encoded)
    input_ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in encoded])
    learned = torch.tensor([flags + [False] * (length - len(flags)) for _, flags in encoded])
    embeds = model.get_input_embeddings()(input_ids)
    tokens = model.model.vision_tower.encoder(features).last_hidden_state[:, 1:]  # without the class token
    seen = model.model.multi_modal_projector(tokens)
    embeds = torch.cat([embeds[:, :2], seen, embeds[:, 2 + IMAGE_TOKENS :]], dim=1)
    # Padding is on the right and attention is causal: no token of an answer can see it.
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
    target = input_ids[:, 1:][learned[:, 1:]]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


@torch.no_grad()
def scale_projector(model: LlavaForConditionalGeneration, features: np.ndarray) -> None:
    """Start the projector's first layer at unit scale, whatever the tower's is."""
    tokens = model.model.vision_tower.encoder(torch.from_numpy(features.astype(np.float32))).last_hidden_state
    model.model.multi_modal_projector.linear_1.weight.div_(tokens.std() * 0.02 * WIDTH**0.5)


def train(
    train_bank: Annotated[Path, typer.Argument()],
    val_bank: Annotated[Path, typer.Argument()],
    tower: Annotated[Path, typer.Option(help="A checkpoint of finetune.picto.tower.")] = Path("build/tower.pt"),
    out: Annotated[Path, typer.Option()] = Path("build/reasoner.pt"),
    steps: int = 5000,
    batch: int = 32,
    lr: float = 1.5e-3,
    seed: int = 0,
    start: Annotated[Path | None, typer.Option(help="Go on from this reasoner, without captions.")] = None,
) -> None:
    """Train attention layers, projector and language model; prints loss and token accuracy on fresh scenes."""
    torch.manual_seed(seed)
    wishes = Wishes(load_knowledge())
    bank, val = SceneBank.open(train_bank), SceneBank.open(val_bank)
    state = torch.load(tower, weights_only=True)["model"]
    eyes = DenseTower(len(wishes.knowledge.classes)).to(memory_format=torch.channels_last)
    eyes.load_state_dict(state)
    features, scores = look(eyes, bank, out.with_name(f"{out.stem}.train"))
    val_features, val_scores = look(eyes, val, out.with_name(f"{out.stem}.val"))
    talks, val_talks = Conversations(bank, wishes, scores), Conversations(val, wishes, val_scores)
    folder = out.parent / "reasoner-tokenizer"
    if not folder.exists():
        make_tokenizer(talks).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = make_reasoner(len(tokenizer), state)
    if start is not None:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
    else:
        scale_projector(model, features[:2000])

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step, 4))
        captions = 0.05 if start else 0.05 + 0.75 * max(0.0, 1 - step / (0.3 * steps))
        chosen = np.sort(rng.integers(len(bank), size=batch))
        encoded = [encode(tokenizer, talks.draw(rng, int(i), captions)) for i in chosen]
        loss, accuracy = answer_loss(model, torch.from_numpy(features[chosen].astype(np.float32)), encoded)
        return {"loss": loss, "accuracy": accuracy}

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng((seed, 5))
        parts = []
        for start in range(0, 384, 48):
            chosen = np.arange(start, start + 48)
            encoded = [encode(tokenizer, val_talks.draw(rng, int(i))) for i in chosen]
            parts.append(answer_loss(model, torch.from_numpy(val_features[chosen].astype(np.float32)), encoded))
        losses, accuracies = zip(*parts, strict=True)
        return {
            "val loss": float(torch.stack(losses).mean()),
            "val accuracy": float(torch.stack(accuracies).mean()),
        }

    fit(
        model,
        loss_of,
        Schedule(steps, lr, weight_decay=0.05, clip=1.0),
        out,
        groups=parameter_groups(model, lr, slow="vision_tower", slow_factor=0.2),
        evaluate=evaluate,
        evaluate_every=400,
    )


if __name__ == "__main__":
    typer.run(train)
