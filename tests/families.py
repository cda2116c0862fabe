"""Small checkpoints of the families of multimodal models that people use: real classes, random weights.

Each builder writes a folder as `save_pretrained` does, with a processor, a tokenizer and a chat template in the
family's own manner. Another family is one more builder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 32
LANGUAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that random weights still prefer one token clearly
}
VISION = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CHATML = ("<|im_start|>", "<|im_end|>")


def chatml(image: str) -> str:
    """The template of Qwen and of those who took it over."""
    return turns("<|im_start|>{{ message.role }}\n", image, "<|im_end|>\n", answers="<|im_start|>assistant\n")


def turns(begin: str, image: str, end: str, *, answers: str, end_of_answer: str | None = None) -> str:
    """A chat template: `begin`, the message with `image` for its picture, `end`; `answers` opens an answer."""
    return (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}" + answers + "{% else %}" + begin + "{% endif %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{% if message.role == 'assistant' %}" + (end_of_answer or end) + "{% else %}" + end + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + answers + "{% endif %}"
    )


def tokenizer(*special: str, end: str, **named: str) -> Any:
    """Byte-level, with the family's special tokens and the names that its processor knows them by."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    every = list(dict.fromkeys(["<pad>", end, *special, *named.values()]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=0, special_tokens=every, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token=end, extra_special_tokens=named or every[2:]
    )


def save(folder: Path, model: Any, processor: Any) -> Path:
    tokens = processor.tokenizer
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokens = tokenizer(end="</s>", image_token="<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=LlamaConfig(vocab_size=len(tokens), **LANGUAGE),
        image_token_index=tokens.image_token_id,
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokens,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=turns("USER: ", "<image>\n", " ", answers="ASSISTANT: ", end_of_answer="</s>"),
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)


def llava_next(folder: Path) -> Path:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    tokens = tokenizer(end="</s>", image_token="<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=MistralConfig(vocab_size=len(tokens), **LANGUAGE),
        image_token_index=tokens.image_token_id,
        image_grid_pinpoints=grids,
        image_seq_length=16,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids
        ),
        tokens,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=turns("[INST] ", "<image>\n", " [/INST]", answers=" ", end_of_answer="</s>"),
    )
    return save(folder, LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> Path:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokens = tokenizer(*CHATML, end="<|im_end|>", image_token="<image>", video_token="<video>")
    grids = [[32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Qwen2Config(vocab_size=len(tokens), **LANGUAGE),
        image_token_index=tokens.image_token_id,
        video_token_index=tokens.video_token_id,
        image_grid_pinpoints=grids,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=grids),
        tokens,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )
    return save(folder, LlavaOnevisionForConditionalGeneration(config), processor)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen_tokenizer() -> Any:
    return tokenizer(
        *CHATML,
        end="<|im_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def qwen_ids(tokens: Any) -> dict[str, int]:
    named = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": getattr(tokens, f"{name}_id") for name in named}


def qwen2_5_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokens = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        text_config={"vocab_size": len(tokens), **LANGUAGE, "rope_parameters": rope, "pad_token_id": 0},
        **qwen_ids(tokens),
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, size=size),
        tokens,
        Qwen2VLVideoProcessor(patch_size=8, size=size),
        chat_template=chatml(QWEN_IMAGE),
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen3_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokens = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10_000.0}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={"vocab_size": len(tokens), **LANGUAGE, "head_dim": 8, "rope_parameters": rope},
        **qwen_ids(tokens),
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, size=size),
        tokens,
        Qwen3VLVideoProcessor(patch_size=8, size=size),
        chat_template=chatml(QWEN_IMAGE),
    )
    return save(folder, Qwen3VLForConditionalGeneration(config), processor)


def internvl(folder: Path) -> Path:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokens = tokenizer(
        *CHATML,
        end="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", "vocab_size": len(tokens), **LANGUAGE},
        image_token_id=tokens.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokens,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    return save(folder, InternVLForConditionalGeneration(config), processor)


def idefics_tokenizer() -> Any:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return tokenizer(
        *cells,
        end="<end_of_utterance>",
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        video_token="<video>",
    )


IDEFICS_TEMPLATE = "<|im_start|>" + turns(
    "{{ message.role | capitalize }}: ", "<image>", "<end_of_utterance>\n", answers="Assistant:"
)


def idefics_parts(tokens: Any) -> dict[str, Any]:
    return {
        "vision_config": {**VISION, "image_size": 32, "patch_size": 8},
        "text_config": {"model_type": "llama", "vocab_size": len(tokens), **LANGUAGE, "pad_token_id": 0},
        "image_token_id": tokens.image_token_id,
        "pad_token_id": 0,
        "scale_factor": 2,
    }


def idefics3(folder: Path) -> Path:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokens = idefics_tokenizer()
    pictures = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(pictures, tokens, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return save(folder, Idefics3ForConditionalGeneration(Idefics3Config(**idefics_parts(tokens))), processor)


def smolvlm(folder: Path) -> Path:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokens = idefics_tokenizer()
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokens,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return save(folder, SmolVLMForConditionalGeneration(SmolVLMConfig(**idefics_parts(tokens))), processor)


def gemma3(folder: Path) -> Path:
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokens = tokenizer(
        "<start_of_turn>",
        end="<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Gemma3TextConfig(
            vocab_size=len(tokens), **LANGUAGE, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        image_token_index=tokens.image_token_id,
        tie_word_embeddings=False,  # tied random weights repeat the last token for ever
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # fresh ones are zero: blind
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokens,
        image_seq_length=4,
        chat_template=turns(
            "<start_of_turn>{{ message.role }}\n",
            "<start_of_image>",
            "<end_of_turn>\n",
            answers="<start_of_turn>model\n",
        ),
    )
    return save(folder, model, processor)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "LLaVA 1.5": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "InternVL": internvl,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "Gemma 3": gemma3,
}
