"""Which PCI function is offered as what: the resource rules, asked in order, first match wins.

The built-in rules are NVIDIA's GPUs and NVSwitches. Rules of the config file (`settings.ResourceRule`) come first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.inventory.naming import ModelNames, type_name
from sandbox_plugin.inventory.vgpu_types import NO_TYPES, TypeNames, type_of
from sandbox_plugin.model import NVIDIA, PciFunction
from sandbox_plugin.names import is_alias

_GPU_CLASSES = (0x030000, 0x030200)
"""VGA controller and 3D controller, programming interface 0 (PCI Code and ID Assignment Specification)."""
NVSWITCH_RULE = "NVIDIA NVSwitch"
"""Name of the built-in rule for switches."""
_NVSWITCH_CLASS = 0x068000
"""Other bridge: what an NVSwitch function says it is."""

NOTHING_TO_OFFER = "no GPU, NVSwitch or other device that a resource rule takes is bound to a vfio driver"


class Offer(NamedTuple):
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

    def offer(self, function: PciFunction, types: TypeNames = NO_TYPES) -> Offer | None:
        """What the first rule that matches says, or None: no rule matches this function. `types`: what types of vGPU
        are called, as far as it was seen."""
        type_seen = type_of(function, types)
        for rank, rule in enumerate(self.settings.resources):
            if _matches(rule, function, type_seen):
                return Offer(rank=rank, resource=rule.name, rule=rule.label)
        if function.vendor != NVIDIA:
            return None
        return self._built_in(function, type_seen, len(self.settings.resources))

    def _built_in(self, function: PciFunction, type_seen: str | None, rank: int) -> Offer | None:
        """What the built-in rules say of a function of NVIDIA's. The rank is that of GPUs; NVSwitches have the next.

        A part of a GPU is not a GPU: it never shares a resource with whole ones.
        """
        if function.mdev_type is not None or function.is_vendors_vgpu:
            return Offer(rank=rank, resource=f"nvidia.com/{self._type(function, type_seen)}", rule="NVIDIA vGPU")
        is_gpu = function.class_code in _GPU_CLASSES
        if not is_gpu and function.class_code != _NVSWITCH_CLASS:
            return None
        model = self._model(function)
        if not is_gpu:
            resource = f"nvidia.com/{self.settings.nvswitch_alias or model}"
            return Offer(rank=rank + 1, resource=resource, rule=NVSWITCH_RULE)
        if function.physical_function is not None:
            resource = f"nvidia.com/{type_name(f'{model}_VF')}"
            return Offer(rank=rank, resource=resource, rule="NVIDIA GPU, virtual function")
        return Offer(rank=rank, resource=f"nvidia.com/{self.settings.gpu_alias or model}", rule="NVIDIA GPU")

    def _model(self, function: PciFunction) -> str:
        return self.settings.model_names.get(function.model_id) or self.names.resource_name(*function.model_id)

    def _type(self, function: PciFunction, type_seen: str | None) -> str:
        """The last part of the resource name of a vGPU. One whose name was not seen is called by its number."""
        if type_seen is not None:
            return type_name(type_seen)
        number = function.vgpu_type or "0"
        given = self.settings.type_names.get((*function.model_id, int(number)))
        return given or type_name(f"{self._model(function)}_TYPE_{number}")

    def may_be_ours(self, resource: str) -> bool:
        """Whether a device can get this resource name: what PodResources tells of others is not ours.

        Types of vGPU are not known beforehand, so their names do not count, except those of the config file and the
        numbers of those without a name.
        """
        if resource in {rule.name for rule in self.settings.resources}:
            return True
        domain, _, name = resource.partition("/")
        if domain != "nvidia.com" or not name:
            return False
        aliases = {self.settings.gpu_alias, self.settings.nvswitch_alias}
        model = re.sub(r"_(VF|TYPE_[0-9]+)$", "", name)
        is_of_parts = (model != name and self._is_model_name(model)) or name in self.settings.type_names.values()
        return name in aliases or is_of_parts or ("" in aliases and self._is_model_name(name))

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


def _matches(rule: ResourceRule, function: PciFunction, type_seen: str | None) -> bool:
    """Whether every condition that the rule states holds.

    A mediated device is not a PCI function: its IDs and class are those of the function that carries it, and by them a
    rule for whole functions must not take it. Nor is it a virtual function, or a whole one.
    """
    of_functions = (rule.vendors, rule.devices, rule.classes, rule.subsystems, rule.physical_functions)
    if function.mdev_type is not None and (any(of_functions) or rule.virtual is not None):
        return False
    return (
        (rule.virtual is None or rule.virtual is (function.physical_function is not None))
        and _is_like(function.physical_function, rule.physical_functions)
        and _is_like(type_seen, rule.types)
        and (not rule.vendors or function.vendor in rule.vendors)
        and (not rule.devices or function.device in rule.devices)
        and (not rule.classes or any(f"{function.class_code:06x}".startswith(prefix) for prefix in rule.classes))
        and (not rule.subsystems or (function.subsystem_vendor, function.subsystem_device) in rule.subsystems)
        and _is_like(function.address, rule.addresses)
        and (not rule.drivers or function.driver in rule.drivers)
    )


def _is_like(word: str | None, patterns: Sequence[str]) -> bool:
    return not patterns or (word is not None and any(fnmatchcase(word, pattern) for pattern in patterns))
