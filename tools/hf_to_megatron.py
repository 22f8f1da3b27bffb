"""Convert a Hugging Face folder into a Megatron checkpoint, on a CPU, in bounded memory.

    python tools/hf_to_megatron.py SOURCE TARGET [--workers 2] [--dtype keep]
    python tools/hf_to_megatron.py SOURCE TARGET --dry-run        # files, bytes, memory, time; reads config.json only

SOURCE   config.json, tokenizer and *.safetensors of a supported model, as they were downloaded
TARGET   a new folder in Megatron's torch_dist format, which loads at any TP x PP x EP, with or without Transformer
         Engine's names; the source's side files are in TARGET/hf, and megatron_to_hf.py makes the same folder again

No GPU, no model and no process group is needed: tensors pass through in blocks of 16 MiB. The work is done in
TARGET.partial, a file at a time. Ended by whatever (kill -9, a full disk), the same command goes on where it stopped;
TARGET appears when all is written, synced and compared with the source bit by bit.

Exit status: 0 done, 2 not done, for the reason that is told.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_cppo.config import UserError
from megatron_cppo.convert import forecast
from megatron_cppo.convert.conversion import DTYPES, Options
from megatron_cppo.convert.to_megatron import to_megatron
from megatron_cppo.ranks import leave


def main(arguments: list[str]) -> int:
    """Convert and say what was done; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: one a core, {cores})")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="keep", help="cast every tensor (default: keep)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and do nothing")
    parser.add_argument("--rate", type=float, default=400.0, help="MB/s that --dry-run reckons with (default: 400)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, and what was begun of it otherwise")
    given = parser.parse_args(arguments)
    if given.workers < 1 or given.rate <= 0:
        parser.error("--workers and --rate must be positive")
    options = Options(
        dtype=given.dtype,
        workers=given.workers,
        verify=not given.no_verify,
        overwrite=given.overwrite,
        told=sys.stderr,
    )
    try:
        if given.dry_run:
            told = forecast.of_folder(given.source, options).lines(workers=given.workers, rate=given.rate * 1e6)
        else:
            told = [*to_megatron(given.source, given.target, options).lines(), str(given.target)]
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is kept in {given.target}.partial", file=sys.stderr)
        return 130
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
