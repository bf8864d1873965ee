"""grpclib as a server of one unix socket, where no peer can cost more than its own connection and a few megabytes.

What grpclib, h2 and hpack leave unbounded, and a peer may fill on purpose, is bounded here, for each connection:

    what the peer sends     a request has 64 KiB and 10 s; all unfinished requests together 256 KiB, which is the
                            window of HTTP/2: it is given back when a call ends, not when its bytes are read
    what it does not read   nothing more is read from a peer that does not read; after 10 s its connection is cut
    calls                   16 open ones, 32 with those that were reset and have not ended yet
    HTTP/2's own memory     frames, headers of a call, closed streams, settings, and the table of header compression

More than 16 connections are not held: the oldest one without an open call makes room for a new one.

Names that these libraries do not promise, so pyproject.toml has upper bounds for their releases:

    grpclib 0.4      request_handler, _DispatchServerEvents, protocol.Connection, EventsProcessor (and its
                     `processors`), Stream.buffer with the four methods of Buffer, Configuration.__for_server__
    betterproto 2.0  ServiceBase.__mapping__, and _call_rpc_handler_server_stream (servicer.py)
    h2 4, hpack 4    H2Connection's MAX_CLOSED_STREAMS, incoming_buffer and encoder; FrameBuffer's add_data, _data and
                     _headers_buffer; Encoder.header_table_size
    asyncio          a transport's max_size: how much is read at once
    watchfiles 1     _rust_notify.WatchfilesRustInternalError (host/watch.py)
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.events import SendTrailingMetadata, _DispatchServerEvents
from grpclib.protocol import AbstractHandler, Buffer, Connection, EventsProcessor, H2Protocol, Stream
from grpclib.server import request_handler
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import UnknownFrameReceived
from h2.exceptions import FrameTooLargeError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hpack import Encoder

from sandbox_plugin.api.v1beta1 import DevicePluginBase
from sandbox_plugin.kubelet.wellformed import MessageCodec

CONNECTIONS = 16
"""Held at most. The kubelet has one, and a second one for a moment when it is registered with again."""
STREAMS = 16
"""Calls that may be open on one connection. The kubelet has a ListAndWatch and one other call at a time."""
REQUEST_BYTES = 64 << 10
"""Of the longest request: some 5000 device IDs. It is parsed in one go, and the longest takes a second."""
_REQUEST_SECONDS = 10.0
"""In which a request must have come whole."""
_WINDOW_BYTES = 256 << 10
"""Of all requests on one connection that have not been answered. h2 may hold half of it back for a while, and the other
half is enough for the longest request."""
_DEAF_SECONDS = 10.0
"""For which a peer may leave unread what was sent to it, when there is no room for more."""
_CHUNK_BYTES = 4 << 10
"""Read from one connection before the loop looks at the others again."""
_FRAME_BYTES = 16 << 10
"""Of the longest frame: the least that HTTP/2 allows to ask for, and what h2 asks for."""
_HEADER_BYTES = 4 << 10
"""Of all headers of one call."""
_CLOSED_STREAMS = 1 << 10
"""That are remembered, to tell late frames from wrong ones."""
_SETTINGS = 64
"""Different settings that a peer may send; HTTP/2 has about ten."""
_H2_WINDOW = (1 << 16) - 1
"""Every connection's window when it begins (RFC 9113, section 6.9.2)."""
_BATCH = 32
"""Connections that are accepted before the loop does something else."""
_RETRY_SECONDS = 1.0
"""After which accepting is tried again, when no descriptor was left for it."""
_END_SECONDS = 2.0
"""In which all calls must have ended when the server ends."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class PluginServer:
    """Serves a socket that listens. `service` makes what answers the calls, once for each connection.

    Usage:

        server = PluginServer(listener, service)
        server.start()
        try:
            ...
        finally:
            await server.end()      # closes the listener too
    """

    def __init__(self, listener: socket.socket, service: Callable[[], DevicePluginBase]) -> None:
        self._listener = listener
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._connections: dict[_Peer, None] = {}
        """Those that are not gone, the oldest first."""
        self._retry: asyncio.TimerHandle | None = None
        """Set while no descriptor was left."""

    def start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    async def end(self) -> None:
        """Stops listening, hangs up on everybody, and returns when the last call has ended, or after some seconds."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._retry is not None:
            self._retry.cancel()
        for peer in self._connections:
            peer.hang_up()
        if self._connections:
            await asyncio.wait([peer.gone for peer in self._connections], timeout=_END_SECONDS)
        if self._connections:
            log.error("calls did not end", reason=f"{len(self._connections)} connections after {_END_SECONDS:g} s")

    def _accept(self) -> None:
        """Accepts connections that wait.

        asyncio's own way logs a lack of descriptors a hundred times in a row, and later comes back to a listener that
        may have been closed meanwhile.
        """
        for _ in range(_BATCH):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._pause(error)
                return
            if why_not := self._why_not(client):
                log.warning("connection refused", reason=why_not)
                client.close()
            else:
                self._take_in(client)

    def _pause(self, error: OSError) -> None:
        if self._retry is None:
            log.warning("no connection accepted", reason=f"{error.strerror}; tried again every second")
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(_RETRY_SECONDS, self.start)

    def _why_not(self, client: socket.socket) -> str | None:
        """Why this connection is not served. Makes room for it if needed."""
        _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user not in (0, os.geteuid()):
            expected = "0" if os.geteuid() == 0 else f"0 or {os.geteuid()}"
            return f"peer runs as uid {user}, expected {expected}"
        held = [peer for peer in self._connections if not peer.is_leaving]
        if len(held) < CONNECTIONS:
            return None
        for peer in held:
            if not peer.calls.running:
                peer.hang_up()
                return None
        return f"{CONNECTIONS} connections are already open, and each has a call"

    def _take_in(self, client: socket.socket) -> None:
        self._retry = None
        client.setblocking(False)
        peer = _Peer(self._service())
        self._connections[peer] = None
        peer.gone.add_done_callback(lambda _: self._connections.pop(peer))
        greeting = self._loop.create_task(self._loop.connect_accepted_socket(lambda: peer, client))
        greeting.add_done_callback(partial(_greeted, peer, client))


def _greeted(peer: _Peer, client: socket.socket, greeting: asyncio.Task[Any]) -> None:
    """The connection has its transport, which closes it in the end; or it will never have one."""
    if greeting.cancelled() or greeting.exception() is not None:
        client.close()
        if not peer.gone.done():
            peer.gone.set_result(None)


class _Peer(H2Protocol):
    """One connection."""

    def __init__(self, service: DevicePluginBase) -> None:
        self.calls = _Calls(service, self)
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set when the connection is lost and its last call has ended."""
        self.is_leaving = False
        self._transport: asyncio.Transport | None = None
        self._deaf: asyncio.TimerHandle | None = None
        config = H2Configuration(
            client_side=False,
            header_encoding="latin-1",  # which cannot fail
            validate_outbound_headers=False,
            normalize_inbound_headers=False,
            normalize_outbound_headers=False,
        )
        super().__init__(self.calls, Configuration().__for_server__(), config)

    def hang_up(self, why: str | None = None) -> None:
        """Ends the connection and its calls, soon; says why, if the peer is to blame."""
        if why is not None and not self.is_leaving:
            log.warning("connection closed", reason=why)
        self.is_leaving = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.max_size = _CHUNK_BYTES  # type: ignore[attr-defined]
        self._http = _Http(config=self.h2_config)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(_WINDOW_BYTES - _H2_WINDOW)
        self.connection = Connection(self._http, transport, config=self.config)
        self.connection.flush()
        self.processor = EventsProcessor(self.calls, self.connection)
        self.processor.processors[UnknownFrameReceived] = lambda _: None  # as RFC 9113, section 4.1, asks for
        if self.is_leaving:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.connection.is_closing():
            self.hang_up()  # a peer that breaks the rules would have to read first what is still to be sent to it
        elif len(self._http.remote_settings) > _SETTINGS:
            self.hang_up(f"peer sent more than {_SETTINGS} different settings")

    def eof_received(self) -> None:
        self.hang_up()  # asyncio would keep the connection until the peer has read what is still to be sent

    def pause_writing(self) -> None:
        """There is no room for what the peer must read."""
        super().pause_writing()
        assert self._transport is not None
        self._transport.pause_reading()
        loop = asyncio.get_running_loop()
        self._deaf = loop.call_later(_DEAF_SECONDS, self.hang_up, f"peer reads nothing for {_DEAF_SECONDS:g} s")

    def resume_writing(self) -> None:
        super().resume_writing()
        assert self._transport is not None
        self._transport.resume_reading()
        self._listen_again()

    def _listen_again(self) -> None:
        if self._deaf is not None:
            self._deaf.cancel()
            self._deaf = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_leaving = True
        self._listen_again()
        super().connection_lost(exc)  # cancels every call
        self._transport = None
        self.call_ended()

    def call_ended(self) -> None:
        if self._transport is None and not self.calls.running and not self.gone.done():
            self.gone.set_result(None)


class _Http(H2Connection):
    """HTTP/2 that remembers less of what the peer says."""

    DEFAULT_MAX_HEADER_LIST_SIZE = _HEADER_BYTES
    MAX_CLOSED_STREAMS = _CLOSED_STREAMS

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        limits = {
            SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW_BYTES,
            SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
            SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_BYTES,
        }
        self.local_settings = Settings(client=False, initial_values=limits)
        self.incoming_buffer = _Frames(server=True)
        self.encoder = _ForgetfulEncoder()


class _Frames(FrameBuffer):
    """Refuses a frame that is too long, and headers in more than two frames, as soon as they begin.

    h2 takes in a frame of up to 16 MiB before it refuses it, and headers in up to 64 frames.
    """

    def add_data(self, data: Any) -> None:
        super().add_data(data)
        if int.from_bytes(self._data[:3], "big") > _FRAME_BYTES or len(self._headers_buffer) > 2:
            raise FrameTooLargeError("a frame, or a call's headers, are too long")


class _ForgetfulEncoder(Encoder):
    """Header compression without memory: how much of it there may be is the peer's to say, and it may say 4 GiB."""

    def __init__(self) -> None:
        super().__init__()
        self.header_table.maxsize = 0

    @property
    def header_table_size(self) -> int:
        return 0

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        return


class _Calls(AbstractHandler):
    """The calls on one connection. Each is a task, and stays in `running` until that has ended, however it ends."""

    def __init__(self, service: DevicePluginBase, peer: _Peer) -> None:
        self.running: dict[Stream, asyncio.Task[None]] = {}
        self._mapping = service.__mapping__()
        self._codec = MessageCodec()
        self._dispatch = _DispatchServerEvents()
        self._dispatch.add_listener(SendTrailingMetadata, _tell_refusal)
        self._peer = peer

    def accept(self, stream: Stream, headers: list[tuple[str, str]], release_stream: Callable[[], Any]) -> None:
        if len(self.running) >= 2 * STREAMS:
            self._peer.hang_up(f"peer opened and reset more than {2 * STREAMS} calls at once")
            return
        stream.buffer = _Request()
        # grpclib would release the stream at the end of the coroutine, which one that is cancelled before its first
        # step never reaches: a peer that opens streams and resets them at once (CVE-2023-44487) would leave them all.
        call = request_handler(self._mapping, stream, headers, self._codec, None, self._dispatch, lambda: None)
        task = self.running[stream] = asyncio.get_running_loop().create_task(call)
        task.add_done_callback(partial(self._ended, stream, release_stream))

    def cancel(self, stream: Stream) -> None:
        if stream in self.running:
            self.running[stream].cancel()

    def close(self) -> None:
        """Also cancels calls whose stream was reset, and which wait for room to answer that."""
        for task in self.running.values():
            task.cancel()

    def _ended(self, stream: Stream, release_stream: Callable[[], Any], task: asyncio.Task[None]) -> None:
        del self.running[stream]
        release_stream()
        self._peer.call_ended()


async def _tell_refusal(answer: Any) -> None:
    """For each end of a call: grpclib's `SendTrailingMetadata`."""
    if answer.status is not Status.OK:
        log.debug("call refused", status=answer.status.name, reason=answer.status_message)


class _Request(Buffer):
    """The bytes of one request, in place of grpclib's buffer, which keeps an object for each frame, empty ones too."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._held = 0
        """Bytes of the connection's window that this request keeps until its call has ended."""
        self._has_ended = False
        self._news = asyncio.Event()
        self._until = asyncio.get_running_loop().time() + _REQUEST_SECONDS

    def add(self, data: bytes, ack_size: int) -> None:
        self._held += ack_size
        self._bytes += data
        self._news.set()

    def eof(self) -> None:
        self._has_ended = True
        self._news.set()

    async def read(self, size: int) -> bytes:
        """So many bytes, as soon as they are there: the five before a message, or a message. Raises GRPCError."""
        if size > REQUEST_BYTES:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"a request has at most {REQUEST_BYTES >> 10} KiB")
        try:
            async with asyncio.timeout_at(self._until):
                while len(self._bytes) < size and not self._has_ended:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            why = f"the request did not come whole in {_REQUEST_SECONDS:g} s"
            raise GRPCError(Status.DEADLINE_EXCEEDED, why) from None
        if len(self._bytes) < size:
            raise GRPCError(Status.INVALID_ARGUMENT, "the request ends before its message does")
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken

    def unacked_size(self) -> int:
        return self._held
