"""The command line of the product on a run of seconds: a tiny model, a few steps, two ranks, everything switched on.

Owns the recipe and how its command is started, watched and ended; knows nothing of what a test wants to see.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from examples.digits import make_data, make_model
from megatron_cppo import config as configuration
from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_cppo.launch import loopback_interface

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3
TIMEOUT_SECONDS = 300
# An untrained model is never right; how long its answer is, is a reward that differs within most groups.
REWARD = "def even(text, truth, source):\n    return float(len(text) % 2 == 0)\n"


def tiny_config(folder: Path) -> Config:
    make_model(folder / "model", seed=3)
    paths = make_data(folder, seed=3, num_train=64, num_warm=1, num_evaluation=16)
    return Config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(str(paths["train"]),), evaluation=(str(paths["evaluation"]),), max_prompt_tokens=64),
        algorithm=AlgorithmConfig(
            beta=0.01, correction="sequence_mask", rewards=("even_length:even=0.9", "format=0.1")
        ),
        perception=PerceptionConfig(coefficient=0.1),
        rollout=RolloutConfig(samples_per_prompt=4, max_response_tokens=12),
        policy=PolicyConfig(device="cpu", precision="fp32", tensor_parallel=2, max_tokens_per_microbatch=1024),
        # So high that the first step's second update finds a policy unlike the engine's, which is no fault.
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_updates=2, decay="cosine"),
        trainer=TrainerConfig(
            num_gpus=2,
            num_steps=NUM_STEPS,
            prompts_per_step=4,
            updates_per_step=2,
            save_every_steps=1,
            keep_checkpoints=2,
            evaluation_samples=2,
        ),
    )


def write_recipe(folder: Path, reward: str = REWARD) -> None:
    """Put into `folder` what the command of a `Launcher` needs: model, data, recipe.json and the reward's module."""
    (folder / "even_length.py").write_text(reward)
    configuration.save(tiny_config(folder), folder / "recipe.json")


@dataclass(frozen=True)
class Launcher:
    """Starts the command of a run; `folder` holds the recipe, the reward's module and the run folders."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, run: str, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megatron_cppo.train", str(self.folder / "recipe.json")]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= loopback_interface() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)])}
        with (self.folder / f"{run}.stderr").open("w") as stderr:
            return subprocess.Popen(
                [*command, "--trainer.run_dir", str(self.folder / run), *flags],
                env=environment | dict(self.environment),
                cwd=self.folder,
                stderr=stderr,
                start_new_session=True,
            )

    def finish(self, run: str, *flags: str) -> int:
        """Run to the end; returns its exit status."""
        process = self.start(run, *flags)
        try:
            return process.wait(timeout=TIMEOUT_SECONDS)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)

    def kill_after_checkpoint(self, run: str, step: int) -> None:
        """Kill all of the run's processes as soon as it has published the checkpoint of `step`."""
        process = self.start(run)
        checkpoint = self.folder / run / "checkpoints" / f"step_{step:06d}"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not checkpoint.exists() and time.monotonic() < deadline:
            assert process.poll() is None, self.said(run)
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert checkpoint.exists(), self.said(run)

    def said(self, run: str) -> str:
        """What the last command of this run wrote to stderr."""
        return (self.folder / f"{run}.stderr").read_text()
