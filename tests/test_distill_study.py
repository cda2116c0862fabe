"""The study of distillation, in small, and what its table says of numbers that are known."""

import csv
import json

import pytest

from detgpt.errors import InputError
from finetune.distill.study import METHODS
from finetune.distill.verdict import averaged, by_seed, claims, table
from finetune.recipe import find_recipe, read_recipe, run_recipe


def row(method, seed, exact, ece, wishes="seen"):
    numbers = {"f1": exact, "targets_ece_10": ece, "targets_ece_15": ece, "targets_ece_adaptive": ece}
    numbers |= {"targets_nll": 0.3, "targets_brier": 0.1, "tokens_accuracy": exact, "tokens_ece_10": ece}
    return {"method": method, "seed": seed, "wishes": wishes, "exact": exact, "tokens_true_nll": 0.5, **numbers}


POINTS = [
    row("teacher", None, 0.9, 0.05),
    *[row("SFT", seed, exact, 0.20) for seed, exact in enumerate((0.50, 0.52, 0.54))],
    *[row("FIRST", seed, exact, 0.15) for seed, exact in enumerate((0.55, 0.56, 0.58))],
    *[row("full vocabulary", seed, exact, 0.16) for seed, exact in enumerate((0.58, 0.58, 0.59))],
]
STORAGE = {"FIRST": 24.0, "full vocabulary": 5200.0, "SFT": 0.0}


def test_means_are_over_sets_and_then_seeds_and_their_interval_over_seeds():
    points = [row("SFT", 0, 0.4, 0.1), row("SFT", 0, 0.6, None, "style"), row("SFT", 1, 0.6, 0.3)]
    assert by_seed(points, "SFT", "exact") == {0: 0.5, 1: 0.6}
    assert by_seed(points, "SFT", "ECE") == {0: 0.1, 1: 0.3}  # without a named target there is no ECE
    mean, low, high = averaged(POINTS)["SFT"]["exact"]
    assert mean == pytest.approx(0.52) and 0.50 <= low < mean < high <= 0.54
    assert averaged(POINTS)["teacher"]["exact"][1] != averaged(POINTS)["teacher"]["exact"][1]  # NaN: it is one model


def test_the_claims_are_told_as_they_are():
    more, less, near, trust = claims(POINTS, STORAGE)
    assert "+4.3 points" in more and more.endswith("holds.")
    assert "15.0 against 20.0, 25% less" in less and less.endswith("holds.")
    assert "-2.0 points" in near and "0.46% of its storage" in near and near.endswith("does not hold.")
    assert "has full vocabulary" in trust
    turned = [
        {**point, "method": {"SFT": "FIRST", "FIRST": "SFT"}.get(point["method"], point["method"])} for point in POINTS
    ]
    more, less, *_ = claims(turned, STORAGE)
    assert more.endswith("does not hold.") and less.endswith("does not hold.")


def test_the_table_has_the_best_student_in_bold_and_never_the_teacher():
    lines = table(averaged(POINTS), POINTS, STORAGE).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines[2:6]}
    assert cells["full vocabulary"][heads.index("exact")].startswith("**58.3**")
    assert cells["FIRST"][heads.index("ECE")].startswith("**15.0**")
    assert cells["teacher"][heads.index("exact")] == "90.0"
    assert cells["FIRST"][heads.index("bytes/token")] == "24"


def test_students_that_name_nothing_have_no_calibration():
    points = [row(method, seed, 0.0, None) for method in ("SFT", "FIRST", "full vocabulary") for seed in (0, 1)]
    points = [{**point, "targets_nll": None, "targets_brier": None} for point in points]
    text = table(averaged(points), points, STORAGE)
    assert "nan" not in text and "**" not in text
    assert "nothing can be told" in text and "trust (" not in text


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    steps = ("talks", "held-out", "answers", "larger", "teacher", "study")
    overrides = [f"{step}.output={folder / step}" for step in steps]
    overrides += [f"{step}.scenes={scenes}" for step, scenes in (("talks", 8), ("held-out", 3), ("answers", 3))]
    overrides += [
        f"teacher.model={folder / 'larger'}",
        f"teacher.train={folder / 'talks'}",
        "teacher.trainer.max_steps=1",
        f"study.teacher={folder / 'teacher'}",
        f"study.train={folder / 'talks'}",
        f"study.validation={folder / 'held-out'}",
        f"study.answers={folder / 'answers'}",
        "study.wishes={seen: finetune/picto/splits/seen, style: finetune/picto/splits/style}",
        f"study.methods={json.dumps([*METHODS])}",
        "study.limit=3",
        "study.seeds=[0, 1]",
        "study.distill.trainer.max_steps=2",
        "study.distill.trainer.warmup_steps=0",
        "study.distill.trainer.per_device_train_batch_size=2",
    ]
    run_recipe("first-picto", overrides)
    return folder / "study", overrides


def test_one_command_gives_students_of_every_method_and_what_they_are_worth(studied):
    folder, _ = studied
    with (folder / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["method"], r["seed"], r["wishes"]) for r in rows} == {
        (method, str(seed), wishes) for method in METHODS for seed in (0, 1) for wishes in ("seen", "style")
    } | {("teacher", "", wishes) for wishes in ("seen", "style")}
    text = (folder / "table.md").read_text()
    assert all(method in text for method in METHODS) and "of its storage" in text
    for name in ("compared", "reliability", "teacher/top/concentration"):
        assert (folder / f"{name}.png").stat().st_size > 5000 and (folder / f"{name}.svg").is_file()
    scaled = json.loads((folder / "seed-0/SFT-temperature/temperature.json").read_text())
    assert scaled["validation_nll_scaled"] <= scaled["validation_nll"]
    sizes = json.loads((folder / "seed-0/student/run.json").read_text())["metrics"]
    assert sizes["parameters"] <= sizes["parameters_of_other"] / 3
    assert not list(folder.rglob("checkpoint-*"))


def test_an_interrupted_study_goes_on_with_what_is_missing(studied):
    folder, overrides = studied
    before = (folder / "points.csv").read_text()
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    described = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**described, "finished": None, "metrics": {}}))
    (folder / "points.csv").unlink()
    (folder / "measured/FIRST-1.json").unlink()
    run_recipe("first-picto", overrides)
    assert (folder / "points.csv").read_text() == before
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == kept


def test_what_the_study_does_not_know_is_refused():
    file = find_recipe("first-picto").parent / "first-picto/study.yaml"
    with pytest.raises(InputError, match="there is no method 'magic'"):
        read_recipe(file, ["methods=[magic]"])
    with pytest.raises(InputError, match="scales the student of 'SFT': name both"):
        read_recipe(file, ["methods=[SFT + temperature]"])
    with pytest.raises(InputError, match="distill"):
        read_recipe(file, ["distill.weights=1"])
