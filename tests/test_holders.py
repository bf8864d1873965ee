"""Who holds what, over restarts, takeovers and changed names, with the real process.

The rules themselves, and many more ways to break them, are in test_one_holder.py.
"""

from __future__ import annotations

from conftest import MakeNode, Serve, StartDaemon
from daemon import Places
from grpc import StatusCode
from kubelet import GrpcKubelet, refusal
from names import GEFORCE, PGPU, T4
from pods import PodResources
from trials import QUICK, pairs

HOUR = 3600.0
OTHER = "nvidia.com/other"


def test_a_node_that_a_pod_holds_under_the_old_alias_is_not_given_under_the_new_one(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    pods.start(age=HOUR)
    node, old, _ = serve("workstation", QUICK)
    held, free = (str(node.function(address).iommu_group) for address in (GEFORCE, T4))
    kubelet.plugin(PGPU).allocate([held])
    pods.hold("vm", PGPU, held)
    old.terminate()
    new = daemon(node, QUICK, "--gpu-alias=other")
    kubelet.wait_for(lambda: kubelet.healthy(OTHER) == {free} and kubelet.unhealthy(OTHER) == {held})
    assert "held-as-another" in refusal(lambda: kubelet.plugin(OTHER).allocate([held])).message
    pods.release("vm")
    new.wait_for("device changed", device=held, health="Healthy", timeout=30)


def test_a_plugin_that_takes_over_knows_what_the_other_one_gave(
    serve: Serve, fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    pods.start(age=HOUR)
    node, old, _ = serve(pairs(fake_node, 1), QUICK)
    new = daemon(node, QUICK)
    new.wait_for("standing by")
    pods.wait_until_asked()
    kubelet.plugin(PGPU).allocate(["0"])
    pods.hold("vm", PGPU, "0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"1"})
    since = len(kubelet.history(PGPU))
    old.terminate()
    new.wait_for("registered", resource=PGPU)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"0"} and kubelet.unhealthy(PGPU) == {"1"})
    assert all("1" not in seen.healthy for seen in kubelet.history(PGPU)[since:]), "not for a moment"
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate(["1"]))
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "pod default/vm" in refused.message


def test_a_gpu_that_a_vm_still_has_is_refused_and_unhealthy_until_that_lets_go(
    serve: Serve, kubelet: GrpcKubelet
) -> None:
    node, plugin, _ = serve("workstation", QUICK)
    t4 = str(node.function(T4).iommu_group)
    kubelet.plugin(PGPU).allocate([t4])
    node.set_enable(T4, 1)
    refused = refusal(lambda: kubelet.plugin(PGPU).allocate([t4]))  # the kubelet says that the pod has ended
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert "in use" in refused.message
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {t4})
    plugin.wait_for("device changed", device=t4, reason="in-use-elsewhere: ")
    node.set_enable(T4, 0)
    kubelet.wait_for(lambda: t4 in kubelet.healthy(PGPU))


def test_two_resources_of_one_group_are_two_pods_for_all_that_allocate_tells(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = pairs(fake_node, 1)
    config = places.top / "config.toml"
    config.write_text('[[resources]]\nname = "nvidia.com/second"\naddress = "0000:42:01.0"\n')
    daemon(node, QUICK, f"--config={config}")
    second = "nvidia.com/second"
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"0"} and kubelet.healthy(second) == {"1"})
    kubelet.plugin(PGPU).allocate(["0"])
    assert "group-taken" in refusal(lambda: kubelet.plugin(second).allocate(["1"])).message
