"""Small things: found in parts of the picture, once and whole, in the picture's own pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.tiles import in_tiles, matches, patchwork
from detgpt import DetGPT, InputError, Options
from detgpt.boxes import iou_matrix
from detgpt.cli import app
from detgpt.detectors import Grounding
from detgpt.evaluation import evaluate
from detgpt.pipeline import tidy
from detgpt.reasoners.scripted import ScriptedReasoner
from detgpt.tiles import MAX_TILES, OVERLAP, Tiled

INPUT = 256  # pixels; what `Blobs` shrinks every picture to
LEAST = 8  # of these, the smallest thing that it sees


class Blobs:
    """A detector with the limits of a real one: it shrinks what it is shown, and misses what is small then.

    A name is a colour; the box is around all pixels of that colour, and the first name scores best. `short`: of a
    thing that is cut off it is less sure, and its box stops so many pixels of the input short of the cut.
    """

    name = "blobs"

    def __init__(self, short: int = 0) -> None:
        self.seen: list[tuple[int, int]] = []
        self.short = short

    def detect(self, images, names, *, box_threshold=0.25, text_threshold=0.25, prompting="separate"):
        self.seen += [image.size for image in images]
        return [self._one(image, asked) for image, asked in zip(images, names, strict=True)]

    def _one(self, image: Image.Image, asked) -> Grounding:
        small = np.asarray(image.resize((INPUT, INPUT), Image.Resampling.NEAREST))
        boxes, scores, index = [], [], []
        for number, name in enumerate(asked):
            rows, columns = np.nonzero((small == Image.new("RGB", (1, 1), name).getpixel((0, 0))).all(axis=2))
            if len(rows) and min(np.ptp(rows), np.ptp(columns)) + 1 >= LEAST:
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
                short = self.short if ((box == 0) | (box == INPUT)).any() else 0
                box = np.clip(box, short, INPUT - short)
                scores.append(0.9 - 0.1 * number - 0.02 * short)
                boxes.append(box * np.tile(np.array(image.size, np.float32) / INPUT, 2))
                index.append(number)
        return Grounding(
            np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(index, np.int64)
        )


def painted(size: tuple[int, int], **boxes: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    for colour, box in boxes.items():
        image.paste(colour, box)
    return image


def found_in(image: Image.Image, names: list[str], tiles: int) -> Grounding:
    return tidy(Tiled(Blobs(), tiles).detect([image], [names])[0], Options())


@pytest.fixture(scope="module")
def picto() -> DetGPT:
    return DetGPT.from_pretrained("picto")


def test_a_small_thing_is_missed_whole_and_found_in_a_part() -> None:
    truth = (701, 410, 741, 450)  # 7 x 10 pixels of what the detector sees of the whole
    image = painted((1500, 1000), red=truth)
    assert len(found_in(image, ["red"], 1).boxes) == 0
    found = found_in(image, ["red"], 3)
    assert len(found.boxes) == 1
    assert np.abs(found.boxes[0] - truth).max() < 4


@pytest.mark.parametrize("tiles", [2, 3, MAX_TILES])
@pytest.mark.parametrize("size", [(1200, 800), (700, 1400)], ids=["wide", "high"])
def test_a_thing_of_any_size_at_any_place_comes_once_and_whole(tiles: int, size: tuple[int, int]) -> None:
    """In the middle of a part, over one seam or over four; as small as the detector sees in a part, up to half."""
    rng = np.random.default_rng(tiles)
    share = 1 / (tiles - (tiles - 1) * OVERLAP)  # of the picture, that a part is
    for _ in range(60 // tiles):
        largest = np.exp(rng.uniform(np.log(2.6 * LEAST / INPUT * share), np.log(0.5)))  # small ones as often
        sides = largest * rng.uniform(0.5, 1, 2) * size  # neither long nor thin, which is another matter
        x, y = (rng.uniform(0, 1, 2) * (size - sides)).round()
        truth = np.array([[x, y, x + sides[0].round(), y + sides[1].round()]])
        found = found_in(painted(size, red=tuple(truth[0].astype(int).tolist())), ["red"], tiles)
        assert len(found.boxes) == 1, truth
        assert iou_matrix(found.boxes, truth)[0, 0] > 0.75, truth


@pytest.mark.parametrize("tiles", [2, 3, 4])
def test_a_small_thing_where_parts_meet_comes_whole(tiles: int) -> None:
    for x in range(1, tiles):
        for y in range(1, tiles):
            left, top = 1500 * x // tiles - 20, 1000 * y // tiles - 15
            truth = (left, top, left + 40, top + 30)
            image = painted((1500, 1000), red=truth)
            assert len(found_in(image, ["red"], 1).boxes) == 0
            found = found_in(image, ["red"], tiles)
            assert len(found.boxes) == 1
            assert np.abs(found.boxes[0] - truth).max() < 5


def test_a_piece_whose_box_stops_short_of_the_cut_is_still_a_piece() -> None:
    truth = (300, 250, 900, 600)
    found = Tiled(Blobs(short=6), 3).detect([painted((1200, 800), red=truth)], [["red"]])[0]
    assert len(found.boxes) == 1
    assert np.abs(found.boxes[0] - truth).max() < 6


def test_a_small_thing_within_one_of_another_name_is_no_piece() -> None:
    image = painted((1200, 800), red=(300, 250, 900, 600), blue=(500, 400, 530, 430))
    assert sorted(found_in(image, ["red", "blue"], 3).name_index.tolist()) == [0, 1]


def test_a_thing_at_the_pictures_own_border_is_no_piece() -> None:
    corners = {"red": (0, 0, 40, 40), "blue": (1460, 0, 1500, 40), "lime": (0, 960, 40, 1000)}
    found = found_in(painted((1500, 1000), **corners), list(corners), 3)
    assert sorted(found.name_index.tolist()) == [0, 1, 2]


def test_each_picture_keeps_its_own_names_and_boxes() -> None:
    images = [painted((900, 600), red=(20, 30, 60, 70)), painted((640, 800), blue=(500, 600, 560, 680))]
    first, second = Tiled(Blobs(), 3).detect(images, [["blue", "red"], ["lime", "blue"]])
    assert set(first.name_index.tolist()) == {1}
    assert set(second.name_index.tolist()) == {1}
    assert np.abs(first.boxes - [20, 30, 60, 70]).max() < 4
    assert np.abs(second.boxes - [500, 600, 560, 680]).max() < 4


def test_the_detector_is_asked_once_for_the_whole_and_parts_of_one_size() -> None:
    detector = Blobs()
    Tiled(detector, 4).detect([Image.new("RGB", (1501, 997))], [["red"]])
    whole, *parts = detector.seen
    assert whole == (1501, 997)
    assert len(parts) == 16
    assert len(set(parts)) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 500), (7, 7)])
def test_a_picture_smaller_than_its_parts_would_be(size: tuple[int, int]) -> None:
    for tiles in range(2, MAX_TILES + 1):
        found = found_in(painted(size, red=(0, 0, *size)), ["red"], tiles)
        assert found.boxes.tolist() == [[0, 0, *size]]


def test_average_precision_is_measured_in_the_tiles_that_are_asked_for(tmp_path: Path) -> None:
    box = (400, 300, 440, 330)
    painted((1500, 1000), red=box).save(tmp_path / "a.png")
    row = {"image": "a.png", "instruction": "red?", "targets": ["red"], "labels": ["red"], "present": ["red"]}
    (tmp_path / "data.jsonl").write_text(json.dumps({**row, "boxes": [box]}) + "\n")
    model = DetGPT(ScriptedReasoner(['Targets: ["red"]']), Blobs())
    assert evaluate(model, tmp_path)["detector"]["ap50"] == 0
    assert evaluate(model, tmp_path, tiles=3)["detector"]["ap50"] == pytest.approx(1)
    ran = CliRunner().invoke(app, ["eval", str(tmp_path), "--tiles", "9"])
    assert ran.exit_code != 0 and "tiles=9" in ran.output


@pytest.mark.parametrize("tiles", [0, -1, MAX_TILES + 1, 2.5, "3"])
def test_the_number_of_tiles_is_bounded(picto: DetGPT, tiles: object) -> None:
    with pytest.raises(InputError, match=f"tiles={tiles!r}.*1 to {MAX_TILES}"):
        picto.detect("examples/kitchen.png", names=["coffee"], tiles=tiles)


def test_any_detector_may_be_tiled_by_the_option() -> None:
    model = DetGPT(ScriptedReasoner(['Targets: ["red"]']), Blobs(), options=Options(tiles=3))
    image = painted((1500, 1000), red=(701, 410, 741, 450))
    assert model.detect(image, "something red").labels == ("red",)
    assert model.detect(image, "something red", tiles=1).labels == ()


def test_the_built_in_model_finds_in_parts_what_it_misses_in_the_whole(picto: DetGPT) -> None:
    """Four scenes in one picture, so that the whole shows each at half the size that the model knows."""

    def recall(tiles: int) -> float:
        hits = things = 0
        for seed in range(3):
            picture, truth = patchwork(seed, across=2)
            names = sorted(truth)[::4]
            found = in_tiles(picto, picture, names, tiles)
            hits += sum(matches(found[name], truth[name]) for name in names)
            things += sum(len(truth[name]) for name in names)
        return hits / things

    assert recall(tiles=1) < 0.3
    assert recall(tiles=3) > 0.7


def test_a_real_thing_over_the_seams_is_found_once(picto: DetGPT) -> None:
    """A pictogram in the middle of a large picture, where four parts of 2 x 2 meet."""
    with Image.open("examples/kitchen.png") as kitchen:
        result = picto.detect(kitchen, names=["coffee"])
        x0, y0, x1, y1 = (round(edge) for edge in result.boxes[0].tolist())
        cup = kitchen.convert("RGB").crop((x0 - 40, y0 - 40, x1 + 40, y1 + 40))
    picture = Image.new("RGB", (cup.width * 7, cup.height * 7), cup.getpixel((0, 0)))
    picture.paste(cup, (cup.width * 3, cup.height * 3))
    truth = np.array([[3 * cup.width + 40, 3 * cup.height + 40, 4 * cup.width - 40, 4 * cup.height - 40]])
    found = picto.detect(picture, names=["coffee"], tiles=2, box_threshold=0.4)
    assert len(found) == 1
    assert iou_matrix(found.boxes, truth)[0, 0] > 0.6
