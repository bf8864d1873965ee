"""A few pages over HTTP/1.1, on the daemon's own loop: whoever gets an answer knows that the loop turns.

One request for each connection, GET and HEAD, and no body is read: as much of RFC 9110 and 9112 as a scrape or a probe
needs. A web framework would add to every daemon more modules and memory than all that is served here.

What clients do costs at most themselves: each has `patience` seconds and `_HEAD_BYTES`, and of more than `_CLIENTS` the
one that came first is hung up on, so that idle ones keep no probe out. What goes wrong with the address is logged and
tried again, and ends nothing: the kubelet's API is what this process is for.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import urlsplit

import structlog

from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.outputs.clients import accepted
from sandbox_plugin.trouble import Trouble

TEXT = "text/plain; charset=utf-8"
_CLIENTS = 16
"""How many are served at one time."""
_HEAD_BYTES = 16384
"""Of a request. Prometheus sends some 300."""
_PATIENCE = 5.0
"""Seconds in which a client must have sent its request and read its answer."""
_LINGER = 1.0
"""Seconds in which a client must have hung up after its answer."""
_RETRY = 5.0
"""Seconds between attempts to listen."""
_END = b"\r\n\r\n"
"""Of the head of a request."""
_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (\S+) HTTP/1\.([0-9])")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside those that every answer has."""


Page = Callable[[str], Awaitable[Answer]]
"""Makes the answer. Is given the request's `Accept`, which may be empty."""


@dataclass(kw_only=True)
class HttpServer:
    """Serves `pages`, by path, at `address`: a host, which may be empty for all of them, and a port."""

    address: tuple[str, int]
    pages: Mapping[str, Page]
    retry: float = _RETRY
    patience: float = _PATIENCE
    _trouble: Trouble = field(default_factory=Trouble)
    _clients: dict[asyncio.Task[None], socket.socket] = field(default_factory=dict)
    """Those that are connected, first come first."""
    _leaving: dict[asyncio.Task[None], socket.socket] = field(default_factory=dict)
    """Those that are being hung up on to make room."""

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                listeners = await on_thread(_listen)(*self.address)  # a name may have to be looked up
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
                why = f"{reason}; it is tried again every {self.retry:g} s, and all else goes on"
                if self._trouble.update(why):
                    action = "end what listens there, or give another --metrics-address"
                    log.error("metrics not served", address=_shown(*self.address), reason=why, action=action)
                await asyncio.sleep(self.retry)
                continue
            self._trouble.update(None)
            log.info("metrics served", address=[_shown(*each.getsockname()[:2]) for each in listeners])
            try:
                async with asyncio.TaskGroup() as group:
                    for listener in listeners:
                        group.create_task(self._accept(listener))
            finally:
                # Also of tasks that had not begun yet.
                for open_socket in (*listeners, *self._clients.values(), *self._leaving.values()):
                    open_socket.close()

    async def _accept(self, listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as clients:
            while True:
                client = await accepted(listener)
                if len(self._clients) >= _CLIENTS:
                    oldest = next(iter(self._clients))
                    self._leaving[oldest] = self._clients.pop(oldest)
                    oldest.cancel()
                task = clients.create_task(self._serve(client))
                self._clients[task] = client
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        clients = self._leaving if task in self._leaving else self._clients
        clients.pop(task).close()

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(self.patience):
                head = await _read_head(client)
                if head is None:
                    return
                method, answer = await self._answer(head)
                await loop.sock_sendall(client, _rendered(answer, with_body=method != "HEAD"))
            # What is closed while the client still sends is reset, and the answer may get lost with it.
            client.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER):
                while await loop.sock_recv(client, 1 << 16):
                    pass

    async def _answer(self, head: bytes) -> tuple[str, Answer]:
        """The method, and what is to be said."""
        if _END not in head:
            return "", _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"{_HEAD_BYTES} bytes are allowed")
        lines = head.partition(_END)[0].decode("latin-1").split("\r\n")
        request = _REQUEST_LINE.fullmatch(lines[0])
        headers = _headers(lines[1:])
        if request is None or headers is None or (request[3] != "0" and "host" not in headers):
            return "", _refusal(HTTPStatus.BAD_REQUEST, "this is not a request in HTTP/1.1")
        method, target = request[1], request[2]
        try:
            page = self.pages.get(urlsplit(target).path)
        except ValueError:
            return method, _refusal(HTTPStatus.BAD_REQUEST, "the address makes no sense")
        if page is None:
            return method, _refusal(HTTPStatus.NOT_FOUND, f"there is {', '.join(self.pages)}")
        if method not in ("GET", "HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            return method, _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD are allowed", allowed)
        return method, await page(headers.get("accept", ""))


def _listen(host: str, port: int) -> Sequence[socket.socket]:
    """Listens at each address that the host has. Raises OSError. For a thread: it may look up a name."""
    if host in ("", "::"):
        if socket.has_dualstack_ipv6():
            return [_not_blocking(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True))]
        host = host or "0.0.0.0"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            listeners.append(_not_blocking(socket.create_server(address[:2], family=family)))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _not_blocking(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    return listener


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _read_head(client: socket.socket) -> bytes | None:
    """A request, at least up to its empty line, or what is too long to be one; None: the client hung up before."""
    head = bytearray()
    while _END not in head and len(head) < _HEAD_BYTES:
        part = await asyncio.get_running_loop().sock_recv(client, _HEAD_BYTES)
        if not part:
            return None
        head += part
    return bytes(head)


def _headers(lines: Sequence[str]) -> dict[str, str] | None:
    """By name, in lower case; None: they are none."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            return None
        name = name.lower()
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return headers


def _refusal(status: HTTPStatus, why: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(f"{status.value} {status.phrase}: {why}\n".encode(), status, headers=headers or {})


def _rendered(answer: Answer, *, with_body: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (answer.body if with_body else b"")
