"""The unix socket of one endpoint: made without a moment in which others may use it, removed only if it is ours."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Identity = tuple[int, int, int]
"""Device, inode number and time of making (ns): which socket file this is. Inode numbers alone are used again."""


def identity(path: Path) -> Identity | None:
    """Which socket lies at `path`; None where there is none, or something that is no socket."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns) if stat.S_ISSOCK(found.st_mode) else None


class Connection(socket.socket):
    """An accepted connection that may send `BURST` bytes at once, and no more than `RATE` a second for long.

    gRPC puts no bound on the length that a message announces; this does, and the sender loses only its connection.
    """

    BURST = 4 << 20
    """Bytes: the longest message that the kubelet itself would take."""
    RATE = 1 << 20
    """Bytes a second."""
    CHUNK = 16 << 10
    """Bytes taken in at once, so that a few hundred calls begin, and end, before the loop looks at the others again."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.received = 0
        self._left = float(self.BURST)
        self._at = time.monotonic()

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As socket.recv. Raises ConnectionResetError for a peer that sends too much."""
        data = super().recv(min(size, self.CHUNK), flags)
        now = time.monotonic()
        self._left = min(self.BURST, self._left + (now - self._at) * self.RATE) - len(data)
        self._at = now
        self.received += len(data)
        if self._left < 0:
            log.warning("connection closed", reason=f"its peer sent more than {self.BURST >> 20} MiB at once")
            raise ConnectionResetError(errno.ECONNRESET, "the peer sends too much")
        return data


class Listener(socket.socket):
    """A listening unix socket that only root and the daemon's own user may speak to.

    The file's mode already says so; this holds for those who got past it, as through another mount or a descriptor.
    At most `LIMIT` connections are open: one more takes the place of the oldest that never said a word, or is closed.
    """

    LIMIT = 64
    _PAUSE = 0.5
    """Seconds without an attempt after one that found no descriptor left; asyncio comes back after one."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._starved_at = float("-inf")
        self._accepted: list[weakref.ref[Connection]] = []

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is allowed. Raises BlockingIOError when there is none, as the loop expects.

        Raises OSError where no descriptor is left: once, although asyncio asks up to 128 times in a row all the same,
        and would log each.
        """
        while True:
            if time.monotonic() - self._starved_at < self._PAUSE:
                raise BlockingIOError(errno.EAGAIN, "no descriptor was left a moment ago")
            try:
                plain, address = super().accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._starved_at = time.monotonic()
                raise
            connection = Connection(plain.detach())
            if why_not := self._why_not(connection):
                log.warning("connection refused", reason=why_not)
                connection.close()
            else:
                self._accepted.append(weakref.ref(connection))
                return connection, address

    def hang_up(self) -> None:
        """Ends every connection that is still open; what serves them sees the end and closes them."""
        for connection in (reference() for reference in self._accepted):
            if connection is not None and connection.fileno() != -1:
                with suppress(OSError):  # its peer may have ended it in this moment
                    connection.shutdown(socket.SHUT_RDWR)

    def _why_not(self, connection: Connection) -> str | None:
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user not in (0, os.geteuid()):
            return f"its peer is user {user}, not root"
        self._accepted = [r for r in self._accepted if (c := r()) is not None and c.fileno() != -1]
        if len(self._accepted) < self.LIMIT:
            return None
        for open_one in (r() for r in self._accepted):
            if open_one is not None and open_one.received == 0:
                open_one.received = -1  # so that the next one is chosen next time
                with suppress(OSError):
                    open_one.shutdown(socket.SHUT_RDWR)  # its transport sees the end and closes it
                return None
        return f"{self.LIMIT} are open already"


def listen_at(path: Path) -> tuple[Listener, Identity]:
    """Listens at `path`, in place of a socket that lies there already. Raises OSError.

    The mode is set before bind: Linux gives the file the mode of the socket's own inode (unix_bind_bsd in
    net/unix/af_unix.c), so there is no window in which it is open to others.
    """
    listener = Listener()
    try:
        os.fchmod(listener.fileno(), 0o600)
        if identity(path) is not None:
            os.unlink(path)
        listener.bind(str(path))
        bound = identity(path)
        if bound is None:
            raise FileNotFoundError(2, "the socket vanished while it was made", str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    return listener, bound


def remove(path: Path, own: Identity) -> None:
    """Removes the socket at `path` if it is the one that `own` names."""
    if identity(path) == own:
        path.unlink(missing_ok=True)
