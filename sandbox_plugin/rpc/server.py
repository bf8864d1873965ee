"""grpclib as the server of one unix socket, for root and for the daemon's own user.

Those two could remove the socket, or register in our place, so nothing here guards against what they do on purpose. It
guards against accidents: another user gets past the mode of the socket's file, or no descriptor is left to accept with.
That a peer sends what is not gRPC, or half of it, or hangs up, costs its own connection: grpclib sees to that.

Accepting is not left to asyncio: it logs a lack of descriptors a hundred times in a row, and comes back later to a
listener that may have been closed meanwhile. And each connection has its own servicer, which no name that grpclib
promises can give it: `_protocol_factory` makes the protocol of one connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import structlog
from grpclib import Status
from grpclib.events import SendTrailingMetadata, listen
from grpclib.server import Server

from sandbox_plugin.api.v1beta1 import DevicePluginBase
from sandbox_plugin.rpc.codec import MessageCodec

_RETRY_SECONDS = 1.0
"""After which accepting is tried again, when no descriptor was left for it."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class PluginServer:
    """Serves a socket that listens. `service` makes what answers the calls, once for each connection.

    Usage:

        server = PluginServer(listener, service)
        server.start()
        try:
            ...
        finally:
            server.end()      # closes the listener too
    """

    def __init__(self, listener: socket.socket, service: Callable[[], DevicePluginBase]) -> None:
        self._listener = listener
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._clients: WeakSet[socket.socket] = WeakSet()
        """Those that are not gone. asyncio closes them."""
        self._greetings: set[asyncio.Task[Any]] = set()
        """Of clients that asyncio does not yet read from."""
        self._retry: asyncio.TimerHandle | None = None
        """Set while no descriptor was left."""

    def start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def end(self) -> None:
        """Stops listening, and hangs up on everybody: they see it at once, and their calls end soon."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._retry is not None:
            self._retry.cancel()
        for client in self._clients:
            with suppress(OSError):  # it is gone already
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._pause(error)
            return
        self._retry = None
        if why_not := _why_not(client):
            log.warning("connection refused", reason=why_not)
            client.close()
            return
        client.setblocking(False)
        self._clients.add(client)
        server = Server([self._service()], codec=MessageCodec())
        listen(server, SendTrailingMetadata, _tell_refusal)
        greeting = self._loop.create_task(self._loop.connect_accepted_socket(server._protocol_factory, client))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    def _pause(self, error: OSError) -> None:
        if self._retry is None:
            log.warning("no connection accepted", reason=f"{error.strerror}; tried again every second")
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(_RETRY_SECONDS, self.start)


def _why_not(client: socket.socket) -> str | None:
    """Why this connection is not served."""
    _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user in (0, os.geteuid()):
        return None
    expected = "0" if os.geteuid() == 0 else f"0 or {os.geteuid()}"
    return f"peer runs as uid {user}, expected {expected}"


async def _tell_refusal(answer: SendTrailingMetadata) -> None:
    """For each end of a call."""
    if answer.status is not Status.OK:
        log.debug("call refused", status=answer.status.name, reason=answer.status_message)
