"""Weights to the servers, bucket by bucket, without a disk: the trainer's side of `inside_vllm`.

Whole tensors come from the policy one at a time; they are laid side by side in one of two buffers, and while the
servers load one, the other is filled. The bytes go through memory that both sides map (shm on a CPU, ipc on a shared
GPU) or by a broadcast (gloo, nccl); what lies where goes over HTTP. A server has the new version when all of it is
loaded, all caches are empty and it says so itself; until then it is asked nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.rollout.buckets import BUFFERS, Buffers
from megatron_cppo.rollout.connection import listen_towards
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.fleet import Fleet
from megatron_cppo.rollout.health import Server

PROTOCOL = 2
"""What a server must say that it speaks; `inside_vllm` says the same."""
ALIGNMENT = 64
POLL_SECONDS = 0.0005
TIMEOUT = timedelta(minutes=2)
CACHES = ("prefix", "mm", "encoder")
"""Of a server; each of them holds what the old weights made (https://github.com/vllm-project/vllm/issues/44910)."""
Entry = tuple[str, str, list[int], int]


def checked(
    weights: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises EngineError at one that is unknown, repeated or misshapen, and at the end when some are
    missing: a server would keep its old ones and say nothing.
    """
    missing = dict(expected)
    for name, tensor in weights:
        if name not in missing:
            known = "was sent twice in one load" if name in expected else "is unknown to this model"
            raise EngineError(f"weight '{name}' {known}; send the names of its own checkpoint, each once")
        if tuple(tensor.shape) != missing[name]:
            raise EngineError(f"weight '{name}' has shape {tuple(tensor.shape)}, the model needs {missing[name]}")
        del missing[name]
        yield name, tensor
    if missing:
        raise EngineError(f"{len(missing)} weights are missing, the first: {sorted(missing)[:4]}; send all in one load")


@dataclass(eq=False, slots=True)
class WeightPush:
    """Sends the policy's weights to all usable servers. Called by all ranks of `group`; the one with the `fleet` speaks
    to them. `value_bytes` are those of the widest tensors' numbers.
    """

    fleet: Fleet | None
    transport: str
    bucket_bytes: int
    expected: Mapping[str, tuple[int, ...]]
    value_bytes: int
    device: torch.device
    group: dist.ProcessGroup | None
    num_bytes: int = 0
    """Of the last push."""
    num_buckets: int = 0
    _targets: list[tuple[Server, int]] = field(default_factory=list)
    """Who is sent these weights, and at which of its starts: one that is out and comes back amid them, lacks some."""
    _sent: tuple[list[Future[Any]], list[Future[Any]]] = field(default_factory=lambda: ([], []))
    _buffers: Buffers | None = None
    _broadcast: Any = None
    _met: tuple[tuple[int, int], ...] = ()

    def __call__(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Send all of them. Raises EngineError, on all ranks, when they are not those of the model: no server is asked
        anything then before a whole load. A server that fails alone is out alone.
        """
        self.num_bytes = self.num_buckets = 0
        complete = False
        self._agree(self._begin())
        try:
            self._send(weights)
            complete = True
        finally:
            if not complete:
                self._abandon()
                self._free()
        self._finish(version)
        self._free()

    def _begin(self) -> EngineError | None:
        """Have the servers ready to load. What keeps the driver from it is returned: the others would wait for it."""
        if self.fleet is not None:
            self.fleet.hold()
            self._targets = [(server, server.starts) for server in self.fleet.usable()]
            # A driver that was killed may have left a load open, which no route can end without knowing of it.
            new = [server for server in self._still_in() if server.state == "idle"]
            body = {"method": "megatron_cppo_end_load"}
            for call in [self.fleet.post(server, "/collective_rpc", body) for server in new]:
                self._survives(call)
        try:
            self._meet()
        except EngineError as error:
            return error
        self._all("/start_weight_update")
        return None

    def _still_in(self) -> list[Server]:
        """The targets that have had everything so far."""
        return [server for server, start in self._targets if server.usable and server.starts == start]

    def _agree(self, error: EngineError | None) -> None:
        """Raise the driver's error on all ranks."""
        shared = [error]
        if self.group is not None:
            dist.broadcast_object_list(shared, group=self.group, group_src=0)
        if shared[0] is not None:
            raise shared[0]

    def _meet(self) -> None:
        """Have buffers that the servers know: made once, and told again when a server is another."""
        largest = max(torch.Size(shape).numel() for shape in self.expected.values()) * self.value_bytes
        makes = self.fleet is not None or self.transport == "ipc"
        if self._buffers is None and makes:
            self._buffers = BUFFERS[self.transport](max(self.bucket_bytes, largest), self.device)
        told = [] if self._buffers is None else self._buffers.told
        if self.transport == "ipc":
            told = self._gathered(told)
        met = tuple((server.index, start) for server, start in self._targets)
        if met == self._met:
            return
        self._met = met
        if self.transport in ("shm", "ipc"):
            self._all("/init_weight_transfer_engine", {"init_info": {"transport": self.transport, "buffers": told}})
        elif self._targets:
            try:
                self._broadcast = self._broadcast_group()
            except (EngineError, RuntimeError) as error:
                self._break(str(error))

    def _gathered(self, told: list[Any]) -> list[Any]:
        """The handles of all ranks' buffers, by GPU."""
        every: list[list[Any]] = [told]
        if self.group is not None:
            every = [[]] * dist.get_world_size(self.group)
            dist.all_gather_object(every, told, group=self.group)
        return [{uuid: handle for rank in every for uuid, handle in rank[which].items()} for which in range(2)]

    def _broadcast_group(self) -> Any:
        """The driver as rank 0, and every worker of every server."""
        assert self.fleet is not None, "the driver alone broadcasts"
        servers = self._still_in()
        sizes = [_size(self.fleet.get(server, "/get_world_size").result()) for server in servers]
        world_size = 1 + sum(sizes)
        listener = listen_towards([server.url for server in servers])
        address, port = listener.getsockname()[:2]
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        first, meetings = 1, []
        for server, size in zip(servers, sizes, strict=True):
            info = {"address": address, "port": port, "world_size": world_size, "first_rank": first}
            body = {"init_info": {"transport": self.transport} | info}
            meetings.append(self.fleet.post(server, "/init_weight_transfer_engine", body))
            first += size
        prefixed = dist.PrefixStore("weights", store)
        if self.transport == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            group = dist.ProcessGroupNCCL(prefixed, 0, world_size, options)
        else:
            group = dist.ProcessGroupGloo(prefixed, 0, world_size, TIMEOUT)
        for meeting in meetings:
            meeting.result()
        return group

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        which, start = 0, 0
        tensors: list[Entry] = []
        for name, tensor in checked(weights, self.expected):
            room = 0 if self._buffers is None else len(self._buffers.raw[0])
            if tensors and start + tensor.nbytes > max(room, self.bucket_bytes):
                self._flush(which, start, tensors)
                which, start, tensors = 1 - which, 0, []
                self._await(which)
            assert tensor.nbytes <= room or self._buffers is None, (
                f"{name}: {tensor.nbytes} bytes, a bucket holds {room}"
            )
            if self._buffers is not None:
                self._buffers.raw[which][start : start + tensor.nbytes].copy_(_as_bytes(tensor))
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors.append((name, dtype, list(tensor.shape), start))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._flush(which, start, tensors)
        for each in (0, 1):
            self._await(each)

    def _flush(self, which: int, num_bytes: int, tensors: list[Entry]) -> None:
        """Have the servers load a buffer; returns before they have."""
        self.num_bytes += num_bytes
        self.num_buckets += 1
        self._same_place()
        if self.fleet is None:
            return
        place = {"number": self.num_buckets, "buffer": which, "num_bytes": num_bytes}
        body = {"update_info": {**place, "tensors": tensors}}
        self._sent[which].extend(self.fleet.post(server, "/update_weights", body) for server in self._still_in())
        if self._broadcast is not None and self._still_in():
            assert self._buffers is not None, "the driver has buffers"
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            try:
                self._arrives(self._broadcast.broadcast([self._buffers.raw[which][:num_bytes]], options), which)
            except RuntimeError as error:
                self._break(str(error))

    def _arrives(self, work: Any, which: int) -> None:
        """Wait for a broadcast, as long as all servers take part. Raises RuntimeError when one does not.

        NCCL's own wait returns before the bytes are there: the next bucket's table could overtake them, and a server
        that is gone would block the device for good.
        """
        while not work.is_completed():
            for call in self._sent[which]:
                if call.done() and call.exception() is not None:
                    raise RuntimeError(str(call.exception()))
            time.sleep(POLL_SECONDS)
        work.wait()

    def _await(self, which: int) -> None:
        """Until the servers have loaded a buffer, which may then be filled again."""
        for loaded in self._sent[which]:
            self._survives(loaded)
        self._sent[which].clear()
        self._same_place()

    def _same_place(self) -> None:
        """With buffers on every rank, none may be filled before all are read, or read before all are filled."""
        if self.transport == "ipc":
            torch.cuda.synchronize(self.device)
            if self.group is not None:
                dist.barrier(self.group)

    def _finish(self, version: int) -> None:
        """Only a server that says that it has the version, with empty caches, is asked again."""
        if self.fleet is None:
            return
        label = self.fleet.label(version)
        self._all("/finish_weight_update", {"weight_version": label})
        for cache in CACHES:
            self._all(f"/reset_{cache}_cache")
        for server in self._still_in():
            told = self._survives(self.fleet.get(server, "/weight_info"))
            if told != {"weight_version": label} and server.usable:
                self.fleet.fail(server, f"it has the weights {str(told)[:200]}, was sent {label}")
        self._all("/resume")
        self.fleet.version = version
        for server in self._still_in():
            self.fleet.has(server, version)
        self.fleet.let_go()

    def _free(self) -> None:
        """Give every rank's memory back to its policy until the next load; the servers have let go of it, too."""
        if self.transport == "ipc":
            self._buffers, self._met = None, ()

    def _abandon(self) -> None:
        """End a load that is not whole, so that another can begin; what a server has now has no version."""
        if self.fleet is None:
            return
        self.fleet.version = -1
        for sent in self._sent:
            sent.clear()
        if self._broadcast is not None:
            self._break("the weights were not all there")
        self._all("/finish_weight_update", {"weight_version": self.fleet.label(-1)})
        for server in self._still_in():
            self.fleet.lacks(server)

    def _break(self, why: str) -> None:
        """Give a broadcast up. It needs all of its servers: whose workers wait for bytes now, must be started again.

        The driver goes on with the weights, which the ranks gather together, and sends them to nobody.
        """
        assert self.fleet is not None, "the driver alone broadcasts"
        for server in self._still_in():
            self.fleet.fail(server, f"the broadcast of weights broke off ({why})")
        if self.transport == "nccl" and self._broadcast is not None:
            self._broadcast.abort()  # its kernel would wait on the device for ever
        self._targets, self._broadcast, self._met = [], None, ()

    def _all(self, path: str, body: Any = None) -> None:
        """Call a route of all servers that are still in."""
        if self.fleet is None:
            return
        for call in [self.fleet.post(server, path, body) for server in self._still_in()]:
            self._survives(call)

    def _survives(self, call: Future[Any]) -> Any:
        """What a call brings; None where its server failed, which is then out by itself."""
        try:
            return call.result()
        except EngineError as error:
            if self._broadcast is not None:
                self._break(str(error))
            return None


def _size(told: Any) -> int:
    """What a server says that it has workers. Raises EngineError when it says something else."""
    match told:
        case {"world_size": int(size)} if size > 0:
            return size
    raise EngineError(f"/get_world_size answered {str(told)[:200]}")


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
