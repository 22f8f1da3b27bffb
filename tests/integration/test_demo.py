"""The demo from end to end, with few steps: every stage, the export check and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.html_tree import Page

ROOT = Path(__file__).parents[2]


def test_demo_runs_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.digits_demo", "--run-dir", str(tmp_path), "--steps", "2"]
    done = subprocess.run(
        [*command, "--warm-steps", "12"], cwd=ROOT, capture_output=True, text=True, timeout=420, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "32 of 32 greedy answers equal token for token" in done.stdout
    for stage in ("1/5", "2/5", "3/5", "4/5", "5/5"):
        assert stage in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "cppo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward/mean" in line] == [1, 2]
    assert [line["step"] for line in lines if "evaluation/accuracy" in line] == [0, 2]
    assert max(line["policy/logp_gap"] for line in lines if "policy/logp_gap" in line) < 1e-5
    page = Page((tmp_path / "cppo" / "report.html").read_text()).root
    titles = " ".join(node.text for tag in ("h1", "h2", "h3") for node in page.all(tag))
    for panel in ("Reward", "Accuracy", "Entropy", "KL to the reference", "Share of tokens read off the picture"):
        assert panel in titles
    assert len(page.all("img")) >= 3, "no gated answer with its three views"
