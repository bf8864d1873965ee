"""A gRPC server that answers in odd ways: what a kubelet that is broken, half-started or not a kubelet may say.

Apart from grpcio, which would not send such things.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded
from h2.exceptions import ProtocolError
from kubelet import TIMEOUT

Answer = Callable[[H2Connection, int], bytes]
"""Puts an answer to this stream into the connection, or returns bytes to be sent as they are."""

_OK = [(":status", "200"), ("content-type", "application/grpc")]
_STATUS_0 = [("grpc-status", "0")]


def _answer(
    body: bytes, headers: Sequence[tuple[str, str]] = _OK, trailers: Sequence[tuple[str, str]] = _STATUS_0
) -> Answer:
    def put(http: H2Connection, stream: int) -> bytes:
        http.send_headers(stream, headers)
        http.send_data(stream, body)
        http.send_headers(stream, trailers, end_stream=True)
        return b""

    return put


def _frame(kind: int, payload: bytes, *, on_stream: bool) -> Answer:
    def put(http: H2Connection, stream: int) -> bytes:
        head = len(payload).to_bytes(3, "big") + bytes([kind, 0])
        return head + (stream if on_stream else 0).to_bytes(4, "big") + payload

    return put


def _do(act: Callable[[H2Connection, int], None]) -> Answer:
    def put(http: H2Connection, stream: int) -> bytes:
        act(http, stream)
        return b""

    return put


def _headers_alone(headers: Sequence[tuple[str, str]]) -> Answer:
    return _do(lambda http, stream: http.send_headers(stream, headers, end_stream=True))


ANSWERS: dict[str, Answer] = {
    "a prefix that ends too early": _answer(b"\0\0\0"),
    "a message that ends too early": _answer(b"\0\0\0\0\x10abc"),
    "a message of 4 GiB": _answer(b"\0\xff\xff\xff\xff" + b"x" * 1000),
    "a compressed message": _answer(b"\1\0\0\0\x03abc"),
    "bytes that are not a message": _answer(b"\0\0\0\0\x14" + b"\xff" * 20),
    "status 0 without a message": _answer(b""),
    "status 0 and nothing else": _headers_alone([*_OK, *_STATUS_0]),
    "trailers without a status": _answer(b"\0\0\0\0\0", trailers=[("x", "y")]),
    "a status that is not a number": _answer(b"\0\0\0\0\0", trailers=[("grpc-status", "abc")]),
    "a status that nobody knows": _answer(b"\0\0\0\0\0", trailers=[("grpc-status", "99")]),
    "no :status": _answer(b"\0\0\0\0\0", headers=[("content-type", "application/grpc")]),
    "a page of HTML": _headers_alone([(":status", "500"), ("content-type", "text/html")]),
    "a reset": _do(lambda http, stream: http.reset_stream(stream, 2)),
    "GOAWAY": _do(lambda http, stream: http.close_connection()),
    "data before headers": _frame(0, b"abc", on_stream=True),
    "a window that is too large": _frame(8, b"\x7f\xff\xff\xff", on_stream=False),
    "a ping of one byte": _frame(6, b"x", on_stream=False),
}


class OddServer:
    """Listens at `path` and answers each call with the next of `answers`, the last one again and again."""

    def __init__(self, path: Path, answers: Sequence[Answer]) -> None:
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="odd server")

    def __enter__(self) -> OddServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # shut down
                return
            with client, suppress(OSError, ProtocolError):
                self._answer_one(client)

    def _answer_one(self, client: socket.socket) -> None:
        client.settimeout(TIMEOUT)
        http = H2Connection(
            H2Configuration(client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        http.initiate_connection()
        client.sendall(http.data_to_send())
        while data := client.recv(1 << 16):
            for event in http.receive_data(data):
                if isinstance(event, StreamEnded):
                    odd = next(self._answers)(http, event.stream_id)
                    client.sendall(http.data_to_send() + odd)
            client.sendall(http.data_to_send())
