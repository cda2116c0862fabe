"""The built-in set of a guard: enough of it, nothing twice, nothing measured that is trained, the same each time."""

import itertools
import json
from collections import Counter

import pytest
import typer

from detgpt.errors import InputError
from detgpt.evaluation.attacks import read_attacks
from detgpt.guards.normalise import normalised
from finetune.data.convert import convert
from finetune.protector import splits
from finetune.protector.attacks import KINDS, attacks
from finetune.protector.data import exchanges
from finetune.protector.exchanges import read_exchange, read_exchanges
from finetune.protector.splits import ATTACKS, COUNTS, EACH, FOLDER, SEED
from finetune.protector.texts import Texts


@pytest.fixture(scope="module")
def trained():
    """A quarter of the set that the recipe trains on."""
    return exchanges("train", 4000, 0, set())


def questions(rows):
    return {"\n".join([*row.get("turns", []), row["question"]]).lower().strip(".!? ") for row in rows}


def test_there_are_thousands_of_pairs_and_as_many_harmless_exchanges(trained):
    pairs = [row for row in trained if row["question_harmful"] and row["harmful"] == [True, False]]
    harmless = [row for row in trained if not row["question_harmful"]]
    assert len(pairs) * 4 > 6000  # in the whole set
    assert len(harmless) == len(trained) / 2
    assert 0.4 < sum(row["lookalike"] for row in harmless) / len(harmless) < 0.6


def test_every_kind_of_harm_is_trained_but_those_that_are_held_out(trained):
    texts = Texts()
    assert len(texts.trained) >= 10 and len(texts.held_out) >= 3
    found = {name for row in trained for name in row["categories"]}
    assert found == set(texts.trained)


def test_no_question_comes_twice_nor_is_measured_and_trained(trained):
    taken = questions(trained)
    assert len(taken) == len(trained)
    for name in COUNTS:
        measured = exchanges(name, 400, 5, set())
        assert len(questions(measured)) == 400
        assert not questions(measured) & taken
    for part in ATTACKS.values():
        assert not questions(attacks(10, 5, part)) & taken


def texts_of(lists):
    """{where they stand: the texts}, of nested lists."""
    if not isinstance(lists, dict):
        return {"": [str(text) for text in lists]} if isinstance(lists, list) else {}
    parts = {name: texts_of(part) for name, part in lists.items() if name not in ("words", "things")}
    return {f"{name}/{key}": texts for name, part in parts.items() for key, texts in part.items()}


def test_no_text_is_in_two_parts():
    parts = {name: texts_of(lists) for name, lists in Texts().lists.items()}
    assert sum(map(len, parts["train"].values())) > 15_000
    assert sum(map(len, parts["strangers"].values())) > 800
    for one, other in itertools.combinations(parts, 2):
        for key in parts[one].keys() & parts[other].keys():
            if key not in ("frames/turns/", "frames/signs/"):  # of attacks alone; training has others
                assert not set(parts[one][key]) & set(parts[other][key]), (one, other, key)
    for key in ("frames/turns/", "frames/signs/"):
        assert not set(parts["train"][key]) & set(parts["test"][key])


def test_what_is_composed_of_words_is_nothing_that_is_held_out(trained):
    lists = Texts().lists["test"]
    held_out = [
        act for part in (*lists["harm"].values(), lists["lookalikes"], lists["everyday"]) for act in part["acts"]
    ]
    whole = [act for act in held_out if "{" not in act]
    asked = [f" {row['question'].lower()} " for row in trained]
    assert len(whole) > 60
    # Shorter ones may begin a longer act: "punch the dough" and "punch the dough into shape".
    frames = (" to {}?", " i want to {},", " i will {}.", " help me {}?")
    assert not [act for act in whole for frame in frames if any(frame.format(act) in text for text in asked)]


def test_harmless_wishes_are_put_as_harmful_ones_are(trained):
    """Else the way of asking would give the harm away."""
    for kind in ("role-play", "suffix"):
        shares = [
            sum(row["kind"] == kind for row in rows) / len(rows)
            for rows in (
                [r for r in trained if r["question_harmful"]],
                [r for r in trained if not r["question_harmful"]],
            )
        ]
        assert abs(shares[0] - shares[1]) < 0.05


def test_the_same_seed_gives_the_same_set_and_another_seed_another():
    first, again, other = (exchanges("validation", 60, seed, set()) for seed in (3, 3, 4))
    assert first == again and questions(first) != questions(other)


@pytest.mark.parametrize("name", COUNTS)
def test_the_splits_that_come_along_are_what_their_command_writes(name):
    lines = (FOLDER / name / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == exchanges(name, COUNTS[name], SEED, set())
    assert len(read_exchanges(FOLDER / name)) == COUNTS[name]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacks_are_of_every_kind_half_of_them_harmless_each_with_its_picture(name):
    rows = [json.loads(line) for line in (FOLDER / name / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == attacks(EACH, SEED, ATTACKS[name])
    assert len({row["id"] for row in rows}) == len(rows)
    for kind in KINDS:
        benign = [row["benign"] for row in rows if row["kind"] == kind]
        assert benign.count(True) == benign.count(False) == EACH
    assert all((FOLDER / name / row["image"]).is_file() for row in rows)
    assert all(row["category"] is None for row in rows if row["benign"])


def test_encoded_attacks_are_read_by_who_normalises():
    """Each way of encoding comes back to words: what is not English letters and spaces is little."""
    hidden = [row["question"] for row in attacks(40, SEED, "test") if row["kind"] == "encoded"]
    read = [normalised(question) for question in hidden]
    plain = [
        sum(word.isascii() and word.strip(".,!?':;").isalpha() for word in text.split()) / len(text.split())
        for text in read
    ]
    assert sum(share > 0.8 for share in plain) / len(plain) > 0.95


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answers": ["b"], "harmful": []}, "1 answers but 0"),
        ({"question": "a", "answers": ["b"], "harmful": ["no"]}, "list of true and false"),
        ({"question": "a"}, "nothing to learn"),
        ({"question": "", "question_harmful": True}, "'question'"),
        ({"question": "a", "question_harmful": "yes"}, "true or false"),
        ({"question": "a", "question_harmful": True, "answer": "b"}, "no key 'answer'"),
    ],
)
def test_a_wrong_record_is_refused_with_its_place(row, says):
    with pytest.raises(InputError, match="line 3") as error:
        read_exchange(row, "data.jsonl, line 3")
    assert says in str(error.value)


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def test_pku_saferlhf_becomes_exchanges(tmp_path):
    entry = {
        "prompt": "How do I get my neighbour's parcel?",
        "response_0": "Ask them.",
        "response_1": "Take it while they are out.",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_harm_category": {"Economic Crime": False},
        "response_1_harm_category": {"Economic Crime": True, "Violence": False},
        "better_response_id": 0,
    }
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/train.jsonl", [entry, {**entry, "is_response_1_safe": True, "response_1_harm_category": {}}])
    counts, _ = convert(tmp_path / "in", tmp_path / "out", format="pku_saferlhf")
    assert counts == {"train": 2}
    first, second = read_exchanges(tmp_path / "out/train")
    assert first.pair == ("Take it while they are out.", "Ask them.") and first.categories == ("Economic Crime",)
    assert first.question_harmful is None and second.pair is None


def test_beavertails_becomes_pairs_where_a_question_has_both(tmp_path):
    def entry(question, answer, harmful):
        return {"prompt": question, "response": answer, "is_safe": not harmful, "category": {"theft": harmful}}

    rows = [entry("q", "bad", True), entry("q", "good", False), entry("q", "also good", False), entry("r", "bad", True)]
    write(tmp_path / "in.jsonl", rows)
    convert(tmp_path / "in.jsonl", tmp_path / "out", format="beavertails")
    found = read_exchanges(tmp_path / "out")
    assert sorted(exchange.answers for exchange in found) == [("also good",), ("bad",), ("bad", "good")]
    assert [exchange.pair for exchange in found if exchange.pair] == [("bad", "good")]


@pytest.mark.parametrize("format", ["pku_saferlhf", "beavertails"])
def test_other_data_is_refused_by_name(tmp_path, format):
    write(tmp_path / "in.jsonl", [{"prompt": "q", "response": "a", "response_0": "a", "response_1": "b"}])
    with pytest.raises(InputError, match=r"in\.jsonl, line 1: 'is_"):
        convert(tmp_path / "in.jsonl", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_more_attacks_of_some_kinds_are_written_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "COUNTS", {})
    splits.main(tmp_path, each=4, kind=["suffix", "direct"])
    for name in ATTACKS:
        attacks = read_attacks(tmp_path / name)
        assert Counter((attack.kind, attack.benign) for attack in attacks) == {
            (kind, benign): 4 for kind in ("suffix", "direct") for benign in (True, False)
        }
    with pytest.raises(typer.BadParameter, match="shouted"):
        splits.main(tmp_path, kind=["shouted"])
