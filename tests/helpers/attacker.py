"""An HTTP/2 client that keeps no rule, for what a peer of the daemon may try."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived, SettingsAcknowledged, TrailersReceived
from kubelet import TIMEOUT

PING = b"\0\0\x08\x06\0\0\0\0\0" + b"12345678"


class Attacker:
    """An HTTP/2 client that keeps no rule, on one connection to a plugin's socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(TIMEOUT)
        self.http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()

    def close(self) -> None:
        self.socket.close()

    def send(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def wait_for_greeting(self) -> None:
        """Until the daemon has read what was said first. Raises ConnectionResetError if it hangs up."""
        while data := self.socket.recv(1 << 16):
            if any(isinstance(event, SettingsAcknowledged) for event in self.http.receive_data(data)):
                return
        raise ConnectionResetError

    def wait_for_ping(self) -> None:
        """Until a ping is answered: all that was sent before has been read. Raises ConnectionResetError."""
        while data := self.socket.recv(1 << 16):
            if PING[-8:] in data:
                self.http.receive_data(data.replace(PING[:4] + b"\1" + PING[5:], b""))  # h2 has not sent it
                return
            self.http.receive_data(data)
        raise ConnectionResetError

    def trailers(self, stream: int) -> dict[str, str]:
        """How this call ended: waits until it has. Raises ConnectionResetError if the daemon hangs up."""
        while data := self.socket.recv(1 << 16):
            for event in self.http.receive_data(data):
                if isinstance(event, ResponseReceived | TrailersReceived) and event.stream_id == stream:
                    found = {str(name): str(value) for name, value in event.headers}
                    if "grpc-status" in found:
                        return found
        raise ConnectionResetError

    def room(self, stream: int) -> int:
        """How much may be sent in one frame now."""
        return min(self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size)

    def ask(
        self,
        method: str,
        *,
        message: bytes = b"\0\0\0\0\0",
        end: bool = True,
        more: Sequence[tuple[str, str]] = (),
    ) -> int:
        """Opens a stream with a call on it, and `more` headers. Returns its number. Nothing is sent yet."""
        stream = self.http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/v1beta1.DevicePlugin/{method}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *more,
        ]
        self.http.send_headers(stream, headers)
        if message or end:
            self.http.send_data(stream, message, end_stream=end)
        return stream


@contextmanager
def attacker(path: Path) -> Iterator[Attacker]:
    made = Attacker(path)
    try:
        made.send()
        yield made
    finally:
        made.close()
