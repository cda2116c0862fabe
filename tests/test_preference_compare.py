"""Ways of alignment side by side: `stage: compare` on a few wishes."""

import json
import shutil
from pathlib import Path

import pytest

from detgpt.errors import InputError
from finetune.preference.compare import table
from finetune.recipe import find_recipe, read_recipe, run_recipe

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/needs"
SOME = (13, 125, 129, 160, 193, 204, 210, 265)  # of its wishes
FEWER = {
    "raft": {"iterations": 1, "prompts": 4, "sampling": {"count": 2}},
    "iterative_dpo": {"iterations": 1, "prompts": 8, "sampling": {"count": 4}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The shipped comparison on eight wishes, a step or two of each tuning."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(SPLIT / "images", folder / "wishes/images")
    lines = (SPLIT / "data.jsonl").read_text().splitlines()
    (folder / "wishes/data.jsonl").write_text("\n".join(lines[i] for i in SOME))
    settings = read_recipe(find_recipe("alignment-picto/table")).model_dump(mode="json")
    for tuning in settings["tunings"].values():
        tuning |= FEWER.get(tuning["stage"], {})
        tuning["trainer"] |= {"max_steps": 1}
        if tuning["stage"] == "grpo":
            tuning["trainer"] |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 32}
    data = dict.fromkeys(("train", "held_out"), str(folder / "wishes"))
    few = {**data, "seeds": [0], "output": str(folder / "run"), "diversity": {"count": 2}}
    (folder / "study.yaml").write_text(json.dumps(settings | few))
    return folder / "study.yaml"


def test_every_tuning_is_run_measured_and_put_into_a_table(study, capsys):
    run_recipe(study)
    run = study.parent / "run"
    rows = json.loads((run / "table.json").read_text())
    assert list(rows) == ["start", "RAFT", "DPO", "GRPO"]
    for name, (row,) in rows.items():
        assert -0.8 <= row["reward"] <= 1 and 0 <= row["F1"] <= 1 and 0 < row["distinct_2"] <= 1
        assert ("seconds" in row) is (name != "start")
    assert {name: of[0].get("answers") for name, of in rows.items()} == {
        "start": None,
        "RAFT": 8,
        "DPO": 32,
        "GRPO": 4,
    }
    assert (run / "table.md").read_text() in capsys.readouterr().err

    shutil.rmtree(run / "seed-0/GRPO")
    (run / "measured/GRPO 0.json").unlink()
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": None}))
    raft = (run / "seed-0/RAFT/reasoner/model.safetensors").stat().st_mtime_ns
    run_recipe(study)
    again = json.loads((run / "table.json").read_text())
    again["GRPO"][0].pop("seconds"), rows["GRPO"][0].pop("seconds")
    assert again == rows
    assert (run / "seed-0/RAFT/reasoner/model.safetensors").stat().st_mtime_ns == raft


def test_the_table_has_means_and_intervals_over_the_seeds():
    rows = {
        "start": [{"reward": 0.5, "rejection": None}],
        "RAFT": [{"reward": 0.6, "answers": 960, "seconds": 61.2}, {"reward": 0.8, "answers": 960, "seconds": 63.0}],
    }
    assert table(rows).splitlines()[2:] == [
        "| start | 0.500 |  |  |  |  |  |  |",
        "| RAFT | 0.700 (0.600–0.800) |  |  |  |  | 960 | 62 |",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tunings.RAFT.model=other", "tunings.RAFT: 'model' is the same for all"),
        ("tunings.RAFT.stage=magic", "stage 'magic' is none of"),
        ("tunings.RAFT.iterations=0", "iterations"),
        ("held_out=nowhere", "nowhere"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(override, said, study, tmp_path):
    with pytest.raises(Exception, match=said) as refused:
        run_recipe(study, [override, f"output={tmp_path / 'run'}"])
    assert isinstance(refused.value, InputError)
    assert not (tmp_path / "run").exists()
