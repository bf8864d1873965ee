"""The settings of one run. A setting is one field of `Settings`, which says all about it: name, default, unit, help.

Its flag, its environment variable and its key in the config file follow from the field's name. Only
docs/configuration.md has each of them once more; a test compares.
"""

# ruff: noqa: RUF009 (`option` makes a field, as `field` does)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sandbox_plugin.config import parsers
from sandbox_plugin.model import Reason

VARIABLE_PREFIX = "SANDBOX_PLUGIN_"
STATUS_SOCKET = Path("/run/sandbox-plugin/status.sock")
"""Not in the kubelet's folder: the kubelet deletes sockets there."""
FEATURES_FOLDER = Path("/etc/kubernetes/node-feature-discovery/features.d")
"""Where nfd-worker looks for feature files (source/local/local.go of Node Feature Discovery)."""

BROKEN = (
    Reason.GONE,
    Reason.NOT_BOUND,
    Reason.NO_TYPE,
    Reason.NO_CDEV,
    Reason.NO_NODE,
    Reason.OFF_THE_BUS,
    Reason.FATAL_ERROR,
)
"""Reasons for which a VM that has the device has lost it."""

_T = TypeVar("_T")


class UsageError(Exception):
    """The user gave something wrong: a flag, a variable, a file. The message is one line: which, and what is allowed.

    `cli.main` turns it into that line on stderr and exit status 2.
    """


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Makes a `UsageError` of a ValueError, with the flag, variable or key that the wrong value comes from."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


class Given(NamedTuple):
    """A value, and the flag, variable or key that it comes from."""

    value: Any
    where: str


class Option(NamedTuple):
    """A setting as the user gives it."""

    name: str
    """The field of `Settings`."""
    default: Any
    parse: Callable[[str], Any]
    """From text to value. Raises ValueError saying what is allowed."""
    metavar: str
    help: str
    reference_variable: str = ""
    """The reference plugin's variable for it. Set but empty it counts; any other variable is then as good as unset."""
    variable: str = ""
    """Its variable, where that is a name that everybody gives it."""

    @property
    def flag(self) -> str:
        """Without its dashes it is the key in the config file."""
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> str:
        return self.reference_variable or self.variable or f"{VARIABLE_PREFIX}{self.name.upper()}"

    @property
    def is_switch(self) -> bool:
        """The flag alone means true."""
        return isinstance(self.default, bool)

    @property
    def words(self) -> tuple[str, ...]:
        """All that it may be, where that is a choice of words."""
        return self.parse.words if isinstance(self.parse, parsers.OneOf) else ()

    @property
    def default_text(self) -> str:
        """The default as the user would give it."""
        if self.default is None:
            return "console on a terminal, else json" if self.name == "log_format" else "off"
        text = f"{self.default:g}" if isinstance(self.default, float) else str(self.default)
        return text.lower() if self.is_switch else text

    def given(self, text: str, where: str) -> Given:
        """What the user gave there. Raises `UsageError`."""
        with refusing(where):
            return Given(self.parse(text), where)


def option(default: _T, parse: Callable[[str], _T], metavar: str, help: str, **others: Any) -> _T:
    """A field of `Settings` that the user can give. The arguments are those of `Option`."""
    return field(default=default, metadata={"parse": parse, "metavar": metavar, "help": help, **others})


class Consumer(StrEnum):
    """Who takes the devices of this node: what they need excludes each other, so a node serves one."""

    KATA = "kata"
    """Kata Containers: CDI specs, and nothing but the device's node in a container."""
    KUBEVIRT = "kubevirt"
    """KubeVirt: PCI addresses in environment variables, and VFIO's own nodes in the container."""

    @property
    def reads_cdi(self) -> bool:
        """Whether it finds the node of a device in a CDI spec: none is Healthy before it is in there."""
        return self is Consumer.KATA

    @property
    def opens_group_nodes(self) -> bool:
        """Whether it gets the group's node of each device, beside the cdev: with it the VM gets the whole group."""
        return self is Consumer.KUBEVIRT


class Policy(StrEnum):
    """How preferred allocation chooses among equally healthy devices."""

    PACKED = "packed"
    """As close together as can be: for VMs whose GPUs talk to each other."""
    SPREAD = "spread"
    """As far apart as can be: for many small VMs."""


class ResourceRule(NamedTuple):
    """One `[[resources]]` entry of the config file. Empty conditions hold for every function."""

    label: str
    """How messages call it, e.g. `resources[0]`."""
    name: str | None
    """Full resource name, e.g. `amd.com/gpu`; None: functions that match are not offered."""
    vendors: frozenset[int] = frozenset()
    devices: frozenset[int] = frozenset()
    classes: tuple[str, ...] = ()
    """Lower-case hex prefixes, of two to six digits, of the 24-bit class code."""
    subsystems: frozenset[tuple[int, int]] = frozenset()
    """Subsystem vendor and subsystem device."""
    addresses: tuple[str, ...] = ()
    """PCI addresses, and UUIDs of mediated devices; `*` and `?` stand for any characters and any one character."""
    virtual: bool | None = None
    """Whether it is an SR-IOV virtual function; None: either."""
    physical_functions: tuple[str, ...] = ()
    """Addresses, as above, of the physical function that a virtual function belongs to."""
    types: tuple[str, ...] = ()
    """Names of types, with `*` and `?`, of mediated devices and vGPUs."""
    drivers: frozenset[str] = frozenset()


class ConfigFile(NamedTuple):
    """What a config file says."""

    settings: Mapping[str, Given]
    """By field of `Settings`."""
    resources: tuple[ResourceRule, ...]
    model_names: Mapping[tuple[int, int], Given]
    type_names: Mapping[tuple[int, int, int], Given]
    """By vendor, device and number of the type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `run`, `list` and `demo` need to know. Paths are absolute or relative to the working folder."""

    kubelet_dir: Path = option(
        Path("/var/lib/kubelet/device-plugins"), parsers.socket_folder, "DIR", "the kubelet's device plugin folder"
    )
    pod_resources_socket: Path = option(
        Path("/var/lib/kubelet/pod-resources/kubelet.sock"),
        parsers.path,
        "PATH",
        "the kubelet's PodResources socket; it may be absent",
    )
    cdi_dir: Path = option(Path("/var/run/cdi"), parsers.path, "DIR", "where CDI specs are written")
    gpu_alias: str = option(
        "pgpu",
        parsers.alias,
        "NAME",
        "GPUs are nvidia.com/NAME; empty: a resource per model",
        reference_variable="P_GPU_ALIAS",
    )
    nvswitch_alias: str = option(
        "nvswitch",
        parsers.alias,
        "NAME",
        "NVSwitches are nvidia.com/NAME; empty: a resource per model",
        reference_variable="NVSWITCH_ALIAS",
    )
    consumer: Consumer = option(
        Consumer.KATA, parsers.OneOf(*Consumer), "CONSUMER", "who uses the devices: kata or kubevirt"
    )
    require_iommufd: bool = option(
        False,
        parsers.switch,
        "BOOL",
        "list devices without an iommufd cdev as Unhealthy (confidential guests need one)",
    )
    allocation_policy: Policy = option(
        Policy.PACKED,
        parsers.OneOf(*Policy),
        "POLICY",
        "packed: GPUs that are close together; spread: far apart",
    )
    fabric_partitions: Path | None = option(
        None,
        parsers.or_off(parsers.path),
        "FILE",
        "JSON map of PCI address to module on an HGX board: prefer whole partitions",
    )
    whole_node: tuple[str, int | None] | None = option(
        None,
        parsers.or_off(parsers.whole_node),
        "RESOURCE[=COUNT]",
        "a container gets one device of it or all (COUNT, else all known)",
    )
    status_socket: Path = option(
        STATUS_SOCKET, parsers.socket_path, "PATH", "where `sandbox-plugin status` asks the daemon"
    )
    """With a fake host the default is below its root."""
    node_features: Path | None = option(
        None,
        parsers.or_off(parsers.path),
        "DIR",
        "Node Feature Discovery's features.d: label the node with what it has",
    )
    gpu_feature_labels: bool = option(
        False,
        parsers.go_switch,
        "BOOL",
        "also nvidia.com/gpu.product, .family, .count and .memory, as GPU Feature Discovery labels nodes",
        reference_variable="ENABLE_GFD",
    )
    device_plugin: str = option(
        "on",
        parsers.OneOf("on", "off"),
        "on|off",
        "off: offer nothing by the device plugin API (for nodes that serve claims only)",
    )
    dra: bool = option(
        False, parsers.switch, "BOOL", "offer the devices by Dynamic Resource Allocation, for claims, too"
    )
    dra_driver_name: str = option(
        "vfio.sandbox-plugin", parsers.driver_name, "NAME", "the DRA driver's name, in slices and device classes"
    )
    dra_evict: frozenset[Reason] | None = option(
        None,
        parsers.or_off(parsers.reasons(*BROKEN)),
        "REASON,...",
        "evict the pods whose claims have a device that is Unhealthy for one of these reasons",
    )
    """Those of its own, and never who else holds it: what is only withheld evicts nobody."""
    node_name: str | None = option(
        None,
        parsers.or_off(parsers.node_name),
        "NAME",
        "the name of this node in the cluster; --dra and --node-events need it",
        variable="NODE_NAME",
    )
    api_server: str | None = option(
        None,
        parsers.or_off(parsers.url),
        "URL",
        "the API server for --dra and --node-events; off: the one that the pod's environment names",
    )
    metrics_address: tuple[str, int] | None = option(
        None,
        parsers.or_off(parsers.host_port),
        "HOST:PORT",
        "serve /metrics, /healthz and /readyz there; HOST may be empty",
    )
    metrics_pod_labels: bool = option(True, parsers.switch, "BOOL", "name the pod that holds a device in the metrics")
    node_events: bool = option(
        False,
        parsers.switch,
        "BOOL",
        "a Kubernetes Event on the node when a device becomes Unhealthy or recovers",
    )
    health_interval: float = option(5.0, parsers.seconds, "SECONDS", "seconds between periodic rescans")
    log_format: str | None = option(None, parsers.OneOf("json", "console"), "FORMAT", "json or console")
    """None: console on a terminal, else json."""
    log_level: str = option(
        "info", parsers.OneOf("debug", "info", "warning", "error"), "LEVEL", "debug, info, warning or error"
    )

    # What is no option: `--fake-sysfs`, and the tables of the config file.
    host_root: Path = Path("/")
    """The host is read as `host_root/sys` and `host_root/dev`; anything but `/` is a fake one."""
    resources: tuple[ResourceRule, ...] = ()
    """Resource rules, asked before the built-in ones; the first that matches wins."""
    model_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """(vendor, device) -> last part of the resource name, for models with a name of the user's own."""
    type_names: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    """(vendor, device, number of the type) -> the same for types of vGPU whose names were not seen."""

    @property
    def offers_resources(self) -> bool:
        """Whether devices are offered by the device plugin API."""
        return self.device_plugin == "on"

    @property
    def features_folder(self) -> Path | None:
        """Where the feature file goes; None: nowhere. Who only asks for GPU Feature Discovery's labels, as the
        reference's users do, gets them where NFD looks for them by default."""
        if self.node_features is None and self.gpu_feature_labels:
            return self.host_root / FEATURES_FOLDER.relative_to("/")
        return self.node_features

    def on_fake_host(self, root: Path) -> Settings:
        """The same settings for a fake host below `root`."""
        is_default = self.status_socket == STATUS_SOCKET
        below = root / STATUS_SOCKET.relative_to("/")
        return replace(self, host_root=root, status_socket=below if is_default else self.status_socket)


OPTIONS = tuple(
    Option(name=each.name, default=each.default, **each.metadata) for each in fields(Settings) if each.metadata
)
