"""The product from its command line for every family, in a layout of its own: sampled, trained, exported, verified.

The tokenizer, template and pictures are the demo's; the weights are a tiny random model's of the family.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo import config as configuration
from megatron_cppo.launch import loopback_interface
from tests.distributed import tiny_model
from tests.distributed.tiny_run import REWARD, ROOT, Launcher, tiny_config, write_recipe

LAYOUTS: dict[str, tuple[str, ...]] = {
    "qwen2_5_vl": ("--policy.tensor_parallel=1", "--policy.context_parallel=2"),
    "qwen3_vl": (
        "--policy.tensor_parallel=1",
        "--policy.pipeline_parallel=2",
        "--policy.virtual_pipeline=2",
        "--policy.layers_per_stage",
        *("2", "1", "1", "1"),
    ),
    "qwen3_vl_moe": ("--policy.sequence_parallel=True", "--policy.expert_parallel=2"),
}


def with_weights_of(family: str, folder: Path, scratch: Path) -> None:
    """Exchange the demo model's weights and config for a tiny random model's, which keeps its vocabulary and ids."""
    demo = json.loads((folder / "config.json").read_text())
    text: dict[str, Any] = demo["text_config"]
    made = Path(
        tiny_model.make_checkpoint(scratch, family=family, vocab_size=text["vocab_size"], num_layers=5, tied=False)
    )
    config = json.loads((made / "config.json").read_text())
    config |= {name: demo[name] for name in demo if name.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy2(made / "model.safetensors", folder / "model.safetensors")


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Launcher, Path]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    (folder / "even_length.py").write_text(REWARD)
    configuration.save(tiny_config(folder), folder / "recipe.json")
    with_weights_of(family, folder / "model", tmp_path_factory.mktemp("weights"))
    launcher = Launcher(folder)
    status = launcher.finish("run", *LAYOUTS[family], "--trainer.num_steps", "2", "--optimizer.warmup_updates", "1")
    assert status == 0, launcher.said("run")
    return family, launcher, folder / "run"


def test_a_run_samples_trains_and_exports(run: tuple[str, Launcher, Path]) -> None:
    family, launcher, folder = run
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "policy/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["optim/grad_norm"] > 0 and not line["optim/skipped_updates"] for line in steps)
    assert all(line["tokens/vision"] > 0 for line in steps)
    exported = json.loads((folder / "export" / "config.json").read_text())
    assert exported == json.loads((launcher.folder / "model" / "config.json").read_text())
    assert exported["model_type"] == family
    print(f"{family:12} engine against policy at the first step {steps[0]['policy/logp_gap']:.1e} nat")


def test_transformers_answers_like_the_trained_policy(run: tuple[str, Launcher, Path]) -> None:
    """By the tool that users have for it."""
    _, launcher, folder = run
    places = os.pathsep.join([str(ROOT), str(launcher.folder)])
    done = subprocess.run(
        [sys.executable, "-m", "tools.verify_export", str(folder)],
        cwd=ROOT,
        env=os.environ | loopback_interface() | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.strip().splitlines()[-1])


def test_oversized_samples_are_refused_before_a_run_or_counted_in_it(tmp_path: Path) -> None:
    """Rows of 80 tokens hold every answer, but not its three views."""
    write_recipe(tmp_path)
    launcher = Launcher(tmp_path)
    flags = ("--policy.max_tokens_per_microbatch", "80", "--trainer.num_steps", "1", "--optimizer.warmup_updates", "0")
    assert launcher.finish("refused", *flags, "--check") == 2
    assert "80 cannot hold the longest sample, 3 views x" in launcher.said("refused")
    assert launcher.finish("dropped", *flags, "--policy.oversized_samples", "drop") == 0, launcher.said("dropped")
    lines = [json.loads(line) for line in (tmp_path / "dropped" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "policy/loss" in line]
    samples = (tmp_path / "dropped" / "samples" / "step_000001.jsonl").read_text().splitlines()
    gated = [sample for sample in map(json.loads, samples) if sample["advantage"] > 0]
    assert step["data/oversized_samples"] == len(gated) > 0
    assert "perception/cpl" not in step
