"""The values between two steps: what others told (`Signals`), what is remembered (`Memory`), what is offered
(`Inventory`).

Apart from `advance`, which makes them, because readers of an inventory need nothing of how it came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sandbox_plugin.inventory.devices import Found
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings, Ledger, PreparedClaim
from sandbox_plugin.model import Device, Fault, HostFacts

Bound = tuple[str, int | None]
"""PCI address and `VfioDev.binding`: one function for as long as it stays bound. None before Linux 6.1."""


class Signals(NamedTuple):
    """What sysfs cannot say. `aer` and `busy` are news since the last step; the others are standing facts."""

    aer: tuple[tuple[str, str], ...] = ()
    """(PCI address, ERROR_EVENT) of AER uevents, in order."""
    busy: Mapping[DeviceKey, frozenset[str]] = MappingProxyType({})
    """Devices that an Allocate asked for -> functions of their groups that a look just then saw in use."""
    holdings: Holdings | None = None
    """The latest answer of PodResources, if it ever gave one."""
    pod_resources: bool = False
    """Whether there is a PodResources, so that its answer is worth waiting for."""
    serving_since: float = -math.inf
    """Since when this plugin serves, in monotonic seconds: what PodResources was asked before does not tell what
    another plugin gave until then."""
    in_cdi: Mapping[str, frozenset[str]] | None = None
    """Resource -> IDs that are in a CDI spec on disk. None: this consumer needs no spec."""
    cdi_trouble: Mapping[str, str] = MappingProxyType({})
    """Resource -> why its spec could not be written."""
    former: Mapping[DeviceKey, str] = MappingProxyType({})
    """Device -> its node, by the specs that an earlier run left for resources which no device needs any more. Pods
    may hold such devices."""
    claims: Mapping[str, PreparedClaim] | None = None
    """Claims that are prepared, by UID. None: claims are not served."""
    claims_only: bool = False
    """Whether pods get devices by claims alone: then what claims may have is what is shown as Healthy."""


class FatalError(NamedTuple):
    """A fatal PCIe error (AER) of one function."""

    words: str
    since: float | None
    """When it began, in monotonic seconds. None: its recovery failed."""


class Track(NamedTuple):
    """What is remembered about one device."""

    device: Device
    """As it was found last. What is listed of it is in `Inventory`."""
    fault: Fault | None
    """What the latest scan shows against it. Always something while it is gone."""
    arrived_at: float = -math.inf
    been_well: bool = False
    """It was well at least once since it arrived."""
    ill: bool = False
    """Not to be listed as Healthy before it has settled."""
    well_since: float | None = None
    gone_since: float | None = None
    """Since when it has not been there; None: it is there."""
    free_since: float | None = None
    """While it is gone: since when PodResources has shown that no pod holds it."""
    unanswered: Mapping[Bound, float] = MappingProxyType({})
    """Functions that did not answer on the bus, or may be dead in D3cold, and when the first such scan began."""
    silent: frozenset[Bound] = frozenset()
    """Those that have not answered for so long that they count as dead, also while they sleep and are not asked."""
    fatal_counts: Mapping[Bound, int] = MappingProxyType({})
    """The counts of fatal errors that are old news."""
    fatal_errors: Mapping[Bound, FatalError] = MappingProxyType({})
    """The fatal errors that have not been recovered from."""

    @property
    def key(self) -> DeviceKey:
        return self.device.key


class Memory(NamedTuple):
    """What the next step needs to know of this one."""

    tracks: Mapping[DeviceKey, Track] = MappingProxyType({})
    ledger: Ledger = Ledger()
    facts: HostFacts | None = None
    """The latest scan."""
    found: Found | None = None
    """What was found in it."""
    signals: Signals | None = None
    """Those of this step."""


class Inventory(NamedTuple):
    """What this node offers: one immutable snapshot."""

    version: int = 0
    """Rises by one with every change; 0 is the empty inventory before the first scan."""
    resources: Mapping[str, tuple[Device, ...]] = MappingProxyType({})
    """Resource name -> its devices, in order of their IDs, with those that left but may still be held."""
    by_key: Mapping[DeviceKey, Device] = MappingProxyType({})
    """The same devices."""
    unoffered: Mapping[str, str] = MappingProxyType({})
    """PCI address -> why a function that a rule wants is not a device, or could not be read."""
    without_spec: frozenset[str] = frozenset()
    """Resources whose devices should be in a CDI spec on disk, while none of them is."""
    waits_for_holdings: bool = False
    """Whether something here can only be settled by asking PodResources."""
    nodes: frozenset[str] | None = None
    """The VFIO nodes that exist, also those of no device here; None: not known. A change of them alone is no news: it
    makes no new version."""
    memory: Memory = Memory()

    def device(self, resource: str, device_id: str) -> Device | None:
        """The device that the kubelet means by this ID, or None."""
        return self.by_key.get((resource, device_id))

    def is_healthy(self, key: DeviceKey) -> bool:
        """Whether this device is listed as Healthy."""
        device = self.by_key.get(key)
        return device is not None and device.health.healthy

    def is_claimable(self, key: DeviceKey) -> bool:
        """Whether claims may have this device."""
        device = self.by_key.get(key)
        return device is not None and device.for_claims.healthy
