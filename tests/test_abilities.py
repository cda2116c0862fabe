"""Free answers: how right each is, and what a reasoner can do besides finding things."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from detgpt.cli import app
from detgpt.errors import InputError
from detgpt.evaluation import scoring
from detgpt.evaluation.abilities import AbilityResult, evaluate_abilities, read_abilities
from detgpt.evaluation.writing import Names
from detgpt.reasoners import RawAnswer, Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner

# --- scores ---


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Paris", "Paris", True),
        (" the PARIS. ", "Paris", True),
        ("Paris, France", "Paris", False),
        ("ice-cream", "ice cream", True),
        ("<think>London?</think>Paris", "Paris", True),
        ("<think>Paris", "Paris", False),
        ("A", "A", True),
        ("An", "A", False),
        ("", "A", False),
        ("B", "A", False),
    ],
)
def test_exact_compares_the_whole_text(text: str, answer: str, right: bool) -> None:
    assert scoring.exact(text, answer) == right


@pytest.mark.parametrize("value", range(21))
def test_numbers_in_words_up_to_twenty(value: int) -> None:
    num2words = pytest.importorskip("num2words").num2words
    assert scoring.read_number(f"I see {num2words(value)} cups.") == value
    assert scoring.read_number(f"{num2words(value).capitalize()}.") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A dog twice and a cat: that makes three animals.", 3),
        ('An apple and a cup 2 times: that makes three.\nTargets: ["apple", "4 cups"]', 3),
        ("Two apples and two pears. The answer is: 4", 4),
        ('Targets: ["cup", "4 spoons"]', None),
        ("3 cups and 4 spoons", 4),
        ("3.", 3),
        ("2.5 litres", 2.5),
        ("1,200 people", 1200),
        ("1, 2 and 3", 3),
        ("1,2", 2),
        ("12,345,678", 12345678),
        ("There are no cups.", 0),
        ("No.", 0),
        ("None of them", 0),
        ("Nothing here", 0),
        ("No, there are two.", 2),
        ("no, none", 0),
        ("Someone put seven there.", 7),
        ("twenty-one", None),
        ("a one-eyed cat", None),
        ("many", None),
        ("", None),
        ("<think>3 or 4?</think>four", 4),
        ("FIVE!", 5),
    ],
)
def test_the_last_number_said_before_the_answer_line_counts(text: str, value: float | None) -> None:
    assert scoring.read_number(text) == value


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("three", "3", True), ("none", "0", True), ("3", "4", False), ("many", "3", False)],
)
def test_a_number_is_right_by_its_value(text: str, answer: str, right: bool) -> None:
    assert scoring.number(text, answer) == right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Yes, there is a cup.", "yes", True),
        ("There is no cup, yes.", "no", True),
        ("YES", "Yes.", True),
        ("No", "yes", False),
        ("I know yesterday's noise", "no", False),
        ("", "no", False),
    ],
)
def test_the_first_yes_or_no_counts(text: str, answer: str, right: bool) -> None:
    assert scoring.yes_no(text, answer) == right


KNOWN = Names(("cup", "ice", "ice cream", "strawberry", "box", "knife", "glasses", "t-shirt"))


@pytest.mark.parametrize(
    ("text", "targets", "score"),
    [
        ("There is a cup and a box.", ["cup", "box"], 1),
        ("Two cups, the boxes and strawberries.", ["cup", "box", "strawberry"], 1),
        ("A cup on a desk.", ["cup"], 1),
        ("A cup, a knife.", ["cup"], 2 / 3),
        ("A cup.", ["cup", "knife"], 2 / 3),
        ("A cupboard, a boxer.", ["cup"], 0),
        ("Some ice creams.", ["ice cream"], 1),
        ("Ice cream on ice.", ["ice cream"], 2 / 3),
        ("THE T-SHIRT!", ["t-shirt"], 1),
        ("glasses", ["glasses"], 1),
        ("<think>a knife?</think>A cup.", ["cup"], 1),
        ("A cup, again a cup.", ["cup"], 1),
        ("An empty room.", [], 1),
        ("A cup.", [], 0),
        ("", ["cup"], 0),
    ],
)
def test_names_are_found_in_free_text(text: str, targets: list[str], score: float) -> None:
    assert scoring.names(text, targets, KNOWN) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "targets", "score"),
    [
        ('A desk with a knife.\nTargets: ["cup"]', ["cup"], 1),
        ('Targets: ["Cup", "knife"]', ["cup"], 2 / 3),
        ("Targets: []", [], 1),
        ("Targets: []", ["cup"], 0),
        ("A cup.", [], 0),
        ('Targets: ["cups"]', ["cup"], 0),
    ],
)
def test_targets_are_those_of_the_answer_line(text: str, targets: list[str], score: float) -> None:
    assert scoring.targets(text, targets) == pytest.approx(score)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (5, 5, 0.5655, 1)]
)
def test_the_interval_is_that_of_the_literature(hits: int, n: int, low: float, high: float) -> None:
    """The second is the example of Newcombe 1998 (Statistics in Medicine 17, method 3)."""
    assert scoring.wilson(hits / n, n) == pytest.approx((low, high), abs=1e-4)


# --- questions ---


class Parrot:
    """A reasoner that says what it is told to, and remembers what it was asked."""

    name = "parrot"

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.batches: list[Sequence[Request]] = []

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        self.batches.append(requests)
        return [RawAnswer(self.answers.get(request.instruction, "?")) for request in requests]


def write(folder: Path, **abilities: list[dict[str, Any]]) -> Path:
    for name, questions in abilities.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "gray").save(folder / name / "1.png")
        (folder / name / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def counting(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"image": "1.png", "question": question, "answer": answer, "score": "number", **more}


def test_each_ability_gets_its_mean_and_its_interval(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        counting=[counting("cups", "2"), counting("spoons", "none"), counting("pans", "1")],
        naming=[
            {"image": "1.png", "question": "all", "targets": ["cup", "pan"], "score": "names"},
            {"image": "1.png", "question": "red", "targets": [], "score": "targets"},
        ],
        text=[{"question": "boils?", "answer": "yes", "score": "yes_no"}],
    )
    parrot = Parrot(cups="Two.", spoons="0", pans="many", all="A cup.", red="Targets: []")
    steps: list[tuple[int, int]] = []
    said: list[tuple[str, str, str, float]] = []
    results = evaluate_abilities(
        parrot,
        folder,
        batch_size=2,
        progress=lambda done, total: steps.append((done, total)),
        each=lambda name, question, text, score: said.append((name, question.question, text, score)),
    )
    assert {name: (result.n, round(result.value, 4)) for name, result in results.items()} == {
        "counting": (3, 0.6667),
        "naming": (2, 0.8333),
        "text": (1, 0.0),
    }
    assert (results["counting"].low, results["counting"].high) == scoring.wilson(2 / 3, 3)
    assert steps == [(2, 6), (4, 6), (5, 6), (6, 6)]
    assert said[:2] == [("counting", "cups", "Two.", 1.0), ("counting", "spoons", "0", 1.0)]
    assert [name for name, *_ in said] == ["counting"] * 3 + ["naming"] * 2 + ["text"]


def test_questions_go_as_they_stand_and_pictures_apart_from_text(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        mixed=[
            counting("how many cups", "2"),
            {"question": "is water wet", "answer": "yes", "score": "yes_no"},
            counting("how many", "12"),
        ],
    )
    parrot = Parrot()
    evaluate_abilities(parrot, folder)
    with_picture, text_only = parrot.batches
    assert [request.instruction for request in with_picture] == ["how many cups", "how many"]
    assert [(request.instruction, request.image) for request in text_only] == [("is water wet", None)]
    assert all(request.verbatim for request in (*with_picture, *text_only))
    assert all(request.image is not None and request.image.size == (40, 30) for request in with_picture)


def test_a_limit_takes_the_first_of_each_ability(tmp_path: Path) -> None:
    folder = write(tmp_path, a=[counting("1", "1"), counting("2", "9")], b=[counting("2", "2")])
    results = evaluate_abilities(Parrot(**{"1": "1", "2": "2"}), folder, limit=1)
    assert {name: (result.n, result.value) for name, result in results.items()} == {"a": (1, 1.0), "b": (1, 1.0)}


def test_names_that_only_other_questions_expect_are_known_and_wrong(tmp_path: Path) -> None:
    asked = [
        {"question": "first", "targets": ["cup"], "score": "names"},
        {"question": "second", "targets": ["pan"], "score": "names"},
    ]
    results = evaluate_abilities(Parrot(first="A cup, a pan, a rug."), write(tmp_path, a=asked), limit=1)
    assert results["a"].value == pytest.approx(2 / 3)


def test_one_ability_is_a_folder_too(tmp_path: Path) -> None:
    write(tmp_path, counting=[counting("1", "1")])
    assert list(evaluate_abilities(Parrot(), tmp_path / "counting")) == ["counting"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "1"}, "line 1: 'score' must be a text"),
        ({"question": "q", "answer": "1", "score": "bleu"}, "there is no score 'bleu': choose one of exact"),
        ({"question": " ", "answer": "1", "score": "number"}, "'question' must be a text"),
        ({"question": "q", "score": "number"}, "'answer' must be a text"),
        ({"question": "q", "answer": 3, "score": "number"}, "'answer' must be a text"),
        ({"question": "q", "answer": "many", "score": "number"}, "'many' holds nothing that the score 'number'"),
        ({"question": "q", "answer": "maybe", "score": "yes_no"}, "'maybe' holds nothing that the score 'yes_no'"),
        ({"question": "q", "answer": "+", "score": "exact"}, "'+' holds nothing that the score 'exact'"),
        ({"question": "q", "answer": "cup", "score": "names"}, "'targets' must be a list of names"),
        ({"question": "q", "answer": "1", "score": "number", "image": "2.png"}, "line 1: there is no image"),
    ],
)
def test_wrong_data_is_told_by_its_line_before_a_model_loads(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate_abilities("no-such-model", write(tmp_path, a=[row]))
    assert message in str(error.value)


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 0}, "batch_size=0"), ({"limit": 0}, "limit=0")])
def test_wrong_arguments_are_told(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_abilities(Parrot(), write(tmp_path, a=[counting("1", "1")]), **options)


def test_a_folder_without_abilities_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no abilities"):
        read_abilities(tmp_path)


# --- real models ---


def asked_in_two_ways(folder: Path) -> Path:
    """What the tiny reasoner has learned about a grey picture, and the same without it."""
    wish = {"question": "drink", "targets": ["cup"], "score": "targets"}
    return write(folder, seen=[{**wish, "image": "1.png"}], unseen=[wish])


def test_a_checkpoint_is_loaded_and_asked(tiny_reasoner_folder: Path, tmp_path: Path) -> None:
    texts: dict[str, str] = {}
    results = evaluate_abilities(
        tiny_reasoner_folder,
        asked_in_two_ways(tmp_path),
        max_new_tokens=40,
        each=lambda name, question, text, score: texts.update({name: text}),
    )
    assert results["seen"] == AbilityResult.of([1.0])
    alone = HuggingFaceReasoner(tiny_reasoner_folder)._conversation(Request(None, "drink", verbatim=True))
    assert alone == [{"role": "user", "content": [{"type": "text", "text": "drink"}]}]
    assert texts["unseen"]


def test_of_a_pair_only_the_reasoner_is_loaded(tiny_pair_folder: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    pair.mkdir()
    (pair / "detgpt.json").write_text('{"reasoner": "reasoner", "detector": "no-such/detector"}')
    (pair / "reasoner").symlink_to(tiny_pair_folder / "reasoner")
    assert evaluate_abilities(pair, asked_in_two_ways(tmp_path / "abilities"))["seen"].value == 1.0


def test_text_alone_does_not_disturb_the_kept_pictures(tiny_reasoner_folder: Path) -> None:
    reasoner = HuggingFaceReasoner(tiny_reasoner_folder)
    seen, text = Request(Image.new("RGB", (40, 30), "gray"), "drink"), Request(None, "drink")
    first, alone = reasoner.reason([seen])[0], reasoner.reason([text, text])
    assert alone[0].text == alone[1].text == reasoner.reason([text])[0].text
    again = reasoner.reason([seen])[0]
    assert again.text == first.text
    assert math.isclose(again.tokens[0].logprob, first.tokens[0].logprob, abs_tol=1e-4)


# --- detgpt eval --abilities ---


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `detgpt eval --abilities` with these arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", "--abilities", *map(str, arguments)])


def test_models_stand_side_by_side(run: Callable[..., Result], tiny_pair_folder: Path) -> None:
    asked_in_two_ways(Path("abilities"))
    Path("model").symlink_to(tiny_pair_folder)
    ran = run("abilities", "-m", "model", "-m", "model/reasoner", "-o", "out/numbers.json", "--samples", "said.jsonl")
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["| ability | n | model | model/reasoner |", "| --- | ---: | ---: | ---: |"]
    assert lines[2] == "| seen | 1 | 100.0 (20.7–100.0) | 100.0 (20.7–100.0) |"
    assert lines[3].startswith("| unseen | 1 | ") and lines[4].startswith("| mean |  | ")
    numbers = json.loads(Path("out/numbers.json").read_text())
    assert numbers["model"]["seen"] == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0, "n": 1}
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [(row["model"], row["ability"]) for row in said] == [
        (model, ability) for model in ("model", "model/reasoner") for ability in ("seen", "unseen")
    ]
    assert said[0] == {
        "model": "model",
        "ability": "seen",
        "where": "abilities/seen/data.jsonl, line 1",
        "image": "abilities/seen/1.png",
        "question": "drink",
        "true": ["cup"],
        "said": 'A desk.\nTargets: ["cup"]',
        "score": 1.0,
    }


def test_abilities_of_several_folders_stay_apart(run: Callable[..., Result], tiny_reasoner_folder: Path) -> None:
    for place in ("a", "b"):
        write(Path(place), counting=[counting("drink", "1")])
    shown = run("a", "b", "-m", tiny_reasoner_folder, "--limit", "1").stdout
    assert "| a · counting | 1 |" in shown and "| b · counting | 1 |" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no abilities"),
        (["nowhere", "--masks"], "leave --masks out"),
        (["nowhere", "--split", "val", "--report", "r.html"], "leave --split, --report out"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_loads(
    run: Callable[..., Result], arguments: list[str], message: str
) -> None:
    ran = run(*arguments, "-m", "no-such-model")
    assert ran.exit_code == 1
    assert message in ran.stderr


def test_a_model_that_is_not_there_is_told(run: Callable[..., Result]) -> None:
    asked_in_two_ways(Path("abilities"))
    ran = run("abilities", "-m", "no-such-model")
    assert ran.exit_code == 1
    assert "there is no model folder 'no-such-model'" in ran.stderr
