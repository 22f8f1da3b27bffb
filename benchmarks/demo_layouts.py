"""Is the demo the same run in another layout? Two layouts, step by step, by tools/compare_runs.py.

    python -m benchmarks.demo_layouts [--layouts TP1 PP2] [--steps 70] [--as-is] [--folder runs/demo_layouts]

In fp32 two layouts round differently by about 1e-7, and Adam from a random start turns that into other weights within
tens of steps, which is no fault of either. Pipeline stages need not round differently: only the gradient norm (a sum
over stages) and a tied embedding's gradient (a sum of two stages') are added up in another order. So by default the
demo is run without clipping and with a head of its own, where PP2 must be TP1 to the bit, apart from the norm that is
logged; --as-is runs it as it is, to see how long two layouts stay together.

Every rank computes with one thread, as the number of threads changes sums too. Runs that are complete are kept. Exit
status 1 when the variant without other sums differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from examples import digits_demo
from examples.digits import make_model
from megatron_cppo.config import Config
from tools import compare_runs

TOLERANCE = 1e-4


def run(folder: Path, layout: str, *, seed: int, steps: int, warm_steps: int, as_is: bool) -> None:
    """The demo's warm start and CPPO in one layout, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").is_file():
        make_model(folder / "model", seed=seed, tied=as_is)
    digits_demo.make_inputs(folder, seed=seed)
    stages: dict[str, Config] = {
        "warm": digits_demo.warm_config(folder, seed=seed, num_steps=warm_steps, layout=layout),
        "cppo": digits_demo.config(folder, seed=seed, num_steps=steps, layout=layout),
    }
    for name, config in stages.items():
        if not (folder / name / "export").is_dir():
            if not as_is:
                config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=0.0))
            digits_demo.run_stage(folder, name, config)


def main(arguments: list[str]) -> int:
    """Run both layouts and compare both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs=2, choices=digits_demo.LAYOUTS, default=["TP1", "PP2"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=digits_demo.STEPS, help="steps of CPPO")
    parser.add_argument("--warm-steps", type=int, default=digits_demo.WARM_STEPS, help="supervised steps before")
    parser.add_argument("--as-is", action="store_true", help="clipped, tied: sums in another order")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_layouts"))
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = given.folder / ("as-is" if given.as_is else "same-sums")
    for layout in given.layouts:
        run(
            folder / layout,
            layout,
            seed=given.seed,
            steps=given.steps,
            warm_steps=given.warm_steps,
            as_is=given.as_is,
        )
    one, other = (folder / layout for layout in given.layouts)
    beyond = 0
    for stage in ("warm", "cppo"):
        pair = [str(one / stage), str(other / stage)]
        print(f"\n{stage}: {' and '.join(given.layouts)}, to the bit")
        compare_runs.main(pair)
        print(f"{stage}: within {TOLERANCE:g}")
        beyond |= compare_runs.main([*pair, "--tolerance", str(TOLERANCE)])
    return 0 if given.as_is else beyond


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
