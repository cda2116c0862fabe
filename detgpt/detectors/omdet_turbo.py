"""OmDet-Turbo through transformers: a light detector that scores whole names, not tokens.

    OmDetTurboDetector("omlab/omdet-turbo-swin-tiny-hf").detect([image], [["cup", "cold bottle"]])

It reads the names one by one, but what is asked still meets the image twice: the task, a sentence of all names,
goes through the decoder, and the boxes to refine are those that fit any of the names best. A name's boxes
therefore depend on the others asked with it, unless it is asked alone, which "separate" does after one pass of
the image encoder. Chosen over SAM 3's concept prompts for its size: a Swin-T at 640 pixels runs on a laptop or a
robot, an image encoder of 32 layers of width 1024 at 1008 pixels hardly does.

The public checkpoint builds its image encoder with timm: `pip install 'detgpt[omdet]'`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detgpt.detectors import Grounding
from detgpt.detectors.checkpoint import load_checkpoint, read_config
from detgpt.detectors.spans import Prompt, TokenScores, check_query, ground_images, known_tokens, make_prompts
from detgpt.device import choose_device
from detgpt.errors import InputError, MissingExtraError

MODEL_TYPES = ("omdet-turbo",)
TASK = "Detect {}."  # the sentence of transformers' own processor


class OmDetTurboDetector:
    """An OmDet-Turbo, loaded once; safe to call from several threads."""

    def __init__(
        self,
        model_id_or_folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        max_prompts_per_pass: int = 4,
    ) -> None:
        """Load a checkpoint by its hub id or from a local folder.

        `device` None: CUDA where there is one, else the CPU. `dtype` None: float32, whatever the checkpoint
        was saved in. `max_prompts_per_pass` bounds memory: that many prompts, or images, go through the network
        together. Raises `MissingExtraError` without timm where the checkpoint needs it, and `ModelError` when
        the checkpoint is missing, incomplete or of another kind.
        """
        if max_prompts_per_pass < 1:
            raise InputError(f"max_prompts_per_pass must be at least 1, got {max_prompts_per_pass}.")
        self.name = str(model_id_or_folder)
        self.device = choose_device(device)
        self.max_prompts_per_pass = max_prompts_per_pass
        backbone = read_config(self.name, MODEL_TYPES, revision).backbone_config
        if backbone.model_type == "timm_backbone" and find_spec("timm") is None:
            raise MissingExtraError("timm", "omdet")
        self.processor, self.model = load_checkpoint(self.name, MODEL_TYPES, dtype, revision)
        self.model.to(self.device).eval()
        self._lock = threading.Lock()

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        """Look for `names[i]` in `images[i]`; one `Grounding` per image, boxes in that image's pixels.

        `prompting="separate"`: each name is a task of its own, so what else is asked does not change its boxes;
        the image encoder still runs once per image. A box needs a score of `box_threshold`.
        `prompting="joint"`: the names share one task (a second one past the text encoder's 77 tokens) and each
        box goes to its best name, which must reach `box_threshold` and `text_threshold`.
        Raises `InputError` for thresholds outside [0, 1], another `prompting`, or a name that it cannot read.
        """
        check_query(images, names, box_threshold, text_threshold, prompting)
        with self._lock, torch.inference_mode():
            known = partial(known_tokens, self.processor.tokenizer)
            # A comma or the full stop follows each name in the task, as a full stop does in a prompt.
            positions = self.model.config.text_config.max_position_embeddings
            max_tokens = positions - len(known(TASK.format(""))) + 1
            return ground_images(
                images,
                [make_prompts(asked, prompting, known, max_tokens) for asked in names],
                encode=self._encode,
                fuse=self._fuse,
                max_prompts_per_pass=self.max_prompts_per_pass,
                box_threshold=box_threshold,
                text_threshold=text_threshold if prompting == "joint" else None,
            )

    def _encode(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Feature maps of the images, per level (B, C, h, w)."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        features = self.model.vision_backbone(pixels.to(self.device, self.model.dtype))
        return list(self.model.encoder(features, return_dict=True).extracted_states)

    def _fuse(self, feature_maps: list[torch.Tensor], rows: list[int], prompts: list[Prompt]) -> Iterator[TokenScores]:
        names = [[prompt.text[start:end] for start, end in prompt.spans] for prompt in prompts]
        classes = self._tokenize([name for of_prompt in names for name in of_prompt])
        tasks = self._tokenize([TASK.format(", ".join(of_prompt)) for of_prompt in names])
        counts = torch.tensor([len(of_prompt) for of_prompt in names])
        # The model keeps what it has read, so that a known name or task costs nothing the next time.
        language = self.model.get_language_embedding(*classes, *tasks, counts)
        output = self.model.decoder([maps[rows] for maps in feature_maps], *language, return_dict=True)
        probabilities = output.decoder_classes[-1].float().sigmoid().cpu().numpy()  # (prompts, Q, most names)
        boxes = output.decoder_coords[-1].float().cpu().numpy()
        # A name is scored whole: it is the one token that covers its characters.
        for prompt, scores, found in zip(prompts, probabilities, boxes, strict=True):
            yield TokenScores(np.array(prompt.spans), scores[:, : len(prompt.spans)], found)

    def _tokenize(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        return tokens["input_ids"], tokens["attention_mask"]
