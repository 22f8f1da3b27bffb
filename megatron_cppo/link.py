"""Lines between the launchers of a run that a scheduler started: rank 0's is the hub, the others connect to it.

Owns sockets and the framing of messages (a JSON object a line). Must not know what the messages mean (`launch`). A
launcher that is killed is noticed at once, as the kernel closes its connection; a machine that is gone, within 40 s.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
_SEND_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_LINGER_SECONDS = 2.0
_STRANGER_BYTES = 1 << 16
_DEAD_SECONDS = 40


@dataclass(eq=False, slots=True)
class Peer:
    """One connection; `rank` is -1 until the other side has said which rank it has."""

    socket: socket.socket
    rank: int = -1
    received: bytearray = field(default_factory=bytearray)

    def send(self, message: Message) -> None:
        """Send; a peer that is gone is noticed when it is read."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


class Link:
    """The open connections of one launcher: of the hub to all others, or of another one to the hub."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None

    def listen(self, port: int) -> None:
        """Become the hub. Raises OSError when the port is taken."""
        self._server = open_server("", port)
        self._selector.register(self._server, selectors.EVENT_READ)

    def connect(self, address: str, port: int, timeout_seconds: float) -> None:
        """Connect to the hub, which may be still starting. Raises OSError when it does not come."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self._add(socket.create_connection((address, port), timeout=_SEND_SECONDS))
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def poll(self, timeout_seconds: float) -> Iterator[tuple[Peer, Message | None]]:
        """What has come, or comes within the time; None says that the peer is gone."""
        for key, _ in self._selector.select(timeout_seconds):
            if key.fileobj is self._server:
                assert self._server is not None, "an event of no server"
                self._add(self._server.accept()[0])
            else:
                yield from self._read(key.data)

    def send_all(self, message: Message) -> None:
        """Send to every peer that has named its rank."""
        for peer in self.peers:
            if peer.rank >= 0:
                peer.send(message)

    def drop(self, peer: Peer) -> None:
        """Close a connection."""
        if peer in self.peers:
            self.peers.remove(peer)
            self._selector.unregister(peer.socket)
            peer.socket.close()

    def close(self) -> None:
        """Close everything, when the other sides have read what was sent, or two seconds have passed."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _LINGER_SECONDS
        # Closing with unread bytes would make the kernel throw away what the other side has not read yet.
        while any(peer.rank >= 0 for peer in self.peers) and time.monotonic() < deadline:
            for _ in self.poll(_RETRY_SECONDS):
                pass
        for peer in list(self.peers):
            self.drop(peer)
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_SECONDS)
        _notice_dead_machine(connection)
        peer = Peer(connection)
        self.peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: Peer) -> Iterator[tuple[Peer, Message | None]]:
        try:
            data = peer.socket.recv(1 << 20)
        except OSError:
            data = b""
        peer.received += data
        if peer.rank < 0 and len(peer.received) > _STRANGER_BYTES:
            data = b""
        while (end := peer.received.find(b"\n")) >= 0:
            line = bytes(peer.received[:end])
            del peer.received[: end + 1]
            try:
                message = json.loads(line)
            except ValueError:
                data = b""  # no launcher: somebody tries the port
                break
            if isinstance(message, dict):
                yield peer, message
        if not data:
            self.drop(peer)
            yield peer, None


def open_server(address: str, port: int) -> socket.socket:
    """A listening socket ("": of all interfaces). A port of 0 is chosen by the kernel; `port_of` says which."""
    if address == "" and socket.has_dualstack_ipv6():
        return socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server((address, port), backlog=4096)


def port_of(server: socket.socket) -> int:
    """The port that a listening socket has."""
    return server.getsockname()[1]


def _notice_dead_machine(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_SECONDS)
