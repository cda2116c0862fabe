"""What a detector is asked in training, from COCO and ODVG files: true names, false names, and boxes that fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from detgpt.errors import InputError, UnreadableNameError
from detgpt.models import PAIRS
from finetune.grounding.augment import Augmentation, vary
from finetune.grounding.data import Example, Source, Vocabulary
from finetune.grounding.questions import Asking, Collator, PromptMaker, Question, TrainingQuestions, ValidationQuestions

PROCESSOR = AutoProcessor.from_pretrained(PAIRS["picto"] / "detector")
BOX = [10, 10, 30, 20]  # xywh


def coco(folder: Path, annotations: list[dict], names: list[str]) -> list[Example]:
    """Two pictures of 100 x 80 pixels with these annotations."""
    for number in range(2):
        Image.new("RGB", (100, 80)).save(folder / f"{number}.png")
    document = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(2)],
        "annotations": [{"bbox": BOX, "category_id": 0, **annotation} for annotation in annotations],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return Source(annotations=folder).read()


def odvg(folder: Path, *rows: dict, **label_map: str) -> list[Example]:
    Image.new("RGB", (100, 80)).save(folder / "0.png")
    file = folder / "odvg.jsonl"
    file.write_text(
        "".join(json.dumps({"filename": "0.png", "height": 80, "width": 100, **row}) + "\n" for row in rows)
    )
    if label_map:
        (folder / "names.json").write_text(json.dumps({key.removeprefix("n"): name for key, name in label_map.items()}))
    return Source(annotations=file, label_map=folder / "names.json" if label_map else None).read()


def questions(examples: list[Example], asking: Asking | None = None, **changes) -> TrainingQuestions:
    settings = {"augmentation": None, "fill": (0, 0, 0), "seed": 0, **changes}
    return TrainingQuestions(examples, PromptMaker(PROCESSOR.tokenizer, 96), asking or Asking(), **settings)


def drawn(examples: list[Example], asking: Asking | None = None, epochs: int = 40) -> list[Question]:
    """What is asked about the first picture in many epochs."""
    asked = questions(examples, asking)
    found = []
    for epoch in range(epochs):
        asked.set_epoch(epoch)
        found.append(asked[0])
    return found


def names_of(question: Question) -> list[str]:
    return [question.prompt.text[start:end] for start, end in question.prompt.spans]


def test_present_and_absent_names_are_asked_and_the_boxes_belong_to_the_present_ones(tmp_path):
    examples = coco(tmp_path, [{"image_id": 0}, {"image_id": 0, "category_id": 1}], ["cup", "mug", "fork", "moon"])
    asked = drawn(examples)
    for question in asked:
        boxed = {names_of(question)[place] for place in question.names}
        assert boxed == {"cup", "mug"} & set(names_of(question))
        assert len(question.boxes) == len(question.names)
    assert {name for question in asked for name in names_of(question)} == {"cup", "mug", "fork", "moon"}
    assert {len(question.prompt.spans) for question in asked} >= {1, 2, 3, 4}


def test_a_name_that_is_there_in_a_crowd_alone_is_not_asked_for(tmp_path):
    examples = coco(
        tmp_path, [{"image_id": 0, "iscrowd": 1}, {"image_id": 0, "category_id": 1}], ["cup", "mug", "fork"]
    )
    assert {name for question in drawn(examples) for name in names_of(question)} == {"mug", "fork"}


def test_what_a_caption_does_not_speak_of_is_not_asked_for(tmp_path):
    caption = {"caption": "a red cup", "regions": [{"bbox": [1, 1, 9, 9], "phrase": "a red cup"}]}
    things = {"instances": [{"bbox": [1, 1, 9, 9], "label": 0}, {"bbox": [20, 20, 40, 40], "label": 1}]}
    spoken, boxed = odvg(tmp_path, {"grounding": caption}, {"detection": things}, n0="cup", n1="mug", n2="fork")
    assert {name for question in drawn([spoken]) for name in names_of(question)} == {"a red cup"}
    assert {name for question in drawn([boxed]) for name in names_of(question)} == {"cup", "mug", "fork"}
    assert boxed.labels == ("cup", "mug")
    assert boxed.boxes.tolist() == [[1, 1, 9, 9], [20, 20, 40, 40]]


def test_odvg_without_a_label_map_has_the_names_that_occur(tmp_path):
    rows = [{"detection": {"instances": [{"bbox": [1, 1, 9, 9], "category": name}]}} for name in ("cup", "mug")]
    assert odvg(tmp_path, *rows)[0].vocabulary.names == ("cup", "mug")


@pytest.mark.parametrize(
    ("row", "label_map", "message"),
    [
        ({}, {}, "'grounding' must hold a list 'regions'"),
        ({"detection": {"instances": [{"bbox": [9, 9, 1, 1], "category": "cup"}]}}, {}, "line 1: 'bbox' must hold"),
        ({"detection": {"instances": [{"bbox": [1, 1, 9, 9]}]}}, {}, "line 1: 'category' must be a text"),
        ({"detection": {"instances": [{"bbox": [1, 1, 9, 9], "label": 7}]}}, {"n0": "cup"}, "label 7 is not in"),
        ({"detection": {"instances": []}}, {}, "has no box to learn from"),
        ({"filename": "lost.png", "detection": {"instances": []}}, {}, "there is no picture .*lost.png"),
    ],
)
def test_wrong_odvg_is_refused_with_its_line_and_what_is_wrong(tmp_path, row, label_map, message):
    with pytest.raises(InputError, match=message):
        odvg(tmp_path, row, **label_map)


def test_each_name_of_a_batch_has_its_own_tokens_also_one_that_is_spelled(tmp_path):
    # The built-in detector has "apple" and "banana" in its vocabulary; of "blorb" it knows the letters.
    examples = coco(tmp_path, [{"image_id": 0}, {"image_id": 1, "category_id": 2}], ["apple", "blorb", "banana"])
    asked = [question for question in drawn(examples, Asking(alone=0)) if len(question.prompt.spans) > 1]
    batch = Collator(PROCESSOR)(asked)
    for question, ids, names in zip(asked, batch["input_ids"], batch["asked"], strict=True):
        for name, tokens in zip(names_of(question), names, strict=True):
            spelled = PROCESSOR.tokenizer(name, add_special_tokens=False)["input_ids"]
            assert ids[tokens.bool()].tolist() == spelled
            assert len(spelled) == {"apple": 1, "blorb": 5, "banana": 1}[name]
    truth = batch["truths"][0]
    np.testing.assert_allclose(truth["boxes"][0], [0.25, 0.25, 0.3, 0.25], atol=1e-6)


def test_a_prompt_holds_no_more_than_the_model_reads(tmp_path):
    names = [f"thing number {'x' * 12} {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    examples = coco(tmp_path, [{"image_id": 0, "category_id": 59}], names)
    for question in drawn(examples, Asking(alone=0, max_names=60)):
        assert len(PROCESSOR.tokenizer(question.prompt.text)["input_ids"]) <= 96
        assert len(question.boxes) == 1, "what is there comes before what is not"


def test_a_synonym_is_asked_for_in_its_names_place(tmp_path):
    plain = coco(tmp_path, [{"image_id": 0}], ["cup", "fork"])[0]
    vocabulary = Vocabulary(plain.vocabulary.names, {"cup": ("mug", "beaker")})
    asked = drawn([Example(plain.image, plain.boxes, plain.labels, vocabulary)], Asking(synonyms=0.5))
    said = {names_of(question)[place] for question in asked for place in question.names}
    assert said == {"cup", "mug", "beaker"}


def test_synonyms_that_leave_no_room_push_names_out_with_their_boxes(tmp_path):
    plain = coco(
        tmp_path, [{"image_id": 0, "category_id": i} for i in range(20)], [f"t{chr(97 + i)}" for i in range(20)]
    )
    long = {name: (f"{name} {'x' * 12}",) for name in plain[0].vocabulary.names}
    example = Example(plain[0].image, plain[0].boxes, plain[0].labels, Vocabulary(plain[0].vocabulary.names, long))
    for question in drawn([example], Asking(alone=0, synonyms=1)):
        assert len(question.boxes) == len(question.prompt.spans) < 20
        Collator(PROCESSOR)([question])


def test_a_question_depends_on_seed_epoch_and_picture_alone(tmp_path):
    examples = coco(tmp_path, [{"image_id": 0}], ["cup", "mug", "fork", "moon"])

    def ask(epoch: int, seed: int = 0) -> tuple[str, bytes]:
        asked = questions(examples, augmentation=Augmentation(), seed=seed)
        asked.set_epoch(epoch)
        question = asked[0]
        return question.prompt.text, question.image.numpy().tobytes()

    assert ask(3) == ask(3)
    assert len({ask(epoch) for epoch in range(6)}) == 6
    assert ask(3) != ask(3, seed=1)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_go_where_their_things_go(seed):
    image = Image.new("RGB", (160, 120), (90, 90, 90))
    image.paste((255, 255, 255), (30, 40, 80, 90))
    how = Augmentation(scale=(0.5, 1.8), colour=0)
    seen, boxes, kept = vary(image, np.array([[30.0, 40, 80, 90]]), how, (0, 0, 0), seed)
    assert seen.shape == (3, 120, 160)
    rows, columns = np.nonzero(seen.amin(0).numpy() > 180)
    if not len(kept):
        assert len(rows) < 400, "only what has left the picture may go"
        return
    white = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(boxes[0], white, atol=1.5)


def test_a_picture_that_is_not_to_be_varied_stays_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    seen, boxes, _ = vary(
        Image.fromarray(noise), np.array([[5.0, 5, 20, 20]]), Augmentation(flip=0, scale=(1, 1), colour=0), (0, 0, 0), 0
    )
    np.testing.assert_array_equal(seen.permute(1, 2, 0), noise)
    assert boxes.tolist() == [[5, 5, 20, 20]]


def test_validation_asks_every_picture_for_every_name_in_prompts_that_fit(tmp_path):
    names = [f"{'abcdefgh'[i // 8]} {'abcdefgh'[i % 8]} thing" for i in range(64)]
    examples = coco(tmp_path, [{"image_id": 0, "category_id": 63}], names)
    prompts = PromptMaker(PROCESSOR.tokenizer, 96)
    asked = ValidationQuestions(examples, prompts, "joint")
    for picture in range(2):
        mine = [prompt for number, prompt in asked.questions if number == picture]
        assert len(mine) > 1
        assert [name for prompt in mine for name in prompt.indices] == list(range(64))
    boxed = [asked[i] for i in range(len(asked)) if len(asked[i].boxes)]
    assert [names_of(question)[question.names[0]] for question in boxed] == [names[63]]
    assert len(ValidationQuestions(examples, prompts, "separate")) == 2 * 64


def test_a_folder_of_records_is_asked_for_what_is_boxed_and_not_for_what_is_there_unboxed(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "0.png")
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    rows = [
        {"image": "0.png", "targets": ["cup"], "boxes": [[1, 1, 9, 9]], "labels": ["cup"], "present": ["cup", "mug"]},
        {"image": "1.png", "targets": ["mug"], "boxes": [[1, 1, 9, 9]], "labels": ["mug"], "present": ["mug"]},
    ]
    lines = (json.dumps({"instruction": "I am thirsty", **row}) for row in rows)
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    with_unboxed, other = Source.model_validate(str(tmp_path)).read()
    assert {name for question in drawn([with_unboxed]) for name in names_of(question)} == {"cup"}
    assert {name for question in drawn([other]) for name in names_of(question)} == {"cup", "mug"}


def test_a_name_that_the_model_cannot_read_is_named_before_the_training(tmp_path):
    examples = coco(tmp_path, [{"image_id": 0}], ["cup", "???"])
    with pytest.raises(UnreadableNameError, match=r"\?\?\?"):
        PromptMaker(PROCESSOR.tokenizer, 96).check(examples)
