"""Which VFIO nodes a host has now, whoever uses them and whether or not a rule takes what is behind them."""

from __future__ import annotations

from sandbox_plugin.model import HostFacts, node_of_cdev, node_of_group


def vfio_nodes(facts: HostFacts) -> frozenset[str] | None:
    """Paths such as /dev/vfio/devices/vfio3 and /dev/vfio/12; None: not known, as some function cannot be read.

    The node /dev/vfio/vfio, which is no device's, is not among them.
    """
    if facts.unreachable is not None:
        return None
    if facts.dev_nodes is not None:
        return facts.dev_nodes
    if facts.unreadable:
        return None
    cdevs = [f.vfio.number for f in facts.functions.values() if f.vfio is not None and f.vfio.cdev is not None]
    return frozenset({*map(node_of_cdev, cdevs), *map(node_of_group, facts.group_nodes)})
