"""Accepting clients on the loop, as the status socket and the HTTP server do it."""

from __future__ import annotations

import asyncio
import socket

_RETRY = 1.0
"""Seconds after which accepting is tried again, for want of descriptors or because the client is gone."""


async def accepted(listener: socket.socket) -> socket.socket:
    """Waits for the next client. The socket is the caller's to close.

    Not with the loop's sock_accept: who is cancelled just then never gets the connection to close.
    """
    while True:
        await _is_readable(listener)
        try:
            client, _ = listener.accept()
        except OSError:
            await asyncio.sleep(_RETRY)
            continue
        client.setblocking(False)
        return client


async def _is_readable(listener: socket.socket) -> None:
    """Waits until a client has connected."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)
