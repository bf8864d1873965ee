"""Who may speak to our sockets; and accidents that such a peer may have, which are to cost it alone.

Garbage and halves of requests are raw bytes and hand-made HTTP/2 over the real process's socket. After each the
kubelet's stream must bring news.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from bare import bare_client, connected
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from kubelet import GrpcKubelet
from loop import run
from names import FIRST_GPU
from structlog.testing import capture_logs
from trials import QUICK, as_root, socket_of, wait_until, wait_until_it_sees
from truth import Truth

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.rpc import sockets
from sandbox_plugin.rpc.server import UnixServer

NOBODY = 65534
"""A user."""
OK, NOT_FOUND = "0", "5"
"""Statuses of a call."""


async def until_hung_up(client: socket.socket) -> None:
    """Takes in what the server says, until it closes the connection."""
    client.setblocking(False)
    with suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            pass


@pytest.mark.parametrize("rounds", range(6))
def test_who_connects_in_the_moment_in_which_the_server_ends_is_hung_up_on(places: Places, rounds: int) -> None:
    async def connect_and_end() -> None:
        listener, _ = sockets.listen_at(places.top / "plugin.sock")
        number = listener.fileno()
        with socket.socket(socket.AF_UNIX) as late:
            with UnixServer(listener, list):
                late.connect(str(places.top / "plugin.sock"))
                for _ in range(rounds):  # of the loop: not yet accepted, accepted without a transport, with one
                    await asyncio.sleep(0)
            await until_hung_up(late)
        assert not asyncio.get_running_loop().remove_reader(number), "it would get the events of the next file"

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        run(connect_and_end())
        gc.collect()
    assert [str(complaint.message) for complaint in complaints] == []


@as_root
def test_a_peer_of_another_user_is_refused_although_the_file_lets_it_in(places: Places) -> None:
    async def connect_as_nobody() -> None:
        path = places.top / "plugin.sock"
        listener, _ = sockets.listen_at(path)
        places.top.chmod(0o755)
        path.chmod(0o666)
        with UnixServer(listener, list), socket.socket(socket.AF_UNIX) as client:
            os.seteuid(NOBODY)  # the kernel notes who a peer is when it connects
            try:
                client.connect(str(path))
            finally:
                os.seteuid(0)
            await until_hung_up(client)

    with capture_logs() as logged:
        run(connect_as_nobody())
    assert [event["reason"] for event in logged] == [f"peer runs as uid {NOBODY}, expected 0"]


def test_only_the_socket_that_was_made_here_is_removed(places: Places) -> None:
    path = places.top / "plugin.sock"
    first, own = sockets.listen_at(path)
    second, newer = sockets.listen_at(path)
    with first, second:
        sockets.remove(path, own)
        assert sockets.identity(path) == newer, "another one's was removed"
        sockets.remove(path, newer)
        assert not path.exists()
        path.write_text("no socket")
        sockets.remove(path, newer)
    assert path.read_text() == "no socket"


def test_a_socket_is_for_its_owner_alone_from_the_moment_its_name_appears(places: Places) -> None:
    """Looks without pause while sockets are made, under a umask that takes nothing away."""
    path = places.top / "plugin.sock"
    seen: set[int] = set()
    enough = threading.Event()

    def look() -> None:
        while not enough.is_set():
            with suppress(FileNotFoundError):
                seen.add(stat.S_IMODE(os.stat(path).st_mode))

    watcher = threading.Thread(target=look)
    before = os.umask(0)
    watcher.start()
    try:
        made = 0
        while made < 500 or not seen:
            listener, own = sockets.listen_at(path)
            listener.close()
            sockets.remove(path, own)
            made += 1
    finally:
        os.umask(before)
        enough.set()
        watcher.join()
    assert seen == {0o600}


# Accidents of those who are let in


@dataclass
class Served:
    """A daemon with which a kubelet is content, and the socket at which somebody else has an accident."""

    node: FakeNode
    truth: Truth
    kubelet: GrpcKubelet
    plugin: Daemon
    path: Path

    def still_brings_news(self) -> None:
        """A GPU is unbound, or bound again: the kubelet sees it over the stream that it has."""
        is_bound = self.node.function(FIRST_GPU).driver is not None
        (self.node.unbind if is_bound else self.node.bind)(FIRST_GPU)
        wait_until_it_sees(self.kubelet, self.truth)
        assert not self.plugin.events("registration lost")


@pytest.fixture
def served(fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places) -> Served:
    node = fake_node("hgx-h100")
    truth = Truth(node.root)
    plugin = daemon(node, QUICK)
    wait_until_it_sees(kubelet, truth)
    return Served(node, truth, kubelet, plugin, socket_of(places))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and the first settings, which are empty
GARBAGE = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "noise": b"noise" + os.urandom(100_000),
    "data before headers": PREFACE + b"\0\0\3\0\0\0\0\0\1abc",
    "settings that are out of range": PREFACE + b"\0\0\6\4\0\0\0\0\0" + b"\0\4\xff\xff\xff\xff",
    "broken header compression": PREFACE + b"\0\0\4\1\4\0\0\0\1" + b"\xff\xff\xff\xff",
    "a header that is not ASCII": PREFACE + b"\0\0\5\1\4\0\0\0\1" + b"\0\1x\1\xff",
}


def test_garbage_ends_its_own_connection_and_no_other(served: Served) -> None:
    served.plugin.excused.add("Fatal error: protocol.data_received() call failed.")  # asyncio's, for the last one
    for garbage in GARBAGE.values():
        with connected(served.path) as client, suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(garbage)
            while client.recv(1 << 16):
                pass
        served.still_brings_news()


def test_half_a_request_costs_its_own_call_alone(served: Served) -> None:
    served.plugin.excused.add("Application error")  # grpclib's, for a request that ends too early
    unknown_device = b"\0\0\0\0\x0b\x0a\x09\x0a\x07unknown"
    with bare_client(served.path) as client:
        for half in (b"\0\0", b"\0\0\0\0\x09abc", b""):  # of the length, of the message, nothing at all
            client.ask("Allocate", half, end=False)
            ended = client.ask("Allocate", half)
            whole = client.ask("Allocate", unknown_device)
            client.send()
            assert client.status(ended) not in (OK, NOT_FOUND)
            assert client.status(whole) == NOT_FOUND
        served.still_brings_news()
    served.still_brings_news()


@contextmanager
def deaf_client(path: Path) -> Iterator[None]:
    """It has a call, and is owed more than it takes: answers to pings that do not fit into the buffer of a socket."""
    with bare_client(path) as client:
        client.ask("ListAndWatch")
        client.send()
        client.socket.sendall(15_000 * (b"\0\0\x08\6\0\0\0\0\0" + b"12345678"))
        yield


def test_a_peer_that_reads_nothing_neither_holds_up_the_next_socket_nor_the_end(served: Served) -> None:
    """As a kubelet that hangs."""
    with deaf_client(served.path):
        before = len(served.kubelet.registrations)
        served.path.unlink()
        served.kubelet.wait_for(lambda: len(served.kubelet.registrations) > before)
        wait_until_it_sees(served.kubelet, served.truth)
    with deaf_client(served.path):
        served.plugin.terminate()


def test_connections_that_come_and_go_leave_nothing_behind(served: Served) -> None:
    def open_sockets() -> int:
        return len(psutil.Process(served.plugin.pid).net_connections("unix"))

    before = open_sockets()
    for _ in range(50):
        with connected(served.path):
            pass
        with bare_client(served.path) as client:
            client.ask("ListAndWatch")
            client.send()
    wait_until(lambda: open_sockets() <= before, "connections that ended are closed")
    served.still_brings_news()
