"""The life of one resource at the kubelet: serve, register, notice that the kubelet forgot us, register again.

    serving --> registering --> registered --> lost --> registering ...
       ^                                        |
       +-------- own socket gone ---------------+

What says that a registration is lost: kubelet.sock is another socket than the one we registered with, our own socket
is gone, or the newest ListAndWatch stream ended. When any stream of a resource ends, the kubelet closes the connection
of the client that is mapped at that moment (runClient in pkg/kubelet/cm/devicemanager/plugin/v1beta1/server.go), so the
newest stream tells of the older ones as well; the kubelet never opens one again by itself.

Each resource has its own endpoint and its own trouble; one in trouble leaves the others alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import structlog
from grpclib import GRPCError
from grpclib.client import Channel

from sandbox_plugin.api import v1beta1
from sandbox_plugin.inventory.naming import socket_name
from sandbox_plugin.kubelet import sockets
from sandbox_plugin.kubelet.server import CONNECTION_LOST, PluginServer
from sandbox_plugin.kubelet.servicer import DevicePluginServicer
from sandbox_plugin.kubelet.wellformed import MessageCodec
from sandbox_plugin.model import Device
from sandbox_plugin.registry import Registry
from sandbox_plugin.settings import Consumer, Policy

KUBELET_SOCKET = "kubelet.sock"
API_VERSION = "v1beta1"
_SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket: sun_path of 108 bytes with its end (unix(7))."""
_REGISTER_TIMEOUT = 20.0
"""Seconds. The kubelet dials us for up to 10 s before it answers Register."""
_STREAM_TIMEOUT = 10.0
"""Seconds in which the kubelet opens ListAndWatch after it answered Register."""
_SETTLED = 5.0
"""Seconds after which a registration has held, and its loss is worth another attempt at once."""
_RECHECK = 5.0
"""Seconds between looks at the sockets that no event asked for."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class State(StrEnum):
    """Where an endpoint stands."""

    SERVING = "serving"
    REGISTERING = "registering"
    REGISTERED = "registered"
    LOST = "lost"


@dataclass(kw_only=True)
class Backoff:
    """Seconds to wait before the next attempt: short at first, doubling up to a cap, never in step with others."""

    first: float = 0.1
    cap: float = 5.0
    _next: float = 0.0

    def reset(self) -> None:
        self._next = 0.0

    def next(self) -> float:
        self._next = min(self.cap, self._next * 2) if self._next else self.first
        return self._next * random.uniform(0.75, 1.0)


@dataclass(kw_only=True)
class Endpoint:
    """Keeps `resource` registered for as long as `run` runs.

    Usage:

        endpoint = Endpoint(resource=..., kubelet_dir=..., registry=..., policy=...)
        async with asyncio.TaskGroup() as group:
            group.create_task(endpoint.run())
            ...
            endpoint.look()      # something changed in the kubelet's folder
    """

    resource: str
    kubelet_dir: Path
    registry: Registry
    policy: Policy
    consumer: Consumer
    why_not: Callable[[Sequence[Device]], Awaitable[Mapping[str, str]]]
    """As in `DevicePluginServicer`."""
    state: State = State.SERVING
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    """Rung by everything that is worth a look. Only `_wait` waits for it."""
    _opened: int = 0
    """ListAndWatch streams opened since the endpoint began: the number of the newest."""
    _newest_is_open: bool = False
    _backoff: Backoff = field(default_factory=Backoff)
    _registered_at: float = float("-inf")
    """Monotonic seconds."""
    _trouble: str | None = None
    """The complaint that was logged last; None when all was well last."""

    @property
    def path(self) -> Path:
        """Where our socket lies."""
        budget = _SOCKET_PATH_BYTES - len(str(self.kubelet_dir).encode()) - 1
        return self.kubelet_dir / socket_name(self.resource, max_bytes=budget)

    def look(self) -> None:
        """Something changed in the kubelet's folder: look at the sockets now."""
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled; then the streams are closed and the socket is removed."""
        while True:
            self.state = State.SERVING
            try:
                async with self._serving() as own:
                    while sockets.identity(self.path) == own:
                        kubelet = await self._register(own)
                        await self._until_lost(own, kubelet)
                        await self._pause_if_short(own, kubelet)
            except OSError as error:
                self._complain(f"cannot listen at {error.filename or self.path}: {error.strerror or error}")
                await self._pause(own=None)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[sockets.Identity]:
        listener, own = sockets.listen_at(self.path)
        try:
            servicer = DevicePluginServicer(
                resource=self.resource,
                registry=self.registry,
                policy=self.policy,
                consumer=self.consumer,
                stream=self._stream,
                why_not=self.why_not,
            )
            server = PluginServer([servicer], codec=MessageCodec())
            await server.start(sock=listener)
            try:
                yield own
            finally:
                await server.end(listener)
        finally:
            listener.close()
            sockets.remove(self.path, own)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Around each ListAndWatch stream."""
        self._opened += 1
        number = self._opened
        self._newest_is_open = True
        self._bell.set()
        try:
            yield
        finally:
            if number == self._opened:
                self._newest_is_open = False
                self._bell.set()

    async def _register(self, own: sockets.Identity) -> sockets.Identity | None:
        """Tries until the kubelet has accepted us and opened a stream, or our own socket is gone.

        Returns the kubelet.sock that this happened at.
        """
        self.state = State.REGISTERING
        while sockets.identity(self.path) == own:
            kubelet, opened = self._kubelet(), self._opened
            why_not = await self._register_once(own) if kubelet else f"no socket {self.kubelet_dir / KUBELET_SOCKET}"
            if why_not is None:
                why_not = await self._until_asked(own, kubelet, opened)
            if why_not is None:
                self.state = State.REGISTERED
                self._trouble = None
                self._registered_at = time.monotonic()
                log.info("registered", resource=self.resource, endpoint=self.path.name)
                return kubelet
            self._complain(f"not registered: {why_not}")
            await self._pause(own)
        return None

    async def _register_once(self, own: sockets.Identity) -> str | None:
        """One Register call, given up when either socket changes meanwhile. Returns why it failed, or None.

        While it waits the kubelet dials our socket and asks for our options.
        """
        kubelet = self._kubelet()
        request = v1beta1.RegisterRequest(
            version=API_VERSION,
            endpoint=self.path.name,
            resource_name=self.resource,
            options=v1beta1.DevicePluginOptions(get_preferred_allocation_available=True),
        )
        channel = Channel(path=str(self.kubelet_dir / KUBELET_SOCKET))
        try:
            async with asyncio.TaskGroup() as group:
                call = group.create_task(_outcome(channel, request))
                call.add_done_callback(lambda _: self._bell.set())
                await self._wait(
                    lambda: call.done() or self._kubelet() != kubelet or sockets.identity(self.path) != own,
                    _REGISTER_TIMEOUT,
                )
                if call.done():
                    return call.result()
                call.cancel()
                changed = self._kubelet() != kubelet or sockets.identity(self.path) != own
                return "a socket was replaced meanwhile" if changed else f"no answer in {_REGISTER_TIMEOUT:g} s"
        finally:
            channel.close()

    async def _until_asked(self, own: sockets.Identity, kubelet: sockets.Identity | None, opened: int) -> str | None:
        """Waits for a new stream; gives up when a socket changes, or too much time passes. Returns why, or None."""

        def replaced() -> bool:
            return self._kubelet() != kubelet or sockets.identity(self.path) != own

        await self._wait(lambda: self._opened > opened or replaced(), _STREAM_TIMEOUT)
        if self._opened > opened:
            return None
        if replaced():
            return "a socket was replaced meanwhile"
        return "the kubelet accepted the registration but never asked for the devices"

    async def _until_lost(self, own: sockets.Identity, kubelet: sockets.Identity | None) -> None:
        """Waits until the registration is worth nothing any more, and says why."""
        if self.state is not State.REGISTERED:
            return
        while True:
            if sockets.identity(self.path) != own:
                reason = "our socket is gone"
            elif self._kubelet() not in (kubelet, None):
                reason = f"{KUBELET_SOCKET} is a new one"
            elif not self._newest_is_open:
                reason = "the kubelet's stream ended"
            else:
                await self._wait(lambda: False, _RECHECK, once=True)
                continue
            self.state = State.LOST
            log.warning("registration lost", resource=self.resource, reason=reason)
            return

    async def _pause_if_short(self, own: sockets.Identity, kubelet: sockets.Identity | None) -> None:
        """Before registering again: nothing, unless the same kubelet ends stream after stream as soon as they open."""
        if time.monotonic() - self._registered_at >= _SETTLED:
            self._backoff.reset()
        elif self.state is State.LOST and sockets.identity(self.path) == own and self._kubelet() in (kubelet, None):
            await self._pause(own)

    async def _pause(self, own: sockets.Identity | None) -> None:
        """Until the next attempt: some time, or until kubelet.sock is made anew or our own socket changes."""
        kubelet = self._kubelet()

        def worth_an_attempt() -> bool:
            return self._kubelet() not in (kubelet, None) or (own is not None and sockets.identity(self.path) != own)

        if await self._wait(worth_an_attempt, self._backoff.next()):
            self._backoff.reset()

    async def _wait(self, predicate: Callable[[], bool], seconds: float, *, once: bool = False) -> bool:
        """Waits until `predicate` holds, looking whenever the bell rings, for at most that long.

        With `once`, the first ring ends the wait. Returns whether the predicate holds.
        """
        try:
            async with asyncio.timeout(seconds):
                while not predicate():
                    self._bell.clear()
                    await self._bell.wait()
                    if once:
                        break
        except TimeoutError:
            pass
        return predicate()

    def _kubelet(self) -> sockets.Identity | None:
        return sockets.identity(self.kubelet_dir / KUBELET_SOCKET)

    def _complain(self, why: str) -> None:
        """Logs a trouble once, and not again before it changes."""
        if why != self._trouble:
            log.warning("endpoint trouble", resource=self.resource, reason=why)
        self._trouble = why


async def _outcome(channel: Channel, request: v1beta1.RegisterRequest) -> str | None:
    """Makes a Register call. Returns why it failed, in words; None when it did not."""
    try:
        await v1beta1.RegistrationStub(channel).register(request)
    except GRPCError as error:
        return f"the kubelet answered {error.status.name}: {error.message}"
    except CONNECTION_LOST as error:
        return f"the kubelet does not answer: {error}"
    return None
