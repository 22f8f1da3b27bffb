"""Images whose data is damaged behind a good header, on two ranks: one run from its command line survives them, and
what one rank finds all ranks know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cppo.config import DataConfig, ModelConfig, PerceptionConfig
from megatron_cppo.data.rows import DataError
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import Launcher, tiny_config, write_recipe

# Steps of 4 prompts, in order: two of the first are damaged, one on each rank, and one of the second.
DAMAGED = {1, 2, 6}
PROMPTS_PER_STEP = 4


def damage(file: Path, rows: set[int]) -> None:
    """Cut the images of some rows behind their headers."""
    table = pq.read_table(file)
    records = table.to_pylist()
    for row in rows:
        for image in records[row]["images"]:
            image["bytes"] = image["bytes"][: len(image["bytes"]) * 3 // 4]
    pq.write_table(pa.Table.from_pylist(records, table.schema), file, row_group_size=8)


def test_a_run_survives_damaged_images(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    damage(tmp_path / "train.parquet", DAMAGED)
    damage(tmp_path / "evaluation.parquet", {3})
    launcher = Launcher(tmp_path)
    flags = ("--data.shuffle=False", "--trainer.num_steps=2", "--trainer.export=False")
    assert launcher.finish("run", *flags) == 0, launcher.said("run")

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "reward/mean" in line]
    assert [line.get("data/replaced_prompts") for line in steps] == [2, 1]
    assert [rows(tmp_path / "run", step) for step in (1, 2)] == [[0, 4, 5, 3], [4, 5, 8, 7]]
    for log in ("rank0.log", "rank1.log"):
        said = (tmp_path / "run" / "logs" / log).read_text()
        for row in DAMAGED:
            where = f"a row cannot be used: {tmp_path}/train.parquet, row {row}, image 0: image is corrupt or truncated"
            assert said.count(where) == 1, (log, row)
        assert "evaluation: 15 rows, dropped {'image: damaged': 1}" in said
    print(
        next(line for line in launcher.said("run").splitlines() if "cannot be used" in line).replace(str(tmp_path), ".")
    )


def rows(run: Path, step: int) -> list[int]:
    """The rows of a step's prompts, in their order."""
    lines = (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["row"] for line in lines))


def source_of(folder: Path, rank: int) -> Any:
    from megatron_cppo.data.prompts import PromptSource

    return PromptSource(
        [str(folder / f"rank{rank}.parquet")],
        split="train",
        model_path=str(folder / "model"),
        data=DataConfig(shuffle=False),
        model=ModelConfig(),
        perception=PerceptionConfig(),
        seed=0,
    )


def what_ranks_find(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_cppo.data.damage import leave_out_damaged, sound_prompts

    group = dist.group.WORLD
    source = source_of(folder, rank)
    found = [sound_prompts(source, start, PROMPTS_PER_STEP, group=group) for start in (0, 4, 8)]
    damaged = set(source.damaged)
    whole = source_of(folder, rank)
    leave_out_damaged(whole, group=group)
    # A file that can no longer be read, on one rank alone: an error on both, and nobody waits.
    if rank == 1:
        file = folder / "rank1.parquet"
        with file.open("r+b") as opened:  # in place: the source has it mapped
            opened.seek(4)
            opened.write(b"\xff" * (file.stat().st_size - 2004))
    with pytest.raises(DataError) as caught:
        sound_prompts(source, 40, PROMPTS_PER_STEP, group=group)
    return {
        "rows": [[prompt.row for prompt in prompts] for prompts, _ in found],
        "counts": [count for _, count in found],
        "damaged": damaged,
        "dropped": whole.dropped,
        "error": str(caught.value),
    }


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    damage(tmp_path / "train.parquet", DAMAGED)
    for rank in range(2):
        (tmp_path / f"rank{rank}.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    first, second = run_distributed(what_ranks_find, 2, tmp_path)
    print(first)
    assert first == second
    assert first["rows"] == [[0, 4, 5, 3], [4, 5, 8, 7], [8, 9, 10, 11]]
    assert first["counts"] == [2, 1, 0]
    assert (first["damaged"], first["dropped"]) == (DAMAGED, {"image: damaged": 3})
    assert "rank1.parquet: cannot be read as parquet" in first["error"]
