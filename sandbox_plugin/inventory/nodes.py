"""Which VFIO nodes a host has now, whoever uses them and whether or not a rule takes what is behind them."""

from __future__ import annotations

from sandbox_plugin.model import HostFacts, group_of_node, node_of_cdev, node_of_group


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


def is_in_dev(node: str, facts: HostFacts) -> bool:
    """Whether the host's /dev has it, as far as that can be seen."""
    return facts.dev_nodes is None or node in facts.dev_nodes


def node_exists(node: str, facts: HostFacts) -> bool:
    """Whether sysfs shows the node, of whatever device, and the host's /dev has it.

    Of a function that could be read its own `vfio-dev` folder shows the cdev: for that `is_in_dev` is enough.
    """
    group = group_of_node(node)
    is_shown = node.rpartition("/")[2] in facts.vfio_devs if group is None else group in facts.group_nodes
    return is_shown and is_in_dev(node, facts)
