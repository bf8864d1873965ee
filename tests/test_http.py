"""The pages over HTTP: what is answered to whom, and what a client cannot do to others."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from loop import in_loop, run, until

from sandbox_plugin.config.parsers import host_port
from sandbox_plugin.outputs import clients, http
from sandbox_plugin.outputs.http import Answer, HttpServer

LOCAL = "127.0.0.1"


async def page(accept: str) -> Answer:
    return Answer(f"accepts {accept}\n".encode())


@asynccontextmanager
async def serving(host: str = LOCAL, patience: float = 5.0) -> AsyncIterator[int]:
    """The port of a server with two pages."""
    with structlog.testing.capture_logs() as logs:
        server = HttpServer(address=(host, 0), pages={"/metrics": page, "/healthz": page}, patience=patience)
        running = asyncio.create_task(server.run())
        await until(lambda: logs)
        yield int(logs[0]["address"][0].rpartition(":")[2])
        running.cancel()
        await asyncio.wait([running])


async def answer(port: int, request: bytes, host: str = LOCAL) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to these bytes."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body


def asked(request: bytes) -> tuple[int, dict[str, str], bytes]:
    async def work() -> tuple[int, dict[str, str], bytes]:
        async with serving() as port:
            return await answer(port, request)

    return run(work())


def test_a_page_is_answered_with_its_length_and_the_connection_is_closed() -> None:
    status, headers, body = asked(b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\naccept: */*\r\n\r\n")
    assert (status, body) == (200, b"accepts text/plain, */*\n")
    assert headers.keys() == {"Date", "Content-Type", "Content-Length", "Connection"}
    assert (headers["Content-Length"], headers["Connection"]) == (str(len(body)), "close")


def test_head_gets_the_same_without_the_body() -> None:
    status, headers, body = asked(b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (status, headers["Content-Length"], body) == (200, "9", b"")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics?x=1#y HTTP/1.1", 200),
        ("GET http://some.host:9400/metrics HTTP/1.1", 200),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("DELETE /metrics HTTP/1.1", 405),
        ("GET http://[ HTTP/1.1", 400),
        ("GET /metrics HTTP/2.0", 400),
        ("GET  /metrics HTTP/1.1", 400),
        ("get /metrics HTTP/1.1", 400),
        ("\x16\x03\x01\x02", 400),
        ("", 400),
    ],
)
def test_what_is_asked_for_decides_the_status(request_line: str, status: int) -> None:
    assert asked(f"{request_line}\r\nHost: a\r\n\r\n".encode())[0] == status


@pytest.mark.parametrize("headers", ["", "Host a", "Host : a", ": a", " Host: a"])
def test_a_request_without_a_host_or_with_headers_that_are_none_is_refused(headers: str) -> None:
    assert asked(f"GET /metrics HTTP/1.1\r\n{headers}\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n").encode())[0] == 400


def test_an_old_client_needs_no_host() -> None:
    assert asked(b"GET /metrics HTTP/1.0\r\n\r\n")[0] == 200


def test_whoever_asks_for_what_there_is_not_is_told_what_there_is() -> None:
    assert asked(b"GET / HTTP/1.0\r\n\r\n")[2] == b"404 Not Found: there is /metrics, /healthz\n"


def test_a_method_that_is_not_allowed_is_told_which_are_and_a_body_gets_nobody_reset() -> None:
    body = b"x" * (1 << 20)
    head = b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    status, headers, _ = asked(head + body)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_request_without_an_end_is_refused() -> None:
    status, _, body = asked(b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20000)
    assert (status, body) == (431, b"431 Request Header Fields Too Large: 16384 bytes are allowed\n")


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_get_a_refusal(garbage: bytes) -> None:
    server = HttpServer(address=("", 0), pages={"/metrics": page})
    _, refused = asyncio.run(server._answer(garbage + b"\r\n\r\n"))
    assert refused.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)


@in_loop
async def test_a_request_may_come_in_pieces_and_an_end_before_its_end_gets_no_answer() -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection(LOCAL, port)
        for piece in (b"GET /me", b"trics HTTP/1.0\r", b"\n\r\n"):
            writer.write(piece)
            await writer.drain()
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
        reader, writer = await asyncio.open_connection(LOCAL, port)
        writer.write(b"GET /metrics HTTP/1.0\r\n")
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


@in_loop
async def test_clients_that_say_nothing_keep_no_probe_out_and_the_oldest_are_hung_up_on() -> None:
    async with serving(patience=3600) as port:
        silent = [await asyncio.open_connection(LOCAL, port) for _ in range(40)]
        assert (await answer(port, b"GET /healthz HTTP/1.0\r\n\r\n"))[0] == 200
        assert await silent[0][0].read() == b""
        silent[-1][1].write(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert (await silent[-1][0].read()).startswith(b"HTTP/1.1 200"), "it is among the last sixteen"
        for _, writer in silent:
            writer.close()


@in_loop
async def test_where_no_descriptor_is_left_accepting_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            nonlocal refused
            refused += 1
            if refused < 3:
                raise OSError(errno.EMFILE, "too many open files")
            return super().accept()

    monkeypatch.setattr(clients, "_RETRY", 0.01)
    with Listener() as listener, socket.socket() as client:
        listener.bind((LOCAL, 0))
        listener.listen()
        client.connect(listener.getsockname())
        with await clients.accepted(listener) as served:
            assert served.getpeername() == client.getsockname()
    assert refused == 3


@in_loop
async def test_a_client_that_says_nothing_for_too_long_is_hung_up_on() -> None:
    async with serving(patience=0.05) as port:
        reader, writer = await asyncio.open_connection(LOCAL, port)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("turns", range(4))
@in_loop
async def test_whoever_connects_just_when_it_ends_is_hung_up_on(turns: int) -> None:
    """In whichever turn of the loop that is: a connection that nobody has is a warning, and so an error here."""
    with socket.socket() as client:
        async with serving() as port:
            client.connect((LOCAL, port))
            for _ in range(turns):
                await asyncio.sleep(0)
        client.settimeout(5)
        with suppress(ConnectionResetError):  # nobody had accepted it
            assert client.recv(1) == b""
    gc.collect()


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(
    ("address", "reached"),
    [("", ("127.0.0.1", "::1")), ("::", ("127.0.0.1", "::1")), ("::1", ("::1",)), ("0.0.0.0", ("127.0.0.1",))],
)
def test_an_address_is_listened_at_in_the_families_that_it_means(address: str, reached: tuple[str, ...]) -> None:
    async def work() -> None:
        async with serving(address) as port:
            for host in reached:
                assert (await answer(port, b"GET /healthz HTTP/1.0\r\n\r\n", host))[0] == 200
            for host in {"127.0.0.1", "::1"}.difference(reached):
                with pytest.raises(ConnectionRefusedError):
                    await answer(port, b"", host)

    run(work())


def test_where_there_is_no_ipv6_all_addresses_are_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)

    async def work() -> None:
        async with serving("") as port:
            assert (await answer(port, b"GET /healthz HTTP/1.0\r\n\r\n"))[0] == 200

    run(work())


def test_a_name_is_looked_up() -> None:
    async def work() -> None:
        async with serving("localhost") as port:
            assert (await answer(port, b"GET /healthz HTTP/1.0\r\n\r\n", "localhost"))[0] == 200

    run(work())


@in_loop
async def test_a_port_that_another_program_has_is_named_once_and_taken_when_it_is_free() -> None:
    with structlog.testing.capture_logs() as logs, socket.create_server((LOCAL, 0)) as other:
        port = other.getsockname()[1]
        server = HttpServer(address=(LOCAL, port), pages={"/healthz": page}, retry=0.01)
        running = asyncio.create_task(server.run())
        await until(lambda: logs)
        await asyncio.sleep(0.05)
        other.close()
        await until(lambda: len(logs) == 2)
        said, served = logs
        assert (said["event"], served["event"]) == ("metrics not served", "metrics served")
        assert said["address"] == f"{LOCAL}:{port}"
        assert said["reason"].startswith("Address already in use; it is tried again every 0.01 s")
        assert "--metrics-address" in said["action"]
        assert (await answer(port, b"GET /healthz HTTP/1.0\r\n\r\n"))[0] == 200
        running.cancel()
        await asyncio.wait([running])


@in_loop
async def test_a_name_that_nobody_knows_is_named_with_why() -> None:
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(HttpServer(address=("no.such.host.invalid", 1), pages={}).run())
        await until(lambda: logs)
        running.cancel()
        await asyncio.wait([running])
    assert logs[0]["reason"].endswith("; it is tried again every 5 s, and all else goes on")
    assert not logs[0]["reason"].startswith("None")


def test_of_several_addresses_all_are_had_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOCAL, 0)) as other:
        port = other.getsockname()[1]
        found = [(socket.AF_INET, 1, 6, "", ("127.0.0.2", port)), (socket.AF_INET, 1, 6, "", (LOCAL, port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(OSError, match="in use"):
            http._listen("both", port)
    gc.collect()
    with socket.create_server(("127.0.0.2", port)):  # free again
        pass


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9400", ("127.0.0.1", 9400)),
        ("[::1]:0", ("::1", 0)),
        (":9400", ("", 9400)),
        ("some.host:65535", ("some.host", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert host_port(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "9400", "host", "::1:9400", "[::1]", "host:65536", "host:-1", "h st:1", "http://h:1", "[:::]:1", "a..b:1"],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT, as in '127\.0\.0\.1:9400', '\[::\]:9400' or ':9400'"):
        host_port(text)
