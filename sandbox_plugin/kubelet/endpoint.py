"""The life of one resource at the kubelet: serve, register, notice that the kubelet forgot us, register again.

    serving --> registering --> registered --> lost --> registering ...
       ^             |                           |
       +-------------+---- our socket is gone ---+

`Endpoint.run` goes from state to state. Each state is one method, which returns the next state.

A registration is lost when kubelet.sock is another socket than the one we registered with, when our own socket is
gone, or when one of the kubelet's ListAndWatch streams ended. When any stream of a resource ends, the kubelet closes
the connection of the client that is mapped at that moment (runClient in server.go of
pkg/kubelet/cm/devicemanager/plugin/v1beta1), and it never opens a stream again by itself.

The kubelet connects to us because we register. So a connection that is made while we register, and wait for the stream,
is the kubelet's; streams over other connections are somebody else's and say nothing about the registration.

Each resource has its own endpoint and its own trouble; one in trouble leaves the others alone.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
from grpclib import GRPCError

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.kubelet.calls import Calls
from sandbox_plugin.kubelet.servicer import DevicePluginServicer
from sandbox_plugin.model import LastLook
from sandbox_plugin.names import SOCKET_PATH_BYTES, socket_name
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc import sockets
from sandbox_plugin.rpc.client import NoAnswerError, call
from sandbox_plugin.rpc.server import UnixServer
from sandbox_plugin.tasks import Backoff, happens
from sandbox_plugin.trouble import Trouble

KUBELET_SOCKET = "kubelet.sock"
API_VERSION = "v1beta1"
_REGISTER_TIMEOUT = 20.0
"""Seconds. The kubelet dials us for up to 10 s before it answers Register."""
_STREAM_TIMEOUT = 10.0
"""Seconds in which the kubelet opens ListAndWatch after it answered Register."""
_SETTLED = 5.0
"""Seconds after which a registration has held, and its loss is worth another attempt at once."""
_GLANCE, _URGENT = 0.01, 60.0
"""Seconds between looks for a new kubelet.sock, and for how long it is looked for so often: a kubelet restarts within
seconds, and until it knows the devices again no pod gets one."""
_INTERVAL = 5.0
"""Seconds between looks at the sockets that no event asked for."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class State(StrEnum):
    """Where an endpoint stands."""

    SERVING = "serving"
    """Our socket is to be made, and listened at."""
    REGISTERING = "registering"
    """It listens; the kubelet is to accept us and open a stream."""
    REGISTERED = "registered"
    """It has."""
    LOST = "lost"
    """The registration does not count any more."""


class EndpointStatus(NamedTuple):
    """How one resource stands with the kubelet, for whoever wants to show it."""

    resource: str
    socket: str
    """Name of our socket in the kubelet's folder."""
    state: State
    trouble: str | None
    """Why the last attempt failed, while the next has not succeeded."""
    registrations: int
    """How often the kubelet accepted it, and opened a stream."""
    losses: int
    """How often a registration was lost."""
    registered_at: float | None
    """Since when it is registered, in monotonic seconds; None: it is not."""
    streams: int
    """How many ListAndWatch streams are open, also of other clients than the kubelet."""


@dataclass(kw_only=True, eq=False, repr=False)
class _Registration:
    """One registration, from its first attempt on: the sockets it is for, and what became of the kubelet's streams."""

    own: sockets.Identity
    kubelet: sockets.Identity | None
    opened: bool = False
    ended: bool = False


@dataclass(kw_only=True, eq=False, repr=False)
class Endpoint:
    """Keeps `resource` registered for as long as `run` runs.

    Usage:

        endpoint = Endpoint(resource=..., kubelet_dir=..., registry=..., policy=..., consumer=..., last_look=...)
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
    last_look: LastLook
    """As in `DevicePluginServicer`."""
    on_registered: Callable[[sockets.Identity | None], None] = lambda _: None
    """Called each time the kubelet has accepted the resource, with the kubelet's socket."""
    whole_node: tuple[str, int | None] | None = None
    calls: Calls = field(default_factory=Calls)
    """Of all connections."""
    backoff: Backoff = field(default_factory=Backoff)
    state: State = State.SERVING
    _own: sockets.Identity | None = None
    """Our socket, as we made it."""
    _registration: _Registration | None = None
    """The current one; before the first attempt there is none."""
    _registered_at: float = float("-inf")
    """Monotonic seconds."""
    _unregistered_since: float = field(default_factory=time.monotonic)
    """Monotonic seconds: of the start, or of the last loss."""
    _registrations: int = 0
    _losses: int = 0
    _streams: int = 0
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    """Rung by everything that is worth a look. Only `_wait` waits for it."""
    _trouble: Trouble = field(default_factory=Trouble)

    @property
    def path(self) -> Path:
        """Where our socket lies."""
        budget = SOCKET_PATH_BYTES - len(str(self.kubelet_dir).encode()) - 1
        return self.kubelet_dir / socket_name(self.resource, max_bytes=budget)

    @property
    def status(self) -> EndpointStatus:
        return EndpointStatus(
            resource=self.resource,
            socket=self.path.name,
            state=self.state,
            trouble=self._trouble.now,
            registrations=self._registrations,
            losses=self._losses,
            registered_at=self._registered_at if self.state is State.REGISTERED else None,
            streams=self._streams,
        )

    def look(self) -> None:
        """Something changed in the kubelet's folder: look at the sockets now."""
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled; then the streams are closed and the socket is removed."""
        steps = {State.REGISTERING: self._register, State.REGISTERED: self._hold, State.LOST: self._recover}
        while True:
            async with self._serving():
                self.state = State.REGISTERING
                while self.state in steps:
                    self.state = await steps[self.state]()

    # serving

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        listener, own = await self._listen()
        self._own = own
        try:
            with UnixServer(listener, lambda: [self._service()]):
                yield
        finally:
            sockets.remove(self.path, own)

    async def _listen(self) -> tuple[socket.socket, sockets.Identity]:
        """Our socket, as soon as it can be made."""
        while True:
            kubelet = self._kubelet()
            try:
                return sockets.listen_at(self.path)
            except OSError as error:
                self._complain(f"cannot listen at {self.path}: {error.strerror or error}")
            await self._pause(partial(self._is_new, kubelet))

    def _service(self) -> DevicePluginServicer:
        """What answers on one connection. It is the kubelet's if it is made before a registration has its stream."""
        registration = self._registration
        if self.state is not State.REGISTERING or (registration is not None and registration.opened):
            registration = None
        return DevicePluginServicer(
            resource=self.resource,
            registry=self.registry,
            policy=self.policy,
            consumer=self.consumer,
            whole_node=self.whole_node,
            stream=lambda: self._stream(registration),
            last_look=self.last_look,
            calls=self.calls,
        )

    @contextmanager
    def _stream(self, registration: _Registration | None) -> Iterator[None]:
        """Around each ListAndWatch stream. `registration` led to it; None: it is not the kubelet's."""
        whose = "another client" if registration is None else "the kubelet"
        log.debug("stream opened", resource=self.resource, client=whose)
        if registration is not None:
            registration.opened = True
            self._bell.set()
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            log.debug("stream ended", resource=self.resource, client=whose)
            current = self._registration
            ours = None if registration is None else (registration.kubelet, registration.own)
            if current is not None and (current.kubelet, current.own) == ours:
                # Also when it is an older registration's: it is the current one that the same kubelet drops. Not when
                # it went over an older socket of ours: we hung up there before we registered again.
                current.ended = True
                self._bell.set()

    # registering

    async def _register(self) -> State:
        """One attempt: the kubelet accepts us and opens a stream; or a pause."""
        assert self._own is not None
        registration = self._registration = _Registration(own=self._own, kubelet=self._kubelet())
        why_not = await self._call_register(registration) or await self._wait_for_stream(registration)
        if why_not is None:
            self._trouble.update(None)
            self._registered_at = time.monotonic()
            self._registrations += 1
            log.info("registered", resource=self.resource, endpoint=self.path.name)
            self.on_registered(registration.kubelet)
            return State.REGISTERED
        self._complain(f"not registered: {why_not}")
        await self._pause(partial(self._is_replaced, registration))
        return self._again()

    async def _call_register(self, registration: _Registration) -> str | None:
        """Register, given up when a socket changes meanwhile. Returns why it failed, or None.

        While it waits the kubelet dials our socket and asks for our options.
        """
        path = self.kubelet_dir / KUBELET_SOCKET
        if registration.kubelet is None:
            return f"no socket at {path}"
        request = v1beta1.RegisterRequest(
            version=API_VERSION,
            endpoint=self.path.name,
            resource_name=self.resource,
            options=v1beta1.DevicePluginOptions(get_preferred_allocation_available=True),
        )
        async with asyncio.TaskGroup() as group:
            outcome = group.create_task(_outcome(path, request))
            outcome.add_done_callback(lambda _: self._bell.set())
            await self._wait(lambda: outcome.done() or self._is_replaced(registration), _REGISTER_TIMEOUT)
            if outcome.done():
                return outcome.result()
            outcome.cancel()
            return _REPLACED if self._is_replaced(registration) else f"no answer in {_REGISTER_TIMEOUT:g} s"

    async def _wait_for_stream(self, registration: _Registration) -> str | None:
        """Waits until the kubelet asks for the devices. Returns why it did not, or None."""
        await self._wait(lambda: registration.opened or self._is_replaced(registration), _STREAM_TIMEOUT)
        if registration.opened:
            return None
        if self._is_replaced(registration):
            return _REPLACED
        return "the kubelet accepted the registration but never asked for the devices"

    # registered

    async def _hold(self) -> State:
        """Waits until the registration is lost, and says why."""
        while (reason := self._why_lost()) is None:
            await self._wait(lambda: self._why_lost() is not None, _INTERVAL)
        self._losses += 1
        self._unregistered_since = time.monotonic()
        log.warning("registration lost", resource=self.resource, reason=reason)
        return State.LOST

    def _why_lost(self) -> str | None:
        registration = self._registration
        assert registration is not None
        if sockets.identity(self.path) != registration.own:
            return "our socket is gone"
        if self._is_new(registration.kubelet):
            return f"{KUBELET_SOCKET} was replaced"
        return "the kubelet's stream ended" if registration.ended else None

    # lost

    async def _recover(self) -> State:
        """Before registering again: nothing, unless the same kubelet ends stream after stream as soon as they open."""
        registration = self._registration
        assert registration is not None
        if time.monotonic() - self._registered_at >= _SETTLED:
            self.backoff.reset()
        else:
            await self._pause(partial(self._is_replaced, registration))
        return self._again()

    # What several states need

    def _again(self) -> State:
        """Where the next attempt begins."""
        return State.REGISTERING if sockets.identity(self.path) == self._own else State.SERVING

    def _kubelet(self) -> sockets.Identity | None:
        return sockets.identity(self.kubelet_dir / KUBELET_SOCKET)

    def _is_new(self, before: sockets.Identity | None) -> bool:
        """Whether a kubelet.sock lies there that is not the one from before."""
        return self._kubelet() not in (before, None)

    def _is_replaced(self, registration: _Registration) -> bool:
        """Whether the registration is for other sockets than lie there now."""
        return self._is_new(registration.kubelet) or sockets.identity(self.path) != registration.own

    async def _pause(self, worth_an_attempt: Callable[[], bool]) -> None:
        """Until the next attempt: a while that grows from time to time, or until there is a reason for one.

        For a minute after a registration was lost it looks for a reason without waiting to be told: pods wait for the
        kubelet that is coming.
        """
        is_urgent = time.monotonic() - self._unregistered_since < _URGENT
        if await self._wait(worth_an_attempt, self.backoff.next(), look_every=_GLANCE if is_urgent else None):
            self.backoff.reset()

    async def _wait(self, predicate: Callable[[], bool], seconds: float, look_every: float | None = None) -> bool:
        """Waits until `predicate` holds, for at most that long. Returns whether it does.

        It looks whenever the bell rings, and every `look_every` seconds.
        """
        end = time.monotonic() + seconds
        while not (holds := predicate()) and (left := end - time.monotonic()) > 0:
            self._bell.clear()
            await happens(self._bell, within=left if look_every is None else min(left, look_every))
        return holds

    def _complain(self, why: str) -> None:
        if self._trouble.update(why):
            log.warning("endpoint trouble", resource=self.resource, reason=why)


_REPLACED = f"{KUBELET_SOCKET} or our socket was replaced during the call"


async def _outcome(kubelet: Path, request: v1beta1.RegisterRequest) -> str | None:
    """Makes a Register call. Returns why it failed, in words; None when it did not."""
    try:
        await call(kubelet, lambda channel: v1beta1.RegistrationStub(channel).register(request))
    except GRPCError as error:
        return f"the kubelet answered {error.status.name}: {error.message}"
    except (NoAnswerError, FileNotFoundError, PermissionError) as error:
        return f"the kubelet does not answer: {error}"
    return None
