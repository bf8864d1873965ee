"""The status socket: whoever connects gets one JSON document, and the end of the connection.

Nothing is read from a client, so there is nothing to misunderstand. The socket is for root alone (mode 0600), and what
goes wrong with it is logged and ends nothing: the kubelet's API is what this process is for.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from sandbox_plugin.outputs.clients import accepted
from sandbox_plugin.rpc import sockets
from sandbox_plugin.trouble import Trouble

_CLIENTS = 8
"""How many are answered at one time; others wait in the kernel's queue."""
_PATIENCE = 2.0
"""Seconds in which a client must have read its answer."""
_CHECK = 5.0
"""Seconds between looks whether the socket is still ours, and between attempts to make it."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True, eq=False, repr=False)
class StatusSocket:
    """Answers at `path` with what `document` returns at that moment."""

    path: Path
    document: Callable[[], dict[str, Any]]
    check: float = _CHECK
    patience: float = _PATIENCE
    _trouble: Trouble = field(default_factory=Trouble)
    _clients: set[socket.socket] = field(default_factory=set)
    """Those that are connected."""

    async def run(self) -> None:
        """Runs until cancelled; then the socket is removed."""
        while True:
            try:
                listener, own = _listen(self.path)
            except OSError as error:
                why = error.strerror or str(error)
                if self._trouble.update(why):
                    log.warning("no status socket", path=str(self.path), reason=why, action="everything else goes on")
                await asyncio.sleep(self.check)
                continue
            self._trouble.update(None)
            try:
                async with asyncio.TaskGroup() as group:
                    accepting = group.create_task(self._accept(listener))
                    while sockets.identity(self.path) == own:  # noqa: ASYNC110 (nothing tells of it)
                        await asyncio.sleep(self.check)
                    accepting.cancel()
            finally:
                listener.close()
                for client in self._clients:  # also one whose task had not begun yet
                    client.close()
                self._clients.clear()
                sockets.remove(self.path, own)

    async def _accept(self, listener: socket.socket) -> None:
        free = asyncio.Semaphore(_CLIENTS)
        async with asyncio.TaskGroup() as clients:
            while True:
                await free.acquire()
                client = await accepted(listener)
                self._clients.add(client)
                clients.create_task(self._answer(client)).add_done_callback(lambda _: free.release())

    async def _answer(self, client: socket.socket) -> None:
        answer = json.dumps(self.document()).encode()
        with client, suppress(OSError, TimeoutError):
            async with asyncio.timeout(self.patience):
                await asyncio.get_running_loop().sock_sendall(client, answer)
        self._clients.discard(client)


def _listen(path: Path) -> tuple[socket.socket, sockets.Identity]:
    """Listens at `path`, in place of the socket of a daemon that has ended. Raises OSError."""
    os.makedirs(path.parent, mode=0o700, exist_ok=True)
    if sockets.identity(path) is not None and _is_alive(path):
        raise FileExistsError(
            errno.EADDRINUSE, "another daemon answers there; give one of them another --status-socket"
        )
    return sockets.listen_at(path)


def _is_alive(path: Path) -> bool:
    """Whether somebody listens at this socket, be it without answering."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its queue is full
            return True
    return True
