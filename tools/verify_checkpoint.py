"""Are two checkpoints the same, tensor by tensor? Each is a Hugging Face folder or a Megatron checkpoint.

    python tools/verify_checkpoint.py A B                      # every bit, NaN too
    python tools/verify_checkpoint.py A B --tolerance 1e-3     # numbers, up to a gap; dtypes may differ

Tensors are compared under their official Hugging Face names, however a folder spells, stacks or fuses them; optimizer
state is no weight and is passed over. Told is what is missing, what is extra, other shapes and dtypes, and of tensors
that differ the worst first: by how much at most, and how many of their numbers. No GPU, no model, bounded memory.

Exit status: 0 the same, 1 not the same, 2 could not be compared, for the reason that is told.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_cppo.config import UserError
from megatron_cppo.convert import checkpoints
from megatron_cppo.convert.compare import How, compare
from megatron_cppo.convert.conversion import listener
from megatron_cppo.ranks import leave
from megatron_cppo.storage.durable import brief_bytes


def main(arguments: list[str]) -> int:
    """Compare and say what differs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--tolerance", type=float, help="largest |a - b| that counts as the same (default: every bit)")
    parser.add_argument("--like", type=Path, metavar="HF_FOLDER", help="whose config.json a Megatron checkpoint has")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: one a core, {cores})")
    given = parser.parse_args(arguments)
    if given.workers < 1 or (given.tolerance is not None and not given.tolerance >= 0):
        parser.error("--workers must be positive, --tolerance not negative")
    began = time.monotonic()
    try:
        found = compare(
            checkpoints.opening(given.a, given.like),
            checkpoints.opening(given.b, given.like),
            how=How(tolerance=given.tolerance),
            num_workers=given.workers,
            begin=lambda total: listener("comparing", total, sys.stderr),
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(found.lines()))
    print(f"{brief_bytes(found.num_bytes)} in {time.monotonic() - began:.1f} s")
    return 0 if found.equal else 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
