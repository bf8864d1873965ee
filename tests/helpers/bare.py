"""A client of a plugin's socket that says what grpcio would not: half a request, or nothing that it reads."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import PingAckReceived, ResponseReceived, TrailersReceived
from kubelet import TIMEOUT


class BareClient:
    """One connection. What `ask` and `http` have to say goes out with `send`."""

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()
        self._ended: dict[int, str] = {}
        """Stream -> status."""

    def send(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def ask(self, method: str, message: bytes = b"\0\0\0\0\0", *, end: bool = True) -> int:
        """Opens a stream with a call on it, whose request may go on unless it `end`s. Returns its number."""
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
        self.http.send_data(stream, message, end_stream=end)
        return stream

    def ping(self) -> None:
        """Waits until all that was said before has been read. Raises ConnectionResetError."""
        self.http.ping(b"all read")
        self.send()
        while True:
            if not (data := self.socket.recv(1 << 16)):
                raise ConnectionResetError
            if any(isinstance(event, PingAckReceived) for event in self.http.receive_data(data)):
                return

    def status(self, stream: int) -> str:
        """The number of the status with which this call ended: waits until it has. Raises ConnectionResetError."""
        while stream not in self._ended:
            if not (data := self.socket.recv(1 << 16)):
                raise ConnectionResetError
            for event in self.http.receive_data(data):
                if isinstance(event, ResponseReceived | TrailersReceived):
                    found = {str(name): str(value) for name, value in event.headers}
                    if "grpc-status" in found:
                        self._ended[event.stream_id] = found["grpc-status"]
        return self._ended[stream]


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A connection over which nothing was said."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))  # waits while the queue is full
        client.settimeout(TIMEOUT)
        yield client


@contextmanager
def bare_client(path: Path) -> Iterator[BareClient]:
    with connected(path) as client:
        yield BareClient(client)
