"""grpclib, with two gaps closed: a leak of its server, and how its client says that a connection is lost.

The leak: grpclib gives a stream back at the end of the task that answers it. A task that is cancelled before its
first step never gets there: a peer that opens a stream and resets it in the same breath costs some 8 kB each time, for
as long as its connection lives (CVE-2023-44487 in the small). Here the stream is given back whatever becomes of the
task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import H2Protocol, Stream
from grpclib.server import Handler, Server
from h2.exceptions import H2Error

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

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = _Handler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self._handlers.add(handler)
        return H2Protocol(handler, self._config, self._h2_config)
