"""Small random checkpoints of the detectors that read names through CLIP's tokenizer, saved as users have them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    DetrImageProcessor,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    OmDetTurboProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    SwinConfig,
)

OWL = {
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor),
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor),
}
WORDS = ["cup", "bottle", "red", "wine", "glass", "glasses", "table", "cold", "of", "a", "photo", "detect"]
SQUARE = {"height": 64, "width": 64}


def clip_tokenizer(pad_token: str, length: int) -> CLIPTokenizer:
    """Every byte, and our words as one token each; the end token has the highest id, as the models ask."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        left = word[:1]
        for piece in [*word[1:-1], *([f"{word[-1]}</w>"] if len(word) > 1 else [])]:
            if (left, piece) not in merges:
                merges.append((left, piece))
                tokens.append(left + piece)
            left += piece
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=length)


def save_owl(folder: Path, family: str) -> None:
    config_class, model_class, image_processor_class, processor_class = OWL[family]
    tokenizer = clip_tokenizer("!", 16)
    small = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_class(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": 16, **small},
        vision_config={"image_size": 64, "patch_size": 16, "hidden_size": 32, **small},
        projection_dim=16,
    )
    torch.manual_seed(0)
    _save(model_class(config), folder)
    processor_class(image_processor_class(size=SQUARE), tokenizer).save_pretrained(folder)


def save_omdet(folder: Path, **backbone: object) -> None:
    """With transformers' Swin as the image encoder, or what `backbone` says of it."""
    tokenizer = clip_tokenizer("<|endoftext|>", 77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    ours = {
        "backbone_config": swin,
        "encoder_in_channels": [16, 32, 64],
        "apply_layernorm_after_vision_backbone": False,
    }
    config = OmDetTurboConfig(
        text_config=text,
        **(backbone or ours),
        image_size=64,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=32,
        num_queries=10,
        encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_attention_heads=4,
        encoder_dim_feedforward=32,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=32,
    )
    torch.manual_seed(0)
    _save(OmDetTurboForObjectDetection(config), folder)
    image_processor = DetrImageProcessor(size=SQUARE, do_pad=False)
    OmDetTurboProcessor(image_processor, tokenizer).save_pretrained(folder)


def _save(model: torch.nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        # Fresh weights let the text hardly touch the image; these make every word matter to every score. OWL's
        # boxes keep near their patches, so that they lie all over the image.
        if parameter.dim() > 1 and not name.startswith("vision_backbone"):
            scale = 0.3 if name.startswith("box_head") else 1.2
            torch.nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
