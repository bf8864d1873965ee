"""The device plugin service of one resource.

Every call takes one snapshot of the registry and answers from it; Allocate enters what it gives. Nothing here knows
sockets or registration. That streams open and end is what the endpoint must know: it wraps each in `stream`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache

import structlog
from grpclib import Status

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.inventory.prefer import InvalidRequest, prefer
from sandbox_plugin.kubelet.answers import Answer, answer, prepared
from sandbox_plugin.kubelet.calls import Calls, Refusal, Refused
from sandbox_plugin.model import Device, LastLook
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc import codec
from sandbox_plugin.rpc.codec import Prepared
from sandbox_plugin.rpc.server import PromptStreams

log: structlog.stdlib.BoundLogger = structlog.get_logger()

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
"""The only words the kubelet knows (pkg/apis/deviceplugin/v1beta1/constants.go)."""


@dataclass(kw_only=True, eq=False, repr=False)
class DevicePluginServicer(PromptStreams, v1beta1.DevicePluginBase):
    """Serves one resource. Each ListAndWatch stream lives inside `stream()`."""

    resource: str
    registry: Registry
    policy: Policy
    consumer: Consumer
    stream: Callable[[], AbstractContextManager[None]]
    last_look: LastLook
    whole_node: tuple[str, int | None] | None = None
    """As `Settings.whole_node`."""
    calls: Calls = field(default_factory=Calls)
    """What becomes of them is entered there."""

    async def get_device_plugin_options(self, empty: v1beta1.Empty) -> v1beta1.DevicePluginOptions:
        return v1beta1.DevicePluginOptions(pre_start_required=False, get_preferred_allocation_available=True)

    async def list_and_watch(self, empty: v1beta1.Empty) -> AsyncIterator[v1beta1.ListAndWatchResponse]:
        """Sends the whole list at once and then on every change of it, never twice the same.

        The kubelet writes a checkpoint to disk for each message, so silence is kept where nothing changed.
        """
        with self.stream():
            inventory = self.registry.current
            sent = None
            while True:
                devices = inventory.resources.get(self.resource, ())
                content = b"".join([_listed(d.id, d.health.healthy, d.numa_nodes) for d in devices])
                if content != sent:
                    healthy = sum(device.health.healthy for device in devices)
                    log.debug("list sent", resource=self.resource, devices=len(devices), healthy=healthy)
                    yield _PreparedList(content)
                    sent = content
                inventory = await self.registry.newer_than(inventory.version)

    async def get_preferred_allocation(
        self, request: v1beta1.PreferredAllocationRequest
    ) -> v1beta1.PreferredAllocationResponse:
        """One answer for each container. An error rejects the pod, so only a question without any answer gets one."""
        with self.calls.timed("GetPreferredAllocation"):
            return self._prefer(request)

    def _prefer(self, request: v1beta1.PreferredAllocationRequest) -> v1beta1.PreferredAllocationResponse:
        """Raises `Refusal`."""
        devices = {d.id: d for d in self.registry.current.resources.get(self.resource, ())}
        self._refuse_part_of_node([asked.allocation_size for asked in request.container_requests])
        boards = self.registry.boards
        answers = []
        for asked in request.container_requests:
            about = {"available": asked.available_device_i_ds, "must_include": asked.must_include_device_i_ds}
            log.debug("preference asked", resource=self.resource, size=asked.allocation_size, **about)
            try:
                ids = prefer(
                    devices,
                    available=asked.available_device_i_ds,
                    must_include=asked.must_include_device_i_ds,
                    size=asked.allocation_size,
                    policy=self.policy,
                    boards=boards,
                )
            except InvalidRequest as error:
                raise Refusal(Status.INVALID_ARGUMENT, Refused.MALFORMED, f"{self.resource}: {error}") from None
            log.debug("preference answered", resource=self.resource, devices=list(ids))
            answers.append(v1beta1.ContainerPreferredAllocationResponse(device_i_ds=list(ids)))
        return v1beta1.PreferredAllocationResponse(container_responses=answers)

    async def allocate(self, request: v1beta1.AllocateRequest) -> v1beta1.AllocateResponse:
        """One answer for each container, or an error and nothing given.

        The devices are checked on the host once more, and shortly, since all pod admission of the node waits. After
        that nothing is awaited until the grant: of two Allocates for one group the second sees the first.
        """
        with self.calls.timed("Allocate"):
            return await self._allocate(request)

    async def _allocate(self, request: v1beta1.AllocateRequest) -> v1beta1.AllocateResponse:
        """Raises `Refusal`."""
        asked = [container.devices_ids for container in request.container_requests]
        log.debug("allocate asked", resource=self.resource, devices=asked)
        chosen = self._choose(asked)
        self._refuse_part_of_node([len(ids) for ids in asked])
        looked_at = self.registry.now()
        against = await self.last_look(chosen, self.registry.functions)
        if in_use := {(self.resource, i): found.in_use for i, found in against.items() if found.in_use}:
            self.registry.learn(busy=in_use)
        self._refuse(chosen, {i: (Refused.LAST_LOOK, found.why) for i, found in against.items()})
        looked_at_devices, chosen = chosen, self._choose(asked)
        changed = [d.id for was, d in zip(looked_at_devices, chosen, strict=True) if was.as_bound != d.as_bound]
        self._refuse(chosen, dict.fromkeys(changed, (Refused.CHANGED, "it changed while it was looked at")))
        by_id = {d.id: d for d in chosen}
        egm = self.registry.egm_gpus
        answers = [answer(self.consumer, self.resource, [by_id[i] for i in ids], egm) for ids in asked]
        self.registry.allocate([(d.resource, d.id) for d in chosen], looked_at=looked_at)
        asyncio.get_running_loop().call_soon(self._tell, chosen, answers)  # the kubelet first
        return prepared(answers)

    async def pre_start_container(self, request: v1beta1.PreStartContainerRequest) -> v1beta1.PreStartContainerResponse:
        """Not asked for by our options; answered all the same."""
        return v1beta1.PreStartContainerResponse()

    def _tell(self, devices: Sequence[Device], answers: Sequence[Answer]) -> None:
        """One line for all devices of a call: they are one pod's."""
        ids, addresses = ",".join(d.id for d in devices), ",".join(d.address for d in devices)
        log.info("allocated", resource=self.resource, device=ids, pci_address=addresses)
        log.debug("allocate answered", resource=self.resource, answer=[answer._asdict() for answer in answers])

    def _choose(self, asked: Sequence[Sequence[str]]) -> list[Device]:
        """The devices that these containers ask for, if all of them can be had now. Raises `Refusal`."""
        if not asked or not all(asked):
            raise self._malformed("a container requests no devices")
        counts = Counter(device_id for ids in asked for device_id in ids)
        if twice := [device_id for device_id, count in counts.items() if count > 1]:
            raise self._malformed(f"device {twice[0][:80]!r} is requested twice")
        chosen = []
        for device_id in counts:
            device = self.registry.current.device(self.resource, device_id)
            if device is None:
                why = f"{self.resource}: unknown device {device_id[:80]!r}"
                raise Refusal(Status.NOT_FOUND, Refused.UNKNOWN_DEVICE, why)
            chosen.append(device)
        self._refuse(chosen, {d.id: (d.health.reason, str(d.health)) for d in chosen if d.health.reason is not None})
        return chosen

    def _malformed(self, why: str) -> Refusal:
        return Refusal(Status.INVALID_ARGUMENT, Refused.MALFORMED, f"{self.resource}: {why}")

    def _refuse_part_of_node(self, sizes: Sequence[int]) -> None:
        """Raises `Refusal` if a container asks for some devices of a resource of which it can have one or all.

        All that are listed count, healthy or not: seven GPUs of a board of which one has died are no board. But one
        that was bound again counts once, although its former ID may be listed too; by address, since IDs are re-used.
        """
        if self.whole_node is None or self.whole_node[0] != self.resource:
            return
        listed = self.registry.current.resources.get(self.resource, ())
        everything = self.whole_node[1] or len({d.address for d in listed if d.placements})
        if wrong := [size for size in sizes if size not in (1, everything)]:
            why = f"{wrong[0]} devices for one container; with --whole-node it gets 1 or all {everything}"
            log.warning("allocation refused", resource=self.resource, reason=why)
            hint = "a confidential guest with any other number does not start"
            raise Refusal(Status.INVALID_ARGUMENT, Refused.PART_OF_NODE, f"{self.resource}: {why}: {hint}")

    def _refuse(self, devices: Sequence[Device], against: Mapping[str, tuple[str, str]]) -> None:
        """Raises `Refusal` for the first of these devices, by ID, that something is against: a reason, and in words."""
        for device in devices:
            if device.id in against:
                reason, why = against[device.id]
                about = {"resource": self.resource, "device": device.id, "pci_address": device.address}
                log.warning("allocation refused", **about, reason=why)
                where = f"{self.resource}: device {device.id} ({device.address})"
                raise Refusal(Status.FAILED_PRECONDITION, reason, f"{where} is unhealthy: {why}")


class _PreparedList(Prepared, v1beta1.ListAndWatchResponse):
    """A list of devices, of which there may be a thousand."""


def _listed(device_id: str, is_healthy: bool, numa_nodes: tuple[int, ...]) -> bytes:
    """A list of one device: in protobuf the bytes of two lists, one after the other, are those of the whole list.

    NUMA nodes only where they are known: an empty TopologyInfo is worse than none.
    """
    return codec.field(1, codec.field(1, device_id.encode()) + _state(is_healthy, numa_nodes))


@lru_cache(maxsize=1 << 8)
def _state(is_healthy: bool, numa_nodes: tuple[int, ...]) -> bytes:
    """A device without its ID."""
    device = v1beta1.Device(health=HEALTHY if is_healthy else UNHEALTHY)
    if numa_nodes:
        device.topology = v1beta1.TopologyInfo(nodes=[v1beta1.NumaNode(id=node) for node in numa_nodes])
    return bytes(device)
