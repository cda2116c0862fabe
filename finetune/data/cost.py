"""What it will take to build data with a writer: calls and tokens, before the first call is made.

An estimate from the true prompts, by rules of thumb that stand below; a server's own count differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from detgpt.evaluation.building import PROGRESS_FILE, TRIES, Plan, drawn_pictures, read_log
from detgpt.evaluation.coco import find_image, read_annotations
from detgpt.evaluation.writing import checking_prompt, writing_prompt

CHARACTERS_A_TOKEN = 4  # of English
PIXELS_A_TOKEN = 28 * 28  # of Qwen2.5-VL; other models take about as many or fewer
LONGEST_SIDE = 1536  # pixels to which pictures are scaled down on their way to a server
WISH = "My hands are cold and I am looking for something that could warm them a little"
TOKENS_OF_A_WISH = 60  # with its JSON
TOKENS_OF_AN_ANSWER = 120  # two or three sentences and the last line
LOOKED_AT = 50  # pictures whose sizes are read
UNKNOWN_WH = (640, 480)  # where none can be read


@dataclass(frozen=True)
class Estimate:
    """calls: the fewest and the most. tokens_in, tokens_out: an average call's."""

    pictures: int
    calls: tuple[int, int]
    tokens_in: float
    tokens_out: float

    def in_words(self, price_in: float | None = None, price_out: float | None = None) -> str:
        """One sentence; prices are of a million tokens, in whatever money."""
        least, most = self.calls
        sides = [("in", self.tokens_in, price_in), ("out", self.tokens_out, price_out)]
        tokens = " and ".join(f"{_range(least * each, most * each)} tokens {name}" for name, each, _ in sides)
        text = f"{self.pictures:,} pictures: {least:,} to {most:,} calls, about {tokens}"
        if price_in is not None or price_out is not None:
            price = sum(each * (price or 0) for _, each, price in sides) / 1e6
            text += f"; it costs about {least * price:,.2f} to {most * price:,.2f}"
        return text


def estimate(
    annotation_file: Path, images: Path, output: Path, plan: Plan, captions: Mapping[str, Sequence[str]]
) -> Estimate:
    """What is still to be asked for `plan`; answers of an interrupted run in `output` need not be bought again."""
    pictures = drawn_pictures(read_annotations(annotation_file), plan)
    answered = read_log(output / PROGRESS_FILE)[1:]
    to_write = len(pictures) - sum("wishes" in row for row in answered)
    to_borrow = (len(pictures) - sum("absent" in row for row in answered)) * plan.absent
    checks = to_write * plan.wishes + to_borrow
    most = to_write * (1 + plan.wishes) + to_borrow * TRIES
    sample = pictures[:: max(1, len(pictures) // LOOKED_AT)]
    prompts = [
        (
            len(writing_prompt(picture.boxed, plan.wishes, captions.get(str(picture.id), ()))),
            len(checking_prompt(picture.boxed, WISH, captions.get(str(picture.id), ()), plan.explain)),
        )
        for picture in sample
    ]
    asking, checking = (sum(lengths) / len(sample) / CHARACTERS_A_TOKEN for lengths in zip(*prompts, strict=True))
    calls = max(to_write + checks, 1)
    picture_tokens = _picture_tokens([find_image(images, picture.file_name) for picture in sample])
    return Estimate(
        len(pictures),
        (to_write + checks, most),
        picture_tokens + (to_write * asking + checks * checking) / calls,
        (to_write * plan.wishes * TOKENS_OF_A_WISH + checks * TOKENS_OF_AN_ANSWER) / calls,
    )


def _picture_tokens(files: Sequence[Path]) -> float:
    sizes = []
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
        except OSError:  # a missing or broken file is not asked about
            continue
    tokens = []
    for width, height in sizes or [UNKNOWN_WH]:
        scale = min(1.0, LONGEST_SIDE / max(width, height))
        tokens.append(width * height * scale**2 / PIXELS_A_TOKEN)
    return sum(tokens) / len(tokens)


def _range(least: float, most: float) -> str:
    return f"{round(least):,} to {round(most):,}"
