"""One vLLM server as a process of this machine: its command line, its environment, its start and its end.

The server runs by an interpreter of its own choice, in which vLLM is installed; nothing of vLLM is imported here. Owns
the process and its log; what is asked of the server over HTTP is others' (`fleet`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cppo.config import VllmConfig
from megatron_cppo.ranks import die_with_parent
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.health import Limits
from megatron_cppo.rollout.wire import MODEL
from megatron_cppo.serving import BUCKET_BYTES, GPU_SHARE

INSIDE = Path(__file__).parent / "inside_vllm"
"""On PYTHONPATH of the server: what vLLM loads of ours."""
MODULE = "megatron_cppo_in_vllm"
TRANSFER_BACKEND = "megatron_cppo"
KEY = "VLLM_API_KEY"
GRACE_SECONDS = 10.0
LIMITS = Limits(hang_seconds=120.0, start_seconds=1800.0, max_restarts=3)
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What all servers of a run have in common, and how they are looked after.

    Weights are sent in buckets of `bucket_bytes`, two in memory; one tensor may be larger.
    """

    vllm: VllmConfig
    model_path: str
    dtype: str
    device: str
    max_tokens: int
    max_sequences: int
    min_pixels: int
    max_pixels: int
    max_images: int
    transport: str
    bucket_bytes: int = BUCKET_BYTES
    limits: Limits = LIMITS
    num_on_cpu: int = 1


def command(plan: ServerPlan, *, port: int, seed: int) -> list[str]:
    """The command line of a server."""
    vllm = plan.vllm
    words = [vllm.python, "-m", "vllm.entrypoints.openai.api_server", "--model", plan.model_path]
    options: dict[str, str | int | float] = {
        "host": vllm.host,
        "port": port,
        "served-model-name": MODEL,
        "dtype": plan.dtype,
        "max-model-len": plan.max_tokens,
        "max-num-seqs": plan.max_sequences,
        "tensor-parallel-size": vllm.tensor_parallel,
        "seed": seed,
        "generation-config": "vllm",  # no top-p or top-k of the checkpoint's: the policy's distribution itself
        "logprobs-mode": "processed_logprobs",
        "limit-mm-per-prompt": json.dumps({"image": plan.max_images, "video": 0}),
        "mm-processor-kwargs": json.dumps({"min_pixels": plan.min_pixels, "max_pixels": plan.max_pixels}),
        "weight-transfer-config": json.dumps({"backend": TRANSFER_BACKEND}),
        "worker-extension-cls": f"{MODULE}.Extension",
        "middleware": f"{MODULE}.RequireKey",
        "uvicorn-log-level": "warning",
    }
    flags = ["--enable-scale-out"]  # the route for tokens in, tokens out
    if plan.device == "cpu":
        # A prompt that is read in two parts would end the server: a seeded draw is taken back then, which torch's
        # generators of a CPU cannot do.
        room = max(2048, plan.max_tokens)
        options |= {"kv-cache-memory-bytes": 2**26, "block-size": 32, "max-num-batched-tokens": room}
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
    else:
        options["gpu-memory-utilization"] = GPU_SHARE
        flags.append("--enable-sleep-mode")
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return [*words, *flags, *(f"--{argument}" for argument in vllm.arguments)]


def server_environment(
    plan: ServerPlan, *, key: str, gpus: Sequence[int], inherited: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a server. The key is here and not among the arguments, which every user of a machine sees."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MEGATRON_CPPO_WATCH")
    found = {name: value for name, value in inherited.items() if name not in ours}
    found |= {
        KEY: key,
        "PYTHONPATH": os.pathsep.join([str(INSIDE), *filter(None, [inherited.get("PYTHONPATH", "")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes of reinforcement learning
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if plan.device == "cpu":
        # Compiling a helper for log-probs would take the first request half a minute.
        # Bound to cores, all servers would have the same ones.
        return found | {
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1"),
        }
    return found | {"CUDA_VISIBLE_DEVICES": _visible(gpus, inherited.get("CUDA_VISIBLE_DEVICES", ""))}


def _visible(gpus: Sequence[int], inherited: str) -> str:
    """The GPUs of a server, counted among those that this process sees; these may be some of a machine's, or MIG's."""
    if not inherited:
        return ",".join(map(str, gpus))
    seen = inherited.split(",")
    if max(gpus) >= len(seen):
        raise EngineError(
            f"CUDA_VISIBLE_DEVICES is {inherited!r} and a server is to have GPUs {list(gpus)} of these; let every "
            "process see all of the job's GPUs of its machine, or start fewer servers"
        )
    return ",".join(seen[gpu] for gpu in gpus)


class ServerProcess:
    """A server that this process has started, and that ends with it."""

    def __init__(
        self,
        plan: ServerPlan,
        *,
        seed: int,
        key: str,
        gpus: Sequence[int],
        environment: Mapping[str, str],
        log: Path,
        port: int = 0,
    ) -> None:
        """Start it; it takes a minute or more until it answers. A `port` of 0 is chosen by the kernel.

        Raises EngineError when the port is taken, or the interpreter cannot be run.
        """
        self.port = free_port(plan.vllm.host, port)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        words = command(plan, port=self.port, seed=seed)
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    words,
                    env=server_environment(plan, key=key, gpus=gpus, inherited=environment),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_on_all_cores,
                )
        except OSError as error:
            raise EngineError(
                f"vllm.python: {plan.vllm.python} cannot be run ({error.strerror}); give the interpreter of an "
                "environment with vLLM"
            ) from error

    @property
    def pid(self) -> int:
        """Its process, which leads a session of its own."""
        return self._process.pid

    def ended(self) -> str:
        """Why it is over, with the end of its log; "" while it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return f"it {how}; the end of {self.log}:\n  " + "\n  ".join(line[-400:] for line in lines)

    def end(self) -> None:
        """End it and its workers, at once if it does not go by itself."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            deadline = time.monotonic() + GRACE_SECONDS
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        # Workers that outlive it clean up after themselves: shared memory, semaphores, their GPU's.
        deadline = time.monotonic() + GRACE_SECONDS
        while self._signal(0) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait(GRACE_SECONDS)

    def _signal(self, number: int) -> bool:
        """Whether there still was a process to have it."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def _on_all_cores() -> None:
    """In a new server: a scheduler binds a rank to its share of the cores, and a server works for several ranks."""
    die_with_parent()
    with contextlib.suppress(OSError):  # what a container allows is the container's
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def free_port(host: str, wanted: int = 0) -> int:
    """The wanted port, or (0) one that nobody listens on. Raises EngineError when the wanted one is taken.

    Who takes it before the server does makes that start fail; the next start chooses another.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, wanted), family=family) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise EngineError(
            f"{host}:{wanted} cannot be listened on ({os.strerror(error.errno or 0)}); end what listens there, or give "
            "another port"
        ) from error


def describe_problems(described: Mapping[str, object], plan: ServerPlan, expected: Mapping[str, object]) -> list[str]:
    """How what a server says of itself differs from what the run needs, one text for each."""
    wanted = {
        **expected,
        "logprobs_mode": "processed_logprobs",
        "transfer": TRANSFER_BACKEND,
    }
    found = [
        f"{name} is {described.get(name)}, the run needs {value}"
        for name, value in wanted.items()
        if described.get(name) != value
    ]
    length = described.get("max_model_len")
    if not isinstance(length, int) or length < plan.max_tokens:
        found.append(f"max_model_len is {length}, the run needs at least {plan.max_tokens}")
    return found
