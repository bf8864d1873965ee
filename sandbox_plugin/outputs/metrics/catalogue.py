"""Every metric there is: name, type, unit, labels, meaning, and how many series it can have.

This is the one place: what is exposed is made by these entries (collector.py), and the reference in docs/monitoring.md
is generated from them. Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` for counters,
`_info` for series whose labels are the news and whose value is 1. Imports nothing of the Prometheus client, which a
daemon without `--metrics-address` never loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "sandbox_plugin_"
PER_DEVICE = ("resource", "device", "pci_address")
"""What names a device in every series about it: as in the logs, an ID never stands without its address."""
POD = ("namespace", "pod", "container")
"""Of the pod that holds a device; called as elsewhere, which is why a scrape should say `honor_labels`."""


TRIGGERS = ("start", "timer", "uevent", "folder", "due", "late-answer", "refusal")
"""What a scan may be for; all of them are there from the start."""


class Kind(StrEnum):
    """The types of Prometheus that are used here."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"
    """To Prometheus' text format a gauge that is always 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One metric. Equal to itself alone, which is quickly looked up."""

    name: str
    """In full, as in a query."""
    kind: Kind
    help: str
    """One sentence, without a full stop: what Prometheus shows beside it."""
    series: str
    """What bounds the number of its series."""
    labels: tuple[str, ...] = ()
    unit: str = ""
    """Base unit, as the name ends in it; empty: a number of things, or 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Metrics about one thing."""

    title: str
    entries: tuple[Entry, ...]


def _gauge(name: str, help: str, *labels: str, series: str, unit: str = "") -> Entry:
    return Entry(name=PREFIX + name, kind=Kind.GAUGE, help=help, labels=labels, series=series, unit=unit)


def _counter(name: str, help: str, *labels: str, series: str, unit: str = "") -> Entry:
    return Entry(name=f"{PREFIX}{name}_total", kind=Kind.COUNTER, help=help, labels=labels, series=series, unit=unit)


def _info(name: str, help: str, *labels: str, series: str) -> Entry:
    return Entry(name=f"{PREFIX}{name}_info", kind=Kind.INFO, help=help, labels=labels, series=series)


def _seconds(name: str, help: str, *labels: str, series: str) -> Entry:
    """A histogram of durations."""
    name = f"{PREFIX}{name}_seconds"
    return Entry(name=name, kind=Kind.HISTOGRAM, help=help, labels=labels, series=series, unit="seconds")


def _since(name: str, help: str, *labels: str, series: str) -> Entry:
    """A moment, in seconds since 1970."""
    return _gauge(f"{name}_timestamp_seconds", help, *labels, series=series, unit="seconds")


_ONE = "one"
_ONE_WITH_DRA = "one with `--dra`"
_EACH_RESOURCE = "one for each resource"
_EACH_DEVICE = "one for each device"
_EACH_FUNCTION = "one for each PCI function of each device"

DEVICES = _gauge(
    "devices",
    "Devices that the kubelet is told of",
    "resource",
    "model",
    "health",
    "reason",
    series="for each resource and model one Healthy and, while there are such devices, one for each reason",
)
DEVICE_INFO = _info(
    "device",
    "What a device is and where it sits",
    *PER_DEVICE,
    "model",
    "numa_node",
    "iommu_group",
    "vfio_node",
    series=_EACH_DEVICE,
)
DEVICE_HEALTHY = _gauge(
    "device_healthy", "Whether the kubelet is told that a device is Healthy", *PER_DEVICE, series=_EACH_DEVICE
)
DEVICE_UNHEALTHY = _info(
    "device_unhealthy",
    "Why a device is Unhealthy",
    *PER_DEVICE,
    "reason",
    series="one for each device that is Unhealthy",
)
HEALTH_CHANGED = _since(
    "device_health_changed",
    "Since when a device has been Healthy, or Unhealthy for whatever reason; no earlier than the start of the plugin",
    *PER_DEVICE,
    series=_EACH_DEVICE,
)
TRANSITIONS = _counter(
    "device_health_transitions",
    "Times a device became Healthy, or Unhealthy for this reason; a device that arrives counts too",
    "resource",
    "health",
    "reason",
    series="for each resource one for each reason, and Healthy",
)
ALLOCATED = _gauge(
    "device_allocated",
    "Whether a pod or a claim holds a device: by an Allocate, a Prepare, or PodResources",
    *PER_DEVICE,
    series=_EACH_DEVICE,
)
ALLOCATED_SINCE = _since(
    "device_allocated",
    "When a device was given to the pod or claim that holds it; absent where that was before the plugin started",
    *PER_DEVICE,
    series="one for each device that this run gave to a pod",
)
HOLDER = _info(
    "device_holder",
    "Which pod holds a device, as PodResources says; off with --metrics-pod-labels=false",
    *PER_DEVICE,
    *POD,
    series="one for each device that a pod holds",
)
IN_USE = _gauge(
    "device_in_use",
    "Whether a VM has a function of a device enabled, whoever started it",
    *PER_DEVICE,
    series=_EACH_DEVICE,
)
NOT_OFFERED = _gauge(
    "functions_not_offered",
    "PCI functions that a resource rule wants, or that cannot be read, and that are no device; `list` says why",
    series=_ONE,
)
HELD_WITHOUT_DEVICE = _gauge(
    "held_without_device", "IDs that pods hold and that no device on this node has the node of", series=_ONE
)

AER = _counter(
    "pcie_errors",
    "PCIe errors (AER) that the kernel has counted since the function appeared",
    *PER_DEVICE,
    "severity",
    series="three, fatal, nonfatal and correctable, for each PCI function of each device",
)
LINK_SPEED = _gauge(
    "pcie_link_transfers_per_second",
    "Speed of the PCIe link when it was read last; it falls while a device sleeps",
    *PER_DEVICE,
    series=_EACH_FUNCTION,
    unit="transfers per second",
)
LINK_MAX_SPEED = _gauge(
    "pcie_link_max_transfers_per_second",
    "Most that the function, and the port above it, can do",
    *PER_DEVICE,
    series=_EACH_FUNCTION,
    unit="transfers per second",
)
LINK_WIDTH = _gauge(
    "pcie_link_width_lanes",
    "Lanes of the PCIe link when it was read last",
    *PER_DEVICE,
    series=_EACH_FUNCTION,
    unit="lanes",
)
LINK_MAX_WIDTH = _gauge(
    "pcie_link_max_width_lanes",
    "Lanes that the function, and the port above it, have",
    *PER_DEVICE,
    series=_EACH_FUNCTION,
    unit="lanes",
)

REQUESTS = _seconds(
    "kubelet_request_duration",
    "How long Allocate and GetPreferredAllocation took, by the status that the kubelet got",
    "method",
    "resource",
    "code",
    series="for each resource and method one for each gRPC status that there has been, and OK",
)
REFUSALS = _counter(
    "refusals",
    "Calls that were answered with an error, and so pods that were turned away",
    "resource",
    "reason",
    series="for each resource one for each reason",
)
REGISTERED = _gauge("registered", "Whether the kubelet has accepted a resource", "resource", series=_EACH_RESOURCE)
REGISTERED_SINCE = _since(
    "registered",
    "Since when a resource is registered",
    "resource",
    series="one for each resource that is registered",
)
REGISTRATIONS = _counter("registrations", "Times the kubelet accepted a resource", "resource", series=_EACH_RESOURCE)
LOSSES = _counter("registration_losses", "Times a registration was lost", "resource", series=_EACH_RESOURCE)
STREAMS = _gauge(
    "list_and_watch_streams",
    "ListAndWatch streams that are open, also of other clients than the kubelet",
    "resource",
    series=_EACH_RESOURCE,
)
KUBELET_RESTARTS = _counter("kubelet_restarts", "Times another kubelet than the one before accepted us", series=_ONE)

TURN = _gauge(
    "turn",
    "Which state is 1: this plugin is serving the node, standing-by while another one does, or waiting for the "
    "kubelet's folder",
    "state",
    series="three",
)
READY = _gauge("ready", "Whether /readyz says yes: every resource is registered, or the plugin stands by", series=_ONE)

CLAIMS = _gauge("claims_prepared", "ResourceClaims that are prepared, and not given back", series=_ONE_WITH_DRA)
RELEASED = _counter(
    "claims_released",
    "Claims that were given back unasked, because the kubelet had forgotten them",
    series=_ONE_WITH_DRA,
)
CLAIM_REQUESTS = _seconds(
    "claim_request_duration",
    "How long NodePrepareResources and NodeUnprepareResources took for one claim",
    "method",
    "outcome",
    series="with `--dra` for each method ok and refused, and cancelled or failed once that has happened",
)
CLAIM_REFUSALS = _counter(
    "claim_refusals",
    "Times a claim was not prepared, or not taken back; the kubelet asks again for the same one",
    "reason",
    series="with `--dra` one for each reason",
)
DRA_REGISTERED = _gauge("dra_registered", "Whether the kubelet has accepted the DRA driver", series=_ONE_WITH_DRA)
DRA_REGISTERED_SINCE = _since("dra_registered", "Since when the driver is registered", series="one while it is")
DRA_REGISTRATIONS = _counter("dra_registrations", "Times the kubelet accepted the driver", series=_ONE_WITH_DRA)
SLICES_CURRENT = _gauge(
    "resource_slices_current",
    "Whether the ResourceSlices were brought up to date, and nothing has gone wrong with them since",
    series=_ONE_WITH_DRA,
)
SLICES = _gauge("resource_slices", "ResourceSlices of this node on the API server", series=_ONE_WITH_DRA)
SLICE_DEVICES = _gauge("resource_slice_devices", "Devices that were published in them last", series=_ONE_WITH_DRA)
SLICE_WRITES = _counter("resource_slice_writes", "Attempts to write a ResourceSlice", series=_ONE_WITH_DRA)
API_FAILURES = _counter(
    "api_server_failures",
    "Times something about ResourceSlices failed at the API server, by its status; 409 and 410 say that others were "
    "faster, or time has passed",
    "code",
    series="with `--dra` one for each of 401, 403, 404, 409, 410, 422, 429, 4xx, 5xx (others) and no-answer",
)

SCANS = _seconds("scan_duration", "How long scans of the host took", series=_ONE)
SCAN_TRIGGERS = _counter(
    "scan_triggers",
    "Scans that a trigger has led to; one scan may have several",
    "trigger",
    series=f"one for each trigger: {', '.join(TRIGGERS)}",
)
SCAN_FAILURES = _counter("scan_failures", "Scans that saw nothing; the last known state stays", series=_ONE)
LAST_SCAN = _since("last_scan", "When the last scan of the host began", series=_ONE)
SOURCE_UP = _gauge(
    "event_source_up",
    "Whether a source of events works; absent while it is off",
    "source",
    series="three: uevent, inotify, pod-resources",
)

CDI_WRITES = _counter("cdi_writes", "Times a CDI spec was written", "resource", series=_EACH_RESOURCE)
CDI_FAILURES = _counter(
    "cdi_write_failures",
    "Attempts at a CDI spec that failed; they are repeated every second",
    "resource",
    series=_EACH_RESOURCE,
)
FOREIGN_SPECS = _gauge(
    "foreign_cdi_specs",
    "CDI specs of other programs with something wrong: `bad` fails every Kata pod of the node",
    "problem",
    series="three: bad, not-judged, in-two-folders",
)

BUILD = _info("build", "Which version runs", "version", "python_version", series=_ONE)
NODE = _info("node", "The Kubernetes node, and who uses its devices", "node", "consumer", series=_ONE)

SECTIONS = (
    Section(
        title="Devices",
        entries=(
            DEVICES,
            DEVICE_INFO,
            DEVICE_HEALTHY,
            DEVICE_UNHEALTHY,
            HEALTH_CHANGED,
            TRANSITIONS,
            ALLOCATED,
            ALLOCATED_SINCE,
            HOLDER,
            IN_USE,
            NOT_OFFERED,
            HELD_WITHOUT_DEVICE,
        ),
    ),
    Section(title="PCIe", entries=(AER, LINK_SPEED, LINK_MAX_SPEED, LINK_WIDTH, LINK_MAX_WIDTH)),
    Section(
        title="Kubelet",
        entries=(
            REQUESTS,
            REFUSALS,
            REGISTERED,
            REGISTERED_SINCE,
            REGISTRATIONS,
            LOSSES,
            STREAMS,
            KUBELET_RESTARTS,
        ),
    ),
    Section(
        title="Dynamic Resource Allocation",
        entries=(
            CLAIMS,
            RELEASED,
            CLAIM_REQUESTS,
            CLAIM_REFUSALS,
            DRA_REGISTERED,
            DRA_REGISTERED_SINCE,
            DRA_REGISTRATIONS,
            SLICES_CURRENT,
            SLICES,
            SLICE_DEVICES,
            SLICE_WRITES,
            API_FAILURES,
        ),
    ),
    Section(title="Scans and events", entries=(SCANS, SCAN_TRIGGERS, SCAN_FAILURES, LAST_SCAN, SOURCE_UP)),
    Section(title="CDI specs", entries=(CDI_WRITES, CDI_FAILURES, FOREIGN_SPECS)),
    Section(title="The plugin", entries=(TURN, READY, BUILD, NODE)),
)
ENTRIES = tuple(entry for section in SECTIONS for entry in section.entries)
