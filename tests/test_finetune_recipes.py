"""Every recipe that comes for a reasoner is a recipe that runs, on a tiny model of the family it is for."""

import json

import pytest
from families import FAMILIES
from PIL import Image

from detgpt.models import PAIRS
from finetune.recipe import RECIPES, find_recipe, read_recipe, read_yaml, run_recipe

FAMILY_OF = {
    "instruct-picto": None,  # it is small enough itself
    "dpo-picto": None,
    "grpo-picto": None,
    "reward-picto": None,
    "pareto-picto/base": None,
    "qwen3-vl-2b-lora": "Qwen3-VL",
    "llava-1.5-7b/align": "LLaVA 1.5",
    "llava-1.5-7b/instruct": "LLaVA 1.5",
}
SHORTER = {"grpo-picto": ["trainer.max_completion_length=8"]}
STAGES = ("align", "instruct", "pretrain", "dpo", "grpo", "reward")
ANSWERS = {"chosen": 'A desk.\nTargets: ["cup"]', "rejected": "Targets: []"}


def shipped() -> list[str]:
    files = {str(file.relative_to(RECIPES).with_suffix("")): read_yaml(file) for file in RECIPES.rglob("*.yaml")}
    # Tried as a whole: test_picto_recipe.py, test_finetune_newcomer.py and test_distill_study.py.
    whole = ("picto/", "picto-further/", "sample/", "first-picto/")
    return sorted(n for n, values in files.items() if values.get("stage") in STAGES and not n.startswith(whole))


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_runs_on_a_tiny_model_of_its_family(name, tmp_path):
    build = FAMILIES[FAMILY_OF[name]] if FAMILY_OF[name] else None
    Image.effect_noise((48, 32), 80).convert("RGB").save(tmp_path / "1.png")
    record = {"image": "1.png", "instruction": "I am thirsty", "targets": ["cup"]}
    record |= ANSWERS if name.startswith(("dpo", "reward")) else {}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(record)] * 4))
    overrides = [f"train={tmp_path}", f"output={tmp_path / 'run'}", "trainer.max_steps=2", *SHORTER.get(name, [])]
    run_recipe(name, overrides + ([f"model={build(tmp_path / 'tiny')}"] if build else []))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["finished"] and run["metrics"]["step"] == 2
    if name.startswith("reward"):
        assert (tmp_path / "run/reward_model/model.safetensors").is_file()
    else:
        assert json.loads((tmp_path / "run/detgpt.json").read_text())["reasoner"] == "reasoner"


def test_the_papers_two_stages_have_its_schedule():
    for step in read_yaml(find_recipe("llava-1.5-7b"))["steps"]:
        trainer = read_recipe(RECIPES / f"{step}.yaml").trainer
        assert (trainer["learning_rate"], trainer["lr_scheduler_kwargs"]) == (3e-5, {"min_lr": 1e-5})
        assert (trainer["warmup_steps"], trainer["weight_decay"]) == (200, 0.05)


def test_the_recipe_for_photographs_is_the_named_pair():
    config = read_recipe(find_recipe("qwen3-vl-2b-lora"))
    assert (config.model, config.detector) == (PAIRS["small"].reasoner, PAIRS["small"].detector)
