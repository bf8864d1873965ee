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
from collections.abc import Callable, Iterator
from functools import lru_cache

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from sandbox_plugin.durations import Durations
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
from sandbox_plugin.outputs.metrics.text import Page, labels
from sandbox_plugin.registry import Registry

_SPEED = re.compile(r"([0-9]+(?:\.[0-9]+)?) GT/s")
"""Of a link, in giga-transfers per second (pci_speed_string in drivers/pci/probe.c); `Unknown` is none."""
_TURNS = {SERVING: "serving", STANDING_BY: "standing-by", WAITING: "waiting"}
_SOURCES = {"kernel events": "uevent", "inotify": "inotify", "PodResources": "pod-resources"}
"""As `status` calls them -> as they are called here."""
_OF_REGISTRATIONS = {
    catalogue.REGISTRATIONS: "registrations",
    catalogue.LOSSES: "losses",
    catalogue.STREAMS: "streams",
}
_SEVERITIES = tuple(labels(severity=severity) for severity in ("fatal", "nonfatal", "correctable"))
_CALLS = ("Allocate", "GetPreferredAllocation")

Moment = Callable[[float], int]
"""Makes seconds since 1970 of monotonic seconds."""


class Exposition:
    """The page. `parts` tells what the parts know of themselves now."""

    def __init__(
        self, registry: Registry, history: HealthHistory, parts: Callable[[], Parts], *, pod_labels: bool
    ) -> None:
        self._registry = registry
        self._history = history
        self._parts = parts
        self._pod_labels = pod_labels
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def page(self, accept: str) -> Answer:
        """In the format that the client prefers: OpenMetrics, or Prometheus' own text."""
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # of a version that is no number
            encode, content_type = choose_encoder("")
        openmetrics = content_type.startswith("application/openmetrics-text")
        ours = self._ours().render(catalogue.ENTRIES, openmetrics=openmetrics)
        return Answer(ours + encode(self._process), content_type=content_type)

    def _ours(self) -> Page:
        """All metrics of the catalogue."""
        parts, inventory, page = self._parts(), self._history.catch_up(), Page()
        since_1970 = time.time() - self._registry.now()

        def moment(at: float) -> int:
            """In whole seconds: so it is the same in every scrape."""
            return round(since_1970 + at)

        _plugin(page, parts.shown, inventory)
        _kubelet(page, parts)
        _scans(page, parts, moment)
        _cdi(page, parts)
        if parts.shown.turn["state"] != STANDING_BY:  # else the plugin that serves speaks for them: each counts once
            self._devices(page, inventory, moment)
            _registrations(page, parts, inventory, moment)
            _claims(page, parts, moment)
        return page

    def _devices(self, page: Page, inventory: Inventory, moment: Moment) -> None:
        ledger, functions = inventory.memory.ledger, self._registry.functions
        for kind, number in _counted(inventory):
            page.add(catalogue.DEVICES, kind, number)
        for resource in inventory.resources:
            for reason in ("", *Reason):  # all of them from the start: a first one is a rise, too
                times = self._history.transitions[resource, reason]
                page.add(catalogue.TRANSITIONS, f"{labels(resource=resource)},{_health(reason)}", times)
        page.add(catalogue.NOT_OFFERED, value=len(inventory.unoffered))
        page.add(catalogue.HELD_WITHOUT_DEVICE, value=len(held_without_device(inventory)))
        for device in inventory.by_key.values():
            about = _about(device, device.address if device.placements else "")
            _device(page, device, about, ledger)
            page.add(catalogue.HEALTH_CHANGED, about, moment(self._history.since(device.key)))
            grants = ledger.touching([device.node])
            page.add(catalogue.ALLOCATED, about, bool(grants))
            if grants and math.isfinite(grants[0].at):
                page.add(catalogue.ALLOCATED_SINCE, about, moment(grants[0].at))
            if grants and self._pod_labels:
                _holder(page, about, grants[0], ledger)
            for placement in device.placements:
                if (function := functions.get(placement.address)) is not None:
                    is_first = function.address == device.address
                    _pcie(page, about if is_first else _about(device, function.address), function)


def _counted(inventory: Inventory) -> Iterator[tuple[str, int]]:
    """How many devices there are of each resource, model and reason; of Healthy ones also none."""
    number: Counter[tuple[str, str, str]] = Counter()
    for device in inventory.by_key.values():
        number[device.resource, device.model, ""] += device.health.healthy
        if device.health.reason is not None:
            number[device.resource, device.model, device.health.reason] += 1
    for (resource, model, reason), count in number.items():
        yield f"{labels(resource=resource, model=model)},{_health(reason)}", count


def _health(reason: str) -> str:
    return labels(health="Unhealthy" if reason else "Healthy", reason=reason)


def _about(device: Device, address: str) -> str:
    return labels(resource=device.resource, device=device.id, pci_address=address)


def _device(page: Page, device: Device, about: str, ledger: Ledger) -> None:
    what = labels(
        model=device.model,
        numa_node=",".join(map(str, device.numa_nodes)),
        iommu_group="" if device.iommu_group < 0 else str(device.iommu_group),
        vfio_node=device.node,
    )
    page.add(catalogue.DEVICE_INFO, f"{about},{what}")
    page.add(catalogue.DEVICE_HEALTHY, about, device.health.healthy)
    if device.health.reason is not None:
        page.add(catalogue.DEVICE_UNHEALTHY, f"{about},{labels(reason=device.health.reason)}")
    page.add(catalogue.IN_USE, about, any(placement.address in ledger.uses for placement in device.placements))


def _holder(page: Page, about: str, grant: Grant, ledger: Ledger) -> None:
    holder = holder_of(grant, ledger)
    if holder["pod"] is not None:
        whose = labels(**{label: holder[label] or "" for label in catalogue.POD})
        page.add(catalogue.HOLDER, f"{about},{whose}")


def _pcie(page: Page, about: str, function: PciFunction) -> None:
    counts = (function.fatal_errors, function.nonfatal_errors, function.correctable_errors)
    for severity, count in zip(_SEVERITIES, counts, strict=True):
        if count is not None:
            page.add(catalogue.AER, f"{about},{severity}", count)
    now = LinkLimit(function.link_speed, function.link_width)
    _link(page, catalogue.LINK_SPEED, catalogue.LINK_WIDTH, about, now)
    _link(page, catalogue.LINK_MAX_SPEED, catalogue.LINK_MAX_WIDTH, about, *(function.link_limits or ()))


def _link(page: Page, speed: Entry, width: Entry, about: str, *ends: LinkLimit) -> None:
    """What the ends of a link can both do. One that sleeps, is off the bus or is a virtual function shows no link."""
    speeds = [each for end in ends if (each := _transfers(end.speed)) is not None]
    if speeds:
        page.add(speed, about, min(speeds))
        if widths := [end.width for end in ends if end.width]:
            page.add(width, about, min(widths))


@lru_cache(maxsize=64)
def _transfers(speed: str | None) -> int | None:
    """A link's speed in transfers per second; None: it has none."""
    found = _SPEED.match(speed or "")
    return None if found is None else round(float(found[1]) * 1e9)


def _registrations(page: Page, parts: Parts, inventory: Inventory, moment: Moment) -> None:
    registrations = parts.shown.registrations
    for resource in dict.fromkeys([*inventory.resources, *registrations]):
        about = labels(resource=resource)
        page.add(catalogue.REGISTERED, about, resource in parts.registered_at)
        if resource in parts.registered_at:
            page.add(catalogue.REGISTERED_SINCE, about, moment(parts.registered_at[resource]))
        counted = registrations.get(resource, {})
        for entry, name in _OF_REGISTRATIONS.items():
            page.add(entry, about, counted.get(name, 0))


def _claims(page: Page, parts: Parts, moment: Moment) -> None:
    """Nothing without `--dra`."""
    if parts.shown.dra is None:
        return
    registration, slices, known = parts.shown.dra["registration"], parts.shown.dra["slices"], parts.claims
    page.add(catalogue.DRA_REGISTERED, value=registration["state"] == "registered")
    page.add(catalogue.SLICES_CURRENT, value=slices is not None and slices["published"] and slices["trouble"] is None)
    if known is None or slices is None:
        return
    page.add(catalogue.CLAIMS, value=len(parts.shown.dra["claims"]))
    page.add(catalogue.RELEASED, value=known.released)
    for (method, outcome), durations in known.took.items():
        page.add_durations(catalogue.CLAIM_REQUESTS, labels(method=method, outcome=outcome), durations)
    for reason, times in known.refusals.items():
        page.add(catalogue.CLAIM_REFUSALS, labels(reason=reason), times)
    if known.registered_at is not None:
        page.add(catalogue.DRA_REGISTERED_SINCE, value=moment(known.registered_at))
    page.add(catalogue.DRA_REGISTRATIONS, value=registration["registrations"])
    page.add(catalogue.SLICES, value=slices["slices"])
    page.add(catalogue.SLICE_DEVICES, value=slices["devices"])
    page.add(catalogue.SLICE_WRITES, value=slices["writes"])
    for code, times in known.failures.items():
        page.add(catalogue.API_FAILURES, labels(code=code), times)


def _kubelet(page: Page, parts: Parts) -> None:
    page.add(catalogue.KUBELET_RESTARTS, value=parts.kubelet_restarts)
    for resource, calls in parts.calls.items():
        took = {(method, "OK"): Durations() for method in _CALLS} | dict(calls.took)
        for (method, code), durations in took.items():
            page.add_durations(catalogue.REQUESTS, labels(method=method, resource=resource, code=code), durations)
        for reason, times in calls.refusals.items():
            page.add(catalogue.REFUSALS, labels(resource=resource, reason=reason), times)


def _scans(page: Page, parts: Parts, moment: Moment) -> None:
    page.add_durations(catalogue.SCANS, "", parts.scans)
    for trigger, times in (dict.fromkeys(catalogue.TRIGGERS, 0) | dict(parts.scan_triggers)).items():
        page.add(catalogue.SCAN_TRIGGERS, labels(trigger=trigger), times)
    page.add(catalogue.SCAN_FAILURES, value=parts.scan_failures)
    if parts.last_scan_at is not None:
        page.add(catalogue.LAST_SCAN, value=moment(parts.last_scan_at))
    for source in parts.shown.events:
        if source["state"] != "off":
            page.add(catalogue.SOURCE_UP, labels(source=_SOURCES[source["source"] or ""]), source["state"] == "up")


def _cdi(page: Page, parts: Parts) -> None:
    for resource in sorted(parts.cdi_writes.keys() | parts.cdi_failures.keys()):
        page.add(catalogue.CDI_WRITES, labels(resource=resource), parts.cdi_writes.get(resource, 0))
        page.add(catalogue.CDI_FAILURES, labels(resource=resource), parts.cdi_failures.get(resource, 0))
    for problem, number in parts.foreign_specs.items():
        page.add(catalogue.FOREIGN_SPECS, labels(problem=problem), number)


def _plugin(page: Page, shown: document.Parts, inventory: Inventory) -> None:
    page.add(catalogue.BUILD, labels(version=shown.plugin["version"], python_version=platform.python_version()))
    page.add(catalogue.NODE, labels(node=shown.plugin["node"], consumer=shown.plugin["consumer"]))
    page.add(catalogue.READY, value=not document.not_ready(inventory, shown))
    for turn, state in _TURNS.items():
        page.add(catalogue.TURN, labels(state=state), shown.turn["state"] == turn)
