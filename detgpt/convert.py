"""Original Grounding DINO checkpoints (a config .py and a .pth) to folders that transformers loads.

    detgpt convert GroundingDINO_SwinT_OGC.py groundingdino_swint_ogc.pth gdino-tiny

The package groundingdino-py is not needed: the files are read, and every tensor gets the name that it has in the
checkpoints on the hub. The names were found by reading both implementations; tests/test_convert.py proves them.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    GroundingDinoConfig,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

from detgpt.detectors.grounding_dino import check_tokenizer
from detgpt.detectors.original import read_config, read_weights
from detgpt.errors import InputError, ModelError

_SWIN = "model.backbone.conv_encoder.model."
# Each part's prefix in the package and in transformers, and the names within. # is a number, * anything;
# {a,b,c} cuts the tensor in three; an empty name leaves out what neither reads when it detects.
_PARTS: list[tuple[str, str, dict[str, str]]] = [
    (
        "backbone.0.",
        _SWIN,
        {
            "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
            "patch_embed.norm.*": "embeddings.norm.*",
            "layers.#.downsample.*": "encoder.layers.#.downsample.*",
            # The stages count from 0 in the package and from 1 in transformers.
            **{f"norm{stage}.*": f"hidden_states_norms.stage{stage + 1}.*" for stage in range(4)},
        },
    ),
    (
        "backbone.0.layers.#.blocks.#.",
        f"{_SWIN}encoder.layers.#.blocks.#.",
        {
            "norm1.*": "layernorm_before.*",
            "attn.qkv.*": "attention.self.{query,key,value}.*",
            "attn.relative_position_bias_table": "attention.self.relative_position_bias_table",
            "attn.relative_position_index": "",  # follows from the window's size
            "attn.proj.*": "attention.output.dense.*",
            "norm2.*": "layernorm_after.*",
            "mlp.fc1.*": "intermediate.dense.*",
            "mlp.fc2.*": "output.dense.*",
        },
    ),
    (
        "bert.",
        "model.text_backbone.",
        {
            "embeddings.position_ids": "",  # 0, 1, 2, …, which older versions of transformers saved
            "embeddings.*": "embeddings.*",
            "encoder.*": "encoder.*",
            "pooler.*": "",
        },
    ),
    (
        "transformer.encoder.fusion_layers.#.",
        "model.encoder.layers.#.fusion_layer.",
        {
            "gamma_v": "vision_param",
            "gamma_l": "text_param",
            "layer_norm_v.*": "layer_norm_vision.*",
            "layer_norm_l.*": "layer_norm_text.*",
            "attn.v_proj.*": "attn.vision_proj.*",
            "attn.l_proj.*": "attn.text_proj.*",
            "attn.values_v_proj.*": "attn.values_vision_proj.*",
            "attn.values_l_proj.*": "attn.values_text_proj.*",
            "attn.out_v_proj.*": "attn.out_vision_proj.*",
            "attn.out_l_proj.*": "attn.out_text_proj.*",
        },
    ),
    (
        "transformer.encoder.text_layers.#.",
        "model.encoder.layers.#.text_enhancer_layer.",
        {
            "self_attn.in_proj_*": "self_attn.{query,key,value}.*",
            "self_attn.out_proj.*": "self_attn.out_proj.*",
            "norm1.*": "layer_norm_before.*",
            "linear1.*": "fc1.*",
            "linear2.*": "fc2.*",
            "norm2.*": "layer_norm_after.*",
        },
    ),
    (
        "transformer.encoder.layers.#.",
        "model.encoder.layers.#.deformable_layer.",
        {
            "self_attn.*": "self_attn.*",
            "norm1.*": "self_attn_layer_norm.*",
            "linear1.*": "fc1.*",
            "linear2.*": "fc2.*",
            "norm2.*": "final_layer_norm.*",
        },
    ),
    (
        "transformer.decoder.layers.#.",
        "model.decoder.layers.#.",
        {
            "self_attn.in_proj_*": "self_attn.{query,key,value}.*",
            "self_attn.out_proj.*": "self_attn.out_proj.*",
            "norm2.*": "self_attn_layer_norm.*",
            "ca_text.in_proj_*": "encoder_attn_text.{query,key,value}.*",
            "ca_text.out_proj.*": "encoder_attn_text.out_proj.*",
            "catext_norm.*": "encoder_attn_text_layer_norm.*",
            "cross_attn.*": "encoder_attn.*",
            "norm1.*": "encoder_attn_layer_norm.*",
            "linear1.*": "fc1.*",
            "linear2.*": "fc2.*",
            "norm3.*": "final_layer_norm.*",
        },
    ),
    (
        "transformer.",
        "model.",
        {
            "level_embed": "level_embed",
            "enc_output.*": "enc_output.*",
            "enc_output_norm.*": "enc_output_norm.*",
            "enc_out_bbox_embed.*": "encoder_output_bbox_embed.*",
            "tgt_embed.*": "query_position_embeddings.*",
            "decoder.norm.*": "decoder.layer_norm.*",
            "decoder.ref_point_head.*": "decoder.reference_points_head.*",
        },
    ),
    (
        "",
        "",
        {
            "input_proj.*": "model.input_proj_vision.*",
            "feat_map.*": "model.text_projection.*",
            "bbox_embed.#.*": "bbox_embed.#.*",
            "transformer.decoder.bbox_embed.#.*": "bbox_embed.#.*",  # the same tensors under a second name
            "label_enc.*": "",  # labels of the denoising queries of training
        },
    ),
]
_NAMES = {
    source + name: target + new_name if new_name else ""
    for source, target, names in _PARTS
    for name, new_name in names.items()
}
_SWINS: dict[str, dict[str, Any]] = {
    "swin_T_224_1k": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_B_224_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
    "swin_B_384_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin_L_224_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7},
    "swin_L_384_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
# Settings of the package that transformers has in one way only.
_FIXED: dict[str, Any] = {
    "position_embedding": "sine",
    "pre_norm": False,
    "query_dim": 4,
    "num_patterns": 0,
    "two_stage_type": "standard",
    "embed_init_tgt": True,
    "use_text_enhancer": True,
    "use_fusion_layer": True,
    "use_text_cross_attention": True,
    "sub_sentence_present": True,
}


def convert(
    config_path: str | Path,
    checkpoint_path: str | Path,
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
) -> None:
    """Write the checkpoint to the new `folder`, for `GroundingDinoDetector` and for transformers itself.

    `text_encoder`: the BERT whose architecture and tokenizer to use, a hub id or, to stay offline, a folder;
    None: the config's. Its weights are those of the checkpoint. The folder appears only when it is whole and
    transformers has loaded it with every tensor in its place.
    Raises `InputError` for a folder that is there already or cannot be written, and `ModelError` for files
    that are missing, incomplete, of another kind, or of an architecture that transformers does not have.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already. Choose another folder, or remove it first.")
    settings = read_config(config_path)
    source = str(text_encoder or getattr(settings, "text_encoder_type", "bert-base-uncased"))
    text_config, tokenizer = _load_text_encoder(source)
    config = _transformers_config(settings, text_config, config_path)
    tensors = _rename(read_weights(checkpoint_path), config.decoder_bbox_embed_share, checkpoint_path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".detgpt-convert-", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(made)
            GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer).save_pretrained(made)
            _check_whole(made, f"{checkpoint_path} and {config_path}")
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot write {folder}: {error}. Choose another folder or free space.") from error


def _load_text_encoder(source: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a BERT."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Cannot load the text encoder {source}: {error} Give the folder of a BERT and its tokenizer."
        ) from error
    if config.model_type != "bert":
        raise ModelError(f"The text encoder {source} is a model of type {config.model_type!r}; it must be a BERT.")
    check_tokenizer(source, tokenizer)
    return config, tokenizer


def _transformers_config(settings: SimpleNamespace, text_config: Any, config_path: str | Path) -> GroundingDinoConfig:
    given = vars(settings)
    for name, value in {**_FIXED, "pe_temperatureW": given.get("pe_temperatureH")}.items():
        if given.get(name) != value:
            raise ModelError(
                f"{config_path} has {name} = {given.get(name)!r}; transformers can only do {value!r}. "
                "Run the checkpoint as it is, with GroundingDinoPyDetector."
            )
    if given.get("backbone") not in _SWINS:
        raise ModelError(f"{config_path} has backbone = {given.get('backbone')!r}; known are {', '.join(_SWINS)}.")
    try:
        swin = {
            "model_type": "swin",
            **_SWINS[settings.backbone],
            "image_size": int(settings.backbone.split("_")[2]),
            "drop_path_rate": 0.2,
            # The stages count from 0 in the package and from 1 in transformers.
            "out_indices": [index + 1 for index in settings.return_interm_indices],
        }
        return GroundingDinoConfig(
            architectures=["GroundingDinoForObjectDetection"],
            backbone_config=swin,
            text_config=text_config,
            num_queries=settings.num_queries,
            d_model=settings.hidden_dim,
            encoder_layers=settings.enc_layers,
            encoder_attention_heads=settings.nheads,
            encoder_ffn_dim=settings.dim_feedforward,
            encoder_n_points=settings.enc_n_points,
            decoder_layers=settings.dec_layers,
            decoder_attention_heads=settings.nheads,
            decoder_ffn_dim=settings.dim_feedforward,
            decoder_n_points=settings.dec_n_points,
            num_feature_levels=settings.num_feature_levels,
            activation_function=settings.transformer_activation,
            positional_embedding_temperature=settings.pe_temperatureH,
            max_text_len=256,  # whatever the config says: the package has it written into its code
            decoder_bbox_embed_share=settings.dec_pred_bbox_embed_share,
            two_stage_bbox_embed_share=settings.two_stage_bbox_embed_share,
            dropout=settings.dropout,
            text_enhancer_dropout=settings.text_dropout,
            fusion_dropout=settings.fusion_dropout,
            fusion_droppath=settings.fusion_droppath,
        )
    except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{config_path} does not describe a Grounding DINO: {error}.") from error


def _rename(
    weights: dict[str, torch.Tensor], share_box_head: bool, checkpoint_path: str | Path
) -> dict[str, torch.Tensor]:
    """The same tensors under the names of transformers' checkpoints."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        target = _new_name(name)
        if target is None:
            raise ModelError(f"{checkpoint_path} has a tensor {name}, which no Grounding DINO in transformers has.")
        if share_box_head:
            target = re.sub(r"^bbox_embed\.\d+", "bbox_embed.0", target)
        for whole, part in _cut(target, tensor.contiguous()):
            copy = renamed.setdefault(whole, part)
            if copy is not part and not torch.equal(copy, part):
                raise ModelError(
                    f"{checkpoint_path} has a tensor {name} that should equal that of another box head and does "
                    "not. Use the config that belongs to this checkpoint."
                )
    return renamed


def _new_name(name: str) -> str | None:
    for source, target in _NAMES.items():
        pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
        if match := re.fullmatch(pattern, name):
            for part in match.groups():
                target = re.sub(r"[#*]", part, target, count=1)
            return target
    return None


def _cut(target: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """`a.{query,key,value}.b` names the thirds of a tensor along its first dimension; an empty name drops it."""
    if not target:
        return []
    if not (names := re.search(r"\{(.+)\}", target)):
        return [(target, tensor)]
    parts = names[1].split(",")
    return [
        (target.replace(names[0], part), third)
        for part, third in zip(parts, tensor.tensor_split(len(parts)), strict=True)
    ]


def _check_whole(folder: Path, sources: str) -> None:
    """Load the folder as a user will; raise `ModelError` naming the first tensor that has not found its place."""
    _, report = AutoModelForZeroShotObjectDetection.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = [
        *(
            f"{name} has the shape {tuple(found)}, not {tuple(wanted)}"
            for name, found, wanted in sorted(report["mismatched_keys"])
        ),
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is not in that architecture" for name in sorted(report["unexpected_keys"])),
    ]
    if problems:
        raise ModelError(
            f"{sources} do not belong together: {len(problems)} tensors do not fit. By transformers' names, "
            f"{problems[0]}. Use the config that belongs to this checkpoint."
        )
