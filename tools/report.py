"""Write the HTML report of a run: python tools/report.py RUN_DIR [--output report.html] [--samples 6] [--no-images].

The pictures are rebuilt from the data files and the checkpoint that the run's config.json names, by the same seeded
perturbations as in training; --no-images does without both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_cppo.config import ConfigError
from megatron_cppo.report import rebuild_images, write_report


def main(arguments: list[str]) -> int:
    """Write the report and say where it is; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the HTML report of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, help="default: RUN_DIR/report.html")
    parser.add_argument("--samples", type=int, default=6, help="answers to show")
    parser.add_argument("--no-images", action="store_true", help="do not open data files and checkpoint")
    given = parser.parse_args(arguments)
    output = given.output or given.run_dir / "report.html"
    images = None if given.no_images else rebuild_images(given.run_dir)
    try:
        write_report(given.run_dir, output, images=images, num_samples=given.samples)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
