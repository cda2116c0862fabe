"""Many images in one run: nothing is lost, nothing is done twice, and one bad picture stops nobody."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from detgpt import DetGPT, InputError, terminal
from detgpt.batch import Job, Outcome, read_jobs, run
from detgpt.cli import app


@pytest.fixture(scope="module")
def model(tiny_pair_folder: Path) -> DetGPT:
    return DetGPT.from_pretrained(tiny_pair_folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five pictures, one of them in a folder of its own, and a file that is no picture."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "c.png", "more/d.png", "e.webp")):
        Image.new("RGB", (40 + i, 30), "gray").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_picture_of_a_folder_is_answered_as_detect_answers_it(
    model: DetGPT, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "found.jsonl"
    assert run(model, read_jobs(str(photos), "drink"), output, batch_size=2) == Outcome(5, 0, 0)
    lines = lines_of(output)
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.jpg", "c.png", "e.webp", "d.png"]
    for line in lines:
        image = line.pop("image")
        assert line == json.loads(model.detect(image, "drink").to_json())


def test_a_pattern_chooses(photos: Path) -> None:
    jobs = read_jobs(str(photos / "*.png"), "drink")
    assert jobs == [Job(str(photos / name), "drink") for name in ("a.png", "c.png")]


def test_a_list_may_hold_a_wish_or_names_for_each_image(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    listed = photos / "list.jsonl"
    wanted = [{"image": "a.png"}, {"image": "a.png", "instruction": "swim"}, {"image": "b.jpg", "names": ["bottle"]}]
    listed.write_text("\n".join(map(json.dumps, [*wanted, wanted[0]])) + "\n\n")
    output = tmp_path / "found.jsonl"
    run(model, read_jobs(str(listed), "drink"), output)
    first, second, third = lines_of(output)  # the repeated line is one job
    assert (first["instruction"], first["targets"][0]["name"]) == ("drink", "cup")
    assert (second["instruction"], second["targets"]) == ("swim", [])
    assert (third["names"], third["targets"][0]["name"], third["reasoning"]) == (["bottle"], "bottle", "")


def test_masks_are_in_all_three_forms(
    tiny_pair_folder: Path, tiny_segmenter_folder: Path, photos: Path, tmp_path: Path
) -> None:
    model = DetGPT.from_pretrained(tiny_pair_folder, segmenter=tiny_segmenter_folder)
    jobs = read_jobs(str(photos / "*.png"), ["cup"])
    for name in ("found.jsonl", "found.json", "found.parquet"):
        run(model, jobs, tmp_path / name, masks=True, box_threshold=0.0)
    expected = model.detect(jobs[0].image, names=["cup"], masks=True, box_threshold=0.0)
    rle = expected.to_dict()["detections"][0]["mask"]
    assert lines_of(tmp_path / "found.jsonl")[0]["detections"][0]["mask"] == rle
    assert json.loads((tmp_path / "found.json").read_text())["annotations"][0]["segmentation"] == rle
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "found.parquet").to_pylist()
    assert table[0]["detections"][0]["mask"] == rle


def test_a_second_run_does_only_what_is_missing(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    output, jobs = tmp_path / "found.jsonl", read_jobs(str(photos), "drink")
    run(model, jobs, output)
    whole = output.read_bytes()
    cut = whole[: whole.index(b"\n", len(whole) // 2) + 20]  # within a line
    output.write_bytes(cut)
    kept = cut.count(b"\n")
    assert 0 < kept < 5
    assert run(model, jobs, output) == Outcome(5 - kept, 0, kept)
    assert output.read_bytes() == whole
    assert run(model, jobs, output) == Outcome(0, 0, 5)


def test_a_bad_picture_is_noted_and_the_rest_goes_on(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes(b"\xff\xd8 no more")
    output = tmp_path / "found.jsonl"
    assert run(model, read_jobs(str(photos), "drink"), output) == Outcome(4, 1, 0)
    bad = [line for line in lines_of(output) if "error" in line]
    assert [Path(line["image"]).name for line in bad] == ["b.jpg"]
    assert "b.jpg" in bad[0]["error"]


def test_progress_counts_to_the_end(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(model, read_jobs(str(photos), "drink"), tmp_path / "f.jsonl", batch_size=2, progress=lambda *p: seen.append(p))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_progress_shows_rate_and_time_left_and_does_not_count_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(terminal, "err", Console(file=shown, force_terminal=is_terminal, width=100))
        monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
        with terminal.progress("photos") as progress:
            progress(9_000, 10_000)  # from an earlier run
            time.sleep(0.5)
            progress(9_010, 10_000)
            time.sleep(0.2)  # the bar is drawn ten times a second
        last = [line for line in re.split(r"[\r\n]+", shown.getvalue()) if "9010" in line][-1]
        rate = float(re.search(r"([\d.]+)/s", last)[1])  # type: ignore[index]
        assert "photos" in last and re.search(r"9010(/| of )10000", last)
        assert 5 < rate <= 20
        assert re.search(r"0:0[01]:\d\d", last), "990 at up to 20 a second take a minute or so"


def test_a_file_name_that_is_no_unicode_stops_nobody(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    (photos / "a.png").rename(photos / odd)
    jobs = read_jobs(str(photos), "drink")
    for suffix in (".jsonl", ".json"):
        assert run(model, jobs, tmp_path / f"found{suffix}") == Outcome(5, 0, 0)
    assert run(model, jobs, tmp_path / "found.jsonl") == Outcome(0, 0, 5)
    assert str(photos / odd) in [line["image"] for line in lines_of(tmp_path / "found.jsonl")]


def test_coco_and_parquet_hold_the_same_boxes(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    jobs = read_jobs(str(photos), "drink")
    for suffix in (".jsonl", ".json", ".parquet"):
        run(model, jobs, tmp_path / f"found{suffix}")
    boxes = [found["xyxy"] for line in lines_of(tmp_path / "found.jsonl") for found in line["detections"]]
    assert boxes
    coco = json.loads((tmp_path / "found.json").read_text())
    assert len(coco["images"]) == 5
    assert [a["bbox"][:2] for a in coco["annotations"]] == [pytest.approx(box[:2], abs=0.02) for box in boxes]
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "found.parquet").to_pylist()
    assert [found["xyxy"] for row in rows for found in row["detections"]] == boxes
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "found.json", "found.jsonl", "found.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no images"),
        ("{}", 'line 1 of .* is no job: it is no object with an "image"'),
        ('{"image": "a.png"}', 'it has no "instruction"'),
        ('{"image": "a.png", "names": [""]}', "no name or an empty one"),
        ("a.png", "line 1 of"),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_jobs(str(tmp_path / "list.jsonl"))


def test_a_file_of_something_else_is_not_written_to(model: DetGPT, photos: Path, tmp_path: Path) -> None:
    precious = tmp_path / "data.jsonl"
    precious.write_text('{"my": "data"}\n')
    with pytest.raises(InputError, match="choose another file"):
        run(model, read_jobs(str(photos), "drink"), precious)
    assert precious.read_text() == '{"my": "data"}\n'
    with pytest.raises(InputError, match=r"end it in \.jsonl"):
        run(model, read_jobs(str(photos), "drink"), tmp_path / "found.csv")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def test_the_command_says_what_it_did(tiny_pair_folder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes(b"broken")
    output = tmp_path / "found.jsonl"
    ran = command(photos, "-i", "drink", "-m", tiny_pair_folder, "-o", output)
    assert ran.exit_code == 1
    assert "4 images answered, 1 could not be read" in ran.stderr
    assert command(photos, "-o", output).exit_code == 2, "without a wish there is nothing to look for"


def test_a_killed_run_goes_on(tiny_pair_folder: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "found.jsonl"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (40 + i, 30), "gray").save(folder / f"{i:02}.png")
    arguments = [folder, "-i", "drink", "-m", tiny_pair_folder, "-o", output, "--batch-size", "1"]
    start = [sys.executable, "-c", "from detgpt.cli import main; main()", "batch", *map(str, arguments)]
    started = subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert output.read_bytes().count(b"\n") < 60
    assert command(*arguments).exit_code == 0
    assert [Path(line["image"]).name for line in lines_of(output)] == [f"{i:02}.png" for i in range(60)]
