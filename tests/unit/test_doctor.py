"""tools/doctor.py: each known-bad combination is named, and the real environment gets a verdict."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cppo.precision import PRECISIONS
from tools.doctor import (
    KNOWN_BAD,
    TORCH_FACTS,
    Device,
    Facts,
    Gpu,
    Package,
    describe,
    inspect_package,
    is_foreign_apex,
    numbers,
    problems,
    run_python,
    verdict,
)

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
    nccl="2.28.9",
    cudnn="9.19.0",
)
L40S, H200, B200, RTX5090 = (
    Gpu("L40S", 45.0, 8, 9),
    Gpu("H200", 139.0, 9),
    Gpu("B200", 180.0, 10),
    Gpu("5090", 32.0, 12),
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
            "build it for torch 2.13.0",
        ),
        (
            with_package(GPU_BOX, "transformer-engine", Package("2.9.0", "undefined symbol: cublasLtGroupedMatrix")),
            "cuda",
            "pip install --upgrade nvidia-cublas [github.com/NVIDIA/TransformerEngine/issues/2504]",
        ),
        (dataclasses.replace(GPU_BOX, gpus=(H200, H200), nccl=""), "cuda", "has no NCCL"),
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


BAD: dict[str, tuple[Facts, Facts]] = {
    "transformer-engine 2.8.1: Megatron-Core 0.16.1 was made for 2.9 to 2.11": (
        with_package(GPU_BOX, "transformer-engine", Package("2.8.1")),
        with_package(GPU_BOX, "transformer-engine", Package("2.9")),
    ),
    "transformer-engine 2.12.0: Megatron-Core 0.16.1 was made for 2.9 to 2.11": (
        with_package(GPU_BOX, "transformer-engine", Package("2.12.0")),
        with_package(GPU_BOX, "transformer-engine", Package("2.11.0")),
    ),
    "transformer-engine 2.9.0: gradients of packed attention are wrong": (
        dataclasses.replace(GPU_BOX, gpus=(RTX5090,)),
        dataclasses.replace(GPU_BOX, gpus=(B200,)),
    ),
    "cudnn 9.18.0: it has no backward of packed attention": (
        dataclasses.replace(GPU_BOX, gpus=(H200, L40S), cudnn="9.18.0"),
        dataclasses.replace(GPU_BOX, gpus=(H200, L40S), cudnn="9.18.1"),
    ),
    "cudnn 9.13.0: under torch 2.9 convolutions of images in bf16": (
        with_package(dataclasses.replace(GPU_BOX, cudnn="9.13.0"), "torch", Package("2.9.1+cu128")),
        with_package(dataclasses.replace(GPU_BOX, cudnn="9.13.0"), "torch", Package("2.10.0+cu128")),
    ),
    "nccl 2.29.2: collectives hang": (
        dataclasses.replace(GPU_BOX, gpus=(H200, H200), nccl="2.29.2"),
        dataclasses.replace(GPU_BOX, gpus=(H200, H200), nccl="2.29.3"),
    ),
    "cuda 12.6: it has no kernels for compute capability 10.0": (
        dataclasses.replace(GPU_BOX, gpus=(B200,), cuda="12.6"),
        dataclasses.replace(GPU_BOX, gpus=(B200,), cuda="12.8"),
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_each_known_bad_combination_is_named_with_its_source(said: str) -> None:
    bad, good = BAD[said]
    (found,) = problems(bad, "cuda")
    assert found.startswith(said)
    assert found.endswith("]")
    assert problems(good, "cuda") == []
    assert problems(dataclasses.replace(bad, nvidia_device=False, gpus=()), "cpu") == []


def test_every_entry_has_a_test_a_remedy_and_a_source() -> None:
    assert len(BAD) == len(KNOWN_BAD)
    for entry in KNOWN_BAD:
        assert any(entry.happens.startswith(said.partition(": ")[2]) for said in BAD)
        assert entry.remedy
        assert "." in entry.source.partition("/")[0]


def test_versions_are_compared_by_their_numbers() -> None:
    assert [numbers(text) for text in ("2.9.0+cu130", "9.18.1", "2.12.0.dev0+abc", "13.0", "")] == [
        (2, 9),
        (9, 18, 1),
        (2, 12),
        (13,),
        (),
    ]


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (GPU_BOX, "H200, 139 GiB, compute capability 9.0: fp32, bf16, fp8_delayed, fp8_tensorwise, fp8_blockwise"),
        (dataclasses.replace(GPU_BOX, gpus=(L40S,)), "8.9: fp32, bf16, fp8_delayed, fp8_tensorwise"),
        (dataclasses.replace(GPU_BOX, gpus=(B200,)), f"10.0: {', '.join(PRECISIONS)}"),
        (with_package(GPU_BOX, "transformer-engine", ABSENT), "9.0: fp32, bf16"),
        (with_package(GPU_BOX, "transformer-engine", Package("2.9.0", "undefined symbol")), "9.0: fp32, bf16"),
    ],
)
def test_what_a_gpu_computes_in_is_told(facts: Facts, wanted: str) -> None:
    lines = dict(describe(facts))
    assert lines["gpu 0"].endswith(wanted)
    assert (lines["nccl of torch"], lines["cudnn of torch"]) == ("2.28.9", "9.19.0")


def test_the_facts_of_torch_are_read() -> None:
    output, error = run_python(TORCH_FACTS)
    assert not error
    found = json.loads(output)
    assert found.keys() == {"cuda", "gpus", "nccl", "cudnn"}
    if not found["cuda"]:
        assert found == {"cuda": "", "gpus": [], "nccl": "", "cudnn": ""}
