"""OWLv2 and OWL-ViT through transformers: each image patch has one box, and any name may be compared with it.

    Owlv2Detector("google/owlv2-base-patch16-ensemble").detect([image], [["cup", "cold bottle"]])

Names meet the image only in the last product, of one vector per name with one per patch: names cannot disturb
each other, the image tower runs once for any number of them, and a name is read once per call. Scores run lower
than Grounding DINO's; transformers' own threshold for these models is 0.1.

Left out on purpose: detection by an example image, which has no name to report.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detgpt.boxes import concatenate, cxcywh_norm_to_xyxy, within_image
from detgpt.detectors import Grounding
from detgpt.detectors.checkpoint import load_checkpoint
from detgpt.detectors.spans import check_query, known_tokens, read_names, refuse_nan
from detgpt.device import choose_device
from detgpt.errors import InputError

MODEL_TYPES = ("owlv2", "owlvit")


class Owlv2Detector:
    """An OWLv2 or OWL-ViT, loaded once; safe to call from several threads."""

    def __init__(
        self,
        model_id_or_folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        template: str = "a photo of a {}",
        max_images_per_pass: int = 4,
    ) -> None:
        """Load a checkpoint by its hub id or from a local folder.

        `device` None: CUDA where there is one, else the CPU. `dtype` None: float32, whatever the checkpoint
        was saved in. `template` is the sentence a name is put into, "{}" for the bare name: the models learned
        from captions. `max_images_per_pass` bounds memory: that many images, of any sizes, go through the
        image tower together. Raises `ModelError` when the checkpoint is missing, incomplete or of another kind.
        """
        if max_images_per_pass < 1:
            raise InputError(f"max_images_per_pass must be at least 1, got {max_images_per_pass}.")
        if template.count("{}") != 1:
            raise InputError(f"template must hold {{}} once, where the name goes, got {template!r}.")
        self.name = str(model_id_or_folder)
        self.device = choose_device(device)
        self.template = template
        self.max_images_per_pass = max_images_per_pass
        self.processor, self.model = load_checkpoint(self.name, MODEL_TYPES, dtype, revision)
        self.model.to(self.device).eval()
        self._towers = getattr(self.model, self.model.base_model_prefix)
        self._room = self._tokens_for_a_name()
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

        The scores are the same under either `prompting`, which says whom a box may belong to. "separate": to
        every name that scores `box_threshold` there, so what else is asked changes nothing. "joint": to its
        best name alone, as in transformers' own post-processing; the name, which has but one score, must reach
        `box_threshold` and `text_threshold`.
        Raises `InputError` for thresholds outside [0, 1], another `prompting`, or a name that it cannot read.
        """
        check_query(images, names, box_threshold, text_threshold, prompting)
        threshold = max(box_threshold, text_threshold) if prompting == "joint" else box_threshold
        asked = [i for i, of_image in enumerate(names) if of_image]
        groundings = [concatenate([]) for _ in images]
        with self._lock, torch.inference_mode():
            queries = self._read({name for of_image in names for name in of_image})
            for start in range(0, len(asked), self.max_images_per_pass):
                indices = asked[start : start + self.max_images_per_pass]
                features, boxes = self._encode([images[i] for i in indices])
                for row, i in enumerate(indices):
                    scores = self._score(features[row], torch.stack([queries[name] for name in names[i]]))
                    found = _assign(self._to_pixels(boxes[row], images[i].size), scores, threshold, prompting)
                    groundings[i] = within_image(found, images[i].size)
        return groundings

    def _tokens_for_a_name(self) -> int:
        """What the template and the two special tokens leave of the text tower's positions, 16 for all known."""
        positions = self.model.config.text_config.max_position_embeddings
        room = positions - 2 - len(known_tokens(self.processor.tokenizer, self.template.replace("{}", "")))
        if room < 1:
            raise InputError(
                f"template={self.template!r} leaves no room for a name: {self.name} reads {positions} tokens."
            )
        return int(room)

    def _read(self, names: set[str]) -> dict[str, torch.Tensor]:
        """The text vector (D,) of every name."""
        if not names:
            return {}
        ordered = sorted(names)
        phrases = read_names(ordered, partial(known_tokens, self.processor.tokenizer), self._room)
        texts = [self.template.replace("{}", phrase) for phrase, _ in phrases]
        tokens = self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        read = self._towers.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return dict(zip(ordered, self._towers.text_projection(read.pooler_output), strict=True))

    def _encode(self, images: list[Image.Image]) -> tuple[torch.Tensor, np.ndarray]:
        """Patch features (B, P, D) and boxes (B, P, 4), cxcywh in fractions of what the image tower saw."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        feature_map = self.model.image_embedder(pixels.to(self.device, self.model.dtype))[0]  # (B, h, w, D)
        features = feature_map.flatten(1, 2)
        return features, self.model.box_predictor(features, feature_map).float().cpu().numpy()

    def _score(self, features: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
        """Patch features (P, D) and text vectors (N, D) → scores (P, N)."""
        logits = self.model.class_predictor(features[None], queries[None])[0][0]
        scores = logits.float().sigmoid().cpu().numpy()
        refuse_nan(scores)
        return scores

    def _to_pixels(self, boxes: np.ndarray, image_wh: tuple[int, int]) -> np.ndarray:
        # OWLv2 pads the image at its right and bottom to a square; OWL-ViT squeezes it into one.
        padded = self.model.config.model_type == "owlv2"
        return cxcywh_norm_to_xyxy(boxes, (max(image_wh), max(image_wh)) if padded else image_wh)


def _assign(boxes: np.ndarray, scores: np.ndarray, threshold: float, prompting: str) -> Grounding:
    """Give the boxes (P, 4) to the names whose scores (P, N) reach the threshold, or to the best of them only."""
    belongs = scores >= threshold
    if prompting == "joint":
        belongs &= scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    box, name = np.nonzero(belongs)
    return Grounding(boxes[box], scores[box, name], name.astype(np.int64))
