"""How much does CPPO lift held-out accuracy on the digits? Several seeds, each from its own model, data and warm start.

    python -m benchmarks.digits_seeds [--seeds 0 1 2] [--steps 70] [--folder runs/digits_seeds]

Prints, per seed, avg@4 at T=1 on held-out scans after the warm start and along the run, the gain, and the wall time;
then the mean over seeds, and the share of read-off tokens among masked ones. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean

from examples import digits_demo, digits_perception


def run_seed(folder: Path, seed: int, num_steps: int) -> None:
    """Warm start and CPPO of one seed, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    digits_demo.make_inputs(folder, seed=seed)
    if not (folder / "warm" / "export").is_dir():
        digits_demo.run_stage(folder, "warm", digits_demo.warm_config(folder, seed=seed))
    if not (folder / "cppo" / "export").is_dir():
        digits_demo.run_stage(folder, "cppo", digits_demo.config(folder, seed=seed, num_steps=num_steps))


def seconds(run_dir: Path) -> float:
    """Wall time that a run's log accounts for."""
    lines = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text().splitlines()]
    return sum(line.get("total", sum(v for name, v in line.items() if name != "step")) for line in lines)


def main(arguments: list[str]) -> int:
    """Run and print; exit status 1 when a seed does not gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=digits_demo.STEPS)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits_seeds"))
    given = parser.parse_args(arguments)
    gains, lines = [], []
    for seed in given.seeds:
        folder, start = given.folder / f"{given.steps}-steps-seed-{seed}", time.monotonic()
        run_seed(folder, seed, given.steps)
        wall = time.monotonic() - start
        curve = digits_demo.accuracies(folder / "cppo")
        gains.append(curve[-1][1] - curve[0][1])
        share = digits_perception.table(folder / "cppo")[0][2]
        points = "  ".join(f"{step}: {accuracy:.3f}" for step, accuracy in curve)
        lines.append(
            f"seed {seed}  warm {curve[0][1]:.3f}  final {curve[-1][1]:.3f}  gain {100 * gains[-1]:+.1f} points  "
            f"masked tokens read off the picture {share.masked:.3f} (base {share.base_rate:.3f})  "
            f"CPPO {seconds(folder / 'cppo'):.0f} s, all {wall:.0f} s\n        {points}"
        )
    print("\n".join(lines))
    print(f"mean gain {100 * fmean(gains):+.1f} points over {len(gains)} seeds, smallest {100 * min(gains):+.1f}")
    return 0 if min(gains) > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
