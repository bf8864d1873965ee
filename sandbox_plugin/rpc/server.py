"""A grpclib server on one unix socket, for root and for the daemon's own user.

Those two could remove the socket, or register in our place, so nothing here guards against what they do on purpose. It
guards against accidents: another user gets past the mode of the socket's file, or no descriptor is left to accept with.
That a peer sends what is not gRPC, or half of it, or hangs up, costs its own connection: grpclib sees to that.

Accepting is not left to asyncio: it logs a lack of descriptors a hundred times in a row, and comes back later to a
listener that may have been closed meanwhile. And each connection has its own services, which no name that grpclib
promises can give it: `_protocol_factory` makes the protocol of one connection.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import structlog
from betterproto.grpc.grpclib_server import ServiceBase
from grpclib import Status
from grpclib.events import SendTrailingMetadata, listen
from grpclib.server import Server, Stream

from sandbox_plugin.rpc.codec import RequestCodec

if TYPE_CHECKING:
    from grpclib._typing import IServable

_RETRY_SECONDS = 1.0
"""After which accepting is tried again, when no descriptor was left for it."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class UnixServer:
    """Serves a socket that listens. `services` makes what answers the calls, once for each connection.

    Usage:

        with UnixServer(listener, lambda: [Service()]):
            ...

    At the end it stops listening, closes the socket, and hangs up on everybody: they see it at once, and their calls
    end soon.
    """

    def __init__(self, listener: socket.socket, services: Callable[[], Collection[IServable]]) -> None:
        self._listener = listener
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._clients: WeakSet[socket.socket] = WeakSet()
        """Those that are not gone. asyncio closes them."""
        self._greetings: set[asyncio.Task[Any]] = set()
        """Of clients that asyncio does not yet read from."""
        self._retry: asyncio.TimerHandle | None = None
        """Set while no descriptor was left."""

    def __enter__(self) -> None:
        self._listen()

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._retry is not None:
            self._retry.cancel()
        for client in self._clients:
            with suppress(OSError):  # it is gone already
                client.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._pause(error)
            return
        self._retry = None
        user, allowed = _user_of(client), sorted({0, os.geteuid()})
        if user not in allowed:
            log.warning(
                "connection refused", reason=f"peer runs as uid {user}, expected {' or '.join(map(str, allowed))}"
            )
            client.close()
            return
        client.setblocking(False)
        self._clients.add(client)
        server = Server(self._services(), codec=RequestCodec())
        listen(server, SendTrailingMetadata, _tell_refusal)
        greeting = self._loop.create_task(self._loop.connect_accepted_socket(server._protocol_factory, client))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    def _pause(self, error: OSError) -> None:
        if self._retry is None:
            log.warning("no connection accepted", reason=f"{error.strerror}; tried again every second")
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(_RETRY_SECONDS, self._listen)


class PromptStreams(ServiceBase):
    """A base of services: a server stream that ends while something is sent over it ends the method behind it at once.

    betterproto leaves the method's generator to the garbage collector, so its `finally` waits until that comes by.
    """

    async def _call_rpc_handler_server_stream(self, handler: Any, stream: Stream[Any, Any], request: Any) -> None:
        async with aclosing(handler(request)) as answers:
            async for answer in answers:
                await stream.send_message(answer)


def _user_of(client: socket.socket) -> int:
    """The uid of the process that connected (SO_PEERCRED in unix(7): pid, uid, gid)."""
    _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


async def _tell_refusal(answer: SendTrailingMetadata) -> None:
    """For each end of a call."""
    if answer.status is not Status.OK:
        log.debug("call refused", status=answer.status.name, reason=answer.status_message)
