"""A cluster and a tiny run's inputs for all scenarios; skips them, with the reason, where there can be no cluster."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.tiny_run import write_recipe
from tests.integration.slurm.cluster import Cluster, missing
from tests.integration.slurm.jobs import Jobs

SHAPE_NODES = 20
"""The published shape, and rollout nodes beside it."""


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """pytest's own folders have names that are too long for a socket."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cppo-slurm-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster(short_folder: Path) -> Iterator[Cluster]:
    plugin = short_folder / "container_options.so"
    source = Path(__file__).with_name("container_options.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", plugin, source], check=True)
    with Cluster(short_folder / "slurm", nodes=3, cloud=SHAPE_NODES - 3, plugin=plugin) as started:
        yield started


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, short_folder: Path) -> Jobs:
    inputs = short_folder / "inputs"
    inputs.mkdir()
    write_recipe(inputs)
    (inputs / "site.sh").write_text(f"export PYTHONPATH={inputs}\n")
    return Jobs(cluster, inputs)
