"""The debug section's choices: which exclude each other, what they need, and which fields a resumed run may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_cppo import config as configuration
from megatron_cppo.config import AlgorithmConfig, Config, ConfigError, DebugConfig, RolloutConfig, TrainerConfig
from megatron_cppo.loop import reinforce, sample, supervise
from megatron_cppo.loop_async import loop_of, reinforce_async
from megatron_cppo.plan import resolve
from megatron_cppo.resume import PACKING, RESUMABLE, refuse_other_config


def problems(tmp_path: Path, objective: str = "cppo", **debug: object) -> str:
    config = Config(
        algorithm=dataclasses.replace(AlgorithmConfig(), objective=objective),
        trainer=TrainerConfig(run_dir=str(tmp_path / "run")),
        debug=DebugConfig(**debug),
    )
    with pytest.raises(ConfigError) as error:
        resolve(config)
    return "\n".join(line for line in str(error.value).splitlines() if "debug" in line)


def test_modes_exclude_each_other(tmp_path: Path) -> None:
    said = problems(tmp_path, rollout_only=True, train_on=str(tmp_path))
    assert "debug: rollout_only and train_on were chosen, and exclude each other; keep one" in said
    assert problems(tmp_path, rollout_only=True, save_rollouts=True) == ""


def test_folders_have_to_be_what_the_mode_reads(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert f"debug.train_on: {missing} is no folder; give" in problems(tmp_path, train_on=str(missing))
    assert f"debug.replay: {tmp_path} is no skipped step; give" in problems(tmp_path, replay=str(tmp_path))
    (tmp_path / "skipped.json").write_text("{}")
    assert problems(tmp_path, replay=str(tmp_path)) == ""


@pytest.mark.parametrize("mode", ["save_rollouts", "rollout_only"])
def test_a_supervised_run_has_no_rollouts(mode: str, tmp_path: Path) -> None:
    said = problems(tmp_path, "supervised", **{mode: True})
    assert f"debug.{mode}: a supervised run has no rollouts; leave it out" in said


def test_the_loop_is_chosen_by_objective_and_mode() -> None:
    assert loop_of(Config()) is reinforce
    assert loop_of(Config(rollout=RolloutConfig(max_staleness=1))) is reinforce_async
    assert loop_of(Config(debug=DebugConfig(rollout_only=True))) is sample
    assert loop_of(Config(algorithm=AlgorithmConfig(objective="supervised"))) is supervise


@pytest.fixture
def started(tmp_path: Path) -> Path:
    configuration.save(Config(), tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


def changed(name: str) -> Config:
    section, field = name.split(".")
    fields = getattr(Config(), section)
    value = getattr(fields, field)
    other = {bool: not value, int: 7, float: 7.0, str: "continue", tuple: (2, 1)}[type(value)]
    return dataclasses.replace(Config(), **{section: dataclasses.replace(fields, **{field: other})})


@pytest.mark.parametrize("name", sorted(RESUMABLE))
def test_a_run_may_be_resumed_with_another_layout_or_what_changes_no_number(name: str, started: Path) -> None:
    refuse_other_config(started, changed(name))


@pytest.mark.parametrize(
    "name",
    [
        "algorithm.correction",
        "algorithm.correction_bound",
        "debug.train_on",
        "debug.rollout_only",
        "policy.precision",
        "trainer.seed",
        "trainer.self_check",
    ],
)
def test_everything_else_makes_another_run(name: str, started: Path) -> None:
    with pytest.raises(ConfigError, match=f"  {name}: "):
        refuse_other_config(started, changed(name))


def test_a_run_keeps_the_lead_of_its_rollouts(started: Path) -> None:
    with pytest.raises(ConfigError, match=r"  rollout\.max_staleness: 0 there, 7 here"):
        refuse_other_config(started, changed("rollout.max_staleness"))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("policy", "oversized_samples", "drop"), ("perception", "aggregation", "microbatch")],
)
def test_where_the_loss_depends_on_the_rows_so_does_the_run(
    section: str, field: str, value: str, tmp_path: Path
) -> None:
    def with_option(config: Config) -> Config:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})

    configuration.save(with_option(Config()), tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for name in sorted(RESUMABLE - PACKING):
        refuse_other_config(tmp_path, with_option(changed(name)))
    for name in sorted(PACKING):
        with pytest.raises(ConfigError, match=f"  {name}: "):
            refuse_other_config(tmp_path, with_option(changed(name)))
