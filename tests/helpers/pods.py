"""The kubelet's PodResources API, played by grpcio with code generated from protos/: which pod holds which device."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from kubelet import TIMEOUT
from wire import load_wire


class PodResources:
    """Serves `List` at a socket, for pods that tests make up.

    Usage:

        with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
            pods.start(age=3600)
            pods.hold("vm", "nvidia.com/pgpu", "11")
            ...
            pods.release("vm")
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._pods: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._claims: dict[str, tuple[str, str, tuple[str, ...]]] = {}
        self._asked = 0
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None
        self.get_error: str | None = None
        """What Get says of any pod, as an error of gRPC's UNKNOWN; None: it is unimplemented."""

    def __enter__(self) -> PodResources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, age: float) -> None:
        """Listens, as a kubelet that began `age` seconds ago; a real one has made its socket then."""
        wire = load_wire()
        self.socket.parent.mkdir(exist_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4, thread_name_prefix="PodResources"))
        servicer = wire.podresources_grpc.PodResourcesListerServicer()  # the other calls are unimplemented in it
        servicer.List = self._list
        if self.get_error is not None:
            servicer.Get = self._get
        wire.podresources_grpc.add_PodResourcesListerServicer_to_server(servicer, self._server)
        assert self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()
        made = time.time() - age
        os.utime(self.socket, (made, made))

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop(grace=None).wait(TIMEOUT)

    def hold(self, pod: str, resource: str, *ids: str) -> None:
        """The pod `default/<pod>` holds these devices from now on."""
        with self._changed:
            self._pods[pod] = (resource, ids)

    def hold_by_claim(self, pod: str, claim: str, driver: str, *devices: str) -> None:
        """The pod `default/<pod>` holds these devices by this claim from now on."""
        with self._changed:
            self._claims[pod] = (claim, driver, devices)

    def release(self, pod: str) -> None:
        """The pod is gone."""
        with self._changed:
            self._pods.pop(pod, None)
            self._claims.pop(pod, None)

    def wait_until_asked(self, times: int = 1, timeout: float = TIMEOUT) -> None:
        """Waits until it has answered so many more questions than until now. Raises AssertionError."""
        with self._changed:
            wanted = self._asked + times
            assert self._changed.wait_for(lambda: self._asked >= wanted, timeout), f"nobody asked in {timeout:g} s"

    def _get(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNKNOWN, self.get_error)

    def _list(self, request: Any, context: Any) -> Any:
        answer = load_wire().podresources.ListPodResourcesResponse()
        with self._changed:
            for name, (resource, ids) in self._pods.items():
                pod = answer.pod_resources.add(name=name, namespace="default")
                pod.containers.add(name="vm").devices.add(resource_name=resource, device_ids=ids)
            for name, (claim, driver, devices) in self._claims.items():
                pod = answer.pod_resources.add(name=name, namespace="default")
                resources = pod.containers.add(name="vm").dynamic_resources.add(
                    claim_name=claim, claim_namespace="default"
                )
                for device in devices:
                    resources.claim_resources.add(driver_name=driver, pool_name="node-1", device_name=device)
            self._asked += 1
            self._changed.notify_all()
        return answer
