"""What types of vGPU are called that a vendor's driver sets on virtual functions.

A function shows the number of its type alone. Names are in the lists of what still fits, and those shrink as the card
fills. Numbers are a card's own: another card may mean another type by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sandbox_plugin.model import HostFacts, PciFunction

_Type = tuple[str, int, int, str]
"""Address of the physical function, its model (a card may be replaced by another), and the number of the type."""
TypeNames = Mapping[_Type, str]
"""Names of types that were seen since the daemon started, as the driver writes them."""
NO_TYPES: TypeNames = MappingProxyType({})


def learn_types(facts: HostFacts, known: TypeNames) -> TypeNames:
    """What is known after this scan; the same object if that is no more than before."""
    seen = {
        _key(function, number): name for function in facts.functions.values() for number, name in function.vgpu_types
    }
    return known if all(known.get(key) == name for key, name in seen.items()) else {**known, **seen}


def type_of(function: PciFunction, names: TypeNames) -> str | None:
    """The name of the type of a mediated device or vGPU; None for others, and where it was not seen."""
    if function.mdev_type is not None or function.vgpu_type is None:
        return function.mdev_type
    return names.get(_key(function, function.vgpu_type))


def _key(function: PciFunction, number: str) -> _Type:
    return (function.physical_function or function.address, *function.model_id, number)
