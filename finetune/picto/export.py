"""From training checkpoints to `weights/picto`: the folders that `DetGPT.from_pretrained` loads.

python -m finetune.picto.export build weights/picto
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from finetune.picto.detector import make_detector
from finetune.picto.reasoner import CHAT_TEMPLATE, EOS, PAD, reasoner_config
from finetune.picto.scenebank import SIDE

SIZE = {"height": SIDE, "width": SIDE}  # the whole picture, never a crop: a crop could cut the target out
HALF = [0.5, 0.5, 0.5]
BOX_THRESHOLD = 0.25


def export_reasoner(build: Path, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(build / "reasoner-tokenizer")
    model = LlavaForConditionalGeneration(reasoner_config(len(tokenizer)))
    model.load_state_dict(torch.load(build / "reasoner.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    model.half().save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size=SIZE, do_center_crop=False, image_mean=HALF, image_std=HALF),
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def export_detector(build: Path, folder: Path) -> None:
    tokenizer = BertTokenizer.from_pretrained(build / "tokenizer")
    model = make_detector(len(tokenizer))
    model.load_state_dict(torch.load(build / "detector.pt", weights_only=True)["model"])
    model.half().save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size=SIZE, image_mean=HALF, image_std=HALF)
    GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)


def export(
    build: Annotated[Path, typer.Argument(help="Where the checkpoints are.")] = Path("build"),
    folder: Annotated[Path, typer.Argument(help="Where the model goes.")] = Path("weights/picto"),
) -> None:
    """Write the built-in model as half-precision safetensors with its processors."""
    export_reasoner(build, folder / "reasoner")
    export_detector(build, folder / "detector")
    pair = {
        "reasoner": "reasoner",
        "detector": "detector",
        "options": {"box_threshold": BOX_THRESHOLD, "max_new_tokens": 160},
        "knows": "pictograms of 131 everyday things, not photographs",
        "needs": "nothing: it comes with the package",
    }
    (folder / "detgpt.json").write_text(json.dumps(pair, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(export)
