"""Which PCI function is offered as what: the resource rules, asked in order, first match wins.

The built-in rules are NVIDIA's GPUs and NVSwitches. Rules of the config file (`settings.ResourceRule`) come first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.inventory.naming import ModelNames, type_name
from sandbox_plugin.model import NVIDIA, PciFunction
from sandbox_plugin.names import is_alias

_GPU_CLASSES = (0x030000, 0x030200)
"""VGA controller and 3D controller, programming interface 0 (PCI Code and ID Assignment Specification)."""
NVSWITCH_RULE = "NVIDIA NVSwitch"
"""Name of the built-in rule for switches."""
_NVSWITCH_CLASS = 0x068000
"""Other bridge: what an NVSwitch function says it is."""

NOTHING_TO_OFFER = "no GPU, NVSwitch or other device that a resource rule takes is bound to a vfio driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a rule says of one function. Of two offers for one device the one with the lower rank wins."""

    rank: int
    resource: str | None
    """Full resource name, or None: the rule says not to offer this function."""
    rule: str
    """The rule's name, for people."""


@dataclass(frozen=True)
class Rules:
    """What these settings offer, and under which names."""

    settings: Settings = field(default_factory=Settings)
    names: ModelNames = field(default_factory=ModelNames)

    def offer(self, function: PciFunction) -> Offer | None:
        """What the first rule that matches says, or None: no rule matches this function."""
        for rank, rule in enumerate(self.settings.resources):
            if _matches(rule, function):
                return Offer(rank=rank, resource=rule.name, rule=rule.label)
        return self._built_in(function, len(self.settings.resources)) if function.vendor == NVIDIA else None

    def _built_in(self, function: PciFunction, rank: int) -> Offer | None:
        """What the built-in rules say of a function of NVIDIA's. The rank is that of GPUs; NVSwitches have the next.

        A part of a GPU is not a GPU: it never shares a resource with whole ones.
        """
        if function.mdev_type is not None:
            return Offer(rank=rank, resource=f"nvidia.com/{type_name(function.mdev_type)}", rule="NVIDIA vGPU")
        is_gpu = function.class_code in _GPU_CLASSES
        if not is_gpu and function.class_code != _NVSWITCH_CLASS:
            return None
        model = self.settings.model_names.get(function.model_id) or self.names.resource_name(*function.model_id)
        if not is_gpu:
            resource = f"nvidia.com/{self.settings.nvswitch_alias or model}"
            return Offer(rank=rank + 1, resource=resource, rule=NVSWITCH_RULE)
        if function.physical_function is not None:
            resource = f"nvidia.com/{type_name(f'{model}_VF')}"
            return Offer(rank=rank, resource=resource, rule="NVIDIA GPU, virtual function")
        return Offer(rank=rank, resource=f"nvidia.com/{self.settings.gpu_alias or model}", rule="NVIDIA GPU")

    def may_be_ours(self, resource: str) -> bool:
        """Whether a device can get this resource name: what PodResources tells of others is not ours.

        Types of vGPU are not known beforehand, so their names do not count.
        """
        if resource in {rule.name for rule in self.settings.resources}:
            return True
        domain, _, name = resource.partition("/")
        if domain != "nvidia.com" or not name:
            return False
        aliases = {self.settings.gpu_alias, self.settings.nvswitch_alias}
        model = name.removesuffix("_VF")
        is_of_virtual_functions = model != name and self._is_model_name(model)
        return name in aliases or is_of_virtual_functions or ("" in aliases and self._is_model_name(name))

    def was_perhaps_ours(self, resource: str) -> bool:
        """Whether an earlier run of this plugin, with other aliases or rules, may have offered a resource of this name.

        NVIDIA's own device plugin has `gpu` and the names of MIG profiles in the same domain.
        """
        domain, _, name = resource.partition("/")
        rules = self.settings.resources
        domains = {"nvidia.com"} | {rule.name.partition("/")[0] for rule in rules if rule.name is not None}
        return domain in domains and is_alias(name) and name != "gpu" and not name.startswith("mig-")

    def _is_model_name(self, name: str) -> bool:
        return name in self.settings.model_names.values() or self.names.is_resource_name(name)


def _matches(rule: ResourceRule, function: PciFunction) -> bool:
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
