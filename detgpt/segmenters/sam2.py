"""SAM 2 through transformers: the outline of what stands in each box.

    Sam2Segmenter("facebook/sam2.1-hiera-small").segment(image, boxes)

The hub's checkpoints of SAM 2 are of its video model; what tracks things through a film is left out when they load.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskGeneration, Sam2Processor

from detgpt.device import choose_device
from detgpt.errors import ModelError
from detgpt.masks import check_room

MODEL_TYPES = ("sam2", "sam2_video")
MAX_BOXES_PER_PASS = 16  # through the mask decoder, which holds the picture's features once for each


class Sam2Segmenter:
    """A SAM 2, loaded once; safe to call from several threads."""

    def __init__(self, model_id_or_folder: str | Path, *, device: str | torch.device | None = None) -> None:
        """Load a checkpoint by its hub id or from a local folder, in float32.

        Raises `ModelError` when the checkpoint is missing, incomplete or of another kind.
        """
        self.name = str(model_id_or_folder)
        self.device = choose_device(device)
        self.processor, self.model = _load(self.name)
        self.model.to(self.device).eval()
        self._lock = threading.Lock()  # one picture at a time bounds memory

    def segment(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) xyxy in pixels of the image → masks (N, H, W) bool at its size, one per box, in order.

        The picture is encoded once; without boxes not at all. A box says well enough which thing is meant, so the
        model is asked for its one mask rather than three guesses; where that is unstable, it falls back to the
        guess that it rates best itself. Raises `InputError` where the masks would be over `detgpt.masks.MAX_BYTES`.
        """
        check_room(len(boxes), image.size)
        masks = np.empty((len(boxes), image.height, image.width), dtype=bool)
        if len(boxes) == 0:
            return masks
        inputs = self.processor(images=image, input_boxes=[np.asarray(boxes).tolist()], return_tensors="pt")
        with self._lock, torch.inference_mode():
            prompts = inputs["input_boxes"].to(self.device)  # (1, N, 4)
            features = self.model.get_image_embeddings(inputs["pixel_values"].to(self.device))
            for start in range(0, len(boxes), MAX_BOXES_PER_PASS):
                chunk = prompts[:, start : start + MAX_BOXES_PER_PASS]
                output = self.model(image_embeddings=features, input_boxes=chunk, multimask_output=False)
                for i, logits in enumerate(output.pred_masks[0], start=start):  # (1, h, w), a quarter of the input
                    # One by one, because at the picture's size they are large.
                    masks[i] = self.processor.post_process_masks([logits[None]], inputs["original_sizes"])[0].cpu()
        return masks


def _load(source: str) -> tuple[Any, Any]:
    """Processor and model of a checkpoint, checked to be whole and a SAM 2."""
    try:
        model_type = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        if model_type not in MODEL_TYPES:
            raise ModelError(f"{source} is a model of type {model_type!r}; this segmenter reads SAM 2.")
        processor = Sam2Processor.from_pretrained(source)
        model, report = AutoModelForMaskGeneration.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"Cannot load a SAM 2 from {source}: {error} Give a hub id or a folder as segmenter, which must hold "
            "config.json, model.safetensors and the files of the processor."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"The weights in {source} lack {len(missing)} tensors of its config.json, such as {missing[0]}; "
            "they would run as random numbers. Download the checkpoint again or use its own config."
        )
    return processor, model
