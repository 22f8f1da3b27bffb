"""How fast are the converters, next to copying the same bytes?

    python -m benchmarks.convert FOLDER [--shapes 7B] [--workers 1 2]

Makes a random checkpoint of Qwen2.5-VL's shapes in FOLDER, in shards as the official one has them, then converts it and
back. Each conversion is timed with a sync at its end, between two runs of `cp -r` and `sync` of the same source; the
source is read once before, which warms the cache as far as memory reaches. The comparison with the source is timed
apart. Everything that it made is removed. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_cppo.convert.checkpoints import Model, Opening
from megatron_cppo.convert.compare import How, compare
from megatron_cppo.convert.conversion import Options, Report
from megatron_cppo.convert.layout import row_blocks
from megatron_cppo.convert.to_hf import to_hf
from megatron_cppo.convert.to_megatron import to_megatron
from megatron_cppo.ranks import leave
from megatron_cppo.storage.safetensors_file import Stored, bytes_of, header_bytes
from tests.published_models import CONFIGS

SHARD_BYTES = 3_999_000_000
SHAPES = {"3B": "Qwen2.5-VL-3B-Instruct", "7B": "Qwen2.5-VL-7B-Instruct"}
COLUMNS = (
    "direction",
    "workers",
    "GB",
    "seconds",
    "MB/s",
    "cp + sync, seconds",
    "ratio",
    "peak of a worker, GiB",
    "compared",
    "seconds to compare",
    "peak, GiB",
)


def make_checkpoint(folder: Path, name: str) -> None:
    """Write random bf16 of a published model's shapes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    shards: list[list[Stored]] = [[]]
    for tensor, shape in Model.of(folder).sizes.items():
        stored = Stored(tensor, "BF16", shape)
        if sum(other.num_bytes for other in shards[-1]) + stored.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(stored)
    noise = torch.randint(-(2**15), 2**15, (2**25,), dtype=torch.int16)
    weight_map, count = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(shard, {"format": "pt"}))
            for stored in shard:
                weight_map[stored.name] = file
                for start, stop in row_blocks(stored.shape, torch.bfloat16):
                    numbers = torch.Size((stop - start, *stored.shape[1:])).numel()
                    count += 1
                    stream.write(bytes_of(noise[:numbers] + count))
    index = {"metadata": {"total_size": sum(s.num_bytes for shard in shards for s in shard)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    os.sync()


def timed(work: Callable[[], Report]) -> tuple[float, Report]:
    """Seconds of a conversion, until all is on the disk."""
    os.sync()
    began = time.perf_counter()
    report = work()
    os.sync()
    return time.perf_counter() - began, report


def copy_seconds(source: Path, folder: Path) -> float:
    """Seconds of a copy, until all is on the disk."""
    target = folder / "copy"
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def warm(folder: Path) -> None:
    """Read all files once."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def measure(source: Path, folder: Path, workers: int) -> list[tuple[object, ...]]:
    """Both directions with so many workers: two lines of the table."""
    model, lines = Model.of(source), []
    options = Options(workers=workers, verify=False)
    there, back = folder / "megatron", folder / "back"
    steps: list[tuple[str, Path, Path, Callable[[], Report], Opening]] = [
        ("to Megatron", source, there, lambda: to_megatron(source, there, options), Opening(there, model)),
        ("to Hugging Face", there, back, lambda: to_hf(there, back, options), Opening(back, None)),
    ]
    for what, origin, target, work, made in steps:
        warm(origin)
        before = copy_seconds(origin, folder)
        seconds, report = timed(work)
        after = copy_seconds(origin, folder)
        began = time.perf_counter()
        found = compare(
            Opening(source, None), made, how=How(), num_workers=workers, begin=lambda total: lambda count: None
        )
        compare_seconds = time.perf_counter() - began
        gigabytes = report.num_bytes / 1e9
        copied = (before + after) / 2
        lines.append(
            (
                what,
                workers,
                f"{gigabytes:.2f}",
                f"{seconds:.1f}",
                f"{1e3 * gigabytes / seconds:.0f}",
                f"{before:.1f}, {after:.1f}",
                f"{copied / seconds:.0%}",
                f"{report.peak_bytes / 2**30:.2f}",
                f"{found.num_tensors} tensors " + ("equal" if found.equal else "DIFFER"),
                f"{compare_seconds:.1f}",
                f"{found.peak_bytes / 2**30:.2f}",
            )
        )
        print(lines[-1], file=sys.stderr, flush=True)
        if target == back:
            shutil.rmtree(back)
    shutil.rmtree(there)
    return lines


def main(arguments: list[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to be measured; needs four times the checkpoint's bytes")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="7B")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args(arguments)
    folder = given.folder / f"convert_{given.shapes}"
    try:
        make_checkpoint(folder / "source", SHAPES[given.shapes])
        lines = [line for workers in given.workers for line in measure(folder / "source", folder, workers)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in (COLUMNS, ["---"] * len(COLUMNS), *lines):
        print("| " + " | ".join(str(cell) for cell in line) + " |")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
