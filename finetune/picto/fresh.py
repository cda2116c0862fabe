"""The shapes of the built-in models, and both of them as folders before they have learned anything but to see.

The folders are complete checkpoints in transformers' format, processors included, so every further step is a stage that
any other model goes through, too.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    DPTConfig,
    GenerationConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from finetune.picto.knowledge import Knowledge, load_knowledge
from finetune.picto.world import SIDE

SIZE = {"height": SIDE, "width": SIDE}  # the whole picture, never a crop: a crop could cut the target out
HALF = [0.5, 0.5, 0.5]

RESNET_WIDTHS = (32, 64, 128, 256)  # channels of the stages, at strides 4, 8, 16 and 32


def resnet_config(*out_features: str) -> ResNetConfig:
    """The ResNet of both models, which gives these of its stages."""
    return ResNetConfig(
        embedding_size=RESNET_WIDTHS[0],
        hidden_sizes=list(RESNET_WIDTHS),
        depths=[1, 2, 2, 2],
        layer_type="basic",
        out_features=list(out_features),
    )


# ------------------------------------------------------------------------------------------------ the detector

DETECTOR_WIDTH = 128
MAX_TEXT = 96  # tokens of a prompt
# transformers' Grounding DINO writes these ids into its text masks.
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


def detector_tokenizer(knowledge: Knowledge, folder: Path) -> BertTokenizer:
    """A WordPiece vocabulary: every word of a name is one token, anything else is spelled letter by letter."""
    words = sorted(
        {w for c in knowledge.classes.values() for name in c.names for w in name.lower().replace("-", " ").split()}
    )
    letters = [*string.ascii_lowercase, *string.digits, "-", "'", "&"]
    tokens = [*letters, *(f"##{c}" for c in string.ascii_lowercase + string.digits), *words]
    tokens = [t for t in dict.fromkeys(tokens) if t not in SPECIAL_IDS]
    vocabulary = {i: t for t, i in SPECIAL_IDS.items()}
    free = (i for i in range(SPECIAL_IDS["?"]) if i not in vocabulary)
    vocabulary.update({next(free): t for t in tokens})
    lines = [vocabulary.get(i, f"[unused{i}]") for i in range(max(vocabulary) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return BertTokenizer(str(file), do_lower_case=True, model_max_length=MAX_TEXT)


def detector_config(vocabulary: int) -> GroundingDinoConfig:
    return GroundingDinoConfig(
        backbone_config=resnet_config("stage3", "stage4").to_dict(),
        text_config={
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": DETECTOR_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": MAX_TEXT,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        num_queries=40,
        encoder_layers=2,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_attention_heads=4,
        d_model=DETECTOR_WIDTH,
        dropout=0.0,
        fusion_droppath=0.0,
        num_feature_levels=3,
        max_text_len=MAX_TEXT,
    )


def make_detector(vocabulary: int, resnet: dict[str, torch.Tensor]) -> GroundingDinoForObjectDetection:
    """A fresh detector on a trained ResNet. Raises `ValueError` where that is of another shape."""
    model = GroundingDinoForObjectDetection(detector_config(vocabulary))
    with torch.no_grad():
        # Fusion starts at 1e-4 and would take most of a short training to open. Class scores are plain dot products
        # of two normalised vectors, so the first loss would be in the hundreds: scale the text down, on its way out
        # of the encoder. (Not the decoder's norm: its boxes are refined before that norm and scored after it, by the
        # same head, which then works only if the norm keeps the scale.)
        for name, parameter in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                parameter.fill_(0.1)
        model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.weight.fill_(0.1)
    known = {k: v for k, v in resnet.items() if not k.endswith("num_batches_tracked")}
    if missing := model.model.backbone.conv_encoder.model.load_state_dict(known, strict=False).missing_keys:
        raise ValueError(f"the ResNet lacks {missing}: it is of another shape than the detector's backbone")
    return model


def write_detector(folder: Path, resnet: dict[str, torch.Tensor]) -> None:
    tokenizer = detector_tokenizer(load_knowledge(), folder)
    make_detector(len(tokenizer), resnet).save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size=SIZE, image_mean=HALF, image_std=HALF)
    GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ the reasoner

STRIDE = 32
GRID = SIDE // STRIDE  # cells a side of the tower's tokens
TOWER_WIDTH = 256
VOCABULARY = 2600
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tower_config() -> DPTConfig:
    return DPTConfig(
        is_hybrid=True,
        backbone_config=resnet_config("stage2", "stage3", "stage4").to_dict(),
        backbone_featmap_shape=[1, RESNET_WIDTHS[-1], GRID, GRID],
        hidden_size=TOWER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=SIDE,
        patch_size=STRIDE,
        neck_hidden_sizes=[8, 8, 8, 8],  # the depth head is not used
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
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )
    config.detgpt_prompt = "bare"  # it is trained on the wish alone, without instructions on the form
    return config


def reasoner_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's language: usual words are one token, any other text still has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def reasoner_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessor(size=SIZE, do_center_crop=False, image_mean=HALF, image_std=HALF),
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def make_reasoner(
    vocabulary: int, tower: dict[str, torch.Tensor], pixel_values: torch.Tensor
) -> LlavaForConditionalGeneration:
    """A fresh reasoner on a trained tower. pixel_values (B, 3, S, S): scenes, for the scale of what the tower says."""
    model = LlavaForConditionalGeneration(reasoner_config(vocabulary))
    model.model.vision_tower.load_state_dict(tower)
    tokens = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    # The projector's first layer starts at unit scale, whatever the tower's is.
    model.model.multi_modal_projector.linear_1.weight.div_(tokens.std() * 0.02 * TOWER_WIDTH**0.5)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    return model


def write_reasoner(
    folder: Path, texts: Iterable[str], tower: dict[str, torch.Tensor], pixel_values: torch.Tensor
) -> None:
    tokenizer = reasoner_tokenizer(texts)
    make_reasoner(len(tokenizer), tower, pixel_values).save_pretrained(folder)
    reasoner_processor(tokenizer).save_pretrained(folder)


def write_with_tower(folder: Path, reasoner: Path, tower: dict[str, torch.Tensor]) -> None:
    """The trained `reasoner` with another tower of the same shape, which it has yet to learn to read."""
    model = LlavaForConditionalGeneration.from_pretrained(reasoner, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(tower)
    model.save_pretrained(folder)
    LlavaProcessor.from_pretrained(reasoner).save_pretrained(folder)
