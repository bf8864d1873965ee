"""Who may speak to the daemon's sockets, and what those who may can cost: their own connection, nothing else.

Attacks are raw bytes and hand-made HTTP/2 over the real process's socket. While each goes on the kubelet's stream must
bring news, and the process must not grow.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import platform
import socket
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from conftest import StartDaemon
from daemon import Daemon, Places
from kubelet import TIMEOUT, GrpcKubelet, Watch
from trials import PGPU, QUICK, as_root, figures, memory, socket_of, wait_until, wait_until_it_sees
from truth import Truth

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.kubelet import sockets
from sandbox_plugin.kubelet.server import PluginServer

FIRST_GPU = "0000:1b:00.0"
LIMIT = 64 << 20
"""Bytes that the process may grow under attack."""
SETRESUID = {"x86_64": 117, "aarch64": 147}
"""Numbers of the system call."""
NOBODY = 65534

MakeNode = Callable[[str], FakeNode]


# The socket's file, and its end


def test_who_connects_in_the_moment_in_which_the_server_ends_is_hung_up_on(places: Places) -> None:
    async def connect_and_end() -> bytes:
        listener, _ = sockets.listen_at(places.top / "plugin.sock")
        server = PluginServer([])
        await server.start(sock=listener)
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(places.top / "plugin.sock"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # accepted in the round before this one; its transport is yet to come
            await server.end(listener)
            listener.close()
            late.setblocking(False)
            async with asyncio.timeout(TIMEOUT):
                return await asyncio.get_running_loop().sock_recv(late, 1)

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        assert asyncio.run(connect_and_end()) == b""
        gc.collect()
    assert [str(complaint.message) for complaint in complaints] == []


def test_a_socket_is_for_its_owner_alone_from_the_moment_its_name_appears(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def bind_and_look(self: socket.socket, path: str) -> None:
        socket.socket.bind(self, path)
        modes.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(sockets.Listener, "bind", bind_and_look, raising=False)
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


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))  # waits while the queue is full
        client.settimeout(10)
        yield client


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
    plugin.wait_for("connection refused", reason=f"its peer is user {NOBODY}, not root")
    assert len(kubelet.registrations) == 1


# What those who are let in may try


class Attacker:
    """An HTTP/2 client that keeps no rule, on one connection to a plugin's socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(10)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()

    def close(self) -> None:
        self.socket.close()

    def send(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def wait_for_greeting(self) -> None:
        """Until the daemon has read what was said first. Raises ConnectionResetError if it hangs up."""
        while data := self.socket.recv(1 << 16):
            if any(isinstance(event, h2.events.SettingsAcknowledged) for event in self.http.receive_data(data)):
                return
        raise ConnectionResetError

    def ask(self, method: str, *, message: bytes = b"\0\0\0\0\0", end: bool = True) -> int:
        """Opens a stream with a call on it. Returns its number. Nothing is sent yet."""
        stream = self.http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/v1beta1.DevicePlugin/{method}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self.http.send_headers(stream, headers)
        if message or end:
            self.http.send_data(stream, message, end_stream=end)
        return stream


@contextmanager
def attacker(path: Path) -> Iterator[Attacker]:
    made = Attacker(path)
    try:
        made.send()
        yield made
    finally:
        made.close()


class Victim:
    """A daemon under attack: news must still reach the kubelet, and it must not grow."""

    def __init__(self, node: FakeNode, kubelet: GrpcKubelet, plugin: Daemon, path: Path) -> None:
        self.node, self.kubelet, self.plugin, self.path = node, kubelet, plugin, path
        self.truth = Truth(node.root)
        wait_until_it_sees(kubelet, self.truth)
        plugin.wait_for("registered", resource=PGPU)
        self.memory = memory(plugin)
        self.stream = self.newest_stream()
        self.took: list[float] = []
        self._bound = True

    def newest_stream(self) -> Watch:
        registration = self.kubelet.registration(PGPU)
        assert registration is not None
        assert registration.watch is not None
        return registration.watch

    def still_brings_news(self) -> None:
        """A GPU is unbound, or bound again: the kubelet sees it over the stream that it has."""
        started = time.monotonic()
        (self.node.unbind if self._bound else self.node.bind)(FIRST_GPU)
        self._bound = not self._bound
        wait_until_it_sees(self.kubelet, self.truth)
        self.took.append(time.monotonic() - started)

    def judge(self, attack: str) -> None:
        """At the end: memory, the kubelet's connection, and time."""
        self.still_brings_news()
        grown = memory(self.plugin) - self.memory
        figures(f"news under {attack}", self.took)
        print(f"FIGURE memory under {attack}: {grown / 1e6:+.1f} MB")
        assert grown < LIMIT
        assert self.stream.ended is None, "the kubelet's own stream was lost"


@pytest.fixture
def victim(fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places) -> Victim:
    node = fake_node("hgx-h100")
    return Victim(node, kubelet, daemon(node, QUICK), socket_of(places))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


GARBAGE = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "noise": os.urandom(100_000),
    "noise after the preface": PREFACE + b"\xff" * (5 << 20),
    "a frame of 16 MiB": PREFACE + b"\xff\xff\xff" + b"\0\0\0\0\0\x01" + b"\0" * (5 << 20),
    "settings that are out of range": PREFACE + b"\0\0\x06\x04\0\0\0\0\0" + b"\0\x04\xff\xff\xff\xff",
    "broken header compression": PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x04\x01\x04\0\0\0\x01\xff\xff\xff\xff",
}


def test_garbage_ends_its_own_connection_and_no_other(victim: Victim) -> None:
    for what, garbage in GARBAGE.items():
        for _ in range(5):
            with connected(victim.path) as client:
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(garbage)
                assert ends(client), what
        victim.still_brings_news()
    victim.judge("garbage")


def test_connections_that_never_say_a_word_do_not_keep_the_kubelet_out(victim: Victim) -> None:
    with ExitStack() as stack:
        for _ in range(3 * sockets.Listener.LIMIT):
            stack.enter_context(connected(victim.path))
        victim.still_brings_news()
        victim.kubelet.restart()
        wait_until_it_sees(victim.kubelet, victim.truth)
        victim.stream = victim.newest_stream()
        victim.judge("192 silent connections")


def test_connections_that_greet_and_then_say_nothing_end_at_a_limit(victim: Victim) -> None:
    with ExitStack() as stack:
        for _ in range(2 * sockets.Listener.LIMIT):
            with suppress(BrokenPipeError, ConnectionResetError):
                stack.enter_context(attacker(victim.path)).wait_for_greeting()
        victim.plugin.wait_for("connection refused", reason="are open already")
        victim.judge("128 connections that greet and stay")


def test_a_peer_that_never_reads_does_not_make_the_daemon_keep_what_it_would_send(victim: Victim) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            deaf = stack.enter_context(attacker(victim.path))
            for _ in range(100):
                deaf.ask("ListAndWatch")
            deaf.send()
        for _ in range(20):
            victim.still_brings_news()
        victim.judge("400 streams that nobody reads")


def test_a_message_without_end_costs_its_own_connection(victim: Victim) -> None:
    for _ in range(3):
        with attacker(victim.path) as client:
            stream = client.ask("Allocate", message=b"\0\xff\xff\xff\xff", end=False)  # announces 4 GiB
            client.send()
            sent = 0
            with suppress(OSError, h2.exceptions.ProtocolError):
                while sent < 64 << 20:
                    sent += push(client, stream)
            assert sent < 16 << 20
    victim.plugin.wait_for("connection closed", reason="more than 4 MiB at once")
    victim.judge("messages without end")


def push(client: Attacker, stream: int) -> int:
    """Sends as much as the daemon's window lets through, and takes in its window updates."""
    room = min(client.http.local_flow_control_window(stream), client.http.max_outbound_frame_size)
    if room:
        client.http.send_data(stream, b"x" * room)
        client.send()
    else:
        data = client.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        client.http.receive_data(data)
        client.send()
    return room


def test_a_flood_of_streams_costs_its_own_connection(victim: Victim) -> None:
    with attacker(victim.path) as client, suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(200):
            for _ in range(100):
                client.ask("ListAndWatch")
            client.send()
    victim.judge("20 000 streams on one connection")


def test_streams_that_are_opened_and_reset_at_once_cost_little(victim: Victim) -> None:
    """Rapid reset, CVE-2023-44487."""
    with attacker(victim.path) as client, suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(100):
            for _ in range(200):
                client.http.reset_stream(client.ask("ListAndWatch", message=b"", end=False))
            client.send()
    victim.judge("20 000 streams that are reset at once")


def test_pings_and_settings_without_end_cost_little(victim: Victim) -> None:
    ping = b"\0\0\x08\x06\0\0\0\0\0" + b"12345678"
    settings = b"\0\0\0\x04\0\0\0\0\0"
    for flood in (ping, settings):
        with attacker(victim.path) as client:
            client.socket.settimeout(1)
            with suppress(OSError):
                for _ in range(400):
                    client.socket.sendall(flood * 100)
            victim.still_brings_news()
    victim.judge("pings and settings without end")


def test_connections_that_come_and_go_leave_nothing_behind(victim: Victim) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{victim.plugin.pid}/fd"))

    before = descriptors()
    for _ in range(500):
        with connected(victim.path):
            pass
    wait_until(lambda: descriptors() <= before, "descriptors of connections that ended are closed")
    victim.judge("500 connections that come and go")
