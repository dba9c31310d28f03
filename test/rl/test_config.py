"""Recipes: every one of ours loads, and a mistake in one is an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.rl.config import RECIPES, RecipeError, load_recipe

MINIMAL = "model: {path: m}\ntask: {name: sums}\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_our_recipes_load_and_say_why(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.out == f"runs/{name}" and len(recipe.note) > 100
    assert recipe.model.path


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml") if not p.stem.endswith("-collapse")))
def test_our_recipes_have_an_unstable_one_beside_them(name: str) -> None:
    stable, unstable = load_recipe(name), load_recipe(f"{name}-collapse")
    assert (unstable.model, unstable.task, unstable.steps) == (stable.model, stable.task, stable.steps)
    assert unstable.optim.lr > stable.optim.lr
    assert unstable.optim.ppo_n_minibatches > stable.optim.ppo_n_minibatches
    assert unstable.rollout.max_staleness > stable.rollout.max_staleness
    assert not unstable.loss.recompute_logprob


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "optim: {lr: 1e-3, max_tokens: 77}\nsteps: 5\n")
    child = write(tmp_path / "child.yaml", "extends: base\noptim: {lr: 2.0e-3}\n")
    recipe = load_recipe(child, ("steps=6", "model.lora.rank=3"))
    assert (recipe.optim.lr, recipe.optim.max_tokens, recipe.steps, recipe.model.lora.rank) == (2e-3, 77, 6, 3)


def test_a_model_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert load_recipe(write(tmp_path / "r.yaml", MINIMAL)).model.path == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: {path: m}\n", (), "missing required field `task`"),
        (MINIMAL + "optim: {learning_rate: 1}\n", (), "unknown field `learning_rate` - at `\\$.optim`"),
        (MINIMAL + "loss: {algorithm: magic}\n", (), "magic"),
        (MINIMAL + "optim: {lr: 0}\n", (), "optim.lr is 0"),
        (MINIMAL, ("optim.lr=0",), "optim.lr is 0"),
        (MINIMAL, ("steps",), "must look like section.field=value"),
        (MINIMAL + "steps: 3\n", ("steps.x=1",), "steps is not a section"),
        (MINIMAL + "rollout: {temperature: 0}\n", (), "rollout.temperature is 0"),
        (MINIMAL + "rollout: {samples: 1}\n", (), "needs rollout.samples of 2 or more"),
        (MINIMAL + "extends: nothing\n", (), "no recipe 'nothing'"),
        ("- 1\n", (), "Expected `object`"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "r.yaml", text), overrides)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="one of: .*tiny-cpu"):
        load_recipe("tiny-gpu")
