"""The rollout engine that users run: one or many vLLM servers, driven over HTTP by rank 0.

Rank 0 holds the `Fleet`; every rank owns the servers of its GPUs, as processes, and has the policy's weights at hand.
So whatever the fleet needs meanwhile, a server that died started again or sent its weights, all ranks do together,
between two beats of a loop that rank 0 leads. Processes are `server`'s, questions `fleet`'s, weights `weight_push`'s.
"""

from __future__ import annotations

import base64
import logging
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.rollout import wire
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.fleet import Fleet, Todo
from megatron_cppo.rollout.sampling import uniform_numbers
from megatron_cppo.rollout.server import ServerPlan, ServerProcess, describe_problems
from megatron_cppo.rollout.weight_push import WeightPush
from megatron_cppo.types import Group, ImageKey, Prompt, Sample

LOG = logging.getLogger("megatron_cppo")
BEAT_SECONDS = 2.0
ENCODERS = 4
INCOMPLETE = "the weights are incomplete since the last load failed; load all of them first"
Weights = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a server runs: started by `rank` on its machine with these GPUs, or found at `url`."""

    rank: int
    gpus: tuple[int, ...] = ()
    url: str = ""


def slots(hosts: Sequence[str], gpus: Sequence[int], *, tensor_parallel: int) -> list[Slot]:
    """Servers on the GPUs of the trainer's ranks, `tensor_parallel` of one machine each.

    >>> slots(["a", "a", "b", "b"], [0, 1, 0, 1], tensor_parallel=2)
    [Slot(rank=0, gpus=(0, 1), url=''), Slot(rank=2, gpus=(0, 1), url='')]
    """
    found = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, other in enumerate(hosts) if other == host]
        for start in range(0, len(ranks) - tensor_parallel + 1, tensor_parallel):
            chosen = ranks[start : start + tensor_parallel]
            found.append(Slot(chosen[0], tuple(gpus[rank] for rank in chosen)))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What the engine asks of the run."""

    picture: Callable[[ImageKey], bytes]
    """An image as the tower's patches will be cut from it, resized already, as PNG."""
    decode: Callable[[Sequence[int]], str]
    """A response's text, end token included."""
    weights: Weights
    """The policy's, of the version that was loaded last; all ranks iterate together."""
    beat: Callable[[], None] = lambda: None
    """Heard every few seconds while the engine waits."""


class VllmEngine:
    """See `Engine` for what the methods promise. Tickets may be many, and weights change while they are open.

    A sample's random numbers depend on (seed, salt, prompt, index) alone, by a seed for each request; probabilities,
    and so now and then a draw, depend on what else is decoded with it, as they do in every batching engine.
    """

    def __init__(
        self,
        plan: ServerPlan,
        rules: wire.Rules,
        callbacks: Callbacks,
        *,
        places: Sequence[Slot],
        expected: Mapping[str, tuple[int, ...]],
        model: Mapping[str, object],
        environment: Mapping[str, str],
        seed: int,
        key: str,
        group: dist.ProcessGroup | None,
        device: torch.device,
        log_dir: Path,
    ) -> None:
        """Start the servers (they come up while the policy is built), or find them. Called by all ranks alike.

        `expected` are the tensors that a load must bring, `model` what a server must say of its model; `key` "" draws
        one. `group` is waited in for long: better one of the CPU's. Raises EngineError.
        """
        self._plan, self._rules, self._calls, self._places = plan, rules, callbacks, tuple(places)
        self._device = device
        self._model, self._seed, self._group, self._log_dir = model, seed, group, log_dir
        self._rank = 0 if group is None else dist.get_rank(group)
        self._environment = environment
        self._key, label = self._share((key or secrets.token_urlsafe(32), secrets.token_hex(4)))
        self.fleet: Fleet | None = None
        if self._rank == 0:
            self.fleet = Fleet(
                rules,
                key=self._key,
                label=label,
                max_sequences=plan.max_sequences,
                limits=plan.limits,
            )
        self._push = WeightPush(
            fleet=self.fleet,
            transport=plan.transport,
            bucket_bytes=plan.bucket_bytes,
            expected=expected,
            value_bytes=getattr(torch, plan.dtype).itemsize,
            device=device,
            group=group,
        )
        self._processes: dict[int, ServerProcess] = {}
        self._version: int | None = None
        self._awake = True
        self._tickets: dict[int, tuple[Sequence[Prompt], Any]] = {}
        self._encoders = ThreadPoolExecutor(ENCODERS, "pictures")
        self._start(range(len(self._places)))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        temperature: float,
        salt: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """One group of answers for each prompt, the same list on every rank; see `Engine.generate`."""
        ticket = self.submit(prompts, samples_per_prompt=samples_per_prompt, temperature=temperature, salt=salt)
        return self.collect(ticket, advance=advance)

    def submit(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, temperature: float, salt: int = 0) -> int:
        """Have the prompts answered in the background; returns the ticket for `collect`."""
        if self._version is None:
            raise EngineError(INCOMPLETE)
        if not self._awake:
            raise EngineError("the engine is asleep; wake it before generating")
        if samples_per_prompt < 1 or temperature < 0:
            raise EngineError(
                f"need samples_per_prompt >= 1 and temperature >= 0, got {samples_per_prompt} and {temperature}"
            )
        number = max(self._tickets, default=0) + 1
        asked = None
        if self.fleet is not None:
            images = self._encoders.map(self._pictures, prompts)
            # vLLM wants greedy samples one by one.
            count = samples_per_prompt if temperature else 1
            asked = self.fleet.submit(
                [
                    wire.Question(
                        place=place,
                        prompt=prompt,
                        images=pictures,
                        index=index,
                        count=count,
                        temperature=temperature,
                        seed=_seed(self._seed, salt, prompt),
                    )
                    for place, (prompt, pictures) in enumerate(zip(prompts, images, strict=True))
                    for index in range(0, samples_per_prompt, count)
                ]
            )
        self._tickets[number] = prompts, asked
        return number

    def collect(self, ticket: int, *, advance: Callable[[int], None] | None = None) -> list[Group]:
        """The groups of a ticket, once all of its prompts are answered; see `Engine.collect`."""
        prompts, asked = self._tickets[ticket]
        num_ranks, told = (1 if self._group is None else dist.get_world_size(self._group)), 0
        for todo in self._todos(asked):
            if advance is not None and todo.num_answers // num_ranks > told:
                advance(todo.num_answers // num_ranks - told)
                told = todo.num_answers // num_ranks
        del self._tickets[ticket]
        return self._share(None if asked is None else self._groups(prompts, asked))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Send all weights to all servers; answers that are being sampled go on under them. See `Engine.load_weights`.

        A server that fails meanwhile is asked nothing, is started again when answers are next waited for, and then sent
        the weights before anything else.
        """
        for _ in self._todos(None):
            pass
        self._version = None
        self._examine()
        self._share(self._next(None))
        self._push(weights, version=version)
        self._version = version

    @property
    def pushed(self) -> tuple[int, int]:
        """Bytes and buckets of the last load."""
        return self._push.num_bytes, self._push.num_buckets

    def sleep(self) -> None:
        """Have the servers give their GPUs' memory away; what weights they have is lost (`load_weights` follows).

        One that is being started again is awaited: it would take memory in the middle of an update.
        """
        self._awake = False
        if not self._plan.vllm.addresses:
            for _ in self._todos(None, all_up=True):
                pass
            self._everywhere("/sleep", level="2")
            if self.fleet is not None:
                for server in self.fleet.usable():
                    self.fleet.lacks(server)

    def wake(self) -> None:
        """Have the servers take their memory back."""
        if not self._plan.vllm.addresses:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what the policy does not use now, on this rank's GPU
            self._share(None)
            self._everywhere("/wake_up")
        self._awake = True

    def close(self) -> None:
        """End the servers that were started here, and all connections."""
        if self.fleet is not None:
            self.fleet.close()
        self._encoders.shutdown(cancel_futures=True)
        for process in self._processes.values():
            process.end()

    def _everywhere(self, path: str, **query: str) -> None:
        """Call a route of every server; all ranks go on once all have answered."""
        if self.fleet is not None:
            for call in [self.fleet.post(server, path, **query) for server in self.fleet.usable()]:
                call.exception()  # whose server fails, is out
        self._share(None)

    def _todos(self, asked: Any, *, all_up: bool = False) -> Iterator[Todo]:
        """Do what the fleet needs until `asked` is answered (None: until weights can be sent, with `all_up` until no
        server is being started); every beat is yielded.
        """
        while True:
            todo: Todo = self._share(self._next(asked, all_up=all_up))
            self._bury(todo.dropped)
            yield todo
            self._calls.beat()
            if todo.kind == "done":
                return
            if todo.kind == "start":
                self._start(todo.servers)
            elif todo.kind == "sync":
                if self._version is None:
                    raise EngineError(INCOMPLETE)
                LOG.info("weights of step %d for servers %s", self._version, list(todo.servers))
                self._examine()
                self._push(self._calls.weights(), version=self._version)

    def _examine(self) -> None:
        """Do without servers that have another model, or other settings, than the run needs."""
        if self.fleet is None:
            return
        for server in self.fleet.usable():
            if server.state == "idle":
                call = self.fleet.post(server, "/collective_rpc", {"method": "megatron_cppo_describe"})
                if call.exception() is not None:
                    continue
                match call.result():
                    case {"results": [{**described}, *_]}:
                        server.why = "; ".join(describe_problems(described, self._plan, self._model))
                        if server.why:
                            self.fleet.drop(server)
                    case other:
                        self.fleet.fail(server, f"/collective_rpc answered {str(other)[:200]}")

    def _next(self, asked: Any, *, all_up: bool = False) -> Todo | EngineError | None:
        if self.fleet is None:
            return None
        try:
            return self.fleet.todo(asked, seconds=BEAT_SECONDS, all_up=all_up)
        except EngineError as error:
            return error

    def _share(self, mine: Any) -> Any:
        """Rank 0's, on all ranks; an error of it is raised on all."""
        shared = [mine]
        if self._group is not None:
            dist.broadcast_object_list(shared, group=self._group, group_src=0)
        if isinstance(shared[0], EngineError):
            raise shared[0]
        return shared[0]

    def _gather(self, mine: dict[int, str]) -> dict[int, str]:
        """What the ranks say of their servers, on all ranks."""
        if self._group is None:
            return mine
        every: list[dict[int, str]] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(every, mine, group=self._group)
        return {index: text for said in every for index, text in said.items()}

    def _bury(self, dropped: Iterable[int]) -> None:
        """End what is given up, and tell the fleet of servers whose process is over."""
        for index in dropped:
            if index in self._processes:
                self._processes.pop(index).end()
        dead = self._gather({index: why for index, process in self._processes.items() if (why := process.ended())})
        if self.fleet is not None:
            for index, why in dead.items():
                self.fleet.fail(self.fleet.servers[index], why)

    def _start(self, indices: Iterable[int]) -> None:
        """Start servers, or start them again."""
        urls: dict[int, str] = {}
        failures: dict[int, str] = {}
        for index in indices:
            place = self._places[index]
            if place.rank == self._rank:
                try:
                    urls[index] = place.url or self._start_here(index, place)
                except EngineError as error:
                    failures[index] = str(error)
        urls, failures = self._gather(urls), self._gather(failures)
        if failures:
            raise EngineError("; ".join(failures.values()))
        if self.fleet is not None:
            for index in indices:
                self.fleet.started(index, urls[index], ours=not self._places[index].url)

    def _start_here(self, index: int, place: Slot) -> str:
        if index in self._processes:
            self._processes.pop(index).end()
        process = ServerProcess(
            self._plan,
            seed=self._seed + index,
            key=self._key,
            gpus=place.gpus,
            environment=self._environment,
            log=self._log_dir / f"vllm{index}.log",
        )
        self._processes[index] = process
        host = self._plan.vllm.host
        reached = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        LOG.info("server %d starts at %s:%d, log %s", index, reached, process.port, process.log)
        return f"http://{reached}:{process.port}"

    def _pictures(self, prompt: Prompt) -> tuple[str, ...]:
        return tuple(
            f"data:image/png;base64,{base64.b64encode(self._calls.picture(key)).decode()}"
            for key in prompt.images("original")
        )

    def _groups(self, prompts: Sequence[Prompt], asked: Any) -> list[Group]:
        count = len(asked.answers) // len(prompts)
        return [
            Group(prompt, tuple(self._sample(prompt, index, *asked.answers[place, index]) for index in range(count)))
            for place, prompt in enumerate(prompts)
        ]

    def _sample(self, prompt: Prompt, index: int, parts: Sequence[wire.Part], truncated: bool) -> Sample:
        tokens = tuple(token for part in parts for token in part.token_ids)
        return Sample(
            prompt=prompt,
            index=index,
            token_ids=tokens,
            logp=tuple(value for part in parts for value in part.logp),
            text=self._calls.decode(tokens),
            truncated=truncated,
            version=parts[-1].version,
            earlier=_earlier(parts),
        )


def _earlier(parts: Sequence[wire.Part]) -> tuple[tuple[int, int], ...]:
    """(version, tokens) of the parts before the last version's."""
    found: dict[int, int] = {}
    for part in parts:
        found[part.version] = found.get(part.version, 0) + len(part.token_ids)
    del found[parts[-1].version]
    return tuple(found.items())


def _seed(seed: int, salt: int, prompt: Prompt) -> int:
    """Of the prompt's first sample; the next samples' follow it."""
    return int(uniform_numbers(1, seed, salt, prompt.split, prompt.row, prompt.epoch)[0] * 2**62)
