"""Says what this machine and this Python environment hold, and whether megatron_cppo can run here.

    python tools/doctor.py [--device cpu|cuda]

One line per fact, one per problem with its remedy (and, for what was learned from others, where it is told), and a
verdict last. Exit status: 0 ready, 1 not ready. The device is the one to train on; without the option, cuda where the
machine has an NVIDIA device. Nothing that may be broken is imported into this process: each package is tried in an
interpreter of its own. Standard library only, because it must also work where the installation does not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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
nccl = torch.version.cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available()
cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
print(json.dumps({
    "cuda": torch.version.cuda or "",
    "gpus": [[gpu.name, gpu.total_memory / 2**30, gpu.major, gpu.minor] for gpu in gpus],
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else "",
    "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else "",
}))
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution: its version ("" when absent), and the last line of its import's error ("" when there is none)."""

    version: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that torch can use; `capability` is the major compute capability, `minor` the rest of it."""

    name: str
    memory_gib: float
    capability: int
    minor: int = 0


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
    nccl: str = ""
    cudnn: str = ""

    def version(self, name: str) -> str:
        """Of a package, or of what comes with torch; "" where there is none."""
        found = {"nccl": self.nccl, "cudnn": self.cudnn, "cuda": self.cuda}
        return found[name] if name in found else self.packages.get(name, Package("")).version


def anywhere(_: Facts) -> bool:
    """Where nothing else matters."""
    return True


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A combination that others have found to fail: `name` from version `since` on and below `before`, `where` the rest
    of the machine is so. `source` is where it is told."""

    name: str
    since: str
    before: str
    happens: str
    remedy: str
    source: str
    where: Callable[[Facts], bool] = anywhere


def _oldest_gpu(facts: Facts) -> tuple[int, int]:
    return min(((gpu.capability, gpu.minor) for gpu in facts.gpus), default=(0, 0))


def _newest_gpu(facts: Facts) -> tuple[int, int]:
    return max(((gpu.capability, gpu.minor) for gpu in facts.gpus), default=(0, 0))


# On a GPU. What does not import says so itself: IMPORT_ERRORS.
KNOWN_BAD = (
    KnownBad(
        *("transformer-engine", "0", "2.9", "Megatron-Core 0.16.1 was made for 2.9 to 2.11"),
        "pip install 'transformer-engine[pytorch]>=2.9,<2.12'",
        "pypi.org/project/megatron-core/0.16.1, its requirements",
    ),
    KnownBad(
        *("transformer-engine", "2.12", "99", "Megatron-Core 0.16.1 was made for 2.9 to 2.11"),
        "pip install 'transformer-engine[pytorch]>=2.9,<2.12'",
        "pypi.org/project/megatron-core/0.16.1, its requirements",
    ),
    KnownBad(
        *("transformer-engine", "0", "2.18", "gradients of packed attention are wrong on compute capability 12.x"),
        "train with --policy.attention torch",
        "github.com/NVIDIA/TransformerEngine/issues/3333",
        where=lambda facts: _newest_gpu(facts) >= (12, 0),
    ),
    KnownBad(
        *("cudnn", "0", "9.18.1", "it has no backward of packed attention before compute capability 9.0"),
        "install a newer cuDNN, or train with --policy.attention torch",
        "github.com/NVIDIA/TransformerEngine/pull/3092",
        where=lambda facts: (0, 0) < _oldest_gpu(facts) < (9, 0),
    ),
    KnownBad(
        *("cudnn", "0", "9.15", "under torch 2.9 convolutions of images in bf16 take many times the memory and time"),
        "install cuDNN 9.15 or newer, or torch 2.10",
        "github.com/pytorch/pytorch/issues/166643 and 174051",
        where=lambda facts: numbers("2.9") <= numbers(facts.version("torch")) < numbers("2.10"),
    ),
    KnownBad(
        *("nccl", "2.29.2", "2.29.3", "collectives hang"),
        "install another NCCL",
        "github.com/pytorch/pytorch/pull/174338",
        where=lambda facts: len(facts.gpus) > 1,
    ),
    KnownBad(
        *("cuda", "0", "12.8", "it has no kernels for compute capability 10.0 and newer"),
        "install a torch built for CUDA 12.8 or newer",
        "github.com/NVIDIA/TransformerEngine, README, requirements",
        where=lambda facts: _newest_gpu(facts) >= (10, 0),
    ),
)
# (package, words of its error, remedy, source); the first that fits counts.
IMPORT_ERRORS = (
    ("torchvision", "", "pip uninstall torchvision", "github.com/pytorch/vision/issues/9085"),
    ("torchaudio", "", "pip uninstall torchaudio", ""),
    (
        *("transformer-engine", "cublasLt"),
        *("pip install --upgrade nvidia-cublas", "github.com/NVIDIA/TransformerEngine/issues/2504"),
    ),
    (
        *("transformer-engine", ""),
        "build it for torch {torch} or, to train on the CPU, pip uninstall transformer-engine",
        "github.com/NVIDIA/TransformerEngine/issues/1684",
    ),
)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at their end: 2.9.0+cu130 is (2, 9)."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


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
        nccl=torch_facts.get("nccl", ""),
        cudnn=torch_facts.get("cudnn", ""),
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
    return [*found, *gpu_problems(facts), *known_bad(facts)] if device == "cuda" else found


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
    for name in ("torchvision", "torchaudio", "transformer-engine"):
        package = facts.packages[name]
        if not package.error or torch.error:
            continue
        fitting = (entry[2:] for entry in IMPORT_ERRORS if entry[0] == name and entry[1] in package.error)
        remedy, source = next(fitting)
        imported = ", and transformers imports it" if name.startswith("torch") else ""
        yield (
            f"{name} {package.version} does not fit torch {torch.version} ({package.error}){imported}: "
            + remedy.format(torch=torch.version)
            + (f" [{source}]" if source else "")
        )
    if facts.foreign_apex:
        yield "apex is PyPI's package of that name, not NVIDIA's, and Megatron-Core imports it: pip uninstall apex"
    elif facts.packages["apex"].error:
        yield f"apex cannot be imported: {facts.packages['apex'].error}; build it anew or pip uninstall apex"


def known_bad(facts: Facts) -> Iterator[str]:
    """The entries of KNOWN_BAD that this machine is one of."""
    for bad in KNOWN_BAD:
        version = facts.version(bad.name)
        if version and numbers(bad.since) <= numbers(version) < numbers(bad.before) and bad.where(facts):
            yield f"{bad.name} {version}: {bad.happens}; {bad.remedy} [{bad.source}]"


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
    if len(facts.gpus) > 1 and not facts.nccl:
        yield f"torch {torch.version} has no NCCL, by which GPUs exchange: install another build of torch"
    for gpu in facts.gpus:
        if gpu.capability < 8:
            yield f"{gpu.name} has no bf16 (compute capability {gpu.capability}.x): train on a newer GPU"


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts as (name, value) lines."""
    yield "python", ".".join(map(str, facts.python))
    for name, package in facts.packages.items():
        yield name, (package.version or "-") + (" (cannot be imported)" if package.error else "")
    for name in ("cuda", "cudnn", "nccl"):
        yield f"{name} of torch", facts.version(name) or "-"
    yield "cpu", f"{platform.machine()}, {facts.num_cores} cores, {facts.memory_gib:.0f} GiB"
    for index, gpu in enumerate(facts.gpus):
        capability = f"compute capability {gpu.capability}.{gpu.minor}"
        yield f"gpu {index}", f"{gpu.name}, {gpu.memory_gib:.0f} GiB, {capability}: {', '.join(precisions(gpu, facts))}"
    if not facts.gpus:
        yield "gpu", "-"


def precisions(gpu: Gpu, facts: Facts) -> list[str]:
    """What policy.precision can be on this GPU with these packages, from the package's own table."""
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)  # it may not be installed; nothing else of the folder is to be found
    try:
        from megatron_cppo.precision import usable, version
    finally:
        sys.path.remove(root)
    engine = facts.packages["transformer-engine"]
    with_fp8 = engine.version and not engine.error
    found = usable((gpu.capability, gpu.minor), version(facts.cuda))
    return [name for name in found if with_fp8 or not name.startswith("fp8")]


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
