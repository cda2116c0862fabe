"""The built-in model's reasoner: a small `LlavaForConditionalGeneration`, trained from scratch.

    python -m finetune.picto.reasoner build/train build/val --tower build/tower.pt --out build/reasoner.pt

The tower stays as it was trained, so its features are computed once. The projector and the language model learn
together: mostly captions at first (what is in the picture, in reading order), then mostly wishes. The loss is on
the answers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes, WishSampler, answer, as_typed
from finetune.picto.loop import Schedule, fit
from finetune.picto.scenebank import SceneBank
from finetune.picto.tower import GRID, DenseTower, pixels, tower_config

VOCABULARY = 2600
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
IMAGE_TOKENS = GRID * GRID
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
    """Draws conversations about the scenes of a bank."""

    def __init__(self, bank: SceneBank, wishes: Wishes):
        self.bank = bank
        self.sampler = WishSampler(wishes)
        self.names = list(wishes.knowledge.classes)

    def draw(self, rng: np.random.Generator, scene: int, captions: float = 0.0) -> list[Exchange]:
        """One to three exchanges; the first of a share `captions` of conversations asks for everything."""
        present = [self.names[c] for c in self.bank.classes_in_reading_order(scene)]
        place = self.bank.places[scene]
        kind = "everything" if rng.random() < captions else None
        wish = self.sampler.draw(rng, present, kind)
        drawn = [wish]
        for _ in range(int(rng.integers(3))):
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
    """A fresh reasoner with the trained tower of `DenseTower`'s state, which is frozen."""
    model = LlavaForConditionalGeneration(reasoner_config(vocabulary))
    eyes = {k.removeprefix("tower."): v for k, v in tower.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(eyes)
    model.model.vision_tower.requires_grad_(False).eval()
    return model


@torch.inference_mode()
def tower_features(tower: DenseTower, bank: SceneBank, cache: Path) -> np.ndarray:
    """What the reasoner sees of every scene: (N, 49, 256) float16, kept in `cache`."""
    if not cache.exists():
        features = np.empty((len(bank), IMAGE_TOKENS, 256), np.float16)
        tower.eval()
        for start in range(0, len(bank), 64):
            out = tower.tower(pixels(bank.images[start : start + 64]), output_hidden_states=True)
            features[start : start + 64] = out.hidden_states[-1][:, 1:].numpy()
        np.save(cache, features)
    return np.load(cache)


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
    """Mean cross-entropy and accuracy over the answers' tokens. `features` (B, 49, 256)."""
    length = max(len(ids) for ids, _ in encoded)
    input_ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in encoded])
    learned = torch.tensor([flags + [False] * (length - len(flags)) for _, flags in encoded])
    embeds = model.get_input_embeddings()(input_ids)
    seen = model.model.multi_modal_projector(features)
    embeds = torch.cat([embeds[:, :2], seen, embeds[:, 2 + IMAGE_TOKENS :]], dim=1)
    # Padding is on the right and attention is causal: no token of an answer can see it.
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
    target = input_ids[:, 1:][learned[:, 1:]]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


def train(
    train_bank: Annotated[Path, typer.Argument()],
    val_bank: Annotated[Path, typer.Argument()],
    tower: Annotated[Path, typer.Option(help="A checkpoint of finetune.picto.tower.")] = Path("build/tower.pt"),
    out: Annotated[Path, typer.Option()] = Path("build/reasoner.pt"),
    steps: int = 5000,
    batch: int = 48,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Train projector and language model; prints loss and token accuracy on fresh scenes."""
    torch.manual_seed(seed)
    wishes = Wishes(load_knowledge())
    bank, val = SceneBank.open(train_bank), SceneBank.open(val_bank)
    talks, val_talks = Conversations(bank, wishes), Conversations(val, wishes)
    state = torch.load(tower, weights_only=True)["model"]
    eyes = DenseTower(len(wishes.knowledge.classes)).to(memory_format=torch.channels_last)
    eyes.load_state_dict(state)
    features = tower_features(eyes, bank, out.with_suffix(".train.npy"))
    val_features = tower_features(eyes, val, out.with_suffix(".val.npy"))
    folder = out.parent / "reasoner-tokenizer"
    if not folder.exists():
        make_tokenizer(talks).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = make_reasoner(len(tokenizer), state)
    with torch.no_grad():  # the projector's first layer starts at unit scale, whatever the tower's is
        model.model.multi_modal_projector.linear_1.weight.div_(
            float(features[:2000].astype(np.float32).std()) * 0.02 * 16
        )

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step, 4))
        captions = 0.08 + 0.72 * max(0.0, 1 - step / (0.3 * steps))
        chosen = rng.integers(len(bank), size=batch)
        encoded = [encode(tokenizer, talks.draw(rng, int(i), captions)) for i in chosen]
        seen = torch.from_numpy(features[chosen].astype(np.float32))
        seen = seen + 0.05 * seen.std() * torch.randn_like(seen)
        loss, accuracy = answer_loss(model, seen, encoded)
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
        evaluate=evaluate,
        evaluate_every=400,
    )


if __name__ == "__main__":
    typer.run(train)
