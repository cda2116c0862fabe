"""What an answer is worth, by values that can be worked out by hand."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from detgpt.errors import InputError
from finetune.data.records import load_records
from finetune.preference.rewards import RewardSettings, combined, excess, malformed

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/needs"

RECORD = {"where": "data.jsonl:1", "targets": ["cup", "jug"], "present": ["cup", "jug", "chair"]}
NOTHING_FITS = {**RECORD, "targets": []}
LONG = "word " * 13 + '\nTargets: ["cup", "jug"]'  # 16 words

F1, FORMAT, LENGTH, HALLUCINATION = 1.0, 0.2, 0.1, 0.5


def worth(answer, record=RECORD, **settings):
    return RewardSettings(**settings).build()([answer], [record])[0]


@pytest.mark.parametrize(
    ("answer", "record", "expected"),
    [
        ('A desk.\nTargets: ["cup", "jug"]', RECORD, 1),
        ('Targets: ["Jug", "CUP", "cup"]', RECORD, 1),  # order and case do not matter, and a name counts once
        ('Targets: ["cup"]', RECORD, F1 * 2 / 3),  # precision 1, recall 1/2
        ('Targets: ["chair"]', RECORD, 0),  # wrong, but it is there
        ('Targets: ["cup", "jug", "chair", "dog"]', RECORD, F1 * 2 / 3 - HALLUCINATION / 4),
        ('Targets: ["dog"]', RECORD, -HALLUCINATION),
        ("Targets: []", RECORD, 0),
        ("Targets: []", NOTHING_FITS, 1),
        ('Targets: ["chair"]', NOTHING_FITS, 0),
        ("Nothing here is of use.", NOTHING_FITS, -FORMAT),  # did not say so in the form that is read
        ("I see a cup and a jug.", RECORD, -FORMAT),
        ('Targets: ["cup", "jug"', RECORD, F1 - FORMAT),  # cut off, but read
        ("", RECORD, -FORMAT),
        ("Therefore the answer is: [cup, jug]", RECORD, F1 - FORMAT),  # read, but not as asked for
        ("well " * 200 + '\nTargets: ["dog"', RECORD, -FORMAT - LENGTH - HALLUCINATION),
    ],
)
def test_an_answer_about_names(answer, record, expected):
    assert worth(answer, record) == pytest.approx(expected)


def test_the_length_counts_from_the_longest_that_is_wished():
    assert [excess(LONG, longest) for longest in (16, 10, 8, 4)] == pytest.approx([0, 0.6, 1, 1])
    assert worth(LONG, max_words=10) == pytest.approx(1 - 0.6 * LENGTH)


@pytest.mark.parametrize(
    "text", ["", "Targets:", 'Targets: ["cup"', "A cup.", "Targets: [] </think>", "<think>Targets: []"]
)
def test_what_is_no_finished_answer_is_malformed(text):
    assert malformed(text) == 1 and malformed(f'{text}</think>\nTargets: ["cup"]') == 0


def test_weights_are_settings_and_zero_leaves_a_term_out():
    bad = 'Targets: ["dog", "cup"'
    assert worth(bad, accuracy=2, format=0, hallucination=0) == pytest.approx(2 * 1 / 2)
    assert worth(bad, accuracy=0, format=3, hallucination=0) == pytest.approx(-3)
    with pytest.raises(InputError, match="every weight is 0"):
        RewardSettings(accuracy=0, format=0, length=0, hallucination=0).build()
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        RewardSettings(format=-1)


def test_a_picture_of_which_not_everything_is_known_has_no_hallucinations():
    assert worth('Targets: ["cup", "jug", "dog"]', {**RECORD, "present": None}) == pytest.approx(4 / 5 - 0.5 / 3)


def test_rewards_add_up():
    longer = combined([(lambda answers, records: [len(answer) for answer in answers], 0.5)])
    assert longer(["ab", "abcd"], [RECORD, RECORD]) == [1, 2]
    both = combined([(longer, 2), (RewardSettings().build(), 10)])
    assert both(["Targets: []", 'Targets: ["cup", "jug"]'], [NOTHING_FITS, RECORD]) == [11 + 10, 23 + 10]


def test_a_record_without_its_truth_is_named():
    with pytest.raises(InputError, match=r"data\.jsonl:1 has no 'targets'"):
        worth("Targets: []", {**RECORD, "targets": None})
    with pytest.raises(InputError, match=r"data\.jsonl:1 has no 'boxes'"):
        worth("Targets: []", {**RECORD, "image": "1.png"}, detector="picto")


def test_with_a_detector_the_boxes_count():
    """One true box. The detector finds what is there, and what is named besides is a box too much."""
    record = load_records(SPLIT)[0]
    assert record["targets"] == ["broccoli"] and record["present"] == ["piano", "penguin", "broccoli"]
    nothing = {**record, "targets": [], "boxes": [], "labels": []}
    elsewhere = {**record, "boxes": [[0.0, 0.0, 20.0, 20.0]]}
    everywhere = {**record, "ignored": [[0.0, 0.0, 256.0, 256.0]], "ignored_labels": ["penguin"]}
    both = 'Targets: ["penguin", "broccoli"]'
    expected = [
        ('Targets: ["broccoli"]', record, 1),
        (both, record, 2 / 3),
        (both, everywhere, 1),  # the penguin is neither right nor wrong
        ('Targets: ["broccoli"]', elsewhere, 0),
        ("Targets: []", record, 0),
        ("Targets: []", nothing, 1),
        ("Broccoli.", nothing, -FORMAT),
    ]
    answers, records, values = zip(*expected, strict=True)
    assert RewardSettings(detector="picto").build()(answers, records) == pytest.approx(values)
