"""Ways of aligning a reasoner that are to keep what it could do before: one function each.

Each takes what an alignment had and gave (`Aligned`) and yields its models, a setting and a folder each. Averages
(`AVERAGES`) are made of the two models that are there; the others (`RETRAINED`) align anew, differently, from the same
base on the same wishes. All are those that Lin et al. 2024 (arXiv:2309.06256, section 3) compare.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import rundir
from finetune.averaging import hma
from finetune.averaging.average import average, folder_of
from finetune.averaging.ratios import Ratios, count_blocks, groups
from finetune.averaging.weights import stored
from finetune.parts import EMBEDDINGS, HEAD, PROJECTOR, VISION, part_of
from finetune.preference import raft
from finetune.preference.iterations import ITERATIONS, SAMPLES

Models = Iterator[tuple[str, Path]]
LORA = {"r": 16, "alpha": 32}


@dataclass(frozen=True)
class Aligned:
    """An alignment, and what a method may make of it.

    settings: of the alignment itself, whose `model` is the base, and `output` the aligned one. samples: the aligned
    model's own answers, scored. place: where models go. means: of the tuned model's share, in averages.
    strengths: by which the usual weight of a penalty is multiplied. replay: records of what was learned before.
    """

    settings: raft.Config
    samples: Path
    place: Path
    means: Sequence[float]
    strengths: Sequence[float]
    replay: Path

    @property
    def base(self) -> str:
        return self.settings.model

    @property
    def tuned(self) -> Path:
        return self.settings.output

    def averaged(self, mean: float, ratios: Ratios) -> tuple[str, Path]:
        out = self.place / f"{mean:g}"
        return f"{mean:g}", out if out.is_dir() else average(self.base, self.tuned, out, ratios=ratios)

    def again(self, setting: str, **changed: Any) -> tuple[str, Path]:
        """Align again with some settings changed, from the base's answers that are there already."""
        out = self.place / setting
        if not out.is_dir():
            rundir.write_folder(out, self._copy_first_answers)
        raft.run(raft.Config.model_validate({**self.settings.model_dump(), **changed, "output": out}))
        return setting, out

    def _copy_first_answers(self, out: Path) -> None:
        first = Path(ITERATIONS, "01", SAMPLES)
        (out / first).parent.mkdir(parents=True)
        shutil.copyfile(self.tuned / first, out / first)


def plain(aligned: Aligned) -> Models:
    """The same share of the tuned model everywhere (Wortsman et al. 2022, WiSE-FT)."""
    yield from (aligned.averaged(mean, {"language": mean}) for mean in aligned.means)


def heterogeneous(aligned: Aligned) -> Models:
    """A share by depth, which makes the aligned model's best answers likeliest (Lin et al. 2024, HMA)."""
    for mean in aligned.means:
        out = aligned.place / f"{mean:g}"
        hma.run(hma.Config(base=aligned.base, tuned=str(aligned.tuned), samples=aligned.samples, mean=mean, output=out))
        yield f"{mean:g}", out


def low_layers(aligned: Aligned) -> Models:
    """The lower half of the blocks is averaged, all else stays aligned; a share means the lower half's."""
    blocks = count_blocks(map(part_of, stored(folder_of(aligned.base))))
    low, *high = groups(blocks, min(blocks, 2))
    rest = dict.fromkeys([*high, VISION, PROJECTOR, EMBEDDINGS, HEAD], 1.0)
    yield from (aligned.averaged(mean, {low: mean, **rest}) for mean in aligned.means)


def early_stopping(aligned: Aligned) -> Models:
    """The model of each iteration before the last."""
    *earlier, _ = sorted((aligned.tuned / ITERATIONS).glob("*/reasoner"))
    yield from ((f"iteration {int(place.parent.name)}", place.parent) for place in earlier)


def anchored(kind: str, weight: float) -> Callable[[Aligned], Models]:
    """A penalty for moving away from the base; see `finetune.averaging.anchors`."""

    def penalised(aligned: Aligned) -> Models:
        for strength in aligned.strengths:
            anchor = {"kind": kind, "weight": strength * weight, "model": aligned.base}
            yield aligned.again(f"{strength * weight:g}", anchor=anchor)

    return penalised


def lora(aligned: Aligned) -> Models:
    """Adapters in place of the weights (Hu et al. 2022), at ten times the learning rate, as is usual."""
    trainer = aligned.settings.trainer
    rate = {"learning_rate": 10 * trainer["learning_rate"]} if "learning_rate" in trainer else {}
    yield aligned.again(f"rank {LORA['r']}", language="lora", lora=LORA, trainer={**trainer, **rate})


def moving_average(aligned: Aligned) -> Models:
    """The mean of the weights over the steps of each iteration (Izmailov et al. 2018, SWA)."""
    yield aligned.again("every step", average_steps={"every": 1})


def replay(aligned: Aligned) -> Models:
    """Records of what was learned before beside the chosen answers."""
    for strength in aligned.strengths:
        yield aligned.again(f"{strength:g} to 1", replay=aligned.replay, replay_ratio=strength)


AVERAGES: Mapping[str, Callable[[Aligned], Models]] = {
    "HMA": heterogeneous,
    "plain averaging": plain,
    "low layers": low_layers,
}
RETRAINED: Mapping[str, Callable[[Aligned], Models]] = {
    "early stopping": early_stopping,
    "L1": anchored("l1", 1e-4),
    "L2": anchored("l2", 1e-2),
    "distillation": anchored("distill", 1.0),
    "LoRA": lora,
    "moving average": moving_average,
    "replay": replay,
}
METHODS = {**AVERAGES, **RETRAINED}
