"""Which PCI function is offered as what: the resource rules, asked in order, first match wins.

The built-in rules are NVIDIA's GPUs and NVSwitches. Rules of the config file (`settings.ResourceRule`) come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.inventory.naming import ModelNames, type_name
from sandbox_plugin.model import NVIDIA, PciFunction
from sandbox_plugin.names import is_alias

_GPU_CLASSES = (0x030000, 0x030200)
"""VGA controller and 3D controller, programming interface 0 (PCI Code and ID Assignment Specification)."""
_NVSWITCH_CLASS = 0x068000
"""Other bridge: what an NVSwitch function says it is."""


NOTHING_TO_OFFER = "no GPU, NVSwitch or other device that a resource rule takes is bound to a vfio driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A rule's answer for one function. Of two claims on one device the one with the lower rank wins."""

    rank: int
    resource: str | None
    """Full resource name, or None: the rule says not to offer this function."""
    rule: str
    """The rule's name, for people."""


def claim(function: PciFunction, settings: Settings, names: ModelNames) -> Claim | None:
    """The first rule that matches, or None: no rule matches this function."""
    for rank, rule in enumerate(settings.resources):
        if matches(rule, function):
            return Claim(rank=rank, resource=rule.name, rule=rule.label)
    builtin = len(settings.resources)
    if function.mdev_type is not None:
        if function.vendor != NVIDIA:
            return None
        return Claim(rank=builtin, resource=f"nvidia.com/{type_name(function.mdev_type)}", rule="NVIDIA vGPU")
    if function.vendor == NVIDIA and function.class_code in _GPU_CLASSES:
        if function.physical_function is not None:
            # A part of a GPU is not a GPU: it never shares a resource with whole ones.
            resource = f"nvidia.com/{type_name(_model_name(function, settings, names) + '_VF')}"
            return Claim(rank=builtin, resource=resource, rule="NVIDIA GPU, virtual function")
        return Claim(rank=builtin, resource=_nvidia(settings.gpu_alias, function, settings, names), rule="NVIDIA GPU")
    if function.vendor == NVIDIA and function.class_code == _NVSWITCH_CLASS:
        resource = _nvidia(settings.nvswitch_alias, function, settings, names)
        return Claim(rank=builtin + 1, resource=resource, rule="NVIDIA NVSwitch")
    return None


def may_be_ours(resource: str, settings: Settings, names: ModelNames) -> bool:
    """Whether these settings can give a device this resource name: what PodResources tells of others is not ours.

    Types of vGPU are not known beforehand, so their names do not count.
    """
    if resource in {rule.name for rule in settings.resources}:
        return True
    domain, _, name = resource.partition("/")
    if domain != "nvidia.com":
        return False
    model = name.removesuffix("_VF")
    if model != name and (model in settings.model_names.values() or names.is_resource_name(model)):
        return True
    aliases = {settings.gpu_alias, settings.nvswitch_alias}
    if name in aliases - {""}:
        return True
    return "" in aliases and (name in settings.model_names.values() or names.is_resource_name(name))


def was_perhaps_ours(resource: str, settings: Settings) -> bool:
    """Whether an earlier run of this plugin, with other aliases or rules, may have offered a resource of this name.

    NVIDIA's own device plugin has `gpu` and the names of MIG profiles in the same domain.
    """
    domain, _, name = resource.partition("/")
    domains = {"nvidia.com"} | {rule.name.partition("/")[0] for rule in settings.resources if rule.name is not None}
    return domain in domains and is_alias(name) and name != "gpu" and not name.startswith("mig-")


def matches(rule: ResourceRule, function: PciFunction) -> bool:
    """Whether every condition that the rule states holds.

    A mediated device is not a PCI function: its IDs and class are those of the function that carries it, and by them a
    rule for whole functions must not take it.
    """
    if function.mdev_type is not None and (rule.vendors or rule.devices or rule.classes or rule.subsystems):
        return False
    return (
        (not rule.vendors or function.vendor in rule.vendors)
        and (not rule.devices or function.device in rule.devices)
        and (not rule.classes or any(f"{function.class_code:06x}".startswith(prefix) for prefix in rule.classes))
        and (not rule.subsystems or (function.subsystem_vendor, function.subsystem_device) in rule.subsystems)
        and (not rule.addresses or any(fnmatchcase(function.address, pattern) for pattern in rule.addresses))
        and (not rule.drivers or function.driver in rule.drivers)
    )


def _nvidia(alias: str, function: PciFunction, settings: Settings, names: ModelNames) -> str:
    return f"nvidia.com/{alias or _model_name(function, settings, names)}"


def _model_name(function: PciFunction, settings: Settings, names: ModelNames) -> str:
    given = settings.model_names.get(function.model_id)
    return names.resource_name(function.vendor, function.device) if given is None else given
