"""Boxes that the multimodal model itself writes: what is read from its text, and what the numbers mean."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_servers import ChatServer, serve  # noqa: F401
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from typer.testing import CliRunner

from detgpt import DetGPT
from detgpt.cli import app
from detgpt.detectors.reasoner import CONVENTIONS, COORDINATES, ReasonerDetector, _prompt, read_boxes
from detgpt.errors import InputError, ModelError
from detgpt.reasoners import RawAnswer, Request, TokenSpan
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from detgpt.reasoners.openai import OpenAIReasoner
from detgpt.reasoners.scripted import ScriptedReasoner


class Writer(ScriptedReasoner):
    """A scripted model with token probabilities: each character is a token, of log-probability `logprob`."""

    def __init__(self, *answers: str, family: str = "qwen3_vl", logprob: Callable[[str], float] = lambda _: -0.1):
        super().__init__(list(answers))
        self.family, self.logprob = family, logprob
        self.asked: list[Request] = []
        self.batches: list[int] = []

    def reason(self, requests: Any, *, max_new_tokens: int = 512) -> list[RawAnswer]:
        self.asked += requests
        self.batches.append(len(requests))
        return [
            RawAnswer(raw.text, tuple(TokenSpan(i, i + 1, self.logprob(c)) for i, c in enumerate(raw.text)))
            for raw in super().reason(requests)
        ]


def boxes(*written: tuple[str, list[float]]) -> str:
    return json.dumps([{"bbox_2d": box, "label": label} for label, box in written])


def picture(width: int = 200, height: int = 100) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def detect(detector: ReasonerDetector, *names: str, image: Image.Image | None = None, **options: Any) -> Any:
    [found] = detector.detect([image or picture()], [names], **options)
    return found


# --- what the text holds ---

READ = {
    "JSON": ('[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]', [("cup", 1, 2, 3, 4)]),
    "the label first": ('[{"label": "cup", "bbox_2d": [1, 2, 3, 4]}]', [("cup", 1, 2, 3, 4)]),
    "a fence": ('```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "cup"}\n]\n```', [("cup", 1, 2, 3, 4)]),
    "one object": ('{"bbox_2d": [1, 2, 3, 4], "label": "cup"}', [("cup", 1, 2, 3, 4)]),
    "single quotes": ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'child's cup'}]", [("child's cup", 1, 2, 3, 4)]),
    "another key": ('[{"box": [1, 2, 3, 4], "name": "cup"}]', [("cup", 1, 2, 3, 4)]),
    "several": (
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8], "label": "jug"}]',
        [("cup", 1, 2, 3, 4), ("jug", 5, 6, 7, 8)],
    ),
    "several of one": (
        '{"label": "cup", "bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}',
        [("cup", 1, 2, 3, 4), ("cup", 5, 6, 7, 8)],
    ),
    "cut in a box": ('[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7', [("cup", 1, 2, 3, 4)]),
    "cut in a number": ('[{"bbox_2d": [1, 2, 3, 4', []),
    "cut in a label": ('[{"bbox_2d": [1, 2, 3, 4], "label": "cu', [(None, 1, 2, 3, 4)]),
    "no label": ('[{"bbox_2d": [1, 2, 3, 4]}]', [(None, 1, 2, 3, 4)]),
    "a label is not the next one's": (
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8]}]',
        [("cup", 1, 2, 3, 4), (None, 5, 6, 7, 8)],
    ),
    "lists": ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(None, 1, 2, 3, 4), (None, 5, 6, 7, 8)]),
    "InternVL": (
        "<ref>cup</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> <ref>jug</ref><box>[[9, 9, 9, 9]]</box>",
        [("cup", 1, 2, 3, 4), ("cup", 5, 6, 7, 8), ("jug", 9, 9, 9, 9)],
    ),
    "a thought": (
        '<think>[{"bbox_2d": [9, 9, 9, 9], "label": "jug"}]</think>[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
        [("cup", 1, 2, 3, 4)],
    ),
    "an endless thought": ('<think>[{"bbox_2d": [9, 9, 9, 9], "label": "jug"}]', []),
    "fractions, signs": ('[{"bbox_2d": [-1.5, +2, 3.25, 4.], "label": "cup"}]', [("cup", -1.5, 2, 3.25, 4)]),
    "escapes": (r'[{"bbox_2d": [1, 2, 3, 4], "label": "caf\u00e9 \"x\""}]', [('café "x"', 1, 2, 3, 4)]),
    "braces in a label": ('[{"label": "a {cup}", "bbox_2d": [1, 2, 3, 4]}]', [("a {cup}", 1, 2, 3, 4)]),
    "five numbers": ('[{"bbox_2d": [1, 2, 3, 4, 5], "label": "cup"}]', []),
    "words": ('[{"bbox_2d": ["left", 2, 3, 4], "label": "cup"}]', []),
    "nothing": ("[]", []),
    "no text": ("", []),
    "a sentence": ("There is no cup (1, 2, 3) here.", []),
}


@pytest.mark.parametrize("case", READ)
def test_boxes_are_read_as_models_write_them(case: str) -> None:
    text, expected = READ[case]
    read = read_boxes(text)
    assert [(box.label, *box.xyxy) for box in read] == expected
    for box in read:
        assert [float(number) for number in text[slice(*box.span)].split(",")] == list(box.xyxy)


FRAGMENTS = [
    "[",
    "]",
    "{",
    "}",
    "(",
    '"',
    "'",
    "\\",
    ",",
    ":",
    " ",
    "\n",
    "7",
    "-3.5",
    "12345678",
    '"label"',
    '"bbox_2d"',
]
FRAGMENTS += [
    "<ref>",
    "</ref>",
    "<box>",
    "<think>",
    "</think>",
    '"label": "cup"',
    "[1, 2, 3, 4]",
    "é",
    "\ud800",
    "\x00",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), st.text(max_size=80)))
def test_no_text_is_too_strange(text: str) -> None:
    for box in read_boxes(text):
        assert all(math.isfinite(number) for number in box.xyxy)
        assert 0 <= box.span[0] < box.span[1] <= len(text)


@pytest.mark.parametrize(
    "unit", ["[", "[1, ", "[1,2,3,", '{"label": "', '"label": "a', "[" + " " * 9 + "1,", "<ref>", "'"]
)
def test_reading_takes_linear_time(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length]
        started = time.thread_time()
        read_boxes(text)
        return time.thread_time() - started

    once, eight_times = (min(seconds(length) for _ in range(3)) for length in (20_000, 160_000))
    assert eight_times < 30 * once + 0.01


# --- what the numbers mean ---


def test_every_convention_is_explained() -> None:
    assert set(CONVENTIONS.values()) <= set(COORDINATES)


@pytest.mark.parametrize(
    ("family", "coordinates"),
    [
        ("qwen2_vl", "thousandths"),
        ("qwen2_5_vl", "resized"),
        ("qwen3_vl", "thousandths"),
        ("qwen3_vl_moe", "thousandths"),
        ("internvl", "thousandths"),
        ("Qwen/Qwen2-VL-7B-Instruct", "thousandths"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "resized"),
        ("qwen2.5vl:7b", "resized"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "thousandths"),
        ("qwen3-vl:4b", "thousandths"),
        ("OpenGVLab/InternVL3_5-8B-HF", "thousandths"),
    ],
)
def test_a_family_is_known_by_its_type_or_its_served_name(family: str, coordinates: str) -> None:
    assert ReasonerDetector(Writer("", family=family)).coordinates == coordinates


def test_an_unknown_family_is_told_what_to_give() -> None:
    with pytest.raises(InputError, match=r"'llava'.*coordinates="):
        ReasonerDetector(Writer("", family="llava"))
    with pytest.raises(InputError, match="'pixels'"):
        ReasonerDetector(Writer(""), coordinates="pixels")
    assert ReasonerDetector(Writer("", family="llava"), coordinates="original").coordinates == "original"


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [
        ("thousandths", [20, 20, 100, 50]),
        ("original", [100, 200, 500, 500]),
        ("resized", [25, 40, 125, 100]),
    ],
)
def test_numbers_become_pixels_of_the_image(coordinates: str, box: list[float]) -> None:
    writer = Writer(boxes(("cup", [100, 200, 500, 500])))
    writer.input_size = lambda image: (image.width * 4, image.height * 5)  # type: ignore[attr-defined]
    image = picture(1000, 1000) if coordinates == "original" else picture(200, 100)
    if coordinates == "resized":
        image = picture(200, 500)
    found = detect(ReasonerDetector(writer, coordinates=coordinates), "cup", image=image)
    assert found.boxes.tolist() == [box]


def test_a_box_beyond_the_image_is_clipped_and_one_without_area_left_out() -> None:
    answer = boxes(
        ("cup", [-50, 500, 500, 2000]),
        ("cup", [500, 500, 100, 900]),  # inverted
        ("cup", [100, 100, 100, 900]),  # a line
        ("cup", [1200, 0, 1500, 900]),  # elsewhere
    )
    assert detect(ReasonerDetector(Writer(answer)), "cup").boxes.tolist() == [[0, 50, 100, 100]]


# --- names and scores ---


def test_labels_find_their_names_whatever_their_case_and_strangers_are_left_out() -> None:
    answer = boxes(("Wine  Glass", [0, 0, 100, 100]), ("dog", [0, 0, 200, 200]), ("cup", [0, 0, 300, 300]))
    found = detect(ReasonerDetector(Writer(answer)), "cup", "wine glass", prompting="joint")
    assert sorted(zip(found.name_index.tolist(), found.boxes[:, 2].tolist(), strict=True)) == [(0, 60), (1, 20)]


def test_a_box_without_a_label_is_the_one_thing_that_was_asked_for() -> None:
    detector = ReasonerDetector(Writer("[[0, 0, 100, 100]]"))
    assert detect(detector, "cup").name_index.tolist() == [0]
    assert detect(detector, "cup", "jug", prompting="joint").name_index.tolist() == []


def test_a_score_is_the_geometric_mean_of_the_probabilities_that_wrote_the_box() -> None:
    writer = Writer(boxes(("cup", [1, 1, 900, 900])), logprob=lambda c: {"9": -0.5, "1": -0.25}.get(c, -0.125))
    [score] = detect(ReasonerDetector(writer), "cup").scores.tolist()
    logprobs = [-0.25, -0.125, -0.125] * 2 + [-0.5, -0.125, -0.125, -0.125, -0.125] + [-0.5, -0.125, -0.125]
    assert score == pytest.approx(math.exp(sum(logprobs) / len(logprobs)))  # "1, 1, 900, 900"
    assert len(detect(ReasonerDetector(writer), "cup", box_threshold=score - 0.01).boxes) == 1
    assert len(detect(ReasonerDetector(writer), "cup", box_threshold=score + 0.01).boxes) == 0


def test_a_model_without_token_probabilities_cannot_score_its_boxes() -> None:
    detector = ReasonerDetector(ScriptedReasoner([boxes(("cup", [1, 1, 9, 9]))]), coordinates="thousandths")
    with pytest.raises(ModelError, match="no token probabilities"):
        detect(detector, "cup")


# --- questions ---


def test_names_are_asked_for_one_by_one_or_together_and_nobody_asks_for_nothing() -> None:
    writer = Writer("[]")
    images, names = [picture(), picture(), picture()], [["cup", 'a "red" jug'], [], ["dog"]]
    detector = ReasonerDetector(writer, max_questions_per_pass=2)
    assert [len(found.boxes) for found in detector.detect(images, names)] == [0, 0, 0]
    assert writer.batches == [2, 1]
    assert [request.image for request in writer.asked] == [images[0], images[0], images[2]]
    assert all(request.verbatim for request in writer.asked)
    detector.detect(images, names, prompting="joint")
    assert '"cup", "a \\"red\\" jug"' in writer.asked[3].instruction
    assert len(writer.asked) == 5


def test_wrong_arguments_are_refused() -> None:
    detector = ReasonerDetector(Writer("[]"))
    with pytest.raises(InputError, match="box_threshold"):
        detect(detector, "cup", box_threshold=7)
    with pytest.raises(InputError, match="empty"):
        detect(detector, " ")
    with pytest.raises(InputError, match="max_questions_per_pass"):
        ReasonerDetector(Writer("[]"), max_questions_per_pass=0)


# --- real classes ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            made[family] = FAMILIES[family](tmp_path_factory.mktemp("own-boxes") / "reasoner")
        return made[family]

    return folder


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL", "InternVL"])
def test_a_real_model_that_writes_nonsense_finds_nothing(folders: Callable[[str], Path], family: str) -> None:
    model = DetGPT(folders(family), "reasoner", device="cpu")
    assert model.detector.coordinates == ("resized" if family == "Qwen2.5-VL" else "thousandths")
    model.detector._max_new_tokens = 12  # random weights never end by themselves
    results = model.detect_batch([(picture(64, 48), ["cup", "jug"]), (picture(30, 60), ["dog"])])
    assert [(len(result), len(result.targets)) for result in results] == [(0, 2), (0, 1)]


@pytest.mark.parametrize("size", [(64, 48), (200, 100), (33, 90), (500, 20)])
def test_a_processor_tells_to_which_size_it_resizes(folders: Callable[[str], Path], size: tuple[int, int]) -> None:
    reasoner = HuggingFaceReasoner(folders("Qwen2.5-VL"), device="cpu")
    height, width = smart_resize(size[1], size[0], factor=16, min_pixels=32 * 32, max_pixels=64 * 64)
    assert reasoner.input_size(picture(*size)) == (width, height)


def test_a_processor_of_another_kind_says_so(folders: Callable[[str], Path]) -> None:
    reasoner = HuggingFaceReasoner(folders("InternVL"), device="cpu")
    with pytest.raises(InputError, match="resizes"):
        reasoner.input_size(picture())


def learn_by_heart(reasoner: HuggingFaceReasoner, request: Request, answer: str) -> None:
    model, begin = reasoner._model, reasoner._encode([request])["input_ids"].shape[1]
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    batch = reasoner._processor.apply_chat_template(
        [[*reasoner._conversation(request), turn]], tokenize=True, return_dict=True, return_tensors="pt"
    )
    labels = batch["input_ids"].clone()
    labels[:, :begin] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break


def test_a_taught_model_boxes_what_it_was_taught(folders: Callable[[str], Path]) -> None:
    """Qwen2.5-VL's real class, taught one answer by heart; its numbers count pixels of the resized image."""
    image, written = picture(200, 100), boxes(("cup", [8, 16, 40, 32]))
    reasoner = HuggingFaceReasoner(folders("Qwen2.5-VL"), device="cpu")
    assert reasoner.input_size(image) == (80, 32)
    detector = ReasonerDetector(reasoner, max_new_tokens=80)
    learn_by_heart(reasoner, Request(image, _prompt(["cup"]), verbatim=True), written)
    found = detect(detector, "cup", image=image)
    assert found.boxes.tolist() == [[20, 50, 100, 100]]
    assert 0.5 < found.scores[0] < 1


# --- servers and the command line ---


def tokens(answer: str) -> list[bytes]:
    return [character.encode() for character in answer]


def test_a_served_models_boxes_count_in_what_the_server_sees(serve: Callable[..., ChatServer]) -> None:  # noqa: F811
    server = serve(*tokens(boxes(("cup", [0, 0, 378, 196]))))
    reasoner = OpenAIReasoner("Qwen/Qwen2.5-VL-7B-Instruct", server.url, max_image_side=768)
    found = detect(ReasonerDetector(reasoner), "cup", image=picture(1536, 800))
    assert reasoner.input_size(picture(1536, 800)) == (756, 392)  # 768 x 400, in multiples of 28
    assert found.boxes.tolist() == [[0, 0, 768, 400]]
    assert found.scores.tolist() == pytest.approx([math.exp(-0.5)])


def test_the_command_line_takes_the_models_own_boxes(
    serve: Callable[..., ChatServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    server = serve(*tokens(boxes(("cup", [0, 0, 500, 500]))))
    picture(200, 100).save(tmp_path / "a.png")
    parts = ["--reasoner", "Qwen/Qwen3-VL-4B-Instruct", "--detector", "reasoner", "--base-url", server.url]
    ran = CliRunner().invoke(app, ["detect", str(tmp_path / "a.png"), "--names", "cup", "--json", *parts])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["detections"][0]["xyxy"] == [0, 0, 100, 50]
    ran = CliRunner().invoke(app, ["detect", str(tmp_path / "a.png"), "--names", "cup", "--detector", "reasoner"])
    assert ran.exit_code == 2 and "go together" in ran.stderr
