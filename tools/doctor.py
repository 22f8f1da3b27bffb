"""Says what this machine and this Python environment hold, and whether megatron_cppo can run here.

    python tools/doctor.py [--device cpu|cuda]

One line per fact, one per problem with its remedy, and a verdict last. Exit status: 0 ready, 1 not ready. The device is
the one to train on; without the option, cuda where the machine has an NVIDIA device. Nothing that may be broken is
imported into this process: each package is tried in an interpreter of its own. Standard library only, because it must
also work where the installation does not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MIN_PYTHON = (3, 11)
# The import that shows whether a distribution works. Optional ones matter once they are installed: transformers
# imports torchvision as soon as it finds it.
REQUIRED = {"torch": "torch", "transformers": "transformers", "megatron-core": "megatron.core"}
OPTIONAL = {
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
}
IMPORT_SECONDS = 180
Device = Literal["cpu", "cuda"]
TORCH_FACTS = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "cuda": torch.version.cuda or "",
    "gpus": [[gpu.name, gpu.total_memory / 2**30, gpu.major] for gpu in gpus],
}))
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution: its version ("" when absent), and the last line of its import's error ("" when there is none)."""

    version: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that torch can use; `capability` is the major compute capability."""

    name: str
    memory_gib: float
    capability: int


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the verdict depends on. `unmet` holds what megatron_cppo requires, as (requirement, found version)."""

    python: tuple[int, int, int]
    packages: dict[str, Package]
    cuda: str
    gpus: tuple[Gpu, ...]
    nvidia_device: bool
    foreign_apex: bool
    installed: bool
    unmet: tuple[tuple[str, str], ...]
    num_cores: int
    memory_gib: float


def last_line(text: str) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def run_python(program: str) -> tuple[str, str]:
    """The output of a program in a fresh interpreter, and the last line of its error ("" when it succeeded)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"no end after {IMPORT_SECONDS} seconds"
    return done.stdout, "" if done.returncode == 0 else last_line(done.stderr)


def inspect_package(name: str, module: str) -> Package:
    """Looks up the version of a distribution and, where there is one, tries its import."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package("")
    return Package(version, run_python(f"import {module}")[1])


def is_foreign_apex() -> bool:
    """Whether the package called apex is PyPI's, which has nothing to do with NVIDIA's (built from source)."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return spec is not None and not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders)


def unmet_requirements() -> Iterator[tuple[str, str]]:
    """The requirements of the installed megatron_cppo that this environment does not meet, extras left out.

    Raises importlib.metadata.PackageNotFoundError when megatron_cppo is not installed.
    """
    requirements = importlib.metadata.requires("megatron_cppo") or []
    if importlib.util.find_spec("packaging") is None:
        yield "packaging", ""
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = ""
            if not version or not requirement.specifier.contains(version, prereleases=True):
                yield str(requirement), version


def inspect_machine() -> Facts:
    """Collects the facts; takes some seconds for each installed package that has to be tried."""
    modules = REQUIRED | OPTIONAL
    with ThreadPoolExecutor(max_workers=4) as pool:
        packages = dict(zip(modules, pool.map(inspect_package, modules, modules.values()), strict=True))
    torch_facts: dict[str, Any] = {"cuda": "", "gpus": []}
    if packages["torch"].version and not packages["torch"].error:
        output, error = run_python(TORCH_FACTS)
        torch_facts = torch_facts if error else json.loads(output)
    try:
        installed, unmet = True, tuple(unmet_requirements())
    except importlib.metadata.PackageNotFoundError:
        installed, unmet = False, ()
    return Facts(
        python=sys.version_info[:3],
        packages=packages,
        cuda=torch_facts["cuda"],
        gpus=tuple(Gpu(*gpu) for gpu in torch_facts["gpus"]),
        nvidia_device=Path("/dev/nvidiactl").exists(),
        foreign_apex=is_foreign_apex(),
        installed=installed,
        unmet=unmet,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    )


def problems(facts: Facts, device: Device) -> list[str]:
    """What keeps megatron_cppo from training on the device, each with its remedy."""
    found = [*installation_problems(facts), *combination_problems(facts)]
    return [*found, *gpu_problems(facts)] if device == "cuda" else found


def installation_problems(facts: Facts) -> Iterator[str]:
    """What is absent, too old, too new, or does not import."""
    if facts.python[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        yield f"Python {'.'.join(map(str, facts.python))} is too old: make the environment with {wanted} or newer"
    if not facts.installed:
        yield "megatron_cppo is not installed: `make test` makes .venv; elsewhere `pip install -e .`"
    for requirement, version in facts.unmet:
        yield f"{requirement} is required, found {version or 'none'}: pip install '{requirement}'"
    for name in REQUIRED:
        package = facts.packages[name]
        if not package.version and not facts.installed:
            yield f"{name} is not installed: pip install -e . brings it"
        if package.error:
            yield f"{name} {package.version} cannot be imported: {package.error}"


def combination_problems(facts: Facts) -> Iterator[str]:
    """Packages that each are fine, but not together or not on this machine."""
    torch = facts.packages["torch"]
    for name in ("torchvision", "torchaudio"):
        package = facts.packages[name]
        if package.error and not torch.error:
            yield (
                f"{name} {package.version} does not fit torch {torch.version} ({package.error}), and transformers "
                f"imports it: pip uninstall {name}"
            )
    if facts.foreign_apex:
        yield "apex is PyPI's package of that name, not NVIDIA's, and Megatron-Core imports it: pip uninstall apex"
    elif facts.packages["apex"].error:
        yield f"apex cannot be imported: {facts.packages['apex'].error}; build it anew or pip uninstall apex"
    engine = facts.packages["transformer-engine"]
    if engine.error:
        yield (
            f"transformer-engine {engine.version} cannot be imported: {engine.error}; build it for torch "
            f"{torch.version} or, to train on the CPU, pip uninstall transformer-engine"
        )


def gpu_problems(facts: Facts) -> Iterator[str]:
    """What keeps torch from the GPU, and what training on one needs besides."""
    torch = facts.packages["torch"]
    if not facts.nvidia_device:
        yield "there is no NVIDIA device: ask Slurm (--gres) or Docker (--gpus) for one, or take --device cpu"
    elif torch.version and not facts.cuda:
        yield f"torch {torch.version} cannot use the GPU, it is a CPU build: install a CUDA build, or take --device cpu"
    elif facts.cuda and not facts.gpus:
        yield f"torch {torch.version} (CUDA {facts.cuda}) sees no GPU: compare with the driver's in `nvidia-smi`"
    if not facts.packages["transformer-engine"].version:
        yield "on a GPU the layers are Transformer Engine's, which is not installed: pip install -e '.[gpu]'"
    for gpu in facts.gpus:
        if gpu.capability < 8:
            yield f"{gpu.name} has no bf16 (compute capability {gpu.capability}.x): train on a newer GPU"


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts as (name, value) lines."""
    yield "python", ".".join(map(str, facts.python))
    for name, package in facts.packages.items():
        yield name, (package.version or "-") + (" (cannot be imported)" if package.error else "")
    yield "cuda of torch", facts.cuda or "-"
    yield "cpu", f"{platform.machine()}, {facts.num_cores} cores, {facts.memory_gib:.0f} GiB"
    for index, gpu in enumerate(facts.gpus):
        yield f"gpu {index}", f"{gpu.name}, {gpu.memory_gib:.0f} GiB"
    if not facts.gpus:
        yield "gpu", "-"


def verdict(facts: Facts, device: Device, found: list[str]) -> str:
    """The one line that matters."""
    if found:
        return f"not ready for {device}: {len(found)} problem(s)"
    return f"ready for cuda: {len(facts.gpus)} GPU(s)" if device == "cuda" else "ready for cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description="Can megatron_cppo run here?")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to train on (cuda where there is a GPU)")
    arguments = parser.parse_args()
    facts = inspect_machine()
    device = arguments.device or ("cuda" if facts.nvidia_device else "cpu")
    for name, value in describe(facts):
        print(f"{name:<20}{value}")
    found = problems(facts, device)
    for problem in found:
        print(f"! {problem}")
    print(verdict(facts, device, found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
