"""grpclib, with three gaps closed: a leak of its server, how a server ends, and how a client's connection is lost.

The leak: grpclib gives a stream back at the end of the task that answers it. A task that is cancelled before its
first step never gets there: a peer that opens a stream and resets it in the same breath costs some 8 kB each time, for
as long as its connection lives (CVE-2023-44487 in the small). Here the stream is given back whatever becomes of the
task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import H2Protocol, Stream
from grpclib.server import Handler, Server
from h2.exceptions import H2Error

from sandbox_plugin.kubelet.sockets import Listener

CONNECTION_LOST = (OSError, StreamTerminatedError, H2Error, AttributeError)
"""What a call to another process raises when that process goes, or speaks no HTTP/2.

AttributeError: a connection that ends between its beginning and the first stream on it has lost its transport
(Connection.create_stream in grpclib/protocol.py). A kubelet that restarts does that to us.
"""


class _Handler(Handler):
    def accept(self, stream: Stream, headers: list[tuple[str, str]], release_stream: Callable[[], Any]) -> None:
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                release_stream()

        super().accept(stream, headers, release)
        self._tasks[stream].add_done_callback(lambda _: release())


class PluginServer(Server):
    """As grpclib's."""

    async def end(self, listener: Listener) -> None:
        """Stops listening, hangs up on everybody, and returns when the last call has ended."""
        # A connection that the loop has just accepted gets its transport in the loop's next round. asyncio would forget
        # it there, open as it is, if the server had ended by then (Server._attach in asyncio/base_events.py).
        asyncio.get_running_loop().remove_reader(listener.fileno())
        try:
            await asyncio.sleep(0)
        finally:
            self.close()
            listener.hang_up()
            await self.wait_closed()

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = _Handler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self._handlers.add(handler)
        return H2Protocol(handler, self._config, self._h2_config)
