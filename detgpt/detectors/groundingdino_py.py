"""The original Grounding DINO checkpoints (a config .py and a .pth) through the package groundingdino-py.

    GroundingDinoPyDetector("GroundingDINO_SwinT_OGC.py", "groundingdino_swint_ogc.pth")

Needs `pip install 'detgpt[groundingdino]'`. The config is read, not run, and the weights are unpickled as
tensors only, so that neither file can execute code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BertModel

from detgpt.detectors import Grounding
from detgpt.detectors.original import read_config, read_weights
from detgpt.detectors.spans import (
    Prompt,
    TokenScores,
    check_query,
    ground_images,
    known_offsets,
    known_tokens,
    make_prompts,
)
from detgpt.device import choose_device
from detgpt.errors import InputError, MissingExtraError, ModelError

_build_lock = threading.Lock()


@dataclass(frozen=True)
class _Encoded:
    """Images of one size after the image encoder; every tensor has them along its first dimension."""

    pixel_values: torch.Tensor  # (B, 3, H, W)
    feature_maps: dict[int, torch.Tensor]  # level → (B, C, h, w)


class GroundingDinoPyDetector:
    """An original Grounding DINO, loaded once; safe to call from several threads."""

    def __init__(
        self,
        config_path: str | Path,
        checkpoint_path: str | Path,
        *,
        device: str | torch.device | None = None,
        text_encoder: str | Path | None = None,
        shortest_edge: int = 800,
        longest_edge: int = 1333,
        max_prompts_per_pass: int = 4,
    ) -> None:
        """Build the model of `config_path` and load `checkpoint_path` into it.

        `text_encoder`: the BERT whose architecture and tokenizer to use, a hub id or, to stay offline, a
        folder; None: the config's. Images are resized to `shortest_edge` unless that makes the other edge
        longer than `longest_edge`. `max_prompts_per_pass` bounds memory: that many prompts, or images, go
        through the network together. Raises `MissingExtraError` without the package and `ModelError` for
        files that are missing, incomplete or of another kind.
        """
        if max_prompts_per_pass < 1:
            raise InputError(f"max_prompts_per_pass must be at least 1, got {max_prompts_per_pass}.")
        _require_package()
        import groundingdino.datasets.transforms as transforms

        self.name = str(checkpoint_path)
        self.device = choose_device(device)
        self.max_prompts_per_pass = max_prompts_per_pass
        self.model: Any = _build(config_path, text_encoder)
        _load_weights(self.model, checkpoint_path)
        self.model.to(self.device).eval()
        self._transform = transforms.Compose(
            [
                transforms.RandomResize([shortest_edge], max_size=longest_edge),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
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

        `prompting="separate"`: each name is a prompt of its own, so what else is asked does not change its
        boxes; the image encoder still runs once per image. A box needs a name score of `box_threshold`.
        `prompting="joint"`: the names share one prompt (a second one past the model's 256 tokens). A box
        needs `box_threshold` at the prompt's best token and `text_threshold` at its name.
        Raises `InputError` for thresholds outside [0, 1], another `prompting`, or a name that it cannot read.
        """
        check_query(images, names, box_threshold, text_threshold, prompting)
        with self._lock, torch.inference_mode():
            known, max_tokens = partial(known_tokens, self.model.tokenizer), self.model.max_text_len
            return ground_images(
                images,
                [make_prompts(asked, prompting, known, max_tokens) for asked in names],
                encode=self._encode,
                fuse=self._fuse,
                max_prompts_per_pass=self.max_prompts_per_pass,
                box_threshold=box_threshold,
                text_threshold=text_threshold if prompting == "joint" else None,
            )

    def _encode(self, images: list[Image.Image]) -> _Encoded:
        pixels = torch.stack([self._transform(image, None)[0] for image in images]).to(self.device)
        levels = self.model.backbone[0](_unpadded(pixels))
        return _Encoded(pixels, {level: nested.tensors for level, nested in levels.items()})

    def _fuse(self, encoded: _Encoded, rows: list[int], prompts: list[Prompt]) -> list[TokenScores]:
        texts = [prompt.text for prompt in prompts]
        # The package hands the text masks to its attention heads in the wrong order when a batch has more
        # than one prompt, so prompts read each other's masks. Prompts whose delimiters stand in the same
        # places have the same mask, and only those go together.
        delimiters = set(self.model.specical_tokens)  # spelled so in the package
        alike: dict[tuple[bool, ...], list[int]] = {}
        for k, ids in enumerate(self.model.tokenizer(texts)["input_ids"]):
            alike.setdefault(tuple(token in delimiters for token in ids), []).append(k)
        scores: dict[int, TokenScores] = {}
        for members in alike.values():
            outputs = self._forward(encoded, [rows[k] for k in members], [texts[k] for k in members])
            scores.update(zip(members, outputs, strict=True))
        return [scores[k] for k in range(len(texts))]

    def _forward(self, encoded: _Encoded, rows: list[int], texts: list[str]) -> Iterator[TokenScores]:
        # With the encoder's features at hand only the shape of the pixels is still read.
        pixels = encoded.pixel_values[:1].expand(len(rows), -1, -1, -1)
        features = {level: _unpadded(maps[rows]) for level, maps in encoded.feature_maps.items()}
        with _replaying(self.model.backbone, features):
            output = self.model(_unpadded(pixels), captions=texts)
        # The texts have one length: those that go together have the same delimiters.
        tokens = self.model.tokenizer(texts, return_offsets_mapping=True, return_tensors="np")
        probabilities = output["pred_logits"].sigmoid().cpu().numpy()
        boxes = output["pred_boxes"].cpu().numpy()
        offsets = known_offsets(self.model.tokenizer, tokens)
        return (TokenScores(*row) for row in zip(offsets, probabilities, boxes, strict=True))


def _unpadded(pixels: torch.Tensor) -> Any:
    """The package's images with a padding mask (True is padding), for images that have none."""
    from groundingdino.util.misc import NestedTensor

    batch, _, height, width = pixels.shape
    return NestedTensor(pixels, torch.zeros(batch, height, width, dtype=torch.bool, device=pixels.device))


class _Replay(nn.Module):
    """Stands in for the image encoder and returns what that already computed."""

    def __init__(self, features: dict[int, Any]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Any) -> dict[int, Any]:
        return self.features


@contextmanager
def _replaying(backbone: nn.Sequential, features: dict[int, Any]) -> Iterator[None]:
    """Let the model's own forward run on features computed before. Hold the detector's lock."""
    encoder = backbone[0]
    backbone[0] = _Replay(features)
    try:
        yield
    finally:
        backbone[0] = encoder


def _require_package() -> None:
    try:
        import groundingdino.models  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("groundingdino-py", "groundingdino") from error
    except ImportError as error:
        # OpenCV is there, but a shared library that it links is not: common on servers and in containers.
        remedy = " Install it on Debian or Ubuntu with: apt-get install libgl1" if "libGL" in str(error) else ""
        raise ModelError(f"groundingdino-py is installed but cannot be imported: {error}.{remedy}") from error


def _build(config_path: str | Path, text_encoder: str | Path | None) -> nn.Module:
    from groundingdino.models.GroundingDINO import build_groundingdino

    settings = read_config(config_path)
    settings.use_checkpoint = settings.use_transformer_ckpt = False  # they trade time for memory in training
    try:
        settings.text_encoder_type = str(text_encoder or settings.text_encoder_type)
        with _build_lock, _our_text_encoder():
            return build_groundingdino(settings)
    except OSError as error:
        raise ModelError(
            f"Cannot load the text encoder {settings.text_encoder_type}: {error} "
            "Pass text_encoder=, a folder with a BERT and its tokenizer."
        ) from error
    except (AttributeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ModelError(f"Cannot build the model that {config_path} describes: {error}.") from error


@contextmanager
def _our_text_encoder() -> Iterator[None]:
    """Let the package build its model around a `_Bert` from any folder, and without printing."""
    from groundingdino.models.GroundingDINO import groundingdino as package
    from groundingdino.util import get_tokenlizer as texts

    theirs = texts.get_tokenlizer, texts.get_pretrained_language_model, package.BertModelWarper
    texts.get_tokenlizer, texts.get_pretrained_language_model = AutoTokenizer.from_pretrained, _Bert.from_pretrained
    package.BertModelWarper = lambda bert_model: bert_model
    try:
        yield
    finally:
        texts.get_tokenlizer, texts.get_pretrained_language_model, package.BertModelWarper = theirs


class _Bert(BertModel):
    """A BERT that reads the package's mask, (B, T, T): each phrase sees itself only.

    It stands in for the package's wrapper, which calls the layers of a BERT as they were in transformers 4.
    """

    def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return super().forward(attention_mask=attention_mask[:, None], **inputs)


def _load_weights(model: nn.Module, path: str | Path) -> None:
    try:
        missing = model.load_state_dict(read_weights(path), strict=False).missing_keys
    except RuntimeError as error:  # a tensor of another shape
        raise ModelError(f"The weights {path} do not belong to the config: {error}.") from error
    if missing:
        raise ModelError(
            f"The weights {path} lack {len(missing)} tensors of the config's model, such as {missing[0]}; "
            "they would run as random numbers. Use the config that belongs to this checkpoint."
        )
