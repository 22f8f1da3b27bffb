"""tools/doctor.py: each known-bad combination is named, and the real environment gets a verdict."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tools.doctor import Device, Facts, Gpu, Package, inspect_package, is_foreign_apex, problems, verdict

ROOT = Path(__file__).parents[2]
ABSENT = Package("")
CPU_BOX = Facts(
    python=(3, 11, 7),
    packages={
        "torch": Package("2.13.0+cpu"),
        "transformers": Package("5.23.0"),
        "megatron-core": Package("0.16.1"),
        "transformer-engine": ABSENT,
        "apex": ABSENT,
        "torchvision": ABSENT,
        "torchaudio": ABSENT,
    },
    cuda="",
    gpus=(),
    nvidia_device=False,
    foreign_apex=False,
    installed=True,
    unmet=(),
    num_cores=2,
    memory_gib=8.0,
)
GPU_BOX = dataclasses.replace(
    CPU_BOX,
    packages=CPU_BOX.packages | {"torch": Package("2.13.0"), "transformer-engine": Package("2.9.0")},
    cuda="13.0",
    gpus=(Gpu("H200", 139.0, 9),),
    nvidia_device=True,
)


def with_package(facts: Facts, name: str, package: Package) -> Facts:
    return dataclasses.replace(facts, packages=facts.packages | {name: package})


def test_healthy_machines_are_ready() -> None:
    assert problems(CPU_BOX, "cpu") == []
    assert verdict(CPU_BOX, "cpu", []) == "ready for cpu"
    assert problems(GPU_BOX, "cuda") == []
    assert verdict(GPU_BOX, "cuda", []) == "ready for cuda: 1 GPU(s)"
    # The CPU demo needs nothing of what the GPU needs.
    assert problems(dataclasses.replace(CPU_BOX, nvidia_device=True), "cpu") == []


@pytest.mark.parametrize(
    ("facts", "device", "said"),
    [
        (dataclasses.replace(CPU_BOX, python=(3, 10, 2)), "cpu", "Python 3.10.2 is too old"),
        (dataclasses.replace(CPU_BOX, installed=False), "cpu", "megatron_cppo is not installed"),
        (dataclasses.replace(CPU_BOX, unmet=(("tyro<2,>=0.9", ""),)), "cpu", "tyro<2,>=0.9 is required, found none"),
        (with_package(CPU_BOX, "torch", Package("2.13.0", "OSError: x")), "cpu", "torch 2.13.0 cannot be imported"),
        (
            with_package(CPU_BOX, "torchvision", Package("0.28.0", "operator torchvision::nms does not exist")),
            "cpu",
            "torchvision 0.28.0 does not fit torch 2.13.0+cpu",
        ),
        (dataclasses.replace(CPU_BOX, foreign_apex=True), "cpu", "not NVIDIA's"),
        (
            with_package(GPU_BOX, "transformer-engine", Package("2.9.0", "undefined symbol")),
            "cuda",
            "build it for torch",
        ),
        (with_package(GPU_BOX, "transformer-engine", ABSENT), "cuda", "which is not installed"),
        (dataclasses.replace(GPU_BOX, cuda="", gpus=()), "cuda", "it is a CPU build"),
        (dataclasses.replace(GPU_BOX, gpus=()), "cuda", "sees no GPU"),
        (dataclasses.replace(GPU_BOX, gpus=(Gpu("V100", 32.0, 7),)), "cuda", "V100 has no bf16"),
        (dataclasses.replace(GPU_BOX, nvidia_device=False), "cuda", "there is no NVIDIA device"),
    ],
)
def test_each_problem_is_named(facts: Facts, device: Device, said: str) -> None:
    found = problems(facts, device)
    assert len(found) == 1, found
    assert said in found[0]
    assert verdict(facts, device, found) == f"not ready for {device}: 1 problem(s)"


def test_broken_and_foreign_packages_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in {"torchvision": "raise RuntimeError('no operator nms')", "apex": "x = 1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        (tmp_path / f"{name}-0.9.dist-info").mkdir()
        (tmp_path / f"{name}-0.9.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert inspect_package("torchvision", "torchvision") == Package("0.9", "RuntimeError: no operator nms")
    assert inspect_package("apex", "apex") == Package("0.9")
    assert inspect_package("no-such-distribution", "nothing") == ABSENT
    assert is_foreign_apex()
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()  # a folder of NVIDIA's Apex
    assert not is_foreign_apex()


def test_this_environment_gets_a_verdict() -> None:
    command = [sys.executable, "tools/doctor.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *lines, last = done.stdout.splitlines()
    remedies = [line for line in lines if line.startswith("! ")]
    assert any(line.split() == ["megatron-core", "0.16.1"] for line in lines), done.stdout + done.stderr
    expected = (1, f"not ready for cpu: {len(remedies)} problem(s)") if remedies else (0, "ready for cpu")
    assert (done.returncode, last) == expected, done.stdout + done.stderr
