"""The page that Prometheus scrapes: every metric of the catalogue, made at that moment from the current snapshot.

So nothing goes stale, and the series of a device go with the device. Nothing here reads sysfs: what a function has
counted, and how its link is, is what the latest scan saw. This is the only module that imports the Prometheus client.
"""

from __future__ import annotations

import math
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sandbox_plugin.durations import BOUNDS, Durations
from sandbox_plugin.inventory.ledger import Grant, Ledger
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, LinkLimit, PciFunction, Reason
from sandbox_plugin.outputs import document
from sandbox_plugin.outputs.document import SERVING, STANDING_BY, WAITING, held_without_device, holder_of
from sandbox_plugin.outputs.http import Answer
from sandbox_plugin.outputs.metrics import catalogue
from sandbox_plugin.outputs.metrics.catalogue import Entry
from sandbox_plugin.outputs.metrics.health_history import HealthHistory
from sandbox_plugin.outputs.metrics.parts import Parts
from sandbox_plugin.registry import Registry

_SPEED = re.compile(r"([0-9]+(?:\.[0-9]+)?) GT/s")
"""Of a link, in giga-transfers per second (pci_speed_string in drivers/pci/probe.c); `Unknown` is none."""
_BOUNDS = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
_TURNS = {SERVING: "serving", STANDING_BY: "standing-by", WAITING: "waiting"}
_SOURCES = {"kernel events": "uevent", "inotify": "inotify", "PodResources": "pod-resources"}
"""As `status` calls them -> as they are called here."""
_OF_REGISTRATIONS = {
    catalogue.REGISTRATIONS: "registrations",
    catalogue.LOSSES: "losses",
    catalogue.STREAMS: "streams",
}
_CALLS = ("Allocate", "GetPreferredAllocation")


class Exposition:
    """The page. `parts` tells what the parts know of themselves now."""

    def __init__(
        self, registry: Registry, history: HealthHistory, parts: Callable[[], Parts], *, pod_labels: bool
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Ours(registry, history, parts, pod_labels=pod_labels))
        ProcessCollector(registry=self._registry)

    def page(self, accept: str) -> Answer:
        """In the format that the client prefers: OpenMetrics, or Prometheus' own text."""
        encode, content_type = choose_encoder(accept)
        return Answer(encode(self._registry), content_type=content_type)


@dataclass(slots=True)
class _Families:
    """The metrics of one scrape, each begun when its first series comes."""

    made: dict[Entry, Metric] = field(default_factory=dict)

    def add(self, entry: Entry, labels: dict[str, str], value: float = 1) -> None:
        """One series. Whether the labels are those of the entry is seen to by a test."""
        self.of(entry).add_sample(entry.name, labels, value)

    def add_durations(self, entry: Entry, labels: dict[str, str], durations: Durations) -> None:
        family, cumulative = self.of(entry), durations.cumulative
        for bound, count in zip(_BOUNDS, cumulative, strict=True):
            family.add_sample(f"{entry.name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{entry.name}_sum", labels, durations.total)
        family.add_sample(f"{entry.name}_count", labels, cumulative[-1])

    def of(self, entry: Entry) -> Metric:
        if entry not in self.made:
            # The client puts these endings behind the name again, where the format wants them.
            name = entry.name.removesuffix("_total").removesuffix("_info")
            self.made[entry] = Metric(name, f"{entry.help}.", entry.kind.value)
        return self.made[entry]


class _Ours(Collector):
    """All metrics of the catalogue."""

    def __init__(
        self, registry: Registry, history: HealthHistory, parts: Callable[[], Parts], *, pod_labels: bool
    ) -> None:
        self._registry = registry
        self._history = history
        self._parts = parts
        self._pod_labels = pod_labels

    def collect(self) -> Iterable[Metric]:
        parts, inventory = self._parts(), self._history.catch_up()
        families = _Families()
        # One value for the whole scrape. Whole seconds: then a moment has the same value in every scrape.
        since_1970 = time.time() - self._registry.now()

        def moment(at: float) -> float:
            return round(since_1970 + at)

        _plugin(families, parts.shown, inventory)
        _kubelet(families, parts)
        _scans(families, parts, moment)
        _cdi(families, parts)
        if parts.shown.turn["state"] != STANDING_BY:  # else the plugin that serves speaks for them: each counts once
            self._devices(families, inventory, moment)
            _registrations(families, parts, inventory, moment)
        # In the order of the catalogue, whatever came first.
        return [families.made[entry] for entry in catalogue.ENTRIES if entry in families.made]

    def _devices(self, families: _Families, inventory: Inventory, moment: Callable[[float], float]) -> None:
        ledger, functions = inventory.memory.ledger, self._registry.functions
        for labels, number in _counted(inventory):
            families.add(catalogue.DEVICES, labels, number)
        for resource in inventory.resources:
            for reason in ("", *Reason):  # all of them from the start: a first one is a rise, too
                times = self._history.transitions[resource, reason]
                families.add(catalogue.TRANSITIONS, {"resource": resource, **_health(reason)}, times)
        families.add(catalogue.NOT_OFFERED, {}, len(inventory.unoffered))
        families.add(catalogue.HELD_WITHOUT_DEVICE, {}, len(held_without_device(inventory)))
        for device in inventory.by_key.values():
            about = _about(device)
            _device(families, device, about, ledger)
            families.add(catalogue.HEALTH_CHANGED, about, moment(self._history.since(device.key)))
            grants = ledger.touching([device.node])
            families.add(catalogue.ALLOCATED, about, bool(grants))
            if grants and math.isfinite(grants[0].at):
                families.add(catalogue.ALLOCATED_SINCE, about, moment(grants[0].at))
            if grants and self._pod_labels:
                _holder(families, about, grants[0], ledger)
            for placement in device.placements:
                if (function := functions.get(placement.address)) is not None:
                    _pcie(families, {**about, "pci_address": function.address}, function)


def _counted(inventory: Inventory) -> Iterator[tuple[dict[str, str], int]]:
    """How many devices there are of each resource, model and reason; of Healthy ones also none."""
    number: Counter[tuple[str, str, str]] = Counter()
    for device in inventory.by_key.values():
        number[device.resource, device.model, ""] += device.health.healthy
        if device.health.reason is not None:
            number[device.resource, device.model, device.health.reason] += 1
    for (resource, model, reason), count in number.items():
        yield {"resource": resource, "model": model, **_health(reason)}, count


def _health(reason: str) -> dict[str, str]:
    return {"health": "Unhealthy" if reason else "Healthy", "reason": reason}


def _about(device: Device) -> dict[str, str]:
    return {
        "resource": device.resource,
        "device": device.id,
        "pci_address": device.address if device.placements else "",
    }


def _device(families: _Families, device: Device, about: dict[str, str], ledger: Ledger) -> None:
    what = {
        **about,
        "model": device.model,
        "numa_node": ",".join(map(str, device.numa_nodes)),
        "iommu_group": "" if device.iommu_group < 0 else str(device.iommu_group),
        "vfio_node": device.node,
    }
    families.add(catalogue.DEVICE_INFO, what)
    families.add(catalogue.DEVICE_HEALTHY, about, device.health.healthy)
    if device.health.reason is not None:
        families.add(catalogue.DEVICE_UNHEALTHY, {**about, "reason": device.health.reason})
    families.add(catalogue.IN_USE, about, any(placement.address in ledger.uses for placement in device.placements))


def _holder(families: _Families, about: dict[str, str], grant: Grant, ledger: Ledger) -> None:
    holder = holder_of(grant, ledger)
    if holder["pod"] is not None:
        families.add(catalogue.HOLDER, {**about, **{label: holder[label] or "" for label in catalogue.POD}})


def _pcie(families: _Families, about: dict[str, str], function: PciFunction) -> None:
    errors = {
        "fatal": function.fatal_errors,
        "nonfatal": function.nonfatal_errors,
        "correctable": function.correctable_errors,
    }
    for severity, count in errors.items():
        if count is not None:
            families.add(catalogue.AER, {**about, "severity": severity}, count)
    now = LinkLimit(function.link_speed, function.link_width)
    for speed_entry, width_entry, ends in (
        (catalogue.LINK_SPEED, catalogue.LINK_WIDTH, (now,)),
        (catalogue.LINK_MAX_SPEED, catalogue.LINK_MAX_WIDTH, function.link_limits or ()),
    ):
        speeds = [speed for end in ends if (speed := _transfers(end.speed)) is not None]
        if speeds:  # else the device is asleep, off the bus, or a virtual function: it has no link that could be seen
            families.add(speed_entry, about, min(speeds))
            families.add(width_entry, about, min(end.width or 0 for end in ends))


def _transfers(speed: str | None) -> float | None:
    """A link's speed in transfers per second; None: it has none."""
    found = _SPEED.match(speed or "")
    return None if found is None else float(found[1]) * 1e9


def _registrations(families: _Families, parts: Parts, inventory: Inventory, moment: Callable[[float], float]) -> None:
    registrations = parts.shown.registrations
    for resource in dict.fromkeys([*inventory.resources, *registrations]):
        about = {"resource": resource}
        families.add(catalogue.REGISTERED, about, resource in parts.registered_at)
        if resource in parts.registered_at:
            families.add(catalogue.REGISTERED_SINCE, about, moment(parts.registered_at[resource]))
        counted = registrations.get(resource, {})
        for entry, name in (
            (catalogue.REGISTRATIONS, "registrations"),
            (catalogue.LOSSES, "losses"),
            (catalogue.STREAMS, "streams"),
        ):
            families.add(entry, about, counted.get(name, 0))


def _kubelet(families: _Families, parts: Parts) -> None:
    families.add(catalogue.KUBELET_RESTARTS, {}, parts.kubelet_restarts)
    for resource, calls in parts.calls.items():
        took = {(method, "OK"): Durations() for method in _CALLS} | dict(calls.took)
        for (method, code), durations in took.items():
            families.add_durations(
                catalogue.REQUESTS, {"method": method, "resource": resource, "code": code}, durations
            )
        for reason, times in calls.refusals.items():
            families.add(catalogue.REFUSALS, {"resource": resource, "reason": reason}, times)


def _scans(families: _Families, parts: Parts, moment: Callable[[float], float]) -> None:
    families.add_durations(catalogue.SCANS, {}, parts.scans)
    for trigger, times in parts.scan_triggers.items():
        families.add(catalogue.SCAN_TRIGGERS, {"trigger": trigger}, times)
    families.add(catalogue.SCAN_FAILURES, {}, parts.scan_failures)
    if parts.last_scan_at is not None:
        families.add(catalogue.LAST_SCAN, {}, moment(parts.last_scan_at))
    for source in parts.shown.events:
        if source["state"] != "off":
            families.add(catalogue.SOURCE_UP, {"source": _SOURCES[source["source"] or ""]}, source["state"] == "up")


def _cdi(families: _Families, parts: Parts) -> None:
    for resource in parts.cdi_writes.keys() | parts.cdi_failures.keys():
        families.add(catalogue.CDI_WRITES, {"resource": resource}, parts.cdi_writes.get(resource, 0))
        families.add(catalogue.CDI_FAILURES, {"resource": resource}, parts.cdi_failures.get(resource, 0))
    for problem, number in parts.foreign_specs.items():
        families.add(catalogue.FOREIGN_SPECS, {"problem": problem}, number)


def _plugin(families: _Families, shown: document.Parts, inventory: Inventory) -> None:
    families.add(catalogue.BUILD, {"version": shown.plugin["version"], "python_version": platform.python_version()})
    families.add(catalogue.NODE, {"node": shown.plugin["node"], "consumer": shown.plugin["consumer"]})
    families.add(catalogue.READY, {}, not document.not_ready(inventory, shown))
    for turn, state in _TURNS.items():
        families.add(catalogue.TURN, {"state": state}, shown.turn["state"] == turn)
