"""Updates whose loss or gradient is not finite: skipped on all ranks, counted, saved; the run goes on as if they had
been left out, stops after too many, and a replay says where it began.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cppo.config import Config
from megatron_cppo.plan import resolve
from megatron_cppo.saved import SkippedStep, Writer
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, VOCAB, checkpoint
from tests.distributed.tiny_run import Launcher, tiny_config, write_recipe

CHECKED = ("TP2", "DP2", "DP2 distributed optimizer", "PP2")
POISONED_UPDATE = 3  # the second one of step 2; the first is applied
POISON_ROW = 5  # has two images


@dataclass(frozen=True)
class Outcome:
    """How a run went on one rank."""

    error: str
    unchanged: list[bool]
    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]


def layout_config(config: Config, layout: str, run_dir: Path) -> Config:
    policy = dataclasses.replace(config.policy, tensor_parallel=1, distributed_optimizer=False)
    fields = {name.removeprefix("policy__"): value for name, value in LAYOUTS[layout].items()}
    if "PP2" in layout:
        fields["layers_per_stage"] = (2, 1)
    trainer = dataclasses.replace(config.trainer, run_dir=str(run_dir), export=False)
    data = dataclasses.replace(config.data, evaluation=())
    return dataclasses.replace(config, policy=dataclasses.replace(policy, **fields), trainer=trainer, data=data)


def state_of(policy: Any) -> list[torch.Tensor]:
    """Weights, gradients' consumers (Adam's moments and steps), learning rates and the schedule of this rank."""
    trained = policy.trained
    found = [parameter.detach().clone() for parameter in trained.parameters()]
    for inner in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        for group in inner.optimizer.param_groups:
            found.append(torch.tensor(group["lr"], dtype=torch.float64))
            for parameter in group["params"]:
                found += [parameter.detach().clone()]
                found += [value.clone() for _, value in sorted(inner.optimizer.state[parameter].items())]
    return [*found, torch.tensor(trained.schedule.num_steps)]


def one_run(config: Config, poisons: Callable[[int], bool], *, leave_out: bool = False) -> Outcome:
    """A run in which rank 1 spoils one gradient of the updates that `poisons` names; or those updates are left out."""
    from megatron_cppo.assembly import build_run
    from megatron_cppo.loop import reinforce
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy import step as module

    whole, number, unchanged, error = module.update, 0, [], ""
    with build_run(config, resolve(config), {}) as run:
        parameter = next(p for n, p in run.policy.trained.chunks[0].named_parameters() if "layers.0.mlp" in n)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.nan if dist.get_rank() == 1 else gradient

        def update(*arguments: Any) -> Any:
            nonlocal number
            number += 1
            if not poisons(number - 1):
                return whole(*arguments)
            if leave_out:
                return {"optim/skipped_updates": 1.0}, []
            before, handle = state_of(run.policy), parameter.register_hook(spoil)
            answer = whole(*arguments)
            handle.remove()
            pairs = zip(before, state_of(run.policy), strict=True)
            unchanged.append(all(torch.equal(old, new) for old, new in pairs))
            return answer

        module.update = update
        try:
            reinforce(run)
        except ValueError as stopped:
            error = f"{type(stopped).__name__}: {stopped}"
        module.update = whole
        weights = {name: tensor.clone() for name, tensor in run.policy.weights()}
        run.log.close()
    process_groups.destroy()
    path = Path(config.trainer.run_dir) / "metrics.jsonl"
    return Outcome(error, unchanged, [json.loads(line) for line in path.read_text().splitlines()], weights)


def run_layouts(rank: int, world_size: int, config: Config, root: Path) -> dict[str, dict[str, Outcome]]:
    multiprocessing.current_process().daemon = False  # it has grading workers and checkpoint writers
    found = {}
    for layout in CHECKED:
        runs = found[layout] = {}

        def start(
            run: str, poisons: Callable[[int], bool], *, limit: int = 3, layout: str = layout, **more: Any
        ) -> Any:
            changed = layout_config(config, layout, root / layout / run)
            trainer = dataclasses.replace(changed.trainer, max_skipped_updates=limit)
            return one_run(dataclasses.replace(changed, trainer=trainer), poisons, **more)

        runs["poisoned"] = start("poisoned", lambda update: update == POISONED_UPDATE)
        runs["left out"] = start("left out", lambda update: update == POISONED_UPDATE, leave_out=True)
        if layout != "DP2 distributed optimizer":
            runs["stopped"] = start("stopped", lambda update: update >= POISONED_UPDATE)
            runs["stopped again"] = start("stopped", lambda _: True)
            runs["mended"] = start("stopped", lambda _: False)
    return found


@dataclass(frozen=True)
class Runs:
    root: Path
    found: list[dict[str, dict[str, Outcome]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("nonfinite")
    config = tiny_config(folder)
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield Runs(folder, run_distributed(run_layouts, 2, config, folder, timeout_seconds=300))


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("layout", CHECKED)
def test_a_skipped_update_changes_nothing_and_the_run_goes_on_without_it(layout: str, runs: Runs) -> None:
    for rank in runs.found:
        poisoned, without = rank[layout]["poisoned"], rank[layout]["left out"]
        assert (poisoned.error, without.error) == ("", "")
        assert poisoned.unchanged == [True]
        assert [line["optim/skipped_updates"] for line in poisoned.metrics] == [0.0, 1.0, 0.0]
        assert poisoned.metrics == without.metrics
        assert all(torch.equal(poisoned.weights[name], without.weights[name]) for name in without.weights)
    saved = only(runs.root / layout / "poisoned" / "skipped")
    assert saved.name == "step_000002"
    assert json.loads((saved / "skipped.json").read_text()) == {
        **{"step": 2, "updates": [1], "num_updates": 2, "seed": 0}
    }
    assert sorted(path.name for path in saved.iterdir()) == ["groups.jsonl", "scores.jsonl", "skipped.json"]


@pytest.mark.parametrize("layout", ["TP2", "DP2", "PP2"])
def test_the_run_stops_after_too_many_in_a_row_and_again_when_it_is_resumed(layout: str, runs: Runs) -> None:
    run = runs.root / layout / "stopped"
    for rank in runs.found:
        stopped, again = rank[layout]["stopped"], rank[layout]["stopped again"]
        assert stopped.error.startswith("NonFiniteError: step 3: of its 2 updates 1, 2 skipped")
        assert "3 in a row, and trainer.max_skipped_updates is 3" in stopped.error
        assert f"--debug.replay {run / 'skipped' / 'step_000003'}" in stopped.error
        assert stopped.unchanged == [True] * 3
        assert (again.error, again.metrics) == (stopped.error, stopped.metrics)
        assert again.unchanged == [True] * 2, "the resumed run has to go on after step 2"
        assert rank[layout]["mended"].error == ""
        assert [line["step"] for line in rank[layout]["mended"].metrics] == [1, 2, 3]
    assert sorted(path.name for path in (run / "skipped").iterdir()) == ["step_000002", "step_000003"]
    assert only(run / "skipped" / "step_000003" / "checkpoint").name == "step_000003"
    assert not (run / "skipped" / "step_000002" / "checkpoint").exists()


def test_metrics_of_skipped_updates_count_only_where_there_are_no_others(runs: Runs) -> None:
    _, second, third = runs.found[0]["TP2"]["stopped"].metrics
    assert second["optim/grad_norm"] != "nan"
    assert third["optim/grad_norm"] == "nan"
    assert (second["optim/skipped_updates"], third["optim/skipped_updates"]) == (1.0, 2.0)


# A replay.


@dataclass(frozen=True)
class Replayed:
    """What a rank was told of two skipped updates."""

    from_stop: list[Any]
    from_step_before: list[Any]
    too_old: list[Any]
    steps_missing: int
    unharmed: list[Any]
    norm: float
    others_were_applied: bool


def poison(policy: Any) -> None:
    """A weight of the last layer becomes so large that fp32 overflows between it and the next."""
    model = policy.trained.chunks[0]
    if model.post_process:
        model.language_model.decoder.layers[-1].mlp.linear_fc1.weight.data.mul_(1e20)


def replays(rank: int, world_size: int, model: str, layouts: tuple[str, ...], root: Path) -> dict[str, Replayed]:
    multiprocessing.current_process().daemon = False
    return {layout: replay_case(layout, world_size, model, root / layout) for layout in layouts}


def replay_case(layout: str, world_size: int, model: str, root: Path) -> Replayed:
    from megatron_cppo.loop import plan_batch
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy
    from megatron_cppo.replay import replay

    fields = {
        **{"optimizer__learning_rate": 1e-2, "trainer__updates_per_step": 2, "trainer__run_dir": str(root)},
        **{"rollout__samples_per_prompt": 2, "policy__max_tokens_per_microbatch": 400, **LAYOUTS[layout]},
    }
    config = tiny_model.make_config(model, world_size, **fields)
    plan = resolve(config)
    groups = tiny_model.make_groups(4, 2, vocab_size=VOCAB, first_row=2)
    writer = Writer(root, rank=dist.get_rank(), vocab_size=VOCAB)

    def fresh(at: Path | None = None) -> Policy:
        process_groups.destroy()
        policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
        if at is not None:
            policy.restore(at)
        return policy

    def find(row: int, epoch: int) -> Any:
        return dataclasses.replace(tiny_model.make_prompt(row, vocab_size=VOCAB), epoch=epoch)

    def saved(step: int, scores: Any, updates: tuple[int, ...]) -> Path:
        numbers = tuple(tuple(logp.tolist()) for logp in scores)
        folder = writer.skipped(SkippedStep(step, updates, 2, 0, tuple(groups), numbers, None))
        dist.barrier()
        return folder

    def again(folder: Path, policy: Policy) -> list[Any]:
        changed = dataclasses.replace(config, debug=dataclasses.replace(config.debug, replay=str(folder)))
        return replay(changed, plan, policy, find=find, advance=lambda _: None)

    policy = fresh()
    batch = policy.score(plan_batch(config, plan, groups, score=True), old=True, reference=False)
    assert batch.old_logp is not None
    policy.update(batch)
    policy.save(root / "checkpoints", at_step=1, progress={}, keep=5)
    # In the step's second update one sample is given log-probs that no policy has.
    spoiled = tuple(
        torch.full_like(logp, torch.nan) if batch.samples[i].prompt.row == POISON_ROW and i % 2 else logp
        for i, logp in enumerate(batch.old_logp)
    )
    policy.update(dataclasses.replace(batch, old_logp=spoiled))
    assert policy.skipped == (1,)
    wanted = {name: tensor.clone() for name, tensor in policy.weights()}
    policy.save(root / "checkpoints", at_step=2, progress={}, keep=5)

    policy = fresh()
    from_step_before = again(saved(2, spoiled, (1,)), policy)
    equal = [torch.equal(wanted[name], tensor) for name, tensor in policy.weights()]
    # An update that was skipped for a fault that is gone: what it comes to is what an update makes of it.
    unharmed = again(saved(2, batch.old_logp, (0,)), fresh())
    folder = saved(7, batch.old_logp, (0, 1))
    too_old = again(folder, fresh())
    dist.barrier()  # rank 0 writes it
    told_too_old = json.loads((folder / "replay.json").read_text())["weights"]["steps_missing"]
    policy = fresh(root / "checkpoints")
    poison(policy)
    policy.save(folder / "checkpoint", at_step=7, progress={}, keep=1)
    from_stop = again(folder, fresh())
    dist.barrier()
    show_first(root)
    policy = fresh(root / "only_first")
    norm = policy.update(dataclasses.replace(batch, updates=batch.updates[:1]))["optim/grad_norm"]
    process_groups.destroy()
    return Replayed(from_stop, from_step_before, too_old, told_too_old, unharmed, norm, all(equal))


def show_first(root: Path) -> None:
    """The checkpoint of step 1 in a folder of its own."""
    if dist.get_rank() == 0:
        shutil.copytree(root / "checkpoints" / "step_000001", root / "only_first" / "step_000001")
    dist.barrier()


REPLAYED = ("TP2", "DP2", "PP2", "PP2 recompute full")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Replayed]]]:
    root = tmp_path_factory.mktemp("replay")
    model = checkpoint(tmp_path_factory.mktemp("hf"))
    return root, run_distributed(replays, 2, model, REPLAYED, root, timeout_seconds=200)


@pytest.mark.parametrize("layout", REPLAYED)
def test_a_replay_names_the_row_that_was_given_what_is_not_finite(layout: str, replayed: Any) -> None:
    _, ranks = replayed
    first, *others = [rank[layout].from_step_before for rank in ranks]
    assert str(others) == str([first])  # text, as NaN differs from itself
    (finding,) = first
    assert (finding.update, finding.finite) == (1, False)
    bad = [row for row in finding.rows if row.num_not_finite]
    assert bad
    assert all(set(row.num_not_finite) == {"given old log-probs"} for row in bad)
    assert all(any(f"row {POISON_ROW} image" in image for image in row.images) for row in bad)
    assert (finding.modules, finding.weights) == ((), ())


@pytest.mark.parametrize("layout", REPLAYED)
def test_a_replay_names_the_module_that_overflows(layout: str, replayed: Any) -> None:
    root, ranks = replayed
    for finding in ranks[0][layout].from_stop:
        assert not finding.finite
        # Gate times up overflows, which is no module: the next one gets it.
        assert {(place.names, place.started_here) for place in finding.modules} == {
            (("model.layers.1.mlp.down_proj",), False)
        }
        assert len(finding.modules) >= len({(row.replica, row.row) for row in finding.rows})
        assert all(row.num_not_finite.get("log-probs") for row in finding.rows if row.samples)
        assert finding.weights == ()
        assert {(place.replica, place.row) for place in finding.gradients} == {
            (row.replica, row.row) for row in finding.rows if row.samples
        }
    told = json.loads((root / layout / "skipped" / "step_000007" / "replay.json").read_text())
    assert told["weights"]["steps_missing"] == 0
    assert [found["update"] for found in told["updates"]] == [0, 1]


@pytest.mark.parametrize("layout", REPLAYED)
def test_a_replay_computes_the_update_itself_and_says_when_its_weights_are_older(layout: str, replayed: Any) -> None:
    _, ranks = replayed
    (finding,) = ranks[0][layout].unharmed
    assert finding.finite
    assert finding.grad_norm == ranks[0][layout].norm
    # Updates of other weights are others, and said to be so.
    assert ranks[0][layout].steps_missing == 4
    assert all(found.finite for found in ranks[0][layout].too_old)
    assert all(rank[layout].others_were_applied for rank in ranks)


def test_the_command_stops_on_real_overflow_and_its_replay_is_exact(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    launcher = Launcher(tmp_path)
    # The first update makes the weights so large that the second one's activations overflow.
    flags = ("--optimizer.learning_rate", "1e30", "--optimizer.warmup_updates", "0", "--optimizer.decay", "constant")
    assert launcher.finish("run", *flags, "--trainer.max_skipped_updates", "1") == 2
    folder = tmp_path / "run" / "skipped" / "step_000001"
    assert f"fix: --debug.replay {folder}" in launcher.said("run")
    assert "Traceback" not in launcher.said("run")
    before = files_of(tmp_path / "run")
    assert launcher.finish("run", *flags, "--trainer.max_skipped_updates", "1", "--debug.replay", str(folder)) == 0
    assert {path: text for path, text in files_of(tmp_path / "run").items() if path in before} == before
    new = {path.relative_to(folder).parts[0] for path in files_of(tmp_path / "run").keys() - before.keys()}
    assert new == {"replay.json", "logs"}
    told = json.loads((folder / "replay.json").read_text())
    assert told["weights"]["folder"] == str(folder / "checkpoint" / "step_000001")
    assert [found["update"] for found in told["updates"]] == [1]
    assert told["updates"][0]["modules"]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
