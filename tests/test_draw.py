"""What a drawn picture promises, at any size: boxes in their colours, tags inside, the input untouched."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops

from detgpt.draw import draw, ink_on, target_colours
from detgpt.errors import InputError


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    colours = picture.getcolors(picture.width * picture.height) or []
    return {colour for _, colour in colours if isinstance(colour, tuple)}


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(before, after).getbbox()


def luminance(colour: str) -> float:
    return float(np.dot([0.2126, 0.7152, 0.0722], [(value / 255) ** 2.2 for value in rgb(colour)]))


def simulated(colour: str, deficiency: list[list[float]]) -> np.ndarray:
    """OKLab of a colour as someone with the deficiency sees it (Machado et al. 2009, full strength)."""
    linear = np.clip(np.array(deficiency) @ (np.array(rgb(colour)) / 255) ** 2.2, 0, 1)
    cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ linear
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(to_lab) @ np.cbrt(cones)


VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("background", ["white", "black", "gray"])
def test_box_edges_carry_the_colour_of_their_target(background: str) -> None:
    image = Image.new("RGB", (800, 600), background)
    picture = draw(image, [[100, 200, 300, 400], [500, 250, 700, 500]], ["cup", "bottle"], [0.9, 0.8])
    cup, bottle = map(rgb, target_colours(2))
    for point in ((200, 399), (100, 350), (299, 350)):
        assert picture.getpixel(point) == cup
    for point in ((600, 499), (500, 400), (699, 400)):
        assert picture.getpixel(point) == bottle
    assert picture.getpixel((200, 300)) == image.getpixel((0, 0))  # boxes are outlines


def test_small_boxes_lie_on_top_of_large_ones() -> None:
    boxes = [[250, 250, 350, 350], [100, 300, 700, 500]]
    picture = draw(Image.new("RGB", (800, 600)), boxes, ["cup", "table"])
    assert picture.getpixel((250, 300)) == rgb(target_colours(1)[0])


def test_a_line_of_the_backgrounds_own_colour_is_still_seen() -> None:
    colour = target_colours(1)[0]
    image = Image.new("RGB", (800, 600), colour)
    picture = draw(image, [[100, 200, 300, 400]], [""])
    assert changed(image, picture) is not None


def test_colours_follow_the_targets_whatever_was_found() -> None:
    image = Image.new("RGB", (800, 600))
    alone = draw(image, [[100, 200, 300, 400]], ["bottle"], names=["cup", "bottle"])
    assert alone.getpixel((100, 300)) == rgb(target_colours(2)[1])


def test_colours_differ_and_do_not_depend_on_how_many_there_are() -> None:
    many = target_colours(200)
    assert len(set(many)) == 200
    assert many[:5] == target_colours(5)


@pytest.mark.parametrize("vision", VISION)
def test_the_first_colours_differ_under_colour_blindness(vision: str) -> None:
    seen = [simulated(colour, VISION[vision]) for colour in target_colours(8)]
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 0.07  # about three just noticeable differences


def test_text_contrasts_with_its_tag() -> None:
    for colour in target_colours(60):
        light, dark = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4


def test_the_given_image_is_not_changed() -> None:
    image = Image.new("RGB", (500, 500), "white")
    before = image.tobytes()
    draw(image, [[10, 10, 200, 200]], ["cup"], legend="why")
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("size", "result"),
    [
        ((1, 1), (400, 400)),
        ((64, 64), (448, 448)),
        ((399, 900), (798, 1800)),
        ((400, 400), (400, 400)),
        ((6000, 400), (6000, 400)),
        ((6000, 10), (6000, 10)),
        ((10, 6000), (10, 6000)),
        ((2000, 40), (4000, 80)),
    ],
)
def test_small_pictures_are_enlarged_by_a_whole_factor(size: tuple[int, int], result: tuple[int, int]) -> None:
    box = [[0, 0, size[0], size[1]]]
    assert draw(Image.new("RGB", size), box, ["cup"], [0.5]).size == result
    assert draw(Image.new("RGB", size), box, ["cup"], [0.5], min_side=0).size == size


def test_boxes_are_enlarged_with_the_picture() -> None:
    picture = draw(Image.new("RGB", (100, 100), "white"), [[25, 50, 75, 75]], ["cup"])
    assert picture.getpixel((100, 250)) == rgb(target_colours(1)[0])


def test_lines_and_letters_grow_with_the_picture() -> None:
    def tag_height(side: int) -> int:
        image = Image.new("RGB", (side, side), "white")
        picture = draw(image, [[0.5 * side, 0.5 * side, 0.9 * side, 0.9 * side]], ["cup"])
        rows = changed(image, picture)
        assert rows is not None
        return side // 2 - rows[1]

    assert tag_height(3000) / 3000 == pytest.approx(tag_height(1000) / 1000, rel=0.1)


LABELS = {
    "plain": "cup",
    "accented": "café crème",
    "japanese": "カップ",
    "mixed": "カップ cup",
    "arabic": "كوب",
    "emoji": "☕️ 👩‍🍳",
    "empty": "",
    "blank": " \n\t ",
    "control": "cup\x00\u202e\ud83d",
    "long": "a very long label " * 60,
    "one long word": "x" * 3000,
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_any_label_can_be_drawn(label: str) -> None:
    image = Image.new("RGB", (64, 64))
    picture = draw(image, [[8, 8, 56, 56]], [label], [0.5], legend=label, instruction=label)
    assert picture.width == 448
    assert picture.height > 448


def test_control_characters_leave_no_trace() -> None:
    image, box = Image.new("RGB", (500, 400)), [[50, 100, 400, 300]]
    assert draw(image, box, ["cup\x00\u202e\ud83d"]).tobytes() == draw(image, box, ["cup"]).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (6000, 400), (30, 3000)])
def test_a_long_label_can_be_drawn_at_any_size(size: tuple[int, int]) -> None:
    label = LABELS["long"]
    picture = draw(Image.new("RGB", size), [[0, 0, *size]], [label], [0.5], legend=label, instruction=label)
    assert picture.width >= size[0]


def test_letters_without_a_glyph_leave_a_number_not_a_row_of_boxes() -> None:
    """Hieroglyphs are in none of the fonts we look for; the tag names the target's place instead."""
    image, box = Image.new("RGB", (600, 600), "white"), [[100, 200, 500, 500]]
    hieroglyphs, numbered, named = (draw(image, box, [label]).tobytes() for label in ("𓀀𓀁𓀂", "#1", "cup"))
    assert hieroglyphs == numbered != named


CORNERS = {
    "top left": (0, 0, 60, 60),
    "top right": (580, 0, 640, 60),
    "bottom left": (0, 420, 60, 480),
    "bottom right": (580, 420, 640, 480),
    "whole": (0, 0, 640, 480),
    "outside": (-90, -90, 900, 900),
    "beyond": (700, 500, 900, 900),
    "point": (320, 240, 320, 240),
}


@pytest.mark.parametrize("box", CORNERS.values(), ids=CORNERS)
def test_tags_stay_inside_the_picture(box: tuple[int, ...]) -> None:
    """The whole tag is there wherever the box lies: as many pixels of its colour as in the open."""

    def filled(where: tuple[int, ...], label: str) -> int:
        picture = np.asarray(draw(Image.new("RGB", (640, 480)), [where], [label]))
        return int((picture == rgb(target_colours(1)[0])).all(axis=-1).sum())

    def tag_alone(where: tuple[int, ...]) -> int:
        return filled(where, "refrigerator") - filled(where, "")

    in_the_open = tag_alone((200, 200, 400, 400))
    assert tag_alone(box) == pytest.approx(in_the_open, abs=0.15 * in_the_open)


def test_tags_of_neighbours_do_not_cover_each_other() -> None:
    """Four boxes in one place: all four tags can still be read."""
    image = Image.new("RGB", (800, 600))
    names = ["aaaa", "bbbb", "cccc", "dddd"]

    def filled(labels: list[str], names: list[str] = names) -> np.ndarray:
        boxes = [[300, 200, 500, 400]] * len(labels)
        picture = np.asarray(draw(image, boxes, labels, names=names))
        return np.array([(picture == rgb(colour)).all(axis=-1).sum() for colour in target_colours(4)])

    one_tag = (filled(["aaaa"]) - filled([""], names=[""]))[0]
    assert filled(names)[:3].min() > 0.8 * one_tag > 300  # the fourth's colour is also the top box's


def test_a_long_label_is_cut_but_keeps_its_score() -> None:
    image, box = Image.new("RGB", (500, 400), "white"), [[0, 100, 500, 300]]
    low = draw(image, box, ["cup " * 200], [0.11])
    high = draw(image, box, ["cup " * 200], [0.99])
    difference = changed(low, high)
    assert difference is not None
    assert difference[0] > 400  # the score at the tag's right end


def test_sixty_boxes() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 900, (60, 2))
    boxes = np.hstack([corners, corners + rng.uniform(10, 100, (60, 2))])
    labels = [f"thing {number}" for number in range(60)]
    picture = draw(Image.new("RGB", (1000, 1000)), boxes, labels, rng.uniform(0, 1, 60), legend="Many things.")
    pixels = colours_in(picture.crop((0, 0, 1000, 1000)))
    assert {rgb(colour) for colour in target_colours(60)} <= pixels


def test_no_boxes_leave_the_picture_as_it_is() -> None:
    image = Image.effect_noise((500, 400), 50).convert("RGB")
    assert draw(image, [], []).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_kind_of_picture_comes_back_as_rgb(mode: str) -> None:
    assert draw(Image.new(mode, (500, 400)), [[10, 10, 90, 90]], ["cup"]).mode == "RGB"


def test_the_legend_lies_under_the_picture_and_shows_every_target() -> None:
    image = Image.new("RGB", (800, 600))
    boxes, labels = [[100, 200, 300, 400]], ["cup"]
    plain = draw(image, boxes, labels, [0.9], names=["cup", "spoon"])
    full = draw(image, boxes, labels, [0.9], names=["cup", "spoon"], legend="Tea.", instruction="I want tea")
    assert full.crop((0, 0, 800, 600)).tobytes() == plain.tobytes()
    panel = colours_in(full.crop((0, 600, 800, full.height)))
    assert {rgb(colour) for colour in target_colours(2)} <= panel  # not found, but asked for


def test_the_legend_wraps_and_grows_with_its_text_up_to_the_pictures_height() -> None:
    image = Image.new("RGB", (500, 400))
    heights = [draw(image, [], [], legend="because it is cold " * times).height for times in (1, 20, 2000)]
    assert 400 < heights[0] < heights[1] < heights[2] < 900


def test_a_legend_of_very_many_names_lists_those_found() -> None:
    image, names = Image.new("RGB", (500, 400)), [f"thing {number}" for number in range(500)]
    assert draw(image, [[9, 9, 99, 99]], ["thing 7"], names=names, legend="").height < 480


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, r"\(N, 4\)"),
        ({"boxes": [[1, 2, 3, float("nan")]]}, "finite"),
        ({"labels": ["a", "b"]}, "1 boxes need"),
        ({"scores": [0.1, 0.2]}, "1 boxes need"),
        ({"font": "no-such-font.ttf"}, "no-such-font.ttf"),
        ({"line_width": 0}, "line_width"),
        ({"text_size": -3}, "text_size"),
    ],
)
def test_wrong_arguments_raise(arguments: dict, message: str) -> None:
    given = {"boxes": [[1, 2, 30, 40]], "labels": ["cup"], **arguments}
    with pytest.raises(InputError, match=message):
        draw(Image.new("RGB", (500, 400)), **given)


def test_sizes_can_be_chosen() -> None:
    image = Image.new("RGB", (600, 600), "white")
    thick = draw(image, [[100, 200, 400, 500]], [""], line_width=21)
    assert thick.getpixel((109, 350)) == thick.getpixel((91, 350)) == rgb(target_colours(1)[0])
