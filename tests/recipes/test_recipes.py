"""Recipes can be loaded, checked and estimated: the models' own descriptions lie here, no weights."""

from pathlib import Path

import pytest
from adapters import needs_adapters

from minillm.config.recipe import load_recipe
from minillm.model.cost import cost, describe

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = Path(__file__).parent / "configs"
PARAMETERS = {  # as their publishers count them
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "teacher-gpt2-1.5B": 1_557_611_200,
    "init-gpt2-120M": 124_439_808,
}


def names(recipe):
    model = recipe.run.model
    return model.teacher.rpartition("/")[2], model.student.rpartition("/")[2]


def on_stored_configurations(path, *flags):
    teacher, student = names(load_recipe(path))
    sources = [f"--model.teacher={CONFIGS / teacher}", f"--model.student={CONFIGS / student}"]
    return load_recipe(path, [*sources, *flags])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_short(path):
    recipe = load_recipe(path)
    assert recipe.run.data.eval and recipe.stages
    assert len(path.read_text().splitlines()) <= 30


@pytest.mark.parametrize("name", ["qwen3-8b-to-0.6b", "gpt2-paper"])
def test_memory_of_full_training(name):
    path = RECIPES / f"{name}.yaml"
    teacher, student = (PARAMETERS[model] for model in names(load_recipe(path)))
    recipe = on_stored_configurations(path, "--lora.rank=0")
    for stage in recipe.stages.values():
        found = cost(recipe.run, stage)
        assert recipe.run.teacher.dtype == "bfloat16" and found.held["teacher"] == 2 * teacher
        assert found.held["student"] == found.held["gradients"] == student * 4
        assert found.held["AdamW"] == 2 * student * 4
        assert found.peak > sum(found.held.values())


@needs_adapters
def test_memory_of_a_base_in_4_bits_that_teaches_itself():
    """Matrices below the head in NF4, embeddings and head as they are, and nothing for the teacher."""
    flags = [f"--model.student={CONFIGS / 'Qwen3-8B'}"]
    recipe = load_recipe(RECIPES / "qwen3-8b-self-qlora.yaml", flags)
    held = cost(recipe.run, recipe.stages["gkd"]).held
    whole = 2 * 151_936 * 4096  # embeddings and head
    adapters = held["gradients"]
    expected = 4 * whole + (PARAMETERS["Qwen3-8B"] - whole) * 4.127 / 8 + adapters
    assert held["teacher"] == 0 and held["student"] == pytest.approx(expected, rel=0.002)


@needs_adapters
def test_memory_of_adapters():
    path = RECIPES / "llama3.1-8b-to-3.2-1b-lora.yaml"
    teacher, student = (PARAMETERS[model] for model in names(load_recipe(path)))
    recipe = on_stored_configurations(path)
    held = cost(recipe.run, recipe.stages["on-policy"]).held
    assert held["teacher"] == 2 * teacher
    assert 4 * student < held["student"] < 4.1 * student
    assert held["AdamW"] < 0.1 * 4 * student


def test_both_variants_of_the_papers_setting():
    recipes = [
        on_stored_configurations(RECIPES / "gpt2-paper.yaml", *flags)
        for flags in ((), ("--objective.variant=reference",))
    ]
    paper, reference = (recipe.stages["minillm"].objective for recipe in recipes)
    assert paper.weight_single_step and not reference.weight_single_step
    assert (paper.discount, reference.discount) == (1.0, 0.95)
    assert (paper.pt_teacher, reference.pt_teacher) == (0.0, 0.5)
    told = describe(recipes[0])
    assert all(f"  {part} " in told for part in ("held", "rollout", "update", "peak", "work"))
