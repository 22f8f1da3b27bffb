"""Ranks that were given different configs, or that write into different folders, are told so; none goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cppo.config import Config, ConfigError, TrainerConfig
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import checkpoint


def differing_configs(rank: int, world_size: int) -> str:
    """What a rank is told whose recipe depends on the process."""
    from megatron_cppo.train import refuse_differing

    refuse_differing(Config())
    with pytest.raises(ConfigError) as caught:
        refuse_differing(Config(trainer=TrainerConfig(seed=rank, run_dir=f"runs/{rank}")))
    return str(caught.value)


def differing_folders(rank: int, world_size: int, model: str, folder: Path) -> str:
    """What a rank is told when the others do not see its part of a checkpoint."""
    from megatron_cppo.policy.policy import Policy
    from megatron_cppo.storage.checkpoint_files import SaveError

    config = tiny_model.make_config(model, world_size, policy__tensor_parallel=2)
    policy = Policy(config, tiny_model.make_plan(config), pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    with pytest.raises(SaveError) as caught:
        policy.save(folder / f"machine{rank}", at_step=1, progress={}, keep=1)
    policy.save(folder / "shared", at_step=1, progress={}, keep=1)
    return str(caught.value)


def test_different_configs_are_refused_on_all_ranks() -> None:
    for said in run_distributed(differing_configs, 2):
        assert "trainer.seed: 0 or 1" in said
        assert "trainer.run_dir: 'runs/0' or 'runs/1'" in said
        assert "the recipe gave the ranks different configs" in said


def test_a_checkpoint_in_several_folders_is_not_published(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    for said in run_distributed(differing_folders, 2, model, tmp_path):
        assert "rank 1: " in said
        assert ".partial_step_000001: it is not there: do all ranks see the same folder?" in said
    assert not list((tmp_path / "machine0").glob("step_*"))
    assert (tmp_path / "shared" / "step_000001").is_dir()
