"""Which VFIO nodes a host has."""

from __future__ import annotations

import pytest
from facts import gpu, host

from sandbox_plugin.inventory.nodes import vfio_nodes
from sandbox_plugin.model import HostFacts

A, B = "0000:01:00.0", "0000:02:00.0"
SILENT = {B: "no answer"}


@pytest.mark.parametrize(
    ("facts", "nodes"),
    [
        (host(gpu(A, vfio=3, group=53)), {"/dev/vfio/devices/vfio3", "/dev/vfio/53"}),
        (host(gpu(A, vfio=3, group=53, cdev=False)), {"/dev/vfio/53"}),
        (host(gpu(A, vfio=None)), set()),
        (host(gpu(A, vfio=3), dev_nodes=frozenset({"/dev/vfio/1"}), unreadable=SILENT), {"/dev/vfio/1"}),
        (host(gpu(A, vfio=3), unreadable=SILENT), None),
        (HostFacts(unreachable="no such folder"), None),
    ],
    ids=["cdev and group", "group", "not bound", "a live /dev", "a function does not answer", "no bus"],
)
def test_which_nodes_a_host_has_is_known_unless_something_does_not_answer(
    facts: HostFacts, nodes: set[str] | None
) -> None:
    assert vfio_nodes(facts) == nodes
