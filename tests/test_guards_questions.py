"""N-grams, a network and an encoder judge questions beside a detector, and a folder says how much each counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from detgpt.errors import InputError, ModelError
from detgpt.guards.encoder import QuestionEncoder
from detgpt.guards.network import NETWORK_FILE, TOKENIZER_FILE, QuestionNetwork
from detgpt.guards.ngrams import NGrams
from detgpt.guards.parts import HarmDetector, Questions
from detgpt.guards.protector import Protector
from finetune.protector.exchanges import read_questions
from finetune.protector.network import company
from finetune.protector.ngrams import fit
from finetune.recipe import run_recipe
from tests.tiny_encoder import KICKS, PLAYS, WORDS, learn, save_base, write_questions
from tests.tiny_guards import HARM, save_guard

CPU = torch.device("cpu")
ALONE, ANSWERED = [0.8, 0.4, 0.6, 0.1], [0.5, 0.25, -1.0]


@pytest.fixture(scope="module")
def network() -> QuestionNetwork:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return QuestionNetwork(tokenizer, width=8, filters=16).eval()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(save_base(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("learned"))


@pytest.fixture
def folder(tmp_path: Path, network: QuestionNetwork, learned: Path) -> Path:
    save_guard(tmp_path, detoxifier=False)
    ngrams = fit([*KICKS, *PLAYS] * 3, np.array([True, True, False, False] * 3), [["cruelty"], ["cruelty"], [], []] * 3)
    ngrams.save(tmp_path / "questions")
    network.save(tmp_path / "questions")
    shutil.copytree(learned, tmp_path / "questions", dirs_exist_ok=True)
    return describe(tmp_path, {"folder": "questions", "alone": ALONE, "answered": ANSWERED})


def describe(folder: Path, questions: Any) -> Path:
    described = json.loads((folder / "guard.json").read_text())
    (folder / "guard.json").write_text(json.dumps(described | {"questions": questions}))
    return folder


def judged_by(folder: Path) -> HarmDetector:
    described = json.loads((folder / "guard.json").read_text())["questions"]
    return HarmDetector(folder / "detector", list(HARM), CPU, questions=Questions.load(folder, described, CPU))


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


# ------------------------------------------------------------------------------------------------------ the network


def test_a_question_has_one_score_alone_and_among_longer_ones(network: QuestionNetwork):
    questions = ["kick", "we kick dogs now we walk me now let me kick balls now", "", "never heard words"]
    together = network.score(questions)
    assert np.allclose(together, [network.score([question])[0] for question in questions], atol=1e-5)
    assert np.isfinite(together).all() and len(network.score([])) == 0


def test_it_is_the_same_from_the_disk(network: QuestionNetwork, tmp_path: Path):
    network.save(tmp_path)
    assert np.allclose(QuestionNetwork.load(tmp_path).score(KICKS), network.score(KICKS), atol=5e-3)


@pytest.mark.parametrize("file", [NETWORK_FILE, TOKENIZER_FILE])
def test_a_damaged_one_is_named(network: QuestionNetwork, tmp_path: Path, file: str):
    network.save(tmp_path)
    (tmp_path / file).write_bytes(b"none")
    with pytest.raises(ModelError, match=file):
        QuestionNetwork.load(tmp_path)


def test_words_of_the_same_company_start_near_each_other():
    """0 and 1 stand between 2 and 3, as 4 and 5 do between 6 and 7; 8 is never there."""
    near = company([[2, 0, 3], [2, 1, 3], [6, 4, 7], [6, 5, 7]] * 3, 9, 3)
    assert near[0] @ near[1] > 0.9 and near[4] @ near[5] > 0.9
    assert abs(near[0] @ near[4]) < 0.5
    assert np.allclose(np.linalg.norm(near[:8], axis=1), 1, atol=1e-5) and not near[8].any()


# ------------------------------------------------------------------------------------------------ beside a detector


def test_they_judge_a_question_alone_and_have_a_say_in_an_answer(folder: Path):
    question = KICKS[0]
    ((plain, plain_kind),) = HarmDetector(folder / "detector", list(HARM), CPU).score([(question, "stab")])
    ((alone, _), (answered, kind)) = judged_by(folder).score([(question, None), (question, "stab")])
    by_ngrams = float(NGrams.load(folder / "questions").score([question])[0])
    by_network = float(QuestionNetwork.load(folder / "questions").score([question])[0])
    by_encoder = float(QuestionEncoder.load(folder / "questions").score([question])[0])
    asked = ALONE[0] * by_ngrams + ALONE[1] * by_network + ALONE[2] * by_encoder + ALONE[3]
    assert alone == pytest.approx(sigmoid(asked), abs=1e-5)
    of_exchange, beside, bias = ANSWERED
    assert answered == pytest.approx(
        sigmoid(of_exchange * np.log(plain / (1 - plain)) + beside * asked + bias), abs=1e-4
    )
    assert kind == "cruelty" and plain_kind in HARM


def test_a_question_that_was_judged_is_not_read_again_with_its_answer(folder: Path, monkeypatch: pytest.MonkeyPatch):
    detector, read = judged_by(folder), list[str]()
    score = QuestionEncoder.score
    monkeypatch.setattr(QuestionEncoder, "score", lambda self, texts: (read.extend(texts), score(self, texts))[1])
    ((before, _),) = detector.score([(KICKS[0], None)])
    ((answered, _),) = detector.score([(KICKS[0], "stab")])
    ((again, _),) = detector.score([(KICKS[0], "stab")])
    assert read == [KICKS[0]] and answered == again != before


def test_of_several_turns_the_worst_counts(folder: Path):
    detector = judged_by(folder)
    ((worst, _), *others) = detector.score([(wish, None) for wish in (KICKS[0], *PLAYS)])
    ((talk, _),) = detector.score([("\n".join([PLAYS[0], KICKS[0], PLAYS[1]]), None)])
    assert max(score for score, _ in others) < worst <= talk


def test_breaking_a_wish_into_lines_does_not_hide_it(folder: Path):
    ((whole, _), (broken, _)) = judged_by(folder).score([(KICKS[0], None), (KICKS[0].replace(" ", "\n"), None)])
    assert broken >= whole - 1e-6


def test_the_guard_of_a_folder_has_them(folder: Path):
    describe(folder, {"folder": "questions", "alone": [1.0, 0.0, 0.0, 0.0], "answered": ANSWERED})
    guard = Protector(folder)
    assert guard.check("I kick dogs now").action == "refused"  # of which the detector knows no word
    assert guard.check("I kick balls now").action == "pass"


@pytest.mark.parametrize(
    ("questions", "says"),
    [
        ({}, "'folder', four numbers 'alone' and three 'answered'"),
        ({"folder": "questions", "alone": [1.0, 0.0, 0.0], "answered": [1, 0, 0]}, "four numbers 'alone'"),
        ({"folder": "questions", "alone": ["much", 0, 0, 0], "answered": [1, 0, 0]}, "four numbers 'alone'"),
        ({"folder": "nowhere", "alone": [1, 0, 0, 0], "answered": [1, 0, 0]}, "nowhere"),
    ],
)
def test_a_folder_that_describes_them_wrong_is_named(folder: Path, questions: Any, says: str):
    with pytest.raises(ModelError, match=says):
        Protector(describe(folder, questions))


def test_a_guard_is_made_of_all_or_of_none():
    with pytest.raises(InputError, match="give all"):
        run_recipe("guard-picto/guard", ["network=null"])


# ------------------------------------------------------------------------------------------- what they learn from


def test_they_learn_from_questions_of_one_turn(tmp_path: Path):
    write_questions(tmp_path, ("I kick dogs", True), ("I kick balls", False), ("I kick balls\nI kick dogs", True))
    assert read_questions(tmp_path) == {"I kick dogs": (True, ()), "I kick balls": (False, ())}


def test_there_must_be_harm_and_no_harm(tmp_path: Path):
    write_questions(tmp_path, ("I kick dogs", True))
    with pytest.raises(InputError, match="one kind"):
        read_questions(tmp_path)
