"""The file of a unix socket: made without a moment in which others may use it, removed only if it is ours."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

Identity = tuple[int, int, int]
"""Device, inode number and time of making (ns): which socket file this is. Inode numbers alone are used again."""


def identity(path: Path) -> Identity | None:
    """Which socket lies at `path`; None where there is none, or something that is not a socket."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns) if stat.S_ISSOCK(found.st_mode) else None


def listen_at(path: Path) -> tuple[socket.socket, Identity]:
    """Listens at `path`, in place of a socket that lies there already. Raises OSError.

    The mode is set before bind: Linux gives the file the mode of the socket's own inode (unix_bind_bsd in
    net/unix/af_unix.c), so there is no window in which it is open to others.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)
        if identity(path) is not None:
            os.unlink(path)
        listener.bind(str(path))
        bound = identity(path)
        if bound is None:  # a kubelet that starts removes all sockets
            raise FileNotFoundError(errno.ENOENT, "the socket vanished while it was made")
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener, bound


def remove(path: Path, own: Identity) -> None:
    """Removes the socket at `path` if it is the one that `own` names. Called at the end, so it never raises."""
    if identity(path) != own:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("socket not removed", path=str(path), reason=error.strerror)
