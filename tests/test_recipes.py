"""Recipes: what is wrong with one is said before anything runs."""

import pytest

from detgpt.errors import InputError
from finetune.recipe import run_recipe


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="there is no recipe 'nothing'"):
        run_recipe("nothing")


def test_an_unknown_stage_is_refused_with_the_known_ones(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stage: dance\noutput: out\n")
    with pytest.raises(InputError, match="stage 'dance' is none of align, instruct"):
        run_recipe(recipe)


def test_an_override_that_names_no_step_is_refused(tmp_path):
    (tmp_path / "all.yaml").write_text("steps: []\n")
    with pytest.raises(InputError, match="names no step"):
        run_recipe(tmp_path / "all.yaml", ["dance.seed=1"])
