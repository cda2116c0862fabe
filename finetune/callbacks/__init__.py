"""What happens beside the training steps: one file each, and `attach`, which gives a trainer those that it needs.

attach(trainer, lisa=config.lisa, detection=config.detection)
train(trainer)
"""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback

from finetune.callbacks.detection import DetectionMetrics, DetectionSettings
from finetune.callbacks.lisa import Lisa, LisaSettings
from finetune.callbacks.moving import AverageSettings, MovingAverage
from finetune.callbacks.progress import Progress
from finetune.callbacks.watch import Watch, train

__all__ = ["AverageSettings", "DetectionSettings", "LisaSettings", "attach", "train"]


def attach(
    trainer: Any,
    *,
    lisa: LisaSettings | None = None,
    detection: DetectionSettings | None = None,
    average: AverageSettings | None = None,
) -> None:
    """Give `trainer` our progress in place of transformers', the watch, and what is set of the rest.

    Raises `InputError` for settings that do not go with this trainer, `ModelError` for a detector that does not load.
    """
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    # First, so that what it adds to the logs is in them when others write these down.
    trainer.callback_handler.callbacks.insert(0, Progress())
    if average:
        trainer.callback_handler.callbacks.insert(0, MovingAverage(trainer, average))
    trainer.add_callback(Watch(trainer))
    if lisa:
        trainer.add_callback(Lisa(trainer, lisa))
    if detection:
        trainer.add_callback(DetectionMetrics(trainer, detection))
