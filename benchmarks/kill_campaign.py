"""Kill a tiny run again and again at random moments; does it always end like the run that was never killed?

    python -m benchmarks.kill_campaign [--kills 30] [--layout TP2 DP2 PP2] [--steps 4] [--seed 0] [--folder FOLDER]

Each layout gets its share of the kills, in chains of several over one run folder: any phase of any step, start and
export, twice in the same place too; mostly all processes at once, sometimes one rank or the launcher alone. Prints
the table of kills. Exit status 1 when metrics, samples, checkpoints or export of any chain differ from those of the
uninterrupted run, or when a process outlives its run. A kill costs one start, about ten seconds on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.distributed.kills import LAYOUTS, Chain, draw_targets, kill_chain, kill_table, struck, uninterrupted

KILLS_PER_CHAIN = 8
VICTIMS = {1: ("all",), 2: ("all",) * 6 + ("rank 0", "rank 1", "launcher")}


def campaign(folder: Path, layout: str, *, num_kills: int, num_steps: int, seed: int) -> list[Chain]:
    """Chains of one layout until `num_kills` have struck: a target that a run has passed by then does not count."""
    runs = uninterrupted(folder, layout, num_steps)
    chains: list[Chain] = []
    while (left := num_kills - struck(chains).total()) > 0:
        targets = draw_targets(
            seed + len(chains),
            num_steps,
            min(left, KILLS_PER_CHAIN),
            victims=VICTIMS[1 if layout == "one rank" else 2],
        )
        chains.append(kill_chain(runs, f"{layout.replace(' ', '-')}-killed-{len(chains)}", targets))
    return chains


def main(arguments: list[str]) -> int:
    """Kill, compare and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of all layouts together")
    parser.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), default=["TP2", "DP2", "PP2"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="keep the runs there, in an empty folder (default: a temporary one)"
    )
    given = parser.parse_args(arguments)
    chains: list[Chain] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if given.folder and folder.exists() and any(folder.iterdir()):
            parser.error(f"--folder {folder} is not empty; give a new one")
        folder.mkdir(parents=True, exist_ok=True)
        for number, layout in enumerate(given.layout):
            share = (number + 1) * given.kills // len(given.layout) - number * given.kills // len(given.layout)
            chains += campaign(
                folder.resolve(), layout, num_kills=share, num_steps=given.steps, seed=given.seed + 1000 * number
            )
    different = sum(bool(chain.differences) for chain in chains)
    print(f"\n{kill_table(chains)}\n")
    hits = struck(chains)
    phases = ", ".join(f"{phase} {count}" for phase, count in hits.most_common())
    print(f"{hits.total()} kills in {len(chains)} chains ({phases}); {different} chains ended differently")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
