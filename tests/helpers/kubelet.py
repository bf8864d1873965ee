"""The kubelet's side of the device plugin API, played by grpcio and google.protobuf with code generated from protos/.

Apart from the package's own fake kubelet, which people watch: this one shares no line with what it tests. It does to a
plugin what the real one does, traps included (pkg/kubelet/cm/devicemanager/plugin/v1beta1 of Kubernetes):

- at start it deletes every socket in its folder, then makes `kubelet.sock`;
- Register blocks while it dials the plugin and asks for its options; only then is it answered;
- of two registrations of a resource the newest counts, and the older connection and its stream stay open;
- when any stream of a resource ends, the registration that counts at that moment is dropped with its connection.

Everything happens on threads, so that tests read from top to bottom. Nothing here sleeps: tests wait for what the
kubelet has seen with `GrpcKubelet.wait_for`.
"""

from __future__ import annotations

import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
import pytest
from wire import load_wire

TIMEOUT = 30.0
"""Seconds that a test waits for what should come within a few milliseconds: only machines under load need them."""
_DIAL_TIMEOUT = 10.0
"""Seconds that the kubelet dials a plugin."""

_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")

_T = TypeVar("_T")


class Manners(Enum):
    """How Register is answered."""

    POLITE = auto()
    REFUSES = auto()
    """With an error."""
    HANGS = auto()
    """Not at all, until the caller gives up."""
    FORGETS = auto()
    """As if all were well, but ListAndWatch is never opened."""
    CUTS = auto()
    """As if all were well, but the stream is ended after its first message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One device of a list."""

    id: str
    health: str
    numa: tuple[int, ...] | None
    """NUMA nodes; None: there was no TopologyInfo at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message of a ListAndWatch stream."""

    at: float
    """Monotonic seconds."""
    devices: tuple[Listed, ...]

    @property
    def healthy(self) -> list[str]:
        """IDs in the order of the message, one that stands twice twice."""
        return [device.id for device in self.devices if device.health == "Healthy"]

    @property
    def unhealthy(self) -> list[str]:
        return [device.id for device in self.devices if device.health != "Healthy"]


class Plugin:
    """A client of one plugin's socket, over a connection of its own. The methods raise grpc.RpcError."""

    def __init__(self, socket: Path | str) -> None:
        wire = load_wire()
        self._messages = wire.deviceplugin
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = wire.deviceplugin_grpc.DevicePluginStub(self._channel)

    def close(self) -> None:
        """Ends the connection, and with it every call."""
        self._channel.close()

    def options(self, timeout: float = _DIAL_TIMEOUT) -> Any:
        """GetDevicePluginOptions, as soon as somebody answers at the socket."""
        return self._stub.GetDevicePluginOptions(self._messages.Empty(), timeout=timeout, wait_for_ready=True)

    def list_and_watch(self) -> Any:
        """The call, which is the stream of messages."""
        return self._stub.ListAndWatch(self._messages.Empty())

    def allocate(self, *containers: Sequence[str]) -> Any:
        """Allocate with one container request for each sequence of device IDs."""
        request = self._messages.AllocateRequest()
        for ids in containers:
            request.container_requests.add(devices_ids=ids)
        return self._stub.Allocate(request, timeout=TIMEOUT)

    def prefer(self, available: Sequence[str], size: int, must_include: Sequence[str] = ()) -> list[str]:
        """GetPreferredAllocation for one container."""
        request = self._messages.PreferredAllocationRequest()
        request.container_requests.add(
            available_deviceIDs=available, must_include_deviceIDs=must_include, allocation_size=size
        )
        (answer,) = self._stub.GetPreferredAllocation(request, timeout=TIMEOUT).container_responses
        return list(answer.deviceIDs)

    def pre_start(self, *ids: str) -> Any:
        """PreStartContainer."""
        return self._stub.PreStartContainer(self._messages.PreStartContainerRequest(devices_ids=ids), timeout=TIMEOUT)

    def raw(self, method: str, request: bytes) -> bytes:
        """A call with any bytes for a message; the bytes of the answer."""
        call: Any = self._channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")
        answer: bytes = call(request, timeout=TIMEOUT)
        return answer


class Watch:
    """One ListAndWatch stream, read by a thread until it ends. `changed` is notified of everything that happens.

    `on_end` is called when it has ended. With `cut` it is ended after its first message.
    """

    def __init__(
        self,
        plugin: Plugin,
        changed: threading.Condition,
        on_end: Callable[[], None] = lambda: None,
        *,
        cut: bool = False,
    ) -> None:
        self.received: list[Received] = []
        self.ended: str | None = None
        """Why there is nothing more to come; None while the stream is open."""
        self._changed = changed
        self._on_end = on_end
        self._cut = cut
        self._call = plugin.list_and_watch()
        self._thread = threading.Thread(target=self._read, name="ListAndWatch", daemon=True)
        self._thread.start()

    @property
    def last(self) -> Received | None:
        return self.received[-1] if self.received else None

    def cancel(self) -> None:
        """Ends the stream from our side; the connection stays."""
        self._call.cancel()
        self.join()

    def join(self) -> None:
        """Waits until the stream has come to its end."""
        self._thread.join(TIMEOUT)

    def _read(self) -> None:
        ended = "the plugin ended it"
        try:
            for message in self._call:
                received = Received(at=time.monotonic(), devices=tuple(map(_listed, message.devices)))
                with self._changed:
                    self.received.append(received)
                    self._changed.notify_all()
                if self._cut:
                    self._call.cancel()
        except grpc.RpcError as error:
            ended = f"{self._call.code().name}: {error}"
        with self._changed:
            self.ended = ended
            self._on_end()
            self._changed.notify_all()


def _listed(device: Any) -> Listed:
    numa = tuple(node.ID for node in device.topology.nodes) if device.HasField("topology") else None
    return Listed(id=device.ID, health=device.health, numa=numa)


@dataclass(kw_only=True)
class Registration:
    """One Register call that came to its end, well or not."""

    at: float
    """Monotonic seconds at which it came in."""
    version: str
    resource: str
    endpoint: str
    plugin: Plugin
    options: Any = None
    """What GetDevicePluginOptions answered."""
    watch: Watch | None = None
    failure: str | None = None
    """Why it was not accepted."""
    answered: bool = False
    """The answer is on its way."""


class GrpcKubelet:
    """A kubelet with its folder.

    Usage:

        with GrpcKubelet(folder) as kubelet:
            kubelet.start()
            kubelet.wait_for(lambda: len(kubelet.healthy("nvidia.com/pgpu")) == 8)
            answer = kubelet.plugin("nvidia.com/pgpu").allocate(["0", "1"])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manners = Manners.POLITE
        self.on_register: Callable[[str], None] | None = None
        """Called with the resource when Register comes in, before anything else happens."""
        self.registrations: list[Registration] = []
        """Every one there ever was, restarts included, the oldest first."""
        self.calls = 0
        """Register calls that came in, answered or not."""
        self.changed = threading.Condition()
        self._mapped: dict[str, Registration] = {}
        """Resource -> the registration that counts."""
        self._watches: list[Watch] = []
        self._plugins: list[Plugin] = []
        self._running: tuple[grpc.Server, ThreadPoolExecutor] | None = None

    def __enter__(self) -> GrpcKubelet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Its life

    @property
    def socket(self) -> Path:
        return self.folder / "kubelet.sock"

    def start(self) -> None:
        """Makes the folder if there is none, deletes every socket in it, and listens at a new kubelet.sock."""
        assert self._running is None, "it runs already"
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="Register")
        server = grpc.server(pool)
        load_wire().deviceplugin_grpc.add_RegistrationServicer_to_server(self, server)
        # grpcio removes the socket that it made when it stops. What others see is another name of it, which stays.
        hidden = self.folder.with_name(f"{self.folder.name}.hidden")
        assert server.add_insecure_port(f"unix:{hidden}")
        self._running = server, pool
        server.start()
        self.socket.hardlink_to(hidden)

    def stop(self, *, leave_socket: bool = False) -> None:
        """Ends every call and connection. A kubelet that is killed leaves its socket behind."""
        if self._running is None:
            return
        (server, pool), self._running = self._running, None
        stopped = server.stop(grace=None)
        with self.changed:
            self._mapped.clear()
            watches, plugins, self._watches, self._plugins = self._watches, self._plugins, [], []
        for plugin in plugins:
            plugin.close()
        for watch in watches:
            watch.join()
        stopped.wait(TIMEOUT)
        pool.shutdown()
        if not leave_socket:
            self.socket.unlink(missing_ok=True)

    def restart(self, *, leave_socket: bool = True) -> None:
        """Stops and starts. Between the two a stale socket lies there, as with the real one, or none."""
        self.stop(leave_socket=leave_socket)
        self.start()

    # What it has seen

    def wait_for(self, predicate: Callable[[], _T], timeout: float = TIMEOUT) -> _T:
        """Waits until `predicate` is true, looking whenever something came in; returns what it returned.

        Raises AssertionError, with all that came in, when that takes longer than `timeout` seconds.
        """
        with self.changed:
            if result := self.changed.wait_for(predicate, timeout):
                return result
            raise AssertionError(f"after {timeout:g} s the kubelet has seen no more than\n{self._story()}")

    def registration(self, resource: str) -> Registration | None:
        """The one that counts now, with its stream open; None: every device of this resource is unhealthy."""
        with self.changed:
            found = self._mapped.get(resource)
            return found if found is not None and found.watch is not None and found.watch.ended is None else None

    def plugin(self, resource: str) -> Plugin:
        """The client that the kubelet would ask about this resource now. Raises AssertionError if there is none."""
        registration = self.registration(resource)
        assert registration is not None, f"{resource} is not registered:\n{self._story()}"
        return registration.plugin

    def history(self, resource: str) -> list[Received]:
        """What came in over the stream that counts now."""
        with self.changed:
            registration = self.registration(resource)
            return list(registration.watch.received) if registration and registration.watch else []

    def devices(self, resource: str) -> Mapping[str, Listed]:
        """What the kubelet believes now, by ID; nothing while the resource is not registered."""
        history = self.history(resource)
        return {device.id: device for device in history[-1].devices} if history else {}

    def healthy(self, resource: str) -> set[str]:
        """IDs of the devices that a pod could get now."""
        return {device.id for device in self.devices(resource).values() if device.health == "Healthy"}

    def unhealthy(self, resource: str) -> set[str]:
        return self.devices(resource).keys() - self.healthy(resource)

    def resources(self) -> set[str]:
        """Resources that are registered now."""
        with self.changed:
            return {resource for resource in self._mapped if self.registration(resource)}

    @contextmanager
    def watching(self, resource: str) -> Iterator[Watch]:
        """One more ListAndWatch stream, over a connection of its own that no registration led to."""
        plugin = Plugin(self.folder / f"sandbox-{resource.partition('/')[2]}.sock")
        watch = Watch(plugin, self.changed)
        try:
            self.wait_for(lambda: watch.received)
            yield watch
        finally:
            watch.cancel()
            plugin.close()

    # How

    def Register(self, request: Any, context: grpc.ServicerContext) -> Any:
        """One Register call, on a thread of its own: grpcio calls it."""
        with self.changed:
            self.calls += 1
            self.changed.notify_all()
        if self.on_register is not None:
            self.on_register(request.resource_name)
        if self.manners is Manners.HANGS:
            gone = threading.Event()
            if context.add_callback(gone.set):
                gone.wait()
            context.abort(grpc.StatusCode.CANCELLED, "the caller is gone")
        registration = Registration(
            at=time.monotonic(),
            version=request.version,
            resource=request.resource_name,
            endpoint=request.endpoint,
            plugin=Plugin(self.folder / request.endpoint),
            failure="it will not" if self.manners is Manners.REFUSES else _why_not(request),
        )
        with self.changed:
            self._plugins.append(registration.plugin)
        if registration.failure is None:
            self._connect(registration, context.time_remaining())
        with self.changed:
            self.registrations.append(registration)
            self.changed.notify_all()
        context.add_callback(lambda: self._answered(registration))
        if registration.failure is not None:
            registration.plugin.close()
            context.abort(grpc.StatusCode.UNKNOWN, registration.failure)
        return load_wire().deviceplugin.Empty()

    def _connect(self, registration: Registration, seconds: float | None) -> None:
        """Asks for the options and opens the stream. A registration that fails takes the one before it along."""
        with self.changed:
            self._mapped[registration.resource] = registration
        try:
            registration.options = registration.plugin.options(min(_DIAL_TIMEOUT, seconds or _DIAL_TIMEOUT))
        except grpc.RpcError as error:
            registration.failure = f"cannot dial {registration.endpoint}: {error}"
            with self.changed:
                self._mapped.pop(registration.resource, None)
            return
        with self.changed:
            if self.manners is Manners.FORGETS or self._running is None:
                return
            ended = partial(self._ended, registration.resource)
            registration.watch = Watch(registration.plugin, self.changed, ended, cut=self.manners is Manners.CUTS)
            self._watches.append(registration.watch)

    def _answered(self, registration: Registration) -> None:
        with self.changed:
            registration.answered = True
            self.changed.notify_all()

    def _ended(self, resource: str) -> None:
        """A stream ended, whichever: the registration that counts now is dropped."""
        mapped = self._mapped.pop(resource, None)
        if mapped is not None:
            # On a thread of its own: closing waits for the stream's thread, which may wait for our lock.
            threading.Thread(target=mapped.plugin.close, daemon=True).start()

    def _story(self) -> str:
        lines = [f"{self.calls} Register calls"]
        for number, registration in enumerate(self.registrations):
            outcome = registration.failure or "accepted"
            lines.append(f"{number}: {registration.resource} at {registration.endpoint}: {outcome}")
            if registration.watch is not None:
                lines += [f"   healthy {m.healthy}, unhealthy {m.unhealthy}" for m in registration.watch.received]
                lines.append(f"   ended: {registration.watch.ended}")
        return "\n".join(lines)


def _why_not(request: Any) -> str | None:
    """Why the kubelet would not even dial (ValidatePlugin and IsExtendedResourceName)."""
    if request.version != "v1beta1":
        return f"version {request.version!r} is not supported"
    domain, separator, name = request.resource_name.partition("/")
    fits = separator and len(domain) <= 253 and len(name) <= 63 and "kubernetes.io" not in domain
    if not (fits and _DOMAIN.fullmatch(domain) and _NAME.fullmatch(name)):
        return f"{request.resource_name!r} is no extended resource name"
    return None


class Refusal(NamedTuple):
    """How a call failed."""

    status: grpc.StatusCode
    message: str


def refusal(call: Callable[[], object]) -> Refusal:
    """Makes a call that must fail: `refusal(lambda: plugin.allocate(["99"]))`."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return Refusal(error.code(), error.details())
