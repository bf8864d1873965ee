"""A kubelet's plugin watcher and DRA manager, played by grpcio with code generated from protos/.

It keeps to the order of the real one's calls (pkg/kubelet/pluginmanager, pkg/kubelet/cm/dra): a socket that appears in
`plugins_registry` is asked who it is, its endpoint is connected to and its health watched, then it is told; one that
vanishes is forgotten. Before a pod's sandbox is made its claims are read from the API server and prepared, unless they
are; when its last pod has ended a claim is given back. What it has prepared it forgets when it restarts, though not for
which pods.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
from kubelet import TIMEOUT
from wire import load_wire

from sandbox_plugin.fake.api_server import FakeApiServer

DRIVER, NODE = "vfio.sandbox-plugin", "node-1"
NAMESPACE = "default"
_CALL = 45.0
"""Seconds that the kubelet gives a call."""
_SERVICES = ("v1.DRAPlugin", "v1beta1.DRAPlugin")
_HEALTH = ("v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")

_T = TypeVar("_T")


class NotPrepared(Exception):
    """What the kubelet would say of it in the pod's events."""


class NotRegistered(NotPrepared):
    """There is no driver to ask."""


@contextmanager
def api_server(**options: Any) -> Iterator[FakeApiServer]:
    """A fake API server in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="API server", daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(TIMEOUT)

    server = FakeApiServer(**options)
    run(server.__aenter__())
    try:
        yield server
    finally:
        run(server.__aexit__())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT)
        loop.close()


def claim_object(
    name: str,
    *devices: str | Mapping[str, Any],
    uid: str | None = None,
    config: Sequence[Mapping[str, Any]] = (),
    template: str | None = None,
    pods: Sequence[str] = ("pod",),
) -> dict[str, Any]:
    """An allocated ResourceClaim. A device is its name, for a request `gpu`, or what its result says beside that."""
    results = [
        {"driver": DRIVER, "pool": NODE, "request": "gpu"} | ({"device": d} if isinstance(d, str) else dict(d))
        for d in devices
    ]
    annotations = {"resource.kubernetes.io/pod-claim-name": template} if template else {}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": uid or f"uid-of-{name}",
            "annotations": annotations,
        },
        "spec": {},
        "status": {
            "allocation": {"devices": {"results": results, "config": list(config)}},
            "reservedFor": [{"resource": "pods", "name": pod, "uid": f"uid-of-{pod}"} for pod in pods],
        },
    }


@dataclass(kw_only=True)
class Driver:
    """One plugin that is registered."""

    socket: Path
    endpoint: str
    versions: list[str]
    channel: grpc.Channel
    service: str
    health: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Device -> HEALTHY, UNHEALTHY or UNKNOWN, and the message."""
    messages: int = 0


@dataclass(kw_only=True)
class ClaimInfo:
    """What the kubelet remembers of a claim."""

    uid: str
    pods: set[str] = field(default_factory=set)
    prepared: bool = False
    devices: list[Any] = field(default_factory=list)


class DraManager:
    """A kubelet.

    Usage:

        with DraManager(places.top, api) as kubelet:
            kubelet.wait_for(lambda: kubelet.driver)
            names = kubelet.prepare("pod", "claim")        # CDI names
            kubelet.unprepare("pod")
    """

    def __init__(self, root: Path, api: FakeApiServer, *, services: Sequence[str] = (*_SERVICES, *_HEALTH)) -> None:
        self.registry = root / "plugins_registry"
        self.changed = threading.Condition()
        self.claims: dict[str, ClaimInfo] = {}
        """By name. It outlives a restart, as the real one's checkpoint does."""
        self.registrations: list[str] = []
        """Endpoints, of all that were ever registered."""
        self._api = api
        self._known = services
        self._drivers: list[Driver] = []
        self._ends = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> DraManager:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Its life

    def start(self) -> None:
        self.registry.mkdir(exist_ok=True)
        self._ends.clear()
        self._watcher = threading.Thread(target=self._watch, name="plugin watcher", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        self._ends.set()
        if self._watcher is not None:
            self._watcher.join(TIMEOUT)
        with self.changed:
            drivers, self._drivers = self._drivers, []
        for driver in drivers:
            driver.channel.close()
        for claim in self.claims.values():
            claim.prepared = False

    def restart(self) -> None:
        self.stop()
        self.start()

    # Plugins

    @property
    def driver(self) -> Driver | None:
        """The newest that is registered."""
        with self.changed:
            return self._drivers[-1] if self._drivers else None

    def wait_for(self, predicate: Callable[[], _T], timeout: float = TIMEOUT) -> _T:
        """Waits until `predicate` is true, looking whenever something came in; returns what it returned."""
        end = time.monotonic() + timeout
        with self.changed:
            while not (result := predicate()):
                assert time.monotonic() < end, f"it did not come in {timeout:g} s; registered: {self._drivers}"
                self.changed.wait(0.2)
            return result

    def _watch(self) -> None:
        while not self._ends.wait(0.01):
            there = {path for path in self.registry.iterdir() if path.is_socket()}
            for driver in [d for d in self._drivers if d.socket not in there]:
                with self.changed:
                    self._drivers.remove(driver)
                    self.changed.notify_all()
                driver.channel.close()
            for path in there - {driver.socket for driver in self._drivers}:
                with suppress(grpc.RpcError):
                    self._register(path)

    def _register(self, path: Path) -> None:
        wire = load_wire()
        with _channel(path) as channel:
            stub = wire.registration_grpc.RegistrationStub(channel)
            info = stub.GetInfo(wire.registration.InfoRequest(), timeout=5)
            assert info.type == "DRAPlugin"
            assert info.name == DRIVER
            service = next((v for v in info.supported_versions if v in self._known), None)
            why = None if service else f"none of {list(info.supported_versions)} is supported"
            if info.endpoint in [driver.endpoint for driver in self._drivers]:
                why = f"endpoint {info.endpoint} already registered"
            if why is None:
                assert service is not None
                driver = Driver(
                    socket=path,
                    endpoint=info.endpoint,
                    versions=list(info.supported_versions),
                    channel=_channel(Path(info.endpoint)),
                    service=service,
                )
                threading.Thread(target=self._watch_health, args=(driver,), daemon=True).start()
                with self.changed:
                    self._drivers.append(driver)
                    self.registrations.append(info.endpoint)
                    self.changed.notify_all()
            status = wire.registration.RegistrationStatus(plugin_registered=why is None, error=why or "")
            stub.NotifyRegistrationStatus(status, timeout=5)

    def _watch_health(self, driver: Driver) -> None:
        wire = load_wire()
        service = next((v for v in driver.versions if v in self._known and v in _HEALTH), None)
        if service is None:
            return
        watch = driver.channel.unary_stream(
            f"/{service}/NodeWatchResources",
            request_serializer=wire.health.NodeWatchResourcesRequest.SerializeToString,
            response_deserializer=wire.health.NodeWatchResourcesResponse.FromString,
        )
        with suppress(grpc.RpcError, ValueError):  # it ends with the connection, which may be closed already
            for message in watch(wire.health.NodeWatchResourcesRequest()):
                names = wire.health.HealthStatus.Name
                told = {d.device.device_name: (names(d.health), d.message) for d in message.devices}
                assert {d.device.pool_name for d in message.devices} <= {NODE}
                assert all(time.time() - d.last_updated_time < 10 for d in message.devices)
                with self.changed:
                    driver.health = told
                    driver.messages += 1
                    self.changed.notify_all()

    def health(self, device: str) -> tuple[str, str]:
        """What the pod status would say of it."""
        driver = self.driver
        return ("UNKNOWN", "") if driver is None else driver.health.get(device, ("UNKNOWN", ""))

    # Claims

    def prepare(self, pod: str, *names: str) -> list[str]:
        """The CDI names that the containers of a pod with these claims get. Raises NotPrepared."""
        batch = []
        for name in names:
            found = self._api._objects.get(("resourceclaims", NAMESPACE, name))
            if found is None:
                raise NotPrepared(f"fetch ResourceClaim {name}: not found")
            if self.driver is None:
                raise NotRegistered(f"DRA driver {DRIVER} is not registered")
            info = self.claims.setdefault(name, ClaimInfo(uid=found["metadata"]["uid"]))
            if info.uid != found["metadata"]["uid"]:
                raise NotPrepared(f"old ResourceClaim with same name {name} and different UID {info.uid} still exists")
            info.pods.add(pod)
            if not info.prepared:
                batch.append((name, info))
        if batch:
            self._prepare(batch)
        return [cdi for name in names for device in self.claims[name].devices for cdi in device.cdi_device_ids]

    def _prepare(self, batch: Sequence[tuple[str, ClaimInfo]]) -> None:
        dra = load_wire().dra
        answer = self._call("NodePrepareResources", dra.NodePrepareResourcesRequest, batch)
        for name, info in batch:
            if info.uid not in answer.claims:
                raise NotPrepared(f"NodePrepareResources skipped {name}")
            if error := answer.claims[info.uid].error:
                raise NotPrepared(f"NodePrepareResources failed for ResourceClaim {name}: {error}")
            info.devices = list(answer.claims[info.uid].devices)
        for _, info in batch:
            info.prepared = True

    def unprepare(self, pod: str) -> None:
        """The pod has ended, with all its containers. Raises NotPrepared."""
        dra = load_wire().dra
        batch = [(name, info) for name, info in self.claims.items() if info.pods == {pod}]
        if batch:
            answer = self._call("NodeUnprepareResources", dra.NodeUnprepareResourcesRequest, batch)
            for name, info in batch:
                assert info.uid in answer.claims, f"{name} is missing"
                if error := answer.claims[info.uid].error:
                    raise NotPrepared(f"NodeUnprepareResources failed for ResourceClaim {name}: {error}")
                del self.claims[name]
        for info in self.claims.values():
            info.pods.discard(pod)

    def _call(self, method: str, request: Any, batch: Sequence[tuple[str, ClaimInfo]]) -> Any:
        dra, driver = load_wire().dra, self.driver
        if driver is None:
            raise NotRegistered(f"DRA driver {DRIVER} is not registered")
        call = driver.channel.unary_unary(
            f"/k8s.io.kubelet.pkg.apis.dra.{driver.service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=getattr(dra, request.DESCRIPTOR.name.replace("Request", "Response")).FromString,
        )
        claims = [dra.Claim(namespace=NAMESPACE, uid=info.uid, name=name) for name, info in batch]
        try:
            return call(request(claims=claims), timeout=_CALL)
        except grpc.RpcError as error:
            raise NotPrepared(f"{method}: {error}") from None


def _channel(socket: Path) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)])
