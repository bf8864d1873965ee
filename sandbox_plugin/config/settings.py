"""The settings of one run, as values: validated once, by `configuration`, and never looked up again further down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path


class UsageError(Exception):
    """The user gave something wrong: a flag, a variable, a file. The message is one line: which, and what is allowed.

    `cli.main` turns it into that line on stderr and exit status 2.
    """


class Consumer(StrEnum):
    """Who takes the devices of this node: what they need excludes each other, so a node serves one."""

    KATA = "kata"
    """Kata Containers: CDI specs, and nothing but the device's node in a container."""
    KUBEVIRT = "kubevirt"
    """KubeVirt: PCI addresses in environment variables, and VFIO's own nodes in the container."""


class Policy(StrEnum):
    """How preferred allocation chooses among equally healthy devices."""

    PACKED = "packed"
    """As close together as can be: for VMs whose GPUs talk to each other."""
    SPREAD = "spread"
    """As far apart as can be: for many small VMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRule:
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
    """PCI addresses; `*` and `?` stand for any characters and any one character."""
    drivers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `run`, `list` and `demo` need to know. Paths are absolute or relative to the working folder."""

    host_root: Path = Path("/")
    """The host is read as `host_root/sys` and `host_root/dev`; anything but `/` is a fake one."""
    kubelet_dir: Path = Path("/var/lib/kubelet/device-plugins")
    cdi_dir: Path = Path("/var/run/cdi")
    gpu_alias: str = "pgpu"
    """Last part of the GPUs' resource name; empty: a resource for each model."""
    nvswitch_alias: str = "nvswitch"
    pod_resources_socket: Path = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
    consumer: Consumer = Consumer.KATA
    require_iommufd: bool = False
    """Confidential guests take cdevs only: devices that have none are Unhealthy."""
    allocation_policy: Policy = Policy.PACKED
    resources: tuple[ResourceRule, ...] = ()
    """Resource rules, asked before the built-in ones; the first that matches wins."""
    model_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """(vendor, device) -> last part of the resource name, for models with a name of the user's own."""
    health_interval: float = 5.0
    """Seconds between rescans that no event asked for."""
    log_format: str | None = None
    """`json` or `console`; None: console on a terminal, else json."""
    log_level: str = "info"

    def on_fake_host(self, root: Path) -> Settings:
        """The same settings for a fake host below `root`."""
        return replace(self, host_root=root)
