"""The arithmetic of `--measure`: schedules, peaks, the engine's share, and what its command line refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.digits import make_model
from megatron_cppo import config as configuration
from megatron_cppo import rehearsal, serving, train
from megatron_cppo.config import (
    Config,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
    VllmConfig,
)
from megatron_cppo.plan import Plan, resolve
from megatron_cppo.sizing import ChunkBytes, StageBytes, StageSize, events, schedule_peak, size

CHUNK = ChunkBytes(forward_peak=120, kept=100, backward_peak=150, vision=40, received=0, sent=0)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_schedule_runs_every_row_once_each_way(stages: int, chunks: int) -> None:
    """Forward before backward, in every chunk, for every stage."""
    for stage in range(stages):
        live = [0] * chunks
        for kind, chunk in events(stage, stages, chunks):
            live[chunk] += 1 if kind == "forward" else -1
            assert live[chunk] >= 0
        assert live == [0] * chunks


def test_a_stage_holds_as_many_rows_as_there_are_stages_behind_it() -> None:
    """1F1B (arXiv 2104.04473): PP - stage."""
    peaks = [schedule_peak((CHUNK,), stage, 4) for stage in range(4)]
    assert [peak.rows for peak in peaks] == [(4,), (3,), (2,), (1,)]
    assert [peak.total for peak in peaks] == [450, 350, 250, 150]
    assert peaks[0].vision == 160


def test_interleaved_chunks_hold_more() -> None:
    """2 (PP - stage - 1) + (VPP - 1) PP chunks before the first backward, and one more."""
    peaks = [schedule_peak((CHUNK, CHUNK), stage, 4) for stage in range(4)]
    assert [sum(peak.rows) for peak in peaks] == [11, 9, 7, 5]


def test_what_was_received_is_still_held_in_the_next_pass() -> None:
    chunk = replace(CHUNK, received=7)
    assert schedule_peak((chunk,), 1, 2).total == 157


def test_spare_is_of_the_fuller_phase() -> None:
    one = StageSize({"parameters": 40.0}, {"activations": 10.0}, {"engine": 24.0}, (1,))
    assert (one.update_gib, one.rollouts_gib, one.peak_gib) == (50.0, 64.0, 64.0)
    assert [one.verdict(gib) for gib in (60.0, 70.0, 80.0)] == ["does not fit", "tight", "fits"]


def measured(folder: Path, **policy: Any) -> tuple[Config, Plan]:
    """The demo's model on GPUs that nobody has."""
    if not (folder / "config.json").exists():
        make_model(folder, seed=3)
    config = Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(max_response_tokens=24),
        policy=PolicyConfig(precision="bf16", distributed_optimizer=False, **policy),
        trainer=TrainerConfig(num_gpus=2, prompts_per_step=4),
    )
    return config, resolve(config, files=False)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("tokens", [150, 191, 192, 264, 1024])
def test_the_fullest_row_has_a_sample_under_all_views(context: int, tokens: int, tmp_path: Path) -> None:
    """Also where longer ones are dropped, and rows are cut over context ranks: the longest that is not."""
    config, plan = measured(
        tmp_path, context_parallel=context, max_tokens_per_microbatch=tokens, oversized_samples="drop"
    )
    for batch in rehearsal.full_rows(config, plan):
        first, *_ = batch.samples
        assert first.gated
        length = plan.packing.segment_tokens(len(first.prompt.token_ids) + len(first.token_ids) - 1)
        assert length * 3 <= plan.packing.max_tokens
        (row,) = batch.updates[0].microbatches[0]
        assert row.token_ids_T.numel() <= plan.packing.max_tokens
    last = rehearsal.full_rows(config, plan)[1].samples[0]
    whole = len(last.prompt.token_ids) == 64 and len(last.token_ids) == 24
    length = len(last.prompt.token_ids) + len(last.token_ids) - 1
    assert whole or plan.packing.segment_tokens(length + 1) * 3 > plan.packing.max_tokens, "a longer one fits too"


def test_parameters_in_fp8_are_measured_as_in_bf16_of_which_they_have_the_size(tmp_path: Path) -> None:
    """One byte for what is multiplied, and one for its transpose; copies beside them there are none."""
    found = []
    for overrides in ((), ("fp8_param=true",)):
        config, _ = measured(tmp_path, max_tokens_per_microbatch=1024)
        policy = replace(config.policy, precision="fp8_blockwise", distributed_optimizer=True)
        config = replace(config, policy=replace(policy, megatron_overrides=overrides))
        plan = resolve(config, files=False)
        (one,) = size(config, plan, rehearsal.measure_stages(config, plan), gpu_gib=80.0)
        found.append(one)
    copied, kept = found
    assert copied.resident.pop("copies in FP8") > 0
    assert kept.resident == copied.resident
    assert kept.update == copied.update


def test_attention_is_measured_as_it_runs(tmp_path: Path) -> None:
    """Transformer Engine's takes keys and values from rank to rank, PyTorch's gathers and keeps those of all."""
    found = {}
    for attention in ("default", "torch"):
        config, plan = measured(tmp_path, context_parallel=2, max_tokens_per_microbatch=1024, attention=attention)
        (stage,) = rehearsal.measure_stages(config, plan)
        found[attention] = stage.chunks[0].kept
    tokens, shape = 1024 // 2, plan.shape
    gathered = shape.num_layers * 2 * tokens * shape.num_kv_heads * shape.head_size * 2
    assert found["torch"] - found["default"] > gathered


def test_weights_on_their_way_to_servers_elsewhere_take_room_on_the_first_stage(tmp_path: Path) -> None:
    """Rank 0 fills buckets on its GPU; each rank sees the largest tensor whole."""
    config, _ = measured(tmp_path, pipeline_parallel=2, layers_per_stage=(2, 1), max_tokens_per_microbatch=1024)
    config = replace(
        config,
        rollout=replace(config.rollout, engine="vllm"),
        vllm=VllmConfig(addresses=("http://node7:8000",)),
    )
    plan = resolve(config, files=False)
    assert plan.serving is not None
    assert (plan.serving.where, plan.serving.transport) == ("separate", "nccl")
    nothing = StageBytes(0, 0, 0, 0, 0, 0, (CHUNK,), 0, 0.0)
    first, last = size(config, plan, (nothing, nothing), gpu_gib=80.0)
    largest = plan.padded_vocab_size * plan.shape.hidden_size * 2 / 2**30
    assert sum(first.rollouts.values()) == pytest.approx(plan.serving.buckets_gib + largest)
    assert sum(last.rollouts.values()) == pytest.approx(largest)
    assert plan.serving.buckets_gib >= 1.0


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ((), 0.6),
        (("gpu-memory-utilization=0.35",), 0.35),
        (("max-num-seqs=8", "gpu_memory_utilization=0.5"), 0.5),
    ],
)
def test_the_engines_share_is_what_its_command_line_says(arguments: tuple[str, ...], share: float) -> None:
    assert serving.gpu_share(Config(vllm=VllmConfig(arguments=arguments))) == share


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure"], "--measure: adds to --check"),
        (["--check", "--gpu-gib", "80"], "--gpu-gib: is what --check --measure compares with"),
        (["--check", "--measure", "--gpu-gib", "many"], "got 'many'; for example --gpu-gib 80"),
        (["--check", "--measure", "--gpu-gib"], "got ''"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration.save(Config(), tmp_path / "recipe.json")
    assert train.main([str(tmp_path / "recipe.json"), *words]) == train.USER_ERROR
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for GPUs, and of its model the config.json alone."""
    folder = tmp_path_factory.mktemp("laptop")
    make_model(folder / "whole", seed=3)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes((folder / "whole" / "config.json").read_bytes())
    recipe = Config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(str(folder / "absent.parquet"),), max_prompt_tokens=64),
        rollout=RolloutConfig(engine="vllm", max_response_tokens=24),
        vllm=VllmConfig(python="no-such-python"),
        policy=PolicyConfig(pipeline_parallel=2, layers_per_stage=(1, 2), max_tokens_per_microbatch=1024),
        trainer=TrainerConfig(num_gpus=4, prompts_per_step=4),
    )
    configuration.save(recipe, folder / "recipe.json")
    return folder


def measure(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_cppo.train", str(folder / "recipe.json"), "--check", "--measure"]
    return subprocess.run(
        [*command, *flags], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )


def test_a_laptop_measures_a_gpus_recipe_from_its_config_json(laptop: Path) -> None:
    """No CUDA, no Transformer Engine, no weights, no data, no vLLM; what is missing is said, and 80 GiB are enough."""
    done = measure(laptop)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stage 1" in done.stdout
    assert done.stdout.count(" fits") == 2
    assert "engine, awake" in done.stdout
    for missing in ("absent.parquet does not exist", "holds no *.safetensors", "no-such-python"):
        assert missing in done.stdout


def test_what_does_not_fit_is_said(laptop: Path) -> None:
    done = measure(laptop, "--gpu-gib", "1")
    assert done.returncode == train.USER_ERROR
    assert "does not fit" in done.stdout


def test_what_cannot_be_a_plan_is_refused(laptop: Path) -> None:
    """Missing files are not, but a layout that cannot be is."""
    done = measure(laptop, "--policy.pipeline_parallel", "3")
    assert done.returncode == train.USER_ERROR
    assert done.stdout == ""
    assert "policy.layers_per_stage" in done.stderr
