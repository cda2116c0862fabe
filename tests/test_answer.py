"""Reading and writing answers: what a model may write, and what the user then gets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from detgpt.answer import (
    MAX_NAMES,
    RETRY_INSTRUCTION,
    answer_is_complete,
    format_answer,
    format_instruction,
    parse_answer,
)
from detgpt.confidence import name_confidence
from detgpt.errors import InputError
from detgpt.names import MAX_NAME_LENGTH
from detgpt.reasoners import RawAnswer, TokenSpan

CUP_AND_BOTTLE = ("cup", "bottle")

WELL_FORMED = [
    'A desk.\nTargets: ["cup", "bottle"]',
    'A desk.\nTARGETS : ["cup", "bottle"].',
    'A desk.\nTarget objects: ["cup", "bottle"]',
    'A desk.\n**Targets:** ["cup", "bottle"]',
    'A desk.\n**Targets**: **["cup", "bottle"]**',
    'A desk.\n### Targets:\n["cup", "bottle"]',
    'A desk.\n- Targets: `["cup", "bottle"]`',
    "A desk.\nTargets: ['cup', 'bottle']",
    "A desk.\nTargets: [“cup”, “bottle”]",
    "A desk.\nTargets: [‘cup’, ‘bottle’]",
    "A desk.\nTargets：【「cup」、「bottle」】",
    "A desk.\nTargets： cup，bottle。",
    "A desk.\nTargets: [cup, bottle]",
    'A desk.\nTargets: [cup", bottle]',
    'A desk.\nTargets: ["cup", "bottle"',
    'A desk.\nTargets: ["cup", "bottle"\nI hope that this helps!',
    'A desk.\nTargets: [\n  "cup",\n  "bottle"\n]',
    'A desk.\nTargets: [\n  "cup",\n  "bottle"\n\nI hope that this helps!',
    'A desk.\nTargets: ["cup", "bottle]',
    'A desk.\nTargets: "cup", "bottle"',
    "A desk.\nTargets: cup, bottle",
    "A desk.\nTargets: the cup and a bottle. They stand on the desk.",
    "A desk.\nTargets: **cup**, **bottle**",
    "A desk.\nTargets:\n- cup\n- bottle\n\nAnything else?",
    "A desk.\nTargets:\n1. **cup**: it holds water.\n2. **bottle** - it holds juice.",
    "A desk.\nTargets:\n\n* cup (on the left)\n* bottle, which is green",
    "A desk.\nTargets:\n• cup\n\n• bottle",
    'A desk.\n{"targets": ["cup", "bottle"]}',
    'A desk.\n```json\n{\n  "targets": [\n    "cup",\n    "bottle"\n  ]\n}\n```',
    'A desk.\n```\nTargets: ["cup", "bottle"]\n```',
    'A desk.\nTargets: ```json\n["cup", "bottle"]\n```',
    'A desk.\nTargets: {"objects": ["cup", "bottle"]}',
    'A desk.\nTargets: [{"name": "cup", "why": "to drink"}, {"name": "bottle", "why": "full"}]',
    'A desk.\n```json\n[\n\t{"bbox": [1, 2], "label": "cup"},\n\t{"bbox": [5, 6], "label": "bottle"}\n]\n```',
    'A desk.\n[{"label": "cup", "bbox_2d": [1, 2, 30, 40]}, {"label": "bottle", "bbox_2d": [5, 6, 7, 8]}]',
    "A desk.\n['cup', 'bottle']",
    "A desk.\nTherefore the answer is: [cup, bottle]",
    "A desk.\nTherefore, the answer is: [cup, bottle].",
    "A desk. Therefore the answer is: cup, bottle.",
    "A desk. So the final answer is [cup, bottle]",
    "A desk.\nTherefore the answer is: ['cup', 'bottle']. Is there anything else?",
    'A desk. Targets: ["cup", "bottle"]',
]


MET = [
    pytest.param(text, names, id=f"{manner} {i}")
    for manner, answers in yaml.safe_load(Path(__file__).with_name("answers.yaml").read_text(encoding="utf-8")).items()
    for i, (text, names) in enumerate(answers)
]


@pytest.mark.parametrize(("text", "names"), MET)
def test_what_models_write_is_read(text: str, names: list[str] | None) -> None:
    parsed = parse_answer(text)
    assert list(parsed.names) == (names or [])
    assert (parsed.problem is not None) == (names is None)


@pytest.mark.parametrize("text", WELL_FORMED)
def test_the_names_and_the_reasoning_are_found_in_every_form(text: str) -> None:
    parsed = parse_answer(text)
    assert parsed.names == CUP_AND_BOTTLE
    assert tuple(text[start:end] for start, end in parsed.spans) == CUP_AND_BOTTLE
    assert parsed.reasoning.rstrip(".") == "A desk"
    assert parsed.problem is None


@pytest.mark.parametrize(
    "text",
    [
        "An empty room.\nTargets: []",
        "An empty room.\n**Targets:** [ ]",
        "An empty room.\nTargets: none",
        "An empty room.\nTargets: None.",
        "An empty room.\nTargets: *Nothing*",
        "An empty room.\nTargets: N/A",
        'An empty room.\nTargets: ["none"]',
        "An empty room.\nTargets: [None]",
        "An empty room.\nTargets: none of the objects fits, sorry",
        "An empty room.\nTargets: no suitable objects.",
        'An empty room.\n{"targets": []}',
        "An empty room.\nTargets：无",
        "An empty room.\nTherefore the answer is: []",
        "An empty room.\nTherefore the answer is: none.",
    ],
)
def test_nothing_fits_is_an_answer_and_not_a_problem(text: str) -> None:
    parsed = parse_answer(text)
    assert (parsed.names, parsed.spans, parsed.problem) == ((), (), None)
    assert parsed.reasoning == "An empty room."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("I see a cup and a bottle.", 'no "Targets:" line'),
        ("A cup.\nTargets:", "no object name"),
        ("A cup.\nTargets: .", "no object name"),
        ('A cup.\nTargets: ["..."]', "no object name"),
        ("Therefore the answer is: [object_names]", "no object name"),
        (f'Targets: ["{"x" * (MAX_NAME_LENGTH + 1)}"]', "no object name"),
        ("<think>The cup. Targets: [cup]", "never ends"),
    ],
)
def test_a_malformed_answer_gives_no_names_and_says_what_is_wrong(text: str, problem: str) -> None:
    parsed = parse_answer(text)
    assert parsed.names == ()
    assert problem in str(parsed.problem)


def test_a_hyphen_does_not_end_a_name() -> None:
    assert parse_answer("Therefore the answer is: [t-shirt, cup]").names == ("t-shirt", "cup")


def test_quoted_lists_are_read_and_a_quoted_comma_belongs_to_its_name() -> None:
    assert parse_answer('Targets: ["salt, pepper", \'dog\'s leash\', "rock \\"n\\" roll sign"]').names == (
        "salt, pepper",
        "dog's leash",
        'rock "n" roll sign',
    )


def test_the_word_none_is_never_a_name() -> None:
    assert parse_answer('Targets: ["none", "cup"]').names == ("cup",)
    assert parse_answer("Targets: [nonstick pan, nothing-but-nets game]").names == (
        "nonstick pan",
        "nothing-but-nets game",
    )


def test_text_after_the_answer_is_not_swallowed() -> None:
    text = "Therefore the answer is: [cup, bottle]. [Note: the knife is sharp], and so on."
    assert parse_answer(text).names == CUP_AND_BOTTLE


def test_an_empty_answer_gives_no_dot_to_detect() -> None:
    for text in ("Therefore the answer is: [].", "Targets: [.]", 'Targets: ["."]', "Targets: ."):
        assert parse_answer(text).names == ()


def test_names_keep_the_order_of_first_mention() -> None:
    names = [f"object {number}" for number in (9, 3, 7, 1, 8, 2)]
    assert parse_answer(format_answer("", [*names, *reversed(names)])).names == tuple(names)


def test_the_last_answer_line_counts() -> None:
    assert parse_answer('I would write Targets: ["knife"].\nTargets: ["fork"]\nNo, wait.\nTargets: ["cup"]').names == (
        "cup",
    )
    assert parse_answer('Targets: ["cup"]\nTherefore the answer is: [knife]').names == ("cup",)


def test_a_colon_within_a_name_is_not_another_answer_line() -> None:
    assert parse_answer('Targets: ["poster: targets: red"]').names == ("poster: targets: red",)


def test_thoughts_are_not_the_answer_and_spans_still_index_the_whole_text() -> None:
    text = '<think>Targets: ["knife"]?</think>A desk.\nTargets: ["cup"]'
    parsed = parse_answer(text)
    assert (parsed.names, parsed.reasoning) == (("cup",), "A desk.")
    assert text[slice(*parsed.spans[0])] == "cup"
    assert parse_answer('Hm, a knife?</think>Targets: ["cup"]').reasoning == "Hm, a knife?"


def test_articles_repeats_boxes_and_scores_are_left_out() -> None:
    assert parse_answer('Targets: ["A cup", "the Cup", "an apple", "a4 paper", ""]').names == (
        "cup",
        "apple",
        "a4 paper",
    )
    assert parse_answer("Targets: [cup, [10, 20, 30, 40], 0.87]").names == ("cup",)
    assert parse_answer("Targets: [cup, and a bottle]").names == CUP_AND_BOTTLE


def test_json_escapes_and_wide_spaces_are_read() -> None:
    assert parse_answer('Targets: ["caf\\u00e9  table", "杯子"]').names == ("café table", "杯子")


def test_there_are_never_more_than_the_maximum_of_names() -> None:
    assert len(parse_answer(f"Targets: {list(map(str, range(1000)))}").names) == MAX_NAMES


# --- writing ---


def test_the_prompt_holds_the_instruction_and_the_form_that_the_parser_reads() -> None:
    prompt = format_instruction("  I want a cold drink ")
    assert prompt.startswith("I want a cold drink\n")
    for asked in (prompt, RETRY_INSTRUCTION):
        assert parse_answer(asked).names == () and parse_answer(asked).problem is None  # the last form shown: []
        assert parse_answer(asked.replace("Targets: []", "")).names == CUP_AND_BOTTLE


def test_an_answer_for_nothing_says_so_explicitly() -> None:
    assert format_answer("An empty room.", []) == "An empty room.\nTargets: []"


@pytest.mark.parametrize("name", ["", " ", "...", "none", "x" * (MAX_NAME_LENGTH + 1)])
def test_a_name_that_cannot_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="target name"):
        format_answer("", [name])


def test_too_many_names_are_refused() -> None:
    with pytest.raises(InputError, match="too many"):
        format_answer("", [f"object {number}" for number in range(MAX_NAMES + 1)])


@settings(deadline=None)
@given(st.text(), st.lists(st.text(max_size=MAX_NAME_LENGTH), max_size=8))
def test_what_is_written_is_read_back(reasoning: str, names: list[str]) -> None:
    written = [name for name in names if parse_answer(format_or_nothing(name)).names]
    text = format_answer(reasoning.replace("think>", ""), written)
    once = parse_answer(text)
    assert once.problem is None
    assert once.reasoning == _without_fences(reasoning.replace("think>", ""))
    assert parse_answer(format_answer("", once.names)).names == once.names
    assert len(once.names) == len({parse_answer(format_answer("", [name])).names[0].casefold() for name in written})


def format_or_nothing(name: str) -> str:
    try:
        return format_answer("", [name])
    except InputError:
        return ""


def _without_fences(reasoning: str) -> str:
    return reasoning.strip().removesuffix("{").strip().removesuffix("```").strip()


# --- robustness ---

GRAMMAR = [
    *(
        "Targets:",
        "targets",
        "Therefore the answer is:",
        "<think>",
        "</think>",
        "```",
        "```json",
        "label",
        "none",
    ),
    *("[", "]", "{", "}", '"', "'", "“", "”", ",", ":", "\\", "\n", " ", "-", "1.", "*", "：", "、", "【"),
    *("cup", "a", "the", "é"),
]
FRAGMENTS = st.sampled_from(GRAMMAR)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=40).map("".join), st.text().map("Targets: ".__add__)))
def test_any_text_is_read_and_its_spans_hold_its_names(text: str) -> None:
    parsed = parse_answer(text)
    assert len(parsed.names) == len(parsed.spans) == len({name.casefold() for name in parsed.names})
    assert parsed.problem is None or parsed.names == ()
    for name, (start, end) in zip(parsed.names, parsed.spans, strict=True):
        assert 0 <= start < end <= len(text)
        assert any(char.isalnum() for char in name) and len(name) <= MAX_NAME_LENGTH
        assert "\\" in text[start:end] or " ".join(text[start:end].split()) == name
    answer_is_complete(text)


HOSTILE_UNITS = [
    *(
        "[",
        "Targets: ",
        "Targets: [",
        'Targets: ["',
        "\nTargets: [",
        "Targets:\n- ",
        "Targets: [{",
        "Targets:```",
    ),
    *(" ", "\n", '"', "'", "\\", "*", ".", "_", "，", "```", "[ {", "- x\n", "a ", "no ", "and ", '["a"b ,'),
    *("<think>", "</think>", "the answer is: [", "therefore the ", "the answer is ", "targets ", '"label": '),
]


@pytest.mark.parametrize("unit", HOSTILE_UNITS)
@pytest.mark.parametrize("prefix", ["", "Targets: ", "Targets: [", "Targets: [{", "Targets:\n- a\n", 'Targets: ["'])
def test_hostile_text_takes_linear_time(prefix: str, unit: str) -> None:
    text = prefix + unit * (60_000 // len(unit))
    started = time.process_time()  # not the clock: a busy machine is no reason to fail
    parse_answer(text)
    answer_is_complete(text)
    assert time.process_time() - started < 2


# --- knowing when to stop, and how sure ---


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ('A desk.\nTargets: ["cup"]', True),
        ("Targets: []", True),
        ('**Targets:** ["cup"]', True),
        ('Targets: ["cup"', False),
        ('Targets: ["shelf [left]', False),
        ('Targets: ["key ]', False),
        ('Targets: ["key ]"]', True),
        ('Targets: ["shelf [left]"]', True),
        ('Targets: [{"label": "cup", "bbox_2d": [1, 2]', False),
        ("Targets: cup", False),
        ('I will end with Targets: ["..."]', False),
        ('<think>\nTargets: ["cup"]', False),
        ('<think>\nTargets: ["cup"]</think>\nTargets: ["mug"]', True),
        ("", False),
    ],
)
def test_an_answer_is_complete_at_the_closing_bracket_of_its_line(text: str, complete: bool) -> None:
    assert answer_is_complete(text) is complete


def test_the_confidence_of_a_name_is_the_product_over_its_tokens() -> None:
    text = 'Targets: ["cup"]'
    tokens = (
        TokenSpan(0, 9, -5.0),
        TokenSpan(9, 12, -0.5),
        TokenSpan(12, 14, -0.25),
        TokenSpan(14, 16, -5.0),
    )
    span = parse_answer(text).spans[0]
    assert name_confidence(RawAnswer(text, tokens), span) == pytest.approx(2.718281828**-0.75)


def spans_of(text: str, *pieces: tuple[str, float]) -> tuple[TokenSpan, ...]:
    """Tokens of a text, given piece by piece with their log-probabilities."""
    tokens, start = [], 0
    for piece, logprob in pieces:
        tokens.append(TokenSpan(start, start := start + len(piece), logprob))
    assert "".join(piece for piece, _ in pieces) == text
    return tuple(tokens)


def test_the_confidence_is_that_of_the_conclusion_which_the_list_repeats() -> None:
    """What it saw counts no more, and "The" counts: it decided against "Nothing here fits"."""
    text = 'I see a cup. The Cup fits.\nTargets: ["cup"]'
    pieces = [
        ("I see", -0.1),
        (" a", -1.0),
        (" cup", -2.0),
        (".", -0.1),
        (" The", -0.5),
        (" Cup", -0.25),
        (" fits", -0.7),
    ]
    tokens = spans_of(text, *pieces, (".\n", -0.3), ('Targets: ["', -0.3), ("cup", -0.125), ('"]', -0.3))
    (span,) = parse_answer(text).spans
    assert name_confidence(RawAnswer(text, tokens), span) == pytest.approx(2.718281828**-0.875)


@pytest.mark.parametrize(
    ("above", "counted"),
    [
        ("Both cups fit.", "cups"),
        ("Some cup fits.", "Some cup"),
        ("The cupboard is shut.", ""),
        ("A teacup.", ""),
        ("I see a cup (fits) and a spoon.", "a cup (fits)"),
        ("The coffee cup. A cup!", "A cup"),
        ("", ""),
    ],
)
def test_a_mention_is_a_word_with_its_article_and_what_is_said_of_it_in_brackets(above: str, counted: str) -> None:
    text = f'{above}\nTargets: ["cup", "coffee cup"]'
    place = above.rindex(counted) if counted else 0
    tokens = (TokenSpan(place, place + len(counted), -1.0), TokenSpan(len(above) + 11, len(above) + 16, -0.5))
    span = parse_answer(text).spans[0]
    assert name_confidence(RawAnswer(text, tokens), span) == pytest.approx(2.718281828 ** (-1.5 if counted else -0.5))


def test_the_confidence_is_unknown_without_token_probabilities() -> None:
    assert name_confidence(RawAnswer('Targets: ["cup"]'), (11, 14)) is None
    assert name_confidence(RawAnswer('Targets: ["cup"]', ()), (11, 14)) is None
