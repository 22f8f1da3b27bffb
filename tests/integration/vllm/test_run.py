"""The real command with vLLM servers: two ranks, every step's log-probs checked, synchronous and ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.tiny_run import Launcher, write_recipe
from tests.integration.vllm.rig import PYTHON

NUM_STEPS = 4
BOUND = 1e-4


def processes() -> list[str]:
    lines = [path / "cmdline" for path in Path("/proc").glob("[0-9]*")]
    return [line.read_text(errors="replace") for line in lines if line.exists()]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_of_two_ranks_trains_on_what_servers_sampled(staleness: int, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    launcher = Launcher(tmp_path)
    flags = ["--rollout.engine", "vllm", "--vllm.python", PYTHON, "--rollout.check_every_steps", "1"]
    flags += ["--trainer.num_steps", str(NUM_STEPS), "--rollout.max_staleness", str(staleness)]
    flags += ["--algorithm.correction", "auto"]
    assert launcher.finish("run", *flags) == 0, launcher.said("run")
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "rollout/truncated_share" in step or "policy/loss" in step]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    gaps = [step["rollout/logp_gap_max"] for step in steps if "rollout/logp_gap_max" in step]
    print(f"staleness {staleness}: largest gap of each step {[f'{gap:.1e}' for gap in gaps]}")
    assert gaps
    assert max(gaps) <= BOUND
    weights = [step.get("policy/correction_weight", 1.0) for step in steps]
    print(f"staleness {staleness}: mean correction weight of each step {weights}")
    assert all(0 < weight <= 2 for weight in weights)
    assert any(weight != 1 for weight in weights) == (staleness > 0)
    if staleness:
        assert max(step["rollout/staleness_max"] for step in steps) <= staleness
    assert (run / "logs" / "vllm0.log").stat().st_size > 0
    assert not [line for line in processes() if str(tmp_path) in line], "a server is left"
