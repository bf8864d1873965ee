"""What this node has, as labels, and as the text of a feature file of Node Feature Discovery (NFD): pure.

nfd-worker reads such files and has the node labelled, so this plugin needs no rights for it. The format and its rules
are of NFD's source/local/local.go and pkg/apis/nfd/validate/validate.go: a line `name=value` for each label, at most
64 KiB, and no namespace of kubernetes.io but `feature.node.kubernetes.io` and those below it. What comes behind a line
`# +expiry-time=` does not count after that time. Labels of Kubernetes have names of at most 63 characters behind their
prefix, and values of at most 63.

Labels say what is there, not how it is: a GPU that is Unhealthy is counted, and one that has left is not. What can be
given to pods now is the node's Allocatable.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sandbox_plugin.host.confidential import Confidential
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.products import family, memory_in_name, product
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import NVIDIA, ROM, Device, PciFunction, Reason

PREFIX = "sandbox-plugin.feature.node.kubernetes.io/"
GPU_FEATURE_PREFIX = "nvidia.com/gpu."
"""Of GPU Feature Discovery's labels."""

_MARK = "# Written by sandbox-plugin, which renews this file while it serves the node.\n"
_LEFT = (Reason.GONE, Reason.NOT_BOUND, Reason.NO_TYPE)
"""Devices that are listed because a pod may still hold them, and are not here."""
_NEVER_GIVEN = (Reason.NOT_VIABLE, Reason.FIRMWARE_MAPPING)
"""What the kernel says of an IOMMU group as a whole."""
_MIB = 1 << 20
_WINDOW = 256 * _MIB
"""Bytes of a BAR that is only a window onto the memory of a GPU, which may have far more."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What labels follow from."""

    devices: tuple[Device, ...] = ()
    """Those that are here."""
    functions: Mapping[str, PciFunction] = field(default_factory=dict)
    """PCI address -> a function of theirs as it was read last: it may not answer now."""


def seen(inventory: Inventory, before: Seen) -> Seen:
    """What is here now."""
    facts = inventory.memory.facts
    now = {} if facts is None else facts.functions
    devices = tuple(
        device
        for listed in inventory.resources.values()
        for device in listed
        if device.placements and device.health.reason not in _LEFT
    )
    functions = {}
    for device in devices:
        for placement in device.placements:
            function = now.get(placement.address) or before.functions.get(placement.address)
            if function is not None:
                functions[placement.address] = function
    return Seen(devices=devices, functions=functions)


def labels(here: Seen, confidential: Confidential, names: ModelNames, *, gpu_features: bool) -> dict[str, str]:
    """By name; none where there is no device. `gpu_features`: also those that GPU Feature Discovery would write."""
    if not here.devices:
        return {}
    gpus = [function for _, function in sorted(here.functions.items()) if _is_whole_gpu(function)]
    by_model: dict[tuple[int, int], list[PciFunction]] = defaultdict(list)
    for gpu in gpus:
        by_model[gpu.model_id].append(gpu)
    own = {"gpu.count": str(len(gpus)), **_of_host(here, gpus, confidential)}
    for (vendor, device), of_model in sorted(by_model.items()):
        about = _about(of_model, names)
        own |= {f"gpu.{vendor:04x}-{device:04x}.{name}": value for name, value in about.items()}
        if len(by_model) == 1:
            own |= {f"gpu.{name}": value for name, value in about.items()}
    found = {PREFIX + name: value for name, value in own.items() if value and _NAME.fullmatch(name)}
    if gpu_features:
        found |= _gpu_features(by_model, names)
    return dict(sorted(found.items()))


def feature_file(labels: Mapping[str, str], expires: datetime) -> str:
    """The text of the file. `expires`, in UTC: what nobody renews is not to outlive this plugin for long."""
    expiry = f"# +expiry-time={expires:%Y-%m-%dT%H:%M:%SZ}\n"
    return _MARK + expiry + "".join(f"{name}={value}\n" for name, value in labels.items())


def _is_whole_gpu(function: PciFunction) -> bool:
    """A display controller, and no part of one."""
    is_part = function.mdev_type is not None or function.physical_function is not None
    return function.class_code >> 16 == 0x03 and not is_part


def _about(gpus: Sequence[PciFunction], names: ModelNames) -> dict[str, str]:
    """Of all GPUs of one model."""
    return {
        "count": str(len(gpus)),
        "product": product(gpus[0], names),
        "family": family(gpus[0], names) or "",
        "bar-memory": _text(_bar_memory(gpus)),
    }


def _of_host(here: Seen, gpus: Iterable[PciFunction], confidential: Confidential) -> dict[str, str]:
    own = {f"gpu.driver.{driver}.count": str(n) for driver, n in Counter(gpu.driver for gpu in gpus).items()}
    own |= {f"gpu.numa-{numa}.count": str(n) for numa, n in Counter(gpu.numa_node for gpu in gpus).items()}
    own.pop("gpu.driver.None.count", None)
    own.pop("gpu.numa-None.count", None)
    switches = [f for f in here.functions.values() if f.vendor == NVIDIA and f.class_code >> 8 == 0x0680]
    return own | {
        "nvswitch.count": str(len(switches)),
        "vfio.cdevs": _text(all(device.is_cdev for device in here.devices)),
        "iommu-groups.viable": _text(not any(device.health.reason in _NEVER_GIVEN for device in here.devices)),
        "confidential.snp": _text(confidential.snp),
        "confidential.tdx": _text(confidential.tdx),
    }


def _gpu_features(by_model: Mapping[tuple[int, int], Sequence[PciFunction]], names: ModelNames) -> dict[str, str]:
    """Of the model of which there are most: these labels have room for one."""
    of_nvidia = [gpus for model_id, gpus in sorted(by_model.items()) if model_id[0] == NVIDIA]
    if not of_nvidia:
        return {}
    about = _about(gpus := max(of_nvidia, key=len), names)
    bar, named = _bar_memory(gpus), memory_in_name(gpus[0], names)
    del about["bar-memory"]
    about["memory"] = _text(min(filter(None, (bar, named)), default=None))
    return {GPU_FEATURE_PREFIX + name: value for name, value in about.items() if value}


def _bar_memory(gpus: Iterable[PciFunction]) -> int | None:
    """MiB of the BAR through which the whole memory of each of these GPUs is reached; None where there is none.

    A BAR is a power of two: it is up to twice the memory.
    """
    sizes = [max((b.size for b in gpu.bars if not b.io and b.index != ROM), default=0) for gpu in gpus]
    return min(sizes) // _MIB if min(sizes) > _WINDOW else None


def _text(value: bool | int | None) -> str:
    return "" if value is None else str(value).lower()
