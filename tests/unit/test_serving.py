"""What is checked before any server is started, and what servers are started with."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.digits import make_data, make_model
from megatron_cppo import config as configuration
from megatron_cppo import serving
from megatron_cppo.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
    VllmConfig,
)
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.families import read_shape
from megatron_cppo.rollout.buckets import BUFFERS
from megatron_cppo.rollout.build import server_plan
from megatron_cppo.rollout.connection import listen_towards
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.server import command, describe_problems, server_environment
from megatron_cppo.rollout.vllm import Slot, slots
from megatron_cppo.rollout.weight_push import checked
from megatron_cppo.train import read_config
from tests.published_models import CONFIGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    make_model(folder / "model", seed=3)
    make_data(folder, seed=3, num_train=12, num_warm=1, num_evaluation=1)
    return folder


def config(folder: Path, device: Any = "cpu", **vllm: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(folder / "model"), min_pixels=3136, max_pixels=50_000),
        data=DataConfig(train=(str(folder / "train.parquet"),), max_prompt_tokens=100),
        rollout=RolloutConfig(engine="vllm", max_response_tokens=50, max_sequences=7),
        policy=PolicyConfig(device=device, precision="fp32"),
        vllm=VllmConfig(**vllm),
    )


@pytest.mark.parametrize(
    ("inherited", "gpus", "seen"),
    [("", (2, 3), "2,3"), ("4,5,6,7", (2, 3), "6,7"), ("MIG-aaaa,MIG-bbbb", (1,), "MIG-bbbb")],
)
def test_a_server_sees_the_job_s_own_gpus(inherited: str, gpus: tuple[int, ...], seen: str, folder: Path) -> None:
    plan = server_plan(config(folder, "cuda"), max_images=1)
    environment = {"CUDA_VISIBLE_DEVICES": inherited} if inherited else {}
    assert server_environment(plan, key="k", gpus=gpus, inherited=environment)["CUDA_VISIBLE_DEVICES"] == seen


def test_a_server_cannot_have_gpus_that_the_process_does_not_see(folder: Path) -> None:
    plan = server_plan(config(folder, "cuda"), max_images=1)
    with pytest.raises(EngineError, match=r"'3' and a server is to have GPUs \[0, 1\]"):
        server_environment(plan, key="k", gpus=(0, 1), inherited={"CUDA_VISIBLE_DEVICES": "3"})


def test_weights_are_broadcast_from_where_the_servers_reach_this_machine() -> None:
    with listen_towards(["http://127.0.0.1:8000", "http://localhost:8001"]) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    if mine := own_address():
        with listen_towards(["http://192.0.2.7:8000"]) as listener:
            assert listener.getsockname()[0] == mine
        with pytest.raises(EngineError, match=r"127\.0\.0\.1:8000 is on this machine's loopback, and others are not"):
            listen_towards(["http://127.0.0.1:8000", "http://192.0.2.7:8000"])
    with pytest.raises(EngineError, match=r"http://no\.such\.machine\.invalid:8000 cannot be reached"):
        listen_towards(["http://no.such.machine.invalid:8000"])


def own_address() -> str:
    """Towards an address for documentation, which is routed like any other; "" on a machine without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.7", 8000))
        except OSError:
            return ""
        return probe.getsockname()[0]


def test_shared_buffers_have_no_name_and_are_seen_by_both_sides() -> None:
    buffers = BUFFERS["shm"](4096, torch.device("cpu"))
    mapped = [torch.from_file(told["path"], shared=True, size=4096, dtype=torch.uint8) for told in buffers.told]
    for number, raw in enumerate(buffers.raw, 1):
        raw.fill_(number)
    assert [int(other.sum()) for other in mapped] == [4096, 2 * 4096]
    paths = [Path(told["path"]) for told in buffers.told]
    assert all(path.exists() for path in paths)
    del buffers, raw
    assert not any(path.exists() for path in paths)
    assert [int(other.sum()) for other in mapped] == [4096, 2 * 4096]


def test_what_servers_hold_of_a_large_model(tmp_path: Path) -> None:
    """Qwen2.5-VL-72B in bf16 on 64 GPUs, by hand: 80 layers, 8 heads of keys of 128, vocabulary 152,064 x 8,192."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-VL-72B-Instruct"]))
    shape = read_shape(str(tmp_path))
    chosen = Config(
        data=DataConfig(max_prompt_tokens=1024),
        rollout=RolloutConfig(engine="vllm", max_response_tokens=4096),
        trainer=TrainerConfig(num_gpus=64),
        vllm=VllmConfig(tensor_parallel=4),
    )
    placed = serving.placement(chosen, shape, value_bytes=2)
    assert placed is not None
    assert (placed.where, placed.num_servers, placed.gpus_per_server, placed.transport) == ("colocated", 16, 4, "ipc")
    vision = shape.vision.num_parameters
    assert placed.weights_gib * 2**30 == 2 * ((shape.num_parameters - vision) / 4 + vision)
    assert placed.kv_gib_per_sequence * 2**30 == 2 * 80 * (8 // 4) * 128 * (1024 + 4096) * 2
    assert placed.buckets_gib * 2**30 == 2 * 152064 * 8192 * 2
    assert serving.memory_problem(chosen, placed, gpu_gib=80) == ""
    narrow = dataclasses.replace(chosen, vllm=VllmConfig(tensor_parallel=2))
    placed = serving.placement(narrow, shape, value_bytes=2)
    assert placed is not None
    assert "each of its 2 GPUs" in serving.memory_problem(narrow, placed, gpu_gib=80)
    raised = dataclasses.replace(narrow, vllm=VllmConfig(tensor_parallel=2, arguments=("gpu-memory-utilization=0.9",)))
    assert serving.memory_problem(raised, placed, gpu_gib=80) == ""
    assert serving.placement(dataclasses.replace(chosen, rollout=RolloutConfig()), shape, value_bytes=2) is None


@pytest.mark.parametrize(
    ("vllm", "says"),
    [
        ({"addresses": ("node7:8000",)}, "'node7:8000' is no http://host:port"),
        ({"addresses": ("http://",)}, "'http://' is no http://host:port"),
        ({"addresses": ("http://a:1/v1",)}, "'http://a:1/v1' is no http://host:port"),
        ({"addresses": ("http://a",)}, "'http://a' names no port from 1 to 65535"),
        ({"addresses": ("http://a:70000",)}, "'http://a:70000' names no port from 1 to 65535"),
        ({"addresses": ("http://a:1", "http://b:1", "http://a:1")}, "http://a:1 is named twice"),
        (
            {"arguments": ("gpu-memory-utilization=much",)},
            "is no number (could not convert string to float: 'much'",
        ),
        ({"arguments": ("gpu_memory_utilization=1.5",)}, "gpu-memory-utilization 1.5 is outside (0, 1]"),
        ({"arguments": ("--enforce-eager",)}, "'--enforce-eager' is no name or name=value; write it without dashes"),
        ({"arguments": ("swap-space 4",)}, "'swap-space 4' is no name or name=value"),
        ({"arguments": ("=4",)}, "'=4' is no name or name=value"),
        ({"tensor_parallel": 3}, "3 does not divide the model's 4 attention heads"),
    ],
)
def test_what_cannot_work_is_named(vllm: dict[str, Any], says: str, folder: Path) -> None:
    found = serving.problems(config(folder, **vllm), read_shape(str(folder / "model")))
    assert len(found) == 1, found
    assert says in found[0]
    embedded = dataclasses.replace(config(folder, **vllm), rollout=RolloutConfig())
    assert serving.problems(embedded, read_shape(str(folder / "model"))) == []


def test_colocated_servers_on_gpus(folder: Path) -> None:
    chosen = config(folder, "cuda", tensor_parallel=4)
    assert "the trainer has 1; use fewer" in serving.problems(chosen, None)[0]
    more = dataclasses.replace(chosen, trainer=TrainerConfig(num_gpus=8))
    assert serving.problems(more, None) == []
    uneven = dataclasses.replace(more, trainer=TrainerConfig(num_gpus=6))
    assert "leaves 2 of the trainer's 6 GPUs without a server" in serving.problems(uneven, None)[0]
    ahead = dataclasses.replace(more, rollout=dataclasses.replace(more.rollout, max_staleness=1))
    assert "cannot run ahead" in serving.problems(ahead, None)[0]
    apart = dataclasses.replace(ahead, vllm=VllmConfig(addresses=("http://a:1", "https://b:2/")))
    assert serving.problems(apart, None) == []
    ways = [serving.transport(config(folder, d, addresses=a)) for d in ("cpu", "cuda") for a in ((), ("http://a:1",))]
    assert ways == ["shm", "gloo", "ipc", "nccl"]


def test_an_interpreter_without_vllm_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no vLLM; give the interpreter of an environment with it"):
        serving.refuse_interpreter(config(folder, python=sys.executable))
    with pytest.raises(ConfigError, match="cannot be run"):
        serving.refuse_interpreter(config(folder, python=str(tmp_path / "none")))
    old = tmp_path / "python"
    for version, refused in (("0.31.2", True), ("0.32.0", False), ("1.0", False)):
        old.write_text(f"#!/bin/sh\necho {version}\n")
        old.chmod(0o755)
        if refused:
            with pytest.raises(ConfigError, match=r"has vLLM 0.31.2; needed is 0.32 or newer"):
                serving.refuse_interpreter(config(folder, python=str(old)))
        else:
            serving.refuse_interpreter(config(folder, python=str(old)))
    serving.refuse_interpreter(config(folder, python="none", addresses=("http://a:1",)))


def test_a_server_is_started_for_the_run_and_the_key_is_no_argument(folder: Path) -> None:
    plan = server_plan(config(folder, arguments=("swap-space=1",)), max_images=3)
    words = command(plan, port=4321, seed=9)
    options = dict(zip(words, [*words[1:], ""], strict=True))
    assert options["--model"] == str(folder / "model")
    assert (options["--port"], options["--seed"], options["--max-model-len"]) == ("4321", "9", "150")
    assert (options["--max-num-seqs"], options["--dtype"], options["--host"]) == ("7", "float32", "127.0.0.1")
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 3, "video": 0}
    assert json.loads(options["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 50_000}
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert words[-1] == "--swap-space=1"
    inherited = {"RANK": "1", "MASTER_PORT": "1", "HOME": "/h", "PYTHONPATH": "/p"}
    made = server_environment(plan, key="secret", gpus=(), inherited=inherited)
    assert "secret" not in " ".join(words)
    assert made["VLLM_API_KEY"] == "secret"
    assert "RANK" not in made
    assert "MASTER_PORT" not in made
    first, *others = made["PYTHONPATH"].split(":")
    assert (Path(first) / "megatron_cppo_in_vllm.py").is_file()
    assert others == ["/p"]
    on_gpus = dataclasses.replace(plan, device="cuda")
    assert server_environment(on_gpus, key="k", gpus=(2, 3), inherited={})["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "--enable-sleep-mode" in command(on_gpus, port=1, seed=0)


def test_the_servers_arguments_are_read_from_a_flag_and_from_a_saved_config(folder: Path, tmp_path: Path) -> None:
    chosen = ("gpu-memory-utilization=0.5", "enforce-eager")
    saved = tmp_path / "config.json"
    configuration.save(config(folder, arguments=chosen), saved)
    assert read_config(str(saved), []) == config(folder, arguments=chosen)
    assert read_config(str(saved), ["--vllm.arguments", *chosen[:1]]).vllm.arguments == chosen[:1]


def test_servers_share_no_gpu_and_cross_no_machine() -> None:
    hosts, gpus = ["a"] * 4 + ["b"] * 3, [0, 1, 2, 3, 0, 1, 2]
    assert slots(hosts, gpus, tensor_parallel=2) == [Slot(0, (0, 1)), Slot(2, (2, 3)), Slot(4, (0, 1))]
    assert slots(hosts, gpus, tensor_parallel=4) == [Slot(0, (0, 1, 2, 3))]


def test_another_model_and_other_settings_are_told_apart(folder: Path) -> None:
    plan = server_plan(config(folder), max_images=1)
    expected = {"hidden_size": 128, "dtype": "float32"}
    right = {
        **expected,
        "logprobs_mode": "processed_logprobs",
        "transfer": "megatron_cppo",
        "max_model_len": 150,
    }
    assert describe_problems(right, plan, expected) == []
    for name, value in {
        "hidden_size": 64,
        "dtype": "bfloat16",
        "logprobs_mode": "raw_logprobs",
        "transfer": "nccl",
    }.items():
        (found,) = describe_problems({**right, name: value}, plan, expected)
        assert found == f"{name} is {value}, the run needs {right[name]}"
    assert describe_problems({**right, "max_model_len": 149}, plan, expected) == [
        "max_model_len is 149, the run needs at least 150"
    ]
    assert len(describe_problems({}, plan, expected)) == 5


def test_weights_that_are_not_the_models_are_refused() -> None:
    expected = {"a": (2,), "b": (3, 1)}
    a, b = ("a", torch.ones(2)), ("b", torch.ones(3, 1))
    assert [name for name, _ in checked([b, a], expected)] == ["b", "a"]
    for tensors, says in (
        ([a], r"1 weights are missing, the first: \['b'\]"),
        ([a, b, ("c", torch.ones(1))], "'c' is unknown"),
        ([a, a, b], "'a' was sent twice"),
        ([("a", torch.ones(3)), b], r"'a' has shape \(3,\)"),
    ):
        with pytest.raises(EngineError, match=says):
            list(checked(tensors, expected))


def test_the_picture_that_is_sent_is_the_one_that_is_cut_up(folder: Path) -> None:
    """An image processor that is given it has nothing left to do: the same patches, to the bit."""
    chosen = config(folder)
    for pixels in ((3136, 50_000), (100_000, 200_000)):  # as it is, and enlarged
        model = dataclasses.replace(chosen.model, min_pixels=pixels[0], max_pixels=pixels[1])
        source = PromptSource(
            chosen.data.train,
            split="train",
            model_path=model.path,
            data=dataclasses.replace(chosen.data, max_prompt_tokens=1000),
            model=model,
            perception=PerceptionConfig(),
            seed=0,
        )
        assert source.max_images == 1
        for prompt in source.take(0, 4):
            (key,) = prompt.images("original")
            (grid,) = prompt.grids
            sent = source._reader.decode(source.png(key), grid)
            assert sent.size == (14 * grid.width, 14 * grid.height)
            assert torch.equal(source._reader.patches(sent, grid), source.pixels(key))
