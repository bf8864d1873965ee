"""Topology on the wire: the running daemon, asked by grpcio, gives the sets that docs/topology.md shows."""

from __future__ import annotations

import pytest
from conftest import MakeNode, StartDaemon
from kubelet import GrpcKubelet, Listed
from names import PGPU

from examples import Example, examples
from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import FunctionSpec

PRESETS = sorted({example.preset for example in examples()})


@pytest.mark.parametrize("policy", ["packed", "spread"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_daemon_prefers_what_the_doc_shows(
    preset: str, policy: str, fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(fake_node(preset), f"--allocation-policy={policy}")
    every = kubelet.wait_for(lambda: kubelet.healthy(PGPU))
    rows: list[Example] = [example for example in examples() if example.preset == preset]
    assert rows
    for row in rows:
        available = sorted(row.available or every, reverse=True)
        answer = kubelet.plugin(PGPU).prefer(available, row.size, row.must_include)
        assert tuple(answer) == row.answers[policy], str(row)


def test_a_gpu_that_is_found_on_another_numa_node_is_preferred_with_those_there(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = fake_node("hgx-h100")
    daemon(node, "--health-interval=0.2")
    every = sorted(kubelet.wait_for(lambda: kubelet.healthy(PGPU)))
    assert kubelet.plugin(PGPU).prefer(every, 4) == ["4", "5", "6", "7"]
    node.set_attribute("0000:1b:00.0", "numa_node", "1")
    node.set_attribute("0000:9d:00.0", "numa_node", "0")
    kubelet.wait_for(lambda: (kubelet.devices(PGPU)["4"].numa, kubelet.devices(PGPU)["8"].numa) == ((1,), (0,)))
    assert kubelet.plugin(PGPU).prefer(every, 4) == ["4", "9", "10", "11"]
    assert kubelet.plugin(PGPU).prefer(every, 4, ["5"]) == ["5", "6", "7", "8"]


def test_a_group_whose_gpus_are_on_two_numa_nodes_is_listed_with_both(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    """On a kernel without cdevs, where a group is one device."""
    node = fake_node("workstation")
    first, second = "0000:02:00.0", "0000:02:01.0"
    group = node.function(first).iommu_group
    node.add(FunctionSpec(address=second, model=models.T4, parent="0000:00:1b.0", iommu_group=group))
    node.bind(second)
    node.set_attribute(first, "numa_node", "1")
    node.set_attribute(second, "numa_node", "0")
    daemon(node)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    assert kubelet.devices(PGPU)[str(group)] == Listed(id=str(group), health="Healthy", numa=(0, 1))
