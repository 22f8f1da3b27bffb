"""The shipped recipes of published models: each has a plan, and what it says of itself is so. No files are needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_cppo.config import Config
from megatron_cppo.plan import Plan
from tests.published_models import PUBLISHED
from tools.sizing_table import PAGE, RECIPES, ROOT, recipe_plan


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Config, Plan]:
    return (request.param, *recipe_plan(request.param, tmp_path))


def test_every_recipe_has_a_plan(recipe: tuple[str, Config, Plan]) -> None:
    """Of the published shape; all layers are on some stage, all machines are whole."""
    name, config, plan = recipe
    published = PUBLISHED[Path(config.model.path).name]
    assert plan.num_parameters == published or (published is None and round(plan.num_parameters / 1e9) == 73)
    assert sum(plan.layers_per_chunk) == plan.shape.num_layers
    assert plan.num_ranks % 8 == 0
    assert config.trainer.num_gpus % config.vllm.tensor_parallel == 0
    layout = f"TP{config.policy.tensor_parallel} x PP{config.policy.pipeline_parallel} x DP{plan.data_parallel}"
    said = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text())) or ""
    assert layout.replace("TP1 x ", "").replace("PP1 x ", "") in said
    assert f"{plan.num_ranks} H100" in said


def test_what_a_recipe_says_of_memory_is_in_the_table(recipe: tuple[str, Config, Plan]) -> None:
    """The table is made by a command; a docstring is not."""
    name, *_ = recipe
    said = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text())) or ""
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| [{name}]")]
    _, _, _, _, update, rollouts, spare, seconds, _ = (cell.strip() for cell in line.split("|"))
    assert f"update {update}, rollouts {rollouts}; {spare} to spare" in said
    assert f"{seconds} s or more (estimate, not measured)" in said


def test_what_the_paper_ran_is_what_the_recipes_run(recipe: tuple[str, Config, Plan]) -> None:
    """arXiv 2601.00501's script for 3B and 7B; larger models differ in updates a step alone."""
    _, config, plan = recipe
    assert (config.trainer.prompts_per_step, config.rollout.samples_per_prompt) == (512, 5)
    assert (config.algorithm.beta, config.perception.coefficient, config.perception.temperature) == (0.01, 0.01, 0.1)
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (512, 4096)
    assert (config.optimizer.learning_rate, config.algorithm.clip_low, config.algorithm.clip_high) == (1e-6, 0.2, 0.2)
    assert config.trainer.num_steps == 2 * 38_870 // 512
    if plan.num_parameters < 1e10:
        assert config.trainer.updates_per_step == 8


def test_every_example_recipe_is_measured() -> None:
    """A recipe that is in no list is in no table."""
    found = {path.stem for path in (ROOT / "examples").glob("qwen*.py")}
    assert found == set(RECIPES)
