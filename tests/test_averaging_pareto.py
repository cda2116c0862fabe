"""What alignment costs by each way of aligning: the study of `stage: pareto` in small, and its arithmetic."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from detgpt import DetGPT
from detgpt.errors import InputError
from finetune.averaging.front import front, hypervolume, interval
from finetune.averaging.methods import METHODS
from finetune.averaging.pareto import hypervolumes, table
from finetune.averaging.plot import draw
from finetune.recipe import find_recipe, read_recipe, run_recipe

PICTO = Path(__file__).parents[1] / "finetune/picto"
SOME = (13, 125, 129, 160, 193, 204, 210, 265, 277, 282, 302, 327)  # of its wishes
QUESTIONS = 2


def point(method, reward, ability, seed=0, setting=""):
    return {"seed": seed, "method": method, "setting": setting, "reward": reward, "counting": ability, "mean": ability}


POINTS = [
    *(point("before", 0.0, 1.0, seed) for seed in (0, 1)),
    *(point("after", 1.0, 0.0, seed) for seed in (0, 1)),
    point("HMA", 0.5, 0.8, 0, "0.5"),
    point("HMA", 0.5, 1.0, 1, "0.5"),
    point("plain averaging", 0.5, 0.5, 0, "0.5"),
    point("plain averaging", 0.5, 0.6, 1, "0.5"),
]


def test_the_front_leaves_out_what_another_is_better_than():
    assert front([(1, 1), (2, 0), (1, 1), (0, 3), (0.5, 0.5), (1, 0.9)]) == [(0, 3), (1, 1), (2, 0)]
    assert front([]) == []


def test_the_hypervolume_is_the_area_between_the_front_and_the_reference():
    assert hypervolume([(0.2, 0.7), (0.3, 0.5)], (0, 0)) == pytest.approx(0.2 * 0.7 + 0.1 * 0.5)
    assert hypervolume([(0.2, 0.7), (0.3, 0.5), (0.1, 0.6)], (0, 0)) == pytest.approx(0.19)
    assert hypervolume([(0.2, 0.7), (0.3, 0.5)], (0.25, 0.1)) == pytest.approx(0.05 * 0.4)
    assert hypervolume([(0.2, 0.7), (0.0, 0.9)], (0.2, 0.5)) == 0
    assert hypervolume([], (0, 0)) == 0


def test_the_interval_is_that_of_the_mean_and_one_value_has_none():
    low, high = interval([0.1, 0.2, 0.4])
    assert (low, high) == pytest.approx((0.1, 0.4))
    many = [float(i % 10) for i in range(200)]
    low, high = interval(many)
    assert low == pytest.approx(4.1, abs=0.05) and high == pytest.approx(4.9, abs=0.05)
    assert all(map(math.isnan, interval([1.0])))


def test_methods_are_compared_seed_by_seed_with_the_models_before_and_after_on_every_front():
    of = {(row["ability"], row["method"]): row for row in hypervolumes(POINTS)}
    assert of.keys() == {(ability, method) for ability in ("counting", "mean") for method in ("HMA", "plain averaging")}
    hma = of["mean", "HMA"]
    assert hma["mean"] == pytest.approx(0.45) and (hma["low"], hma["high"]) == pytest.approx((0.4, 0.5))
    assert hma["more"] == pytest.approx((0.15 + 0.2) / 2)
    assert (hma["more_low"], hma["more_high"]) == pytest.approx((0.15, 0.2))
    first = table(hypervolumes(POINTS)).splitlines()[2]
    assert first == "| HMA | 0.4500 | 0.4000 to 0.5000 | +0.1750 | +0.1500 to +0.2000 |"


def test_the_plot_names_every_method_and_is_the_same_every_time(tmp_path):
    draw(tmp_path / "one", POINTS, ["counting", "mean"])
    draw(tmp_path / "two", POINTS, ["counting", "mean"])
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text()
    assert "<!-- HMA -->" in svg and "<!-- plain averaging -->" in svg and "<!-- counting (%) -->" in svg
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('methods=["magic"]', "there is no method 'magic'"),
        ("align.prompts=0", "prompts"),
        ("held_out=nowhere", "nowhere"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(override, said, study, tmp_path):
    with pytest.raises(InputError, match=said):
        run_recipe(study, [override, f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The shipped study on a few wishes and questions, with fewer settings."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(PICTO / "splits/needs/images", folder / "wishes/images")
    lines = (PICTO / "splits/needs/data.jsonl").read_text().splitlines()
    (folder / "wishes/data.jsonl").write_text("\n".join(lines[i] for i in SOME))
    settings = read_recipe(find_recipe("pareto-picto/study")).model_dump(mode="json")
    align = settings["align"] | {"model": "picto", "train": str(folder / "wishes"), "iterations": 2, "prompts": 8}
    align["sampling"]["count"] = 4
    few = {"align": align, "held_out": str(folder / "wishes"), "replay": str(folder / "wishes"), "limit": QUESTIONS}
    few |= {"seeds": [0], "means": [0.5], "output": str(folder / "run")}
    (folder / "study.yaml").write_text(json.dumps(settings | few))
    return folder / "study.yaml"


def test_the_study_makes_and_measures_every_method_and_goes_on_where_it_was_stopped(study, capsys):
    run = study.parent / "run"
    run_recipe(study)
    rows = list(csv.DictReader((run / "points.csv").open()))
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["before", "after", *METHODS]
    assert list(rows[0])[4:] == ["attributes", "captions", "counting", "facts", "needs", "mean"]
    assert {row["method"] for row in csv.DictReader((run / "hypervolume.csv").open())} == set(METHODS)
    assert all((run / f"{name}.{kind}").is_file() for name in ("pareto", "abilities") for kind in ("png", "svg"))
    assert "| HMA |" in capsys.readouterr().err

    for place in ("HMA/0.5", "L2/0.01", "moving-average/every step", "replay/1 to 1"):
        result = DetGPT.from_pretrained(run / "seed-0" / place).detect(
            PICTO / "splits/needs/images/0000.webp", "I am thirsty"
        )
        assert result.answer

    before = (run / "points.csv").read_text()
    shutil.rmtree(run / "seed-0/low-layers")
    (run / "seed-0/measured/low layers 0.5.json").unlink()
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": None}))
    tuned = (run / "seed-0/after/reasoner/model.safetensors").stat().st_mtime_ns
    run_recipe(study)
    assert (run / "points.csv").read_text() == before
    assert (run / "seed-0/after/reasoner/model.safetensors").stat().st_mtime_ns == tuned
