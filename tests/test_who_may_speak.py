"""Who may speak to the daemon's sockets; and accidents that such a peer may have, which are to cost it alone.

Garbage and halves of requests are raw bytes and hand-made HTTP/2 over the real process's socket. After each the
kubelet's stream must bring news.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import platform
import socket
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bare import bare_client, connected
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from devices import nothing_against
from kubelet import TIMEOUT, GrpcKubelet
from names import FIRST_GPU, PGPU
from structlog.testing import capture_logs
from trials import QUICK, as_root, socket_of, wait_until, wait_until_it_sees
from truth import Truth

from sandbox_plugin.api.v1beta1 import DevicePluginBase
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.endpoint import Endpoint
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc import sockets
from sandbox_plugin.rpc.server import PluginServer

SETRESUID = {"x86_64": 117, "aarch64": 147}
"""Numbers of the system call."""
NOBODY = 65534


# The socket's file, and its end


@pytest.mark.parametrize("rounds", range(6))
def test_who_connects_in_the_moment_in_which_the_server_ends_is_hung_up_on(places: Places, rounds: int) -> None:
    async def connect_and_end() -> bytes:
        listener, _ = sockets.listen_at(places.top / "plugin.sock")
        server = PluginServer(listener, DevicePluginBase)
        server.start()
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(places.top / "plugin.sock"))
            for _ in range(rounds):  # of the loop: not yet accepted, accepted without a transport, with one
                await asyncio.sleep(0)
            server.end()
            late.setblocking(False)
            async with asyncio.timeout(TIMEOUT):
                while data := await asyncio.get_running_loop().sock_recv(late, 1 << 16):
                    pass
                return data

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        with suppress(ConnectionResetError):
            assert asyncio.run(connect_and_end()) == b""
        gc.collect()
    assert [str(complaint.message) for complaint in complaints] == []


@pytest.mark.parametrize("rounds", range(5))
def test_an_endpoint_that_is_cancelled_as_soon_as_it_began_leaves_nothing_to_the_loop(
    places: Places, rounds: int
) -> None:
    """A reader of a descriptor that was closed would get the events of the next file with its number."""

    async def begin_and_cancel() -> None:
        registry = Registry(Rules(), requires_cdi=False)
        endpoint = Endpoint(
            resource=PGPU,
            kubelet_dir=places.top,
            registry=registry,
            policy=Policy.PACKED,
            consumer=Consumer.KATA,
            why_not=nothing_against,
        )
        running = asyncio.create_task(endpoint.run())
        for _ in range(rounds):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running], timeout=TIMEOUT)
        assert running.cancelled()
        assert [path.name for path in places.top.iterdir()] == []
        one, other = socket.socketpair()
        with one, other:
            other.send(b"x")
            reader, writer = await asyncio.open_unix_connection(sock=one)
            async with asyncio.timeout(TIMEOUT):
                assert await reader.read(1) == b"x"
            writer.close()
            await writer.wait_closed()

    asyncio.run(begin_and_cancel())


def test_only_the_socket_that_was_made_here_is_removed(places: Places) -> None:
    path = places.top / "plugin.sock"
    first, own = sockets.listen_at(path)
    second, newer = sockets.listen_at(path)
    with first, second:
        sockets.remove(path, own)
        assert sockets.identity(path) == newer, "another one's was removed"
        sockets.remove(path, newer)
        assert not path.exists()
        sockets.remove(path, newer)
        path.write_text("no socket")
        sockets.remove(path, newer)
    assert path.read_text() == "no socket"


def test_a_socket_that_cannot_be_removed_is_logged_and_raises_nothing(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it raised would take the place of the cancellation that the endpoint is ending for."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    path = places.top / "plugin.sock"
    listener, own = sockets.listen_at(path)
    monkeypatch.setattr(Path, "unlink", fail)
    with listener, capture_logs() as logged:
        sockets.remove(path, own)
    assert [(event["event"], event["reason"]) for event in logged] == [("socket not removed", "Read-only file system")]


def test_a_socket_is_for_its_owner_alone_from_the_moment_its_name_appears(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    class Watched(socket.socket):
        def bind(self, path: Any) -> None:
            super().bind(path)
            modes.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        listener, own = sockets.listen_at(places.top / "plugin.sock")
    finally:
        os.umask(before)
    listener.close()
    sockets.remove(places.top / "plugin.sock", own)
    assert modes == [0o600]


def test_the_daemons_socket_is_never_seen_with_another_mode_however_often_it_is_made(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    path = socket_of(places)
    seen: dict[int, int] = {}
    enough = threading.Event()

    def look() -> None:
        while not enough.is_set():
            with suppress(FileNotFoundError):
                mode = stat.S_IMODE(os.stat(path).st_mode)
                seen[mode] = seen.get(mode, 0) + 1

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        plugin = daemon(fake_node("workstation"))
        for turn in range(5):
            kubelet.wait_for(lambda turn=turn: len(kubelet.registrations) == turn + 1)  # type: ignore[misc]
            plugin.wait_for("registered", resource=PGPU)
            path.unlink()
        kubelet.wait_for(lambda: len(kubelet.registrations) == 6)
    finally:
        enough.set()
        watcher.join()
    assert seen.keys() == {0o600}


# Who is let in


def ends(client: socket.socket) -> bool:
    """Whether the daemon closes the connection, within the socket's timeout. Takes in what comes before."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@as_root
@pytest.mark.skipif(platform.machine() not in SETRESUID, reason="the number of setresuid is not known here")
def test_a_peer_of_another_user_is_refused_although_the_file_lets_it_in(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    plugin = daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    for folder in (places.top, places.kubelet):
        folder.chmod(0o755)
    socket_of(places).chmod(0o666)
    refused: list[bool] = []

    def as_nobody() -> None:
        # The bare system call changes this thread alone; and the kernel notes who a peer is when it connects.
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(SETRESUID[platform.machine()], NOBODY, NOBODY, NOBODY) == 0
        with connected(socket_of(places)) as client:
            refused.append(ends(client))

    thread = threading.Thread(target=as_nobody)
    thread.start()
    thread.join()
    assert refused == [True]
    plugin.wait_for("connection refused", reason=f"peer runs as uid {NOBODY}, expected 0")
    assert len(kubelet.registrations) == 1


# Accidents of those who are let in


class Served:
    """A daemon with which a kubelet is content, and the socket at which somebody else has an accident."""

    def __init__(self, node: FakeNode, kubelet: GrpcKubelet, plugin: Daemon, path: Path) -> None:
        self.node, self.kubelet, self.plugin, self.path = node, kubelet, plugin, path
        self.truth = Truth(node.root)
        self._bound = True
        wait_until_it_sees(kubelet, self.truth)
        plugin.wait_for("registered", resource=PGPU)

    def still_brings_news(self) -> None:
        """A GPU is unbound, or bound again: the kubelet sees it over the stream that it has."""
        (self.node.unbind if self._bound else self.node.bind)(FIRST_GPU)
        self._bound = not self._bound
        wait_until_it_sees(self.kubelet, self.truth)
        assert not self.plugin.events("registration lost")


@pytest.fixture
def served(fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places) -> Served:
    node = fake_node("hgx-h100")
    return Served(node, kubelet, daemon(node, QUICK), socket_of(places))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and the first settings, which are empty
GARBAGE = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "noise": b"noise" + os.urandom(100_000),
    "data before headers": PREFACE + b"\0\0\3\0\0\0\0\0\1abc",
    "settings that are out of range": PREFACE + b"\0\0\6\4\0\0\0\0\0" + b"\0\4\xff\xff\xff\xff",
    "broken header compression": PREFACE + b"\0\0\4\1\4\0\0\0\1" + b"\xff\xff\xff\xff",
    "a header that is not ASCII": PREFACE + b"\0\0\5\1\4\0\0\0\1" + b"\0\1x\1\xff",
    "a kind of frame that nobody knows": PREFACE + b"\0\0\3\x77\0\0\0\0\0abc",
}


def test_garbage_ends_its_own_connection_and_no_other(served: Served) -> None:
    served.plugin.excused.add("Fatal error: protocol.data_received() call failed.")  # asyncio's, for the last two
    for what, garbage in GARBAGE.items():
        with connected(served.path) as client:
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(garbage)
            assert ends(client), what
        served.still_brings_news()


HALVES = {"half of the length": b"\0\0", "half of the message": b"\0\0\0\0\x09abc", "no message": b""}
NOT_FOUND = "5"
UNKNOWN_DEVICE = b"\0\0\0\0\x0b\x0a\x09\x0a\x07unknown"


@pytest.mark.parametrize("half", HALVES)
def test_half_a_request_costs_its_own_call_alone(served: Served, half: str) -> None:
    served.plugin.excused.add("Application error")  # grpclib's, for a request that ends too early
    with bare_client(served.path) as client:
        client.ask("Allocate", HALVES[half], end=False)
        ended = client.ask("Allocate", HALVES[half])
        whole = client.ask("Allocate", UNKNOWN_DEVICE)
        client.send()
        assert client.status(ended) not in ("0", NOT_FOUND)
        assert client.status(whole) == NOT_FOUND
        served.still_brings_news()
    served.still_brings_news()


PINGS = 40_000 * (b"\0\0\x08\6\0\0\0\0\0" + b"12345678")
"""The answers, which are as long, do not fit into the buffer of a socket."""


@contextmanager
def deaf_client(path: Path) -> Iterator[None]:
    """It has a call, and is owed more than it takes."""
    with bare_client(path) as client:
        client.ask("ListAndWatch")
        client.send()
        client.socket.sendall(PINGS)
        yield


def test_a_peer_that_reads_nothing_neither_holds_up_the_next_socket_nor_the_end(served: Served) -> None:
    """As a kubelet that hangs."""
    with deaf_client(served.path):
        served.path.unlink()
        served.kubelet.wait_for(lambda: len(served.kubelet.registrations) == 3)
        wait_until_it_sees(served.kubelet, served.truth)
    with deaf_client(served.path):
        served.plugin.terminate()


def test_connections_that_come_and_go_leave_nothing_behind(served: Served) -> None:
    def open_sockets() -> int:
        return len(psutil.Process(served.plugin.pid).net_connections("unix"))

    before = open_sockets()
    for _ in range(100):
        with connected(served.path):
            pass
        with bare_client(served.path) as client:
            client.ask("ListAndWatch")
            client.send()
    wait_until(lambda: open_sockets() <= before, "connections that ended are closed")
    served.still_brings_news()
