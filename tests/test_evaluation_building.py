"""`detgpt bench-build`: from an annotation and a writer to an instruction set that `detgpt eval` reads."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detgpt.errors import InputError, ModelError
from detgpt.evaluation.building import Plan, build
from detgpt.evaluation.readers import read_dataset
from detgpt.evaluation.writing import Names, Wish, read_check, read_wishes
from detgpt.reasoners import RawAnswer, Request
from detgpt.reasoners.scripted import ScriptedReasoner

# --- reading what a writer writes ---

NAMES = Names(("cup", "dining table", "wine glass", "bottle"), {"cup": ("mug",)})


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_wishes_are_read_with_the_names_that_the_writer_adds():
    row = {"wish": " I am  thirsty ", "fits": ["Cups", "the bottle"], "also_called": {"bottle": ["flask", "cup"]}}
    wishes, refused = read_wishes(lines(row), NAMES)
    synonyms = {"cup": ("mug",), "bottle": ("flask",)}  # "cup" is another thing here, so no name of a bottle
    assert (wishes, refused) == ([Wish("I am thirsty", ("cup", "bottle"), synonyms)], {})


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "```json\n[{}]\n```",
        "Sure! Here they are:\n1. {}\nHave fun {{with}} them",
        '<think>maybe {{"wish": "no", "fits": ["cup"]}}</think>{}',
        '{} {{"wish": "cut off", "fits": ["cu',
    ],
)
def test_wishes_are_found_whatever_stands_around_them(around: str):
    row = json.dumps({"wish": "I am thirsty", "fits": ["cup"]}, indent=2)
    assert [wish.text for wish in read_wishes(around.format(row), NAMES)[0]] == ["I am thirsty"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"wish": "I am thirsty"}, "not in the form asked for"),
        ({"wish": 3, "fits": ["cup"]}, "not in the form asked for"),
        ({"wish": "I am thirsty", "fits": ["cup", "jug"]}, "names a thing that is not marked"),
        ({"wish": "I want to fly", "fits": []}, "nothing fulfils it"),
        ({"wish": " ", "fits": ["cup"]}, "empty or too long"),
        ({"wish": "x" * 301, "fits": ["cup"]}, "empty or too long"),
        ({"wish": "where are the Cups?", "fits": ["cup"]}, "says what it asks for"),
        ({"wish": "hand me a mug", "fits": ["cup"]}, "says what it asks for"),
        (
            {"wish": "a flask, please", "fits": ["bottle"], "also_called": {"bottle": ["flask"]}},
            "says what it asks for",
        ),
    ],
)
def test_a_wish_that_is_no_good_is_counted_by_its_reason(row: dict[str, Any], reason: str):
    assert read_wishes(lines(row), NAMES) == ([], {reason: 1})


def test_the_same_wish_counts_once_however_it_is_written():
    rows = [{"wish": text, "fits": ["cup"]} for text in ("I am thirsty", "i am thirsty!", "I am a thirsty", "Drink?")]
    wishes, refused = read_wishes(lines(*rows), NAMES)
    assert ([wish.text for wish in wishes], refused) == (["I am thirsty", "Drink?"], {"said before": 2})


@pytest.mark.parametrize(
    ("answer", "things"),
    [
        ('It holds water.\nTargets: ["cup", "mug"]', {"cup"}),
        ("Targets: []", set()),
        ('Targets: ["wine glasses"]', {"wine glass"}),
        ('Targets: ["cup", "other"]', None),
        ("I cannot say.", None),
    ],
)
def test_a_check_is_read(answer: str, things: set[str] | None):
    assert read_check(answer, NAMES) == things


@given(st.text(alphabet=st.sampled_from('{}[]":, wishfitscup\\\n'), max_size=200))
def test_no_answer_makes_the_readers_fail(text: str):
    wishes, _ = read_wishes(text, NAMES)
    assert all(set(wish.targets) <= set(NAMES.things) for wish in wishes)
    read_check(text, NAMES)


def test_a_deep_answer_makes_the_reader_neither_fail_nor_hang():
    assert read_wishes('{"a":' * 2000, NAMES) == ([], {})


# --- a whole set ---

SERVES = {"cup": "I am thirsty", "chair": "my legs are tired", "umbrella": "it is raining", "bed": "I am sleepy"}
SHOWN = [("cup", "chair"), ("chair",), ("umbrella", "cup"), ("bed",), ("cup",), ("umbrella",)]


def what_a_good_writer_says(request: Request) -> str:
    """Knows what serves what, and has a look at the picture: the blue one shows an umbrella that is not marked."""
    assert request.verbatim, "the prompt must reach the model as it is"
    marked = re.search(r"things are marked: (.*)\.", request.instruction)
    assert marked
    things = marked.group(1).split(", ")
    said = re.search(r'Somebody says: "(.*)"', request.instruction)
    if said is None:
        rows = [{"wish": SERVES[thing], "fits": [thing], "also_called": {thing: [f"my {thing}"]}} for thing in things]
        return lines(*rows)
    fitting = [thing for thing in things if SERVES[thing] == said.group(1)]
    is_blue = request.image.getpixel((0, 0)) == (0, 0, 255)
    return f"Targets: {json.dumps(fitting + ['other'] * (is_blue and said.group(1) == SERVES['umbrella']))}"


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """A COCO file with six pictures; the last cup of the first one stands in a crowd, the fourth picture is blue."""
    (tmp_path / "pictures").mkdir()
    names = sorted(SERVES)
    document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    for image_id, shown in enumerate(SHOWN, start=1):
        Image.new("RGB", (90, 60), "blue" if image_id == 4 else "gray").save(tmp_path / f"pictures/{image_id}.png")
        document["images"].append({"id": image_id, "file_name": f"{image_id}.png"})
        for place, name in enumerate(shown):
            x, number = 10 + 30 * place, 10 * image_id + place
            box = {"bbox": [x, 10, 20, 20], "segmentation": [[x, 10, x + 20, 10, x + 20, 30]]}
            row = {"id": number, "image_id": image_id, "category_id": names.index(name)}
            document["annotations"].append(row | box)
    crowd = {"bbox": [0, 40, 90, 20], "segmentation": {"size": [60, 90], "counts": [5400]}, "iscrowd": 1}
    document["annotations"].append({"id": 99, "image_id": 1, "category_id": names.index("cup")} | crowd)
    (tmp_path / "coco.json").write_text(json.dumps(document))
    return tmp_path


def built(annotated: Path, writer: Any = what_a_good_writer_says, output: str = "bench", **plan: Any) -> dict[str, Any]:
    reasoner = ScriptedReasoner(writer) if callable(writer) else writer
    return build(reasoner, annotated / "coco.json", annotated / "pictures", annotated / output, Plan(**plan))


def rows(annotated: Path, output: str = "bench") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (annotated / output / "data.jsonl").read_text().splitlines()]


def test_a_set_is_built_that_eval_reads(annotated: Path):
    about = built(annotated)
    dataset = read_dataset(annotated / "bench")
    wishes = [(record.image.name, record.instruction, record.targets) for record in dataset.records if record.targets]
    expected = [
        (f"{image_id}.png", SERVES[thing], (thing,)) for image_id, shown in enumerate(SHOWN, start=1) for thing in shown
    ]
    assert wishes == expected
    first = dataset.records[0]
    assert (first.boxes.tolist(), first.ignored.tolist()) == ([[10, 10, 30, 30]], [[0, 40, 90, 60]])
    assert (first.synonyms, set(first.present), first.kind) == ({"cup": ("my cup",)}, {"cup", "chair"}, "need")
    assert first.outlines is not None and len(first.outlines.layers) == 2
    assert about["counts"]["wishes"] == {"need": 8, "absent": 6}
    assert json.loads((annotated / "bench/about.json").read_text()) == about
    assert sorted(path.name for path in (annotated / "bench").iterdir()) == ["about.json", "data.jsonl", "images"]


def test_what_nothing_fulfils_is_said_of_other_pictures_where_something_does(annotated: Path):
    built(annotated, absent=3)
    for image_id, shown in enumerate(SHOWN, start=1):
        absent = {row["instruction"] for row in rows(annotated) if row["image"] == f"images/{image_id}.png"}
        absent -= {SERVES[thing] for thing in shown}
        elsewhere = {wish for thing, wish in SERVES.items() if thing not in shown}
        if image_id == 4:
            elsewhere.remove(SERVES["umbrella"])  # there is one, though nobody marked it
        assert absent == elsewhere, "how a wish is put does not tell that nothing fulfils it"
    assert all(row["kind"] == ("need" if row["targets"] else "absent") for row in rows(annotated))


def test_a_wish_is_not_borrowed_where_its_target_is_marked_whatever_the_writer_says(annotated: Path):
    def forgetful(request: Request) -> str:
        """Words a wish by how many things are marked, and knows only wishes that are worded so."""
        today = " today" * (request.instruction.partition(".")[0].count(",") + 1)
        prompt = request.instruction.replace(f'{today}"', '"')
        answer = what_a_good_writer_says(replace(request, instruction=prompt))
        return re.sub(r'("wish": "[^"]*)"', rf'\1{today}"', answer)

    built(annotated, forgetful, absent=3)
    for row in rows(annotated):
        if not row["targets"]:
            assert not any(row["instruction"].startswith(SERVES[thing]) for thing in row["present"])


def test_the_same_seed_gives_the_same_set_and_another_seed_another(annotated: Path):
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        built(annotated, output=output, seed=seed, limit=4)
    assert rows(annotated, "a") == rows(annotated, "b")
    assert rows(annotated, "a") != rows(annotated, "c")
    assert len({row["image"] for row in rows(annotated, "a")}) == 4


def test_a_wish_stays_only_if_the_writer_answers_it_alike_when_asked_again(annotated: Path):
    def unsure(request: Request) -> str:
        return "Targets: []" if f'"{SERVES["cup"]}"' in request.instruction else what_a_good_writer_says(request)

    about = built(annotated, unsure, absent=0)
    assert not any(row["targets"] == ["cup"] for row in rows(annotated))
    assert about["counts"]["refused"] == {"answered otherwise when asked again": 3}
    assert built(annotated, unsure, "unchecked", absent=0, check=False)["counts"]["wishes"] == {"need": 8}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 8, 15])
def test_an_interrupted_run_goes_on_and_ends_the_same(annotated: Path, after: int):
    built(annotated, output="whole")
    asked: list[str] = []

    def until_it_breaks(request: Request) -> str:
        if len(asked) == after:
            raise Interrupted
        asked.append(request.instruction)
        return what_a_good_writer_says(request)

    plan, place = Plan(), annotated / "bench"
    arguments = annotated / "coco.json", annotated / "pictures", place, plan
    with pytest.raises(Interrupted):
        build(ScriptedReasoner(until_it_breaks), *arguments, batch_size=1)
    assert not (place / "data.jsonl").exists()
    with (place / "progress.jsonl").open("a") as log:
        log.write('{"image_id": 3, "wi')  # the power went
    done = len((place / "progress.jsonl").read_text().splitlines()) - 2
    again: list[str] = []
    steps: list[tuple[int, int]] = []
    build(
        ScriptedReasoner(lambda request: again.append("") or what_a_good_writer_says(request)),
        *arguments,
        batch_size=1,
        progress=lambda *step: steps.append(step),
    )
    assert rows(annotated) == rows(annotated, "whole")
    assert steps[0] == (done + 1, 12) and steps[-1] == (12, 12)
    assert len(asked) + len(again) < 2 * 28


def test_a_run_with_other_settings_does_not_go_on(annotated: Path):
    with pytest.raises(ModelError):
        built(annotated, lambda request: "no", seed=1)
    with pytest.raises(InputError, match="is of another run"):
        built(annotated, seed=2)


def test_a_finished_set_is_not_overwritten(annotated: Path):
    built(annotated)
    with pytest.raises(InputError, match="holds a finished set already"):
        built(annotated)


def test_a_writer_that_cannot_write_wishes_is_named(annotated: Path):
    with pytest.raises(ModelError, match=r"'scripted' wrote no usable wish about 6 pictures .*'Targets: \[\]'"):
        built(annotated, ScriptedReasoner(["Targets: []"]))
    assert not (annotated / "bench/data.jsonl").exists()


def test_a_picture_that_cannot_be_read_is_counted_and_the_rest_goes_on(annotated: Path):
    (annotated / "pictures/2.png").write_bytes(b"broken")
    about = built(annotated)
    assert about["counts"]["refused"] == {"the picture cannot be read": 1}
    assert {row["image"] for row in rows(annotated)} == {f"images/{n}.png" for n in (1, 3, 4, 5, 6)}


def test_batches_change_nothing(annotated: Path):
    sizes: list[int] = []

    class Counting(ScriptedReasoner):
        def reason(self, requests: Any, *, max_new_tokens: int = 512) -> list[RawAnswer]:
            sizes.append(len(requests))
            return super().reason(requests, max_new_tokens=max_new_tokens)

    built(annotated, output="eight")
    build(
        Counting(what_a_good_writer_says),
        annotated / "coco.json",
        annotated / "pictures",
        annotated / "one",
        Plan(),
        batch_size=1,
    )
    assert rows(annotated, "eight") == rows(annotated, "one")
    assert set(sizes) == {1}


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"wishes": 0}, {"absent": -1}, {"check": False}])
def test_a_plan_that_makes_no_sense(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Plan(**wrong)


def test_the_order_in_which_a_file_lists_its_annotations_does_not_matter_for_who_is_drawn(annotated: Path):
    built(annotated, limit=3, output="a")
    document = json.loads((annotated / "coco.json").read_text())
    random.Random(5).shuffle(document["annotations"])
    (annotated / "coco.json").write_text(json.dumps(document))
    built(annotated, limit=3, output="b")
    assert {row["image"] for row in rows(annotated, "a")} == {row["image"] for row in rows(annotated, "b")}
