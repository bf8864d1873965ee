"""The unix socket of one endpoint: made without a moment in which others may use it, removed only if it is ours."""

from __future__ import annotations

import os
import socket
import stat
import struct
import weakref
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


class Listener(socket.socket):
    """A listening unix socket that only root and the daemon's own user may speak to.

    The file's mode already says so; this holds for those who got past it, as through another mount or a descriptor.
    Connections above `limit` are closed at once, so that a flood of them costs no more than that.
    """

    limit = 64

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is allowed. Raises BlockingIOError when there is none, as the loop expects."""
        while True:
            connection, address = super().accept()
            _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.geteuid()):
                log.warning("connection refused", path=self.getsockname(), reason=f"its peer is user {uid}, not root")
            elif sum(c.fileno() != -1 for c in self._accepted) >= self.limit:
                log.warning("connection refused", path=self.getsockname(), reason=f"{self.limit} are open already")
            else:
                self._accepted.add(connection)
                return connection, address
            connection.close()


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
        raise OSError(error.errno, error.strerror, str(path)) from None
    return listener, bound


def remove(path: Path, own: Identity) -> None:
    """Removes the socket at `path` if it is the one that `own` names."""
    if identity(path) == own:
        path.unlink(missing_ok=True)
