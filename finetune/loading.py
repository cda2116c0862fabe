"""The model that a stage goes on from: any vision-language or causal language model of transformers, to be trained."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from pydantic import Field
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.models import resolve
from detgpt.reasoners.chat import BARE
from detgpt.reasoners.huggingface import load_model, load_processor
from finetune.recipe import Settings
from finetune.rundir import is_pair
from finetune.scoring import SCORE, SCORES, scorer
from finetune.tuning import Group, modules_of


class RopeScaling(Settings):
    """A context `factor` times as long, by rescaling the rotary positions.

    rope_type: linear (Chen et al. 2023, arXiv:2306.15595), dynamic (NTK-aware, as the text grows) or yarn (Peng et al.
    2023, arXiv:2309.00071).
    """

    rope_type: Literal["linear", "dynamic", "yarn"] = "yarn"
    factor: float = Field(gt=1)


class Checkpoint(Settings):
    """Which model, and how it is loaded. scores: with a head of `finetune.scoring`, whatever it was before.

    model: a hub id, a folder, a named pair ("picto") or the folder of a run, whose reasoner is meant. dtype: of the
    weights that do not train; those that do are float32, as is all on a CPU; unset: bfloat16 on a GPU unless the
    language model trains as a whole. prompt: "bare" if it is to get instructions as users write them, "full" with the
    three steps and the answer's form; unset: as it was trained before.
    """

    scores: ClassVar[bool] = False

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None
    rope_scaling: RopeScaling | None = None
    prompt: Literal["bare", "full"] | None = None

    @property
    def source(self) -> str:
        """The hub id or folder that holds the weights."""
        return resolve(self.model).reasoner if is_pair(self.model) else self.model


def load(checkpoint: Checkpoint, dtype: str, *, quantized: tuple[Group, ...] = ()) -> tuple[Any, Any]:
    """Model and processor (a tokenizer for a language model); a checkpoint that scores is a `finetune.scoring.Scorer`.

    dtype: of the weights, or "auto" for that in which they are stored. quantized: parts whose linear layers get 4 bits
    (NF4, Dettmers et al. 2023, arXiv:2305.14314).

    Raises `ModelError` for a checkpoint that does not load, `InputError` for settings that it does not take, or without
    the GPU that 4 bits need, `MissingExtraError` without bitsandbytes.
    """
    config, processor = load_reader(checkpoint)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = scorer(mapping[type(config)]) if getattr(config, SCORES, False) else auto_class
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    if checkpoint.attn_implementation is not None:
        options["attn_implementation"] = checkpoint.attn_implementation
    if quantized:
        options["quantization_config"] = _four_bits(config, auto_class, quantized)
        options["device_map"] = {"": PartialState().local_process_index}
    return load_model(checkpoint.source, checkpoint.revision, options, model_class), processor


def load_reader(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Configuration and processor (a tokenizer for a language model), without the weights. Raises as `load` does."""
    config = _config(checkpoint)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return config, load_processor(checkpoint.source, checkpoint.revision)
    return config, _tokenizer(checkpoint)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In which the checkpoint has its weights, and a result is kept; float32 where it does not say."""
    dtype = _config(checkpoint).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _config(checkpoint: Checkpoint) -> Any:
    try:
        config = AutoConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{checkpoint.source!r} cannot be loaded: {error}\nCheck the name and the files.") from error
    if checkpoint.prompt is not None:
        config.detgpt_prompt = BARE if checkpoint.prompt == "bare" else "full"
    if checkpoint.scores:
        setattr(config, SCORES, True)
    if checkpoint.rope_scaling is not None:
        lengthen(config.get_text_config(decoder=True), checkpoint.rope_scaling)
    return config


def lengthen(config: Any, scaling: RopeScaling) -> None:
    """Let a language model's configuration take `scaling.factor` times as many positions, in place.

    Raises `InputError` for one without rotary positions, or with rescaled ones.
    """
    rope = getattr(config, "rope_parameters", None)
    # Where layers of a sliding window have rotary positions of their own, those reach no further than the window.
    rope = rope.get("full_attention", rope) if rope else None
    if not rope or rope.get("rope_type", "default") != "default":
        found = f"already has {rope['rope_type']!r} ones" if rope else "has no rotary positions"
        raise InputError(f"rope_scaling: the {config.model_type} language model {found}: leave it out")
    original = config.max_position_embeddings
    rope.update(rope_type=scaling.rope_type, factor=scaling.factor)
    if scaling.rope_type == "yarn":
        rope["original_max_position_embeddings"] = original
    if scaling.rope_type != "dynamic":  # which measures how far a text goes beyond the original length
        config.max_position_embeddings = int(original * scaling.factor)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        return AutoTokenizer.from_pretrained(checkpoint.source, revision=checkpoint.revision, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {checkpoint.source!r} cannot be loaded: {error}") from error


def _four_bits(config: Any, auto_class: Any, quantized: tuple[Group, ...]) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantization")
    if not torch.cuda.is_available():
        raise InputError("language: qlora needs a GPU, and there is none here: take lora")
    with torch.device("meta"):
        model = auto_class.from_config(config)
    whole = [group for group in Group if group not in quantized]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*modules_of(model, whole), "lm_head", SCORE],  # used for 4 bits, too
    )
