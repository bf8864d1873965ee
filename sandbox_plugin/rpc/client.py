"""Calls to other processes, which may answer anything, or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from grpclib import GRPCError
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError

from sandbox_plugin.rpc.codec import MessageCodec

_T = TypeVar("_T")


class NoAnswerError(Exception):
    """The other process is gone, or does not speak gRPC. Says so in words."""


class NonsenseError(NoAnswerError):
    """It answered, and not in gRPC: it is no kubelet, or a broken one."""


async def call(socket: Path, method: Callable[[Channel], Awaitable[_T]]) -> _T:
    """One call over a connection of its own: `method` makes it, and does nothing else.

    Raises GRPCError for an answer that is an error, FileNotFoundError without a socket, PermissionError for one that we
    may not use, and `NoAnswerError` when the other side goes away. `NonsenseError`, which is one too, is for whatever
    else grpclib, h2 and betterproto raise when it answers with nonsense: assertions and AttributeErrors among them.
    """
    channel = Channel(path=str(socket), codec=MessageCodec())
    try:
        return await method(channel)
    except (GRPCError, FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise NoAnswerError(error.strerror or str(error)) from None
    except StreamTerminatedError as error:
        raise NoAnswerError(str(error)) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise NonsenseError(f"not a valid gRPC answer ({what})") from error
    finally:
        channel.close()
