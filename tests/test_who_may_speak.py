"""Who may speak to the daemon's sockets, and what those who may can cost: their own connection, nothing else.

Attacks are raw bytes and hand-made HTTP/2 over the real process's socket. While each goes on the kubelet's stream must
bring news, and the process must not grow.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import platform
import signal
import socket
import stat
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import h2.exceptions
import h2.settings
import psutil
import pytest
from attacker import PING, Attacker, attacker
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from devices import nothing_against
from kubelet import TIMEOUT, GrpcKubelet, Watch
from names import FIRST_GPU, PGPU
from structlog.testing import capture_logs
from trials import QUICK, as_root, figures, memory, socket_of, wait_until, wait_until_it_sees
from truth import Truth

from sandbox_plugin.api.v1beta1 import DevicePluginBase
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.kubelet import server, sockets
from sandbox_plugin.kubelet.endpoint import Endpoint
from sandbox_plugin.kubelet.server import PluginServer
from sandbox_plugin.registry import Registry
from sandbox_plugin.settings import Consumer, Policy, Settings

LIMIT = 64 << 20
"""Bytes that the process may grow under attack."""
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
            await server.end()
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
        registry = Registry(Settings(), ModelNames(), requires_cdi=False)
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


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))  # waits while the queue is full
        client.settimeout(TIMEOUT)
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
    plugin.wait_for("connection refused", reason=f"peer runs as uid {NOBODY}, expected 0")
    assert len(kubelet.registrations) == 1


# What those who are let in may try


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


@pytest.mark.parametrize("greet", [False, True], ids=["silent", "that greet"])
def test_connections_without_a_call_do_not_keep_the_kubelet_out(victim: Victim, greet: bool) -> None:
    def connect(times: int) -> None:
        for _ in range(times):
            client = stack.enter_context(attacker(victim.path) if greet else connected(victim.path))
            if isinstance(client, Attacker):
                client.wait_for_greeting()

    with ExitStack() as stack:
        connect(192)
        victim.still_brings_news()
        assert victim.stream.ended is None
        victim.kubelet.on_register = lambda _: connect(20)  # when its own connection is free, before it makes another
        victim.kubelet.plugin(PGPU).close()
        victim.kubelet.wait_for(lambda: len(victim.kubelet.registrations) == 3)
        wait_until_it_sees(victim.kubelet, victim.truth)
        victim.stream = victim.newest_stream()
        victim.judge(f"212 connections {'that greet and stay' if greet else 'that never say a word'}")


def test_connections_with_a_call_on_each_are_held_up_to_a_limit(victim: Victim) -> None:
    with ExitStack() as stack:
        for _ in range(2 * server.CONNECTIONS):
            with suppress(BrokenPipeError, ConnectionResetError):
                busy = stack.enter_context(attacker(victim.path))
                busy.ask("ListAndWatch")
                busy.send()
                busy.wait_for_greeting()
        victim.plugin.wait_for("connection refused", reason=f"{server.CONNECTIONS} connections are already open")
        victim.judge("32 connections with a call on each")


@pytest.mark.slow
def test_a_peer_that_never_reads_does_not_make_the_daemon_keep_what_it_would_send(victim: Victim) -> None:
    with ExitStack() as stack:
        for _ in range(server.CONNECTIONS - 1):
            deaf = stack.enter_context(attacker(victim.path))
            for _ in range(server.STREAMS):
                deaf.ask("ListAndWatch")
            deaf.send()
        for _ in range(20):
            victim.still_brings_news()
        victim.judge("240 streams that nobody reads")


def fill(deaf: Attacker) -> None:
    """Pings until there is no room for the answers, and nothing more is read. Calls are reset on the way."""
    deaf.socket.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            deaf.http.reset_stream(deaf.ask("ListAndWatch"))
            deaf.socket.sendall(deaf.http.data_to_send() + 200 * PING)


@pytest.mark.slow
def test_a_deaf_peer_is_read_no_more_and_its_connection_cut_and_its_calls_end(victim: Victim) -> None:
    def calls() -> int:
        asked = victim.plugin.mark()
        os.kill(victim.plugin.pid, signal.SIGUSR1)
        running = victim.plugin.wait_for("tasks", since=asked)["running"]
        return int(running.get("request_handler", 0))

    before = calls()
    with ExitStack() as stack:
        for _ in range(server.CONNECTIONS - 1):
            fill(stack.enter_context(attacker(victim.path)))
        victim.still_brings_news()
        victim.plugin.wait_for("connection closed", reason="peer reads nothing for 10 s")
        wait_until(lambda: calls() == before, "calls that were reset have ended")
        victim.judge("15 deaf peers")


def test_a_deaf_peer_neither_holds_up_the_end_nor_the_next_socket(victim: Victim) -> None:
    with attacker(victim.path) as deaf:
        fill(deaf)
        victim.path.unlink()
        victim.kubelet.wait_for(lambda: len(victim.kubelet.registrations) == 3)
        wait_until_it_sees(victim.kubelet, victim.truth)
    with attacker(victim.path) as deaf:
        fill(deaf)
        victim.plugin.terminate()


RESOURCE_EXHAUSTED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = "8", "3", "4", "5"


def test_a_message_that_announces_more_than_a_request_may_have_is_refused_at_once(victim: Victim) -> None:
    with attacker(victim.path) as client:
        for size in (b"\0\xff\xff\xff\xff", b"\0\0\1\0\1"):
            stream = client.ask("Allocate", message=size, end=False)
            client.send()
            answer = client.trailers(stream)
            assert (answer["grpc-status"], answer["grpc-message"]) == (
                RESOURCE_EXHAUSTED,
                "a request has at most 64 KiB",
            )
        victim.judge("messages that announce too much")


@pytest.mark.slow
def test_a_request_that_does_not_end_costs_ten_seconds_and_its_window(victim: Victim) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(attacker(victim.path)) for _ in range(server.CONNECTIONS - 1)]
        sent = 0
        for client in clients:
            streams = [client.ask("Allocate", message=b"\0\0\1\0\0", end=False) for _ in range(server.STREAMS)]
            client.send()
            client.wait_for_greeting()
            for stream in streams:
                while (room := client.room(stream)) and sent < 1 << 30:
                    client.http.send_data(stream, b"x" * room)
                    client.send()
                    sent += room
        assert sent < (server.CONNECTIONS - 1) << 18, "the window is given back before the call has ended"
        victim.still_brings_news()
        answer = clients[0].trailers(streams[-1])
        assert answer["grpc-status"] == DEADLINE_EXCEEDED
        assert answer["grpc-message"] == "the request did not come whole in 10 s"
        victim.judge("240 requests that do not end")


def test_a_request_that_ends_too_early_is_an_invalid_argument(victim: Victim) -> None:
    with attacker(victim.path) as client:
        for message in (b"", b"\0\0", b"\0\0\0\0\x09abc"):
            stream = client.ask("Allocate", message=message)
            client.send()
            assert client.trailers(stream)["grpc-status"] == INVALID_ARGUMENT
    assert "Traceback" not in victim.plugin.log()


def test_what_a_request_took_of_the_window_is_given_back_when_its_call_has_ended(victim: Victim) -> None:
    message = b"\0\0\0\xea\x65" + b"\x0a\xe1\xd4\x03" + b"\x0a\xdd\xd4\x03" + b"x" * 59_997
    with attacker(victim.path) as client:
        for _ in range(20):  # 1.2 MB, of a window of 256 KiB
            stream = client.ask("Allocate", message=b"", end=False)
            for start in range(0, len(message), 16_000):
                client.http.send_data(
                    stream, message[start : start + 16_000], end_stream=start + 16_000 >= len(message)
                )
            client.send()
            assert client.trailers(stream)["grpc-status"] == NOT_FOUND


@pytest.mark.slow
def test_frames_without_a_byte_cost_no_memory(victim: Victim) -> None:
    with attacker(victim.path) as client:
        watching = client.ask("ListAndWatch", end=False)
        asking = client.ask("Allocate", message=b"\0\0\0\xff\xff", end=False)
        client.send()
        for stream in (watching, asking):
            frame = b"\0\0\0\0\0" + stream.to_bytes(4, "big")
            for _ in range(100):
                client.socket.sendall(2000 * frame)
        victim.judge("400 000 frames without a byte")


def test_a_flood_of_streams_costs_its_own_connection(victim: Victim) -> None:
    with attacker(victim.path) as client, suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(200):
            for _ in range(100):
                client.ask("ListAndWatch")
            client.send()
    victim.judge("20 000 streams on one connection")


def test_streams_that_are_opened_and_reset_at_once_cost_little(victim: Victim) -> None:
    """Rapid reset, CVE-2023-44487."""
    done = 0
    while done < 20_000:
        with attacker(victim.path) as client, suppress(OSError, h2.exceptions.ProtocolError):
            client.wait_for_greeting()
            while done < 20_000:
                for _ in range(server.STREAMS):
                    client.http.reset_stream(client.ask("ListAndWatch", message=b"", end=False))
                client.socket.sendall(client.http.data_to_send() + PING)
                client.wait_for_ping()
                done += server.STREAMS
    victim.judge("20 000 streams that are reset at once")


def test_so_many_streams_opened_and_reset_in_one_breath_that_none_has_ended_cost_their_connection(
    victim: Victim,
) -> None:
    with attacker(victim.path) as client, suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(100):
            for _ in range(200):
                client.http.reset_stream(client.ask("ListAndWatch", message=b"", end=False))
            client.send()
    victim.plugin.wait_for("connection closed", reason=f"more than {2 * server.STREAMS} calls at once")
    victim.judge("20 000 streams that are reset in one breath")


def test_pings_and_settings_without_end_cost_little(victim: Victim) -> None:
    settings = b"\0\0\0\x04\0\0\0\0\0"
    for flood in (PING, settings):
        with attacker(victim.path) as client:
            client.socket.settimeout(1)
            with suppress(OSError):
                for _ in range(400):
                    client.socket.sendall(flood * 100)
            victim.still_brings_news()
    victim.judge("pings and settings without end")


def test_settings_that_nobody_knows_are_not_all_remembered(victim: Victim) -> None:
    for _ in range(5):
        with connected(victim.path) as client, suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(PREFACE)
            for first in range(100, 60_000, 100):
                settings = b"".join(number.to_bytes(2, "big") + b"\0\0\0\1" for number in range(first, first + 100))
                client.sendall(len(settings).to_bytes(3, "big") + b"\4\0\0\0\0\0" + settings)
    victim.plugin.wait_for("connection closed", reason="more than 64 different settings")
    victim.judge("60 000 settings")


def test_headers_without_end_cost_their_own_connection(victim: Victim) -> None:
    with attacker(victim.path) as client:
        client.ask("Allocate", more=[(f"x-{number}", "y" * 50) for number in range(100)])
        client.send()
        assert ends(client.socket), "too many headers"
    with attacker(victim.path) as client, suppress(BrokenPipeError, ConnectionResetError):
        client.wait_for_greeting()
        for kind in (b"\1", *(20 * [b"\x09"])):  # headers that go on, and on
            client.socket.sendall(b"\0\x40\0" + kind + b"\0\0\0\0\1" + b"\0" * 16_384)
        raise AssertionError("a third frame of headers is taken in")
    victim.judge("headers without end")


def test_however_large_a_memory_a_peer_offers_for_headers_nothing_is_put_there(victim: Victim) -> None:
    """What was put there would be shorter the second time: a number in the place of a text."""
    with attacker(victim.path) as client:
        client.http.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 1 << 30})
        client.send()
        client.wait_for_greeting()
        lengths = []
        with client.socket.makefile("rb") as frames:
            for _ in range(2):
                stream = client.ask("Allocate", message=b"\0\0\0\0\x0b\x0a\x09\x0a\x07unknown")
                client.send()
                lengths.append(length_of_headers(frames, stream))
        assert lengths[0] == lengths[1] > 50


def length_of_headers(frames: BinaryIO, stream: int) -> int:
    """How many bytes of headers come on this stream until it ends."""
    length = 0
    while True:
        size, kind, flags, about = struct.unpack(">3sBBI", frames.read(9))
        size = int.from_bytes(size, "big")
        frames.read(size)
        if (kind, about) == (1, stream):
            length += size
            if flags & 1:  # END_STREAM
                return length


def test_a_kind_of_frame_that_nobody_knows_is_ignored(victim: Victim) -> None:
    with attacker(victim.path) as client:
        client.socket.sendall(b"\0\0\3\x77\0\0\0\0\0abc")
        stream = client.ask("Allocate", message=b"\0\0\0\0\x0b\x0a\x09\x0a\x07unknown")
        client.send()
        assert client.trailers(stream)["grpc-status"] == NOT_FOUND


def test_all_of_it_at_once_from_every_connection_there_may_be_stays_below_a_bound(victim: Victim) -> None:
    """What docs/reliability.md calls the worst: full headers, open calls, and a header block that does not end."""
    block = b"\0" * 16_384
    more = [(f"x-{number}", "") for number in range(90)]
    with ExitStack() as stack:
        for _ in range(server.CONNECTIONS - 1):
            client = stack.enter_context(attacker(victim.path))
            client.wait_for_greeting()
            for _ in range(server.STREAMS - 1):
                client.ask("ListAndWatch", more=more)
            client.send()
            stream = client.http.get_next_available_stream_id().to_bytes(4, "big")
            client.socket.sendall(b"\0\x40\0\1\0" + stream + block)
            client.socket.sendall(b"\0\x40\0\x09\0" + stream + block)
        assert len(victim.plugin.events("connection closed")) == 0
        victim.judge("all of it at once from 15 connections")
    victim.still_brings_news()  # 1500 calls have ended, which may take a daemon longer than its own end may take


def test_connections_that_come_and_go_leave_nothing_behind(victim: Victim) -> None:
    def open_sockets() -> int:
        return len(psutil.Process(victim.plugin.pid).net_connections("unix"))

    before = open_sockets()
    for _ in range(500):
        with connected(victim.path):
            pass
    wait_until(lambda: open_sockets() <= before, "connections that ended are closed")
    victim.judge("500 connections that come and go")
