"""The command line as its users meet it: real commands on a tiny pair of real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import detgpt
from detgpt.cli import app
from detgpt.pipeline import Options

REPOSITORY = Path(__file__).parents[1]

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run `detgpt` with these arguments and give back exit code, stdout and stderr."""
    return lambda *arguments, **settings: CliRunner().invoke(app, [str(a) for a in arguments], **settings)


@pytest.fixture
def detect(run: Run, tiny_pair_folder: Path) -> Run:
    """`detgpt detect` with the tiny pair."""
    return lambda *arguments, **settings: run("detect", "-m", tiny_pair_folder, *arguments, **settings)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's folder: a.png, b.png and again an a.png in more/."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b.png", "more/a.png"):
        Image.new("RGB", (40, 30), "gray").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


pytestmark = pytest.mark.usefixtures("images")


def test_a_wish_prints_reasoning_and_boxes(detect: Run) -> None:
    ran = detect("a.png", "drink")
    assert ran.exit_code == 0
    title, reasoning, heading, *rows = ran.stdout.strip().splitlines()
    assert (title, reasoning) == ("a.png", "A desk.")
    assert heading.split() == ["target", "score", "confidence", "x0", "y0", "x1", "y1"]
    assert rows and all(row.split()[:2] == ["●", "cup"] and len(row.split()) == 8 for row in rows)


def test_where_nothing_fits_that_is_the_answer(detect: Run) -> None:
    ran = detect("a.png", "swim")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[:3] == ["a.png", "Only a desk.", "Nothing here fits."]


def test_an_answer_that_cannot_be_read_is_a_warning(detect: Run) -> None:
    ran = detect("a.png", "drink", "--max-new-tokens", 2)  # too few for any answer line
    assert ran.exit_code == 0
    assert "warning: " in ran.stdout
    assert "Nothing here fits" not in ran.stdout


def test_what_the_detector_does_not_find_is_said(detect: Run) -> None:
    ran = detect("a.png", "drink", "--box-threshold", 1)
    assert ran.stdout.splitlines()[2] == "not found in the picture: cup"


def test_json_is_all_that_stdout_holds(detect: Run) -> None:
    ran = detect("a.png", "drink", "--json", "-o", "out.png")
    assert "wrote out.png" in ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["image"] == "a.png"
    assert answer["targets"][0]["name"] == "cup"
    assert len(detgpt.Detections.from_dict(answer)) > 0


def test_one_bad_image_does_not_stop_the_others(detect: Run) -> None:
    ran = detect("a.png", "missing.png", "b.png", "drink", "--json")
    assert ran.exit_code == 1
    assert [json.loads(line)["image"] for line in ran.stdout.splitlines()] == ["a.png", "b.png"]
    assert ran.stderr.startswith("error: 'missing.png'")


def test_coco_is_one_document_for_all_images(detect: Run) -> None:
    document = json.loads(detect("a.png", "b.png", "--names", "cup, bottle", "--coco").stdout)
    assert [image["file_name"] for image in document["images"]] == ["a.png", "b.png"]
    assert [category["name"] for category in document["categories"]] == ["cup", "bottle"]
    ids = [annotation["id"] for annotation in document["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert {annotation["image_id"] for annotation in document["annotations"]} == {1, 2}


def test_a_pair_brings_its_own_settings_and_flags_outrank_them(run: Run, tiny_pair_folder: Path) -> None:
    parts = {part: str(tiny_pair_folder / part) for part in ("reasoner", "detector")}
    Path("detgpt.json").write_text(json.dumps({**parts, "options": {"box_threshold": 1.0}}))
    command = ("detect", "a.png", "--names", "cup", "-m", ".")
    assert "not found in the picture: cup" in run(*command).stdout
    assert "not found" not in run(*command, "--box-threshold", 0).stdout


def test_names_need_no_reasoner(run: Run, tiny_detector_folder: Path) -> None:
    ran = run("detect", "a.png", "--names", "cup", "--detector", tiny_detector_folder, "--box-threshold", 0)
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[1].split() == ["target", "score", "x0", "y0", "x1", "y1"]


def test_both_parts_may_be_named(run: Run, tiny_reasoner_folder: Path, tiny_detector_folder: Path) -> None:
    parts = ("--reasoner", tiny_reasoner_folder, "--detector", tiny_detector_folder)
    assert "A desk." in run("detect", "a.png", "drink", *parts).stdout


def test_an_image_comes_from_standard_input(detect: Run) -> None:
    ran = detect("-", "--names", "cup", "--json", input=Path("a.png").read_bytes())
    assert json.loads(ran.stdout)["image"] == "stdin"
    assert json.loads(ran.stdout)["image_wh"] == [40, 30]


def test_one_picture_goes_to_a_file(detect: Run) -> None:
    detect("a.png", "drink", "-o", "new/out.jpg", "--legend")
    with Image.open("new/out.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.height / picture.width > 30 / 40  # the legend is below the picture
    assert [path.name for path in Path("new").iterdir()] == ["out.jpg"]


def test_several_pictures_go_to_a_folder_under_names_of_their_own(detect: Run) -> None:
    detect("a.png", "b.png", "more/a.png", "--names", "cup", "-o", "new")
    written = sorted(path.name for path in Path("new").iterdir())
    assert written == ["a-detgpt-2.png", "a-detgpt.png", "b-detgpt.png"]


def test_a_picture_that_cannot_be_written_is_an_error_and_leaves_nothing_behind(detect: Run) -> None:
    before = sorted(Path.cwd().rglob("*"))
    ran = detect("a.png", "--names", "cup", "-o", "b.png/out.png")
    assert ran.exit_code == 1
    assert ran.stderr.startswith("error: cannot write 'b.png/out.png'")
    assert sorted(Path.cwd().rglob("*")) == before


def test_nothing_in_a_name_commands_the_terminal(detect: Run) -> None:
    name = "[red]\x1b[31m.png"
    Path("a.png").rename(name)
    assert detect(name, "--names", "cup").stdout.splitlines()[0] == "[red][31m.png"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.png"], "an image and a wish"),
        (["a.png", "b.png"], "'b.png' names a picture"),
        (["a.png", " "], "wish is empty"),
        (["a.png", "--names", " ,"], "holds no name"),
        (["-", "-", "--names", "cup"], "only once"),
        (["a.png", "drink", "--json", "--coco"], "exclude each other"),
        (["a.png", "drink", "--box-threshold", "7"], "box_threshold=7.0"),
        (["a.png", "drink", "--prompting", "together"], "prompting='together'"),
        (["a.png", "drink", "-o", "out.doc"], "names no picture"),
        (["a.png", "drink", "--reasoner", "some/model"], "go together"),
        (["a.png", "drink", "--detector", "some/model"], "go together"),
        (["a.png", "drink", "--box-treshold", "0.5"], "No such option"),
    ],
)
def test_wrong_usage_is_told_before_a_model_loads(run: Run, arguments: list[str], says: str) -> None:
    ran = run("detect", "-m", "no-such-model", *arguments, env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert says in ran.stderr
    assert ran.stdout == ""


def test_an_error_of_the_library_is_one_line_unless_debugging(run: Run) -> None:
    ran = run("detect", "a.png", "drink", "-m", "no-such-model")
    assert ran.exit_code == 1
    assert ran.stderr.startswith("error: no model pair 'no-such-model'")
    assert ran.stderr.count("\n") == 1
    assert isinstance(run("detect", "a.png", "drink", "-m", "no-such-model", "--debug").exception, detgpt.ModelError)


def test_masks_come_from_the_segmenter_that_is_named(detect: Run, tiny_segmenter_folder: Path) -> None:
    ran = detect("a.png", "drink", "--json", "--masks", "--segmenter", tiny_segmenter_folder, "--tiles", 2)
    assert ran.exit_code == 0
    assert detgpt.Detections.from_dict(json.loads(ran.stdout)).masks.shape[1:] == (30, 40)


@pytest.mark.parametrize("command", [["detect", "a.png", "drink"], ["batch", ".", "-i", "drink"]])
def test_a_segmenter_that_is_not_there_is_told_before_anything_is_answered(
    run: Run, tiny_pair_folder: Path, command: list[str]
) -> None:
    ran = run(*command, "-m", tiny_pair_folder, "--masks", "--segmenter", "no such folder")
    assert ran.exit_code == 1
    assert ran.stderr.startswith("error: Cannot load a SAM 2 from no such folder")
    assert ran.stdout == ""


def test_every_option_is_a_flag_with_its_help(run: Run) -> None:
    shown = run("detect", "--help", env={"COLUMNS": "300"}).stdout
    for option in fields(Options):
        line = next(line for line in shown.splitlines() if f"--{option.name.replace('_', '-')} " in line)
        assert option.name in (Options.__doc__ or "")
        assert len(line.split()) > 6, "the flag has no help"
    assert "Exit status" in shown


def test_a_chat_goes_on_until_the_input_ends(run: Run, tiny_pair_folder: Path) -> None:
    typed = "/save early.png\ndrink\n\n/save out.png\n/save out.doc\n/help\nswim\n"
    ran = run("chat", "a.png", "-m", tiny_pair_folder, input=typed)
    assert ran.exit_code == 0
    assert ran.stdout.startswith('A desk.\nTargets: ["cup"]\n\ntarget')
    notes = ["error: there is nothing to save", "wrote out.png", "error: 'out.doc'", "there is no /help"]
    positions = [ran.stderr.index(note) for note in notes]
    assert positions == sorted(positions)
    with Image.open("out.png") as picture:
        assert picture.format == "PNG"
    assert not Path("early.png").exists()


def test_quit_ends_a_chat(run: Run, tiny_pair_folder: Path) -> None:
    ran = run("chat", "a.png", "-m", tiny_pair_folder, input="/quit\ndrink\n")
    assert (ran.exit_code, ran.stdout) == (0, "")


def test_control_c_ends_without_a_traceback(run: Run, tiny_pair_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    ran = run("chat", "a.png", "-m", tiny_pair_folder)
    assert ran.exit_code == 130
    assert "Traceback" not in ran.output


def test_models_lists_the_pairs(run: Run) -> None:
    shown = run("models").stdout
    assert all(name in shown for name in ("picto", "small", "base", "large", "photographs"))
    assert "for photographs add --model base" in shown


def test_eval_prints_a_table_and_saves_the_numbers(run: Run, tiny_pair_folder: Path) -> None:
    pytest.importorskip("pycocotools")
    record = {
        "image": "../a.png",
        "instruction": "drink",
        "targets": ["cup"],
        "boxes": [[1, 1, 9, 9]],
        "labels": ["cup"],
        "present": ["cup"],
    }
    Path("set").mkdir()
    Path("set/data.jsonl").write_text(json.dumps(record))
    ran = run("eval", "set", "-m", tiny_pair_folder, "--output", "results.json")
    assert ran.exit_code == 0
    title = f"{tiny_pair_folder} · set"
    assert ran.stdout.startswith("|") and title in ran.stdout
    assert json.loads(Path("results.json").read_text())[title]["n"] == 1


def test_the_version(run: Run) -> None:
    assert run("--version").stdout == f"detgpt {detgpt.__version__}\n"


# --- the service ---


def test_the_service_is_told_its_settings(run: Run) -> None:
    ran = run("serve", "--queue", 0)
    assert ran.exit_code == 2
    assert "queue=0" in ran.stderr
