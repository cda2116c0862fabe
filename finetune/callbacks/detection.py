"""How well the model in training detects: end-to-end numbers at every evaluation, beside the loss.

    detection: {detector: IDEA-Research/grounding-dino-tiny, data: data/val, limit: 200}
    trainer: {eval_strategy: steps, eval_steps: 200, metric_for_best_model: f1_50, load_best_model_at_end: true}

The model answers wishes as a user asks them, a detector boxes what it names, and `detgpt.evaluation` compares with the
truth: `eval_f1_50` (F1 of boxes at an IoU of 0.5) and `eval_names_f1`. A falling loss does not promise either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import Field
from transformers import TrainerCallback

from detgpt import DetGPT
from detgpt.detectors import Detector
from detgpt.errors import InputError
from detgpt.evaluation import evaluate, read_dataset
from detgpt.models import OWN_BOXES, load_detector
from detgpt.pipeline import Options
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.answering import answering
from finetune.recipe import Settings


class DetectionSettings(Settings):
    """detector: hub id or folder, or "reasoner" for the model's own boxes. data: records with boxes, the first `limit`.

    options: of `detgpt.pipeline.Options`.
    """

    detector: str
    data: Path
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)


class DetectionMetrics(TrainerCallback):
    """Adds `eval_f1_50` and `eval_names_f1` to what every evaluation of `trainer` gives.

    The first process asks. A metric without a denominator counts as 0. Raises `InputError` where parameters are
    sharded, and for wrong data, `ModelError` for a detector that does not load.
    """

    def __init__(self, trainer: Any, settings: DetectionSettings) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("detection cannot ask a model of sharded parameters: leave it out, and use 'detgpt eval'")
        self._trainer = trainer
        self._settings = settings
        self._data = read_dataset(settings.data, limit=settings.limit)
        self._options = Options().updated(settings.options)
        self._detector: str | Detector = settings.detector
        if settings.detector != OWN_BOXES and trainer.args.process_index == 0:
            self._detector = load_detector(settings.detector, device=str(trainer.args.device))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found: list[Any] = [self._detect() if args.process_index == 0 else None]
        broadcast_object_list(found)
        self._trainer.log(dict(found[0]))
        kwargs["metrics"].update(found[0])  # here the trainer looks for metric_for_best_model

    def _detect(self) -> dict[str, float]:
        with answering(self._trainer.model) as model:
            reasoner = HuggingFaceReasoner.of(model, self._trainer.processing_class, "the model in training")
            pair = DetGPT(reasoner, self._detector, options=self._options)
            results = evaluate(pair, self._data, batch_size=self._settings.batch_size, detector_alone=False)
        numbers = {"eval_f1_50": results["end_to_end"]["f1_50"], "eval_names_f1": results["reasoner"]["f1"]}
        return {name: value or 0.0 for name, value in numbers.items()}
