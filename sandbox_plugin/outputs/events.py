"""Kubernetes Events on the node: a device has become Unhealthy, or has recovered. Only with `--node-events`.

Nothing else needs them. They go out as the inventory changes, but no more than `BURST` at once and then one each
`EVERY` seconds: of a device that flaps what it is at that moment is told. What the API server does not take is told
later, again as it is then. How it is asked is handed in (`daemon.py`), since that is another room's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog

from sandbox_plugin.inventory.ledger import DeviceKey
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, Reason
from sandbox_plugin.outputs.document import ORDERLY
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import Backoff
from sandbox_plugin.trouble import Trouble

NAMESPACE = "default"
"""Where events about nodes are: a node is in no namespace (legacyValidateEvent in pkg/apis/core/validation)."""
BURST = 16
"""Events that go out at once: a whole HGX board may fail together."""
EVERY = 60.0
"""Seconds in which one more may go out. Kubernetes keeps each for an hour."""
COMPONENT = "sandbox-plugin"
_NODE_PART = 230
"""Characters of the node's name in that of an event, which has 253 at most."""
_LONGEST = 1024
"""Characters of a message (NoteLengthLimit in pkg/apis/core/validation/events.go)."""

_ACTIONS: Mapping[Reason, str] = {
    Reason.UNREADABLE: "Wait a minute; if it stays, look at dmesg: a GPU that hangs in reset needs a cold restart.",
    Reason.GONE: "If nobody removed it, reseat or replace the card.",
    Reason.NOT_BOUND: "If it is to be offered, bind it to vfio-pci.",
    Reason.NO_TYPE: "If it is to be offered, write the number of a vGPU type into nvidia/current_vgpu_type.",
    Reason.NO_CDEV: "Use a kernel with VFIO cdevs, or switch --require-iommufd off.",
    Reason.NO_NODE: "Bind it again, or restart udev.",
    Reason.NOT_VIABLE: "Bind the function that is named to vfio-pci, or unbind it.",
    Reason.FIRMWARE_MAPPING: "Update the firmware, or switch off there what wants the mapping.",
    Reason.OFF_THE_BUS: "Look at dmesg, and power-cycle the slot or the node.",
    Reason.NO_ADDRESS: "Let the firmware use addresses above 4 GiB, or boot with pci=realloc.",
    Reason.FATAL_ERROR: "If it does not recover within a minute, unbind it and bind it again.",
    Reason.IN_USE_ELSEWHERE: "Find the process that has it with fuser, and end it.",
}
"""What to do, for each reason that an event may have; docs/operations.md says more."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def news(told: Mapping[DeviceKey, Reason], inventory: Inventory) -> list[Device]:
    """Devices that are not what was told of them last. `told`: those that were told to be Unhealthy, and why.

    One that is only withheld for a while is neither ill nor well.
    """
    return [
        device
        for devices in inventory.resources.values()
        for device in devices
        if device.health.reason not in ORDERLY and device.health.reason != told.get(device.key)
    ]


def event(device: Device, node: str, now: float) -> dict[str, Any]:
    """What is told of a device, as an object of core/v1. `now` is in seconds since 1970.

    Its node's UID is the node's name, as in the kubelet's own events: by that `kubectl describe node` finds them.
    """
    reason = device.health.reason
    what = f"{device.resource}={device.id} ({device.address})"
    if reason is None:
        message = f"{what} is Healthy again"
    else:
        action = f" {_ACTIONS[reason]}"
        message = f"{what} is Unhealthy: {device.health}."[: _LONGEST - len(action)] + action
    at = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{node[:_NODE_PART].rstrip('.-')}.{time.time_ns():x}", "namespace": NAMESPACE},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
        "type": "Normal" if reason is None else "Warning",
        "reason": "DeviceHealthy" if reason is None else "DeviceUnhealthy",
        "message": message,
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


@dataclass(kw_only=True)
class NodeEvents:
    """Tells of what changes. To be run only by the plugin that serves the node.

    `tell` has an event created, and returns why that failed, in words; None: it did not. A device that is Unhealthy
    when this begins is told of, too.
    """

    node: str
    registry: Registry
    tell: Callable[[dict[str, Any]], Awaitable[str | None]]
    clock: Callable[[], float] = time.monotonic
    backoff: Backoff = field(default_factory=lambda: Backoff(first=1.0, cap=300.0))
    _told: dict[DeviceKey, Reason] = field(default_factory=dict)
    _tokens: float = BURST
    _counted_at: float = float("-inf")
    _trouble: Trouble = field(default_factory=Trouble)

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            inventory = self.registry.current
            self._told = {key: reason for key, reason in self._told.items() if key in inventory.by_key}
            pause = 0.0
            for device in news(self._told, inventory):
                if pause := await self._tell_of(device):
                    break
            if pause:  # whatever changes meanwhile: it is told then
                await asyncio.sleep(pause)
            else:
                await self.registry.newer_than(inventory.version)

    async def _tell_of(self, device: Device) -> float:
        """Returns after how many seconds it is to be tried again; 0: it was told."""
        now = self.clock()
        if self._counted_at != float("-inf"):
            self._tokens = min(float(BURST), self._tokens + (now - self._counted_at) / EVERY)
        self._counted_at = now
        if self._tokens < 1:
            return (1 - self._tokens) * EVERY
        why = await self.tell(event(device, self.node, time.time()))
        if self._trouble.update(why):
            log.warning("no node events", node=self.node, reason=why, action="everything else goes on")
        if why is not None:
            return self.backoff.next()
        self.backoff.reset()
        self._tokens -= 1
        if device.health.reason is None:
            self._told.pop(device.key, None)
        else:
            self._told[device.key] = device.health.reason
        return 0.0
