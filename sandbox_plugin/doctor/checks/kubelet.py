"""The kubelet: its folder, its two sockets, and who else serves devices to it."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import KubeletFolder, Node, Peer, PodResources, Unread

_tell = Teller(Group.KUBELET)
_START = "Start the kubelet: systemctl status kubelet."


def findings(node: Node) -> Iterator[Finding]:
    folder, pods = node.kubelet, node.pod_resources
    if isinstance(folder, Unread):
        seen = f"{node.settings.kubelet_dir}: {folder.why}"
        yield _tell.fail("folder", seen, "Free or unmount what is mounted there, and restart the kubelet.")
    elif not folder.exists and node.is_fake and node.shown(folder.path) != folder.path:
        yield _tell.unseen("folder", "this fake node has no kubelet")
        return
    elif not folder.exists:
        action = "Mount it into the pod, or give its place by --kubelet-dir." if node.in_container else _START
        yield _tell.fail("folder", f"there is no folder {folder.path}", action)
        return
    else:
        yield from _folder(folder)
        yield _plugins(folder)
    yield from _pod_resources(node, pods)


def _folder(folder: KubeletFolder) -> Iterator[Finding]:
    if folder.writable:
        yield _tell.passed("folder", str(folder.path))
    else:
        seen = f"{folder.path} cannot be written by this user"
        yield _tell.warn(
            "folder", seen, "Run the plugin as uid 0 with this folder mounted to write; run doctor as root."
        )
    match folder.registration:
        case Peer.ALIVE:
            yield _tell.passed("registration", "the kubelet listens at kubelet.sock")
        case Peer.MISSING:
            yield _tell.fail("registration", f"there is no socket {folder.path}/kubelet.sock", _START)
        case Peer.DEAD:
            yield _tell.fail("registration", f"nobody listens at {folder.path}/kubelet.sock", _START)
        case Peer.FORBIDDEN:
            yield _tell.unseen("registration", "only root may connect to kubelet.sock")


def _plugins(folder: KubeletFolder) -> Finding:
    served = ", ".join(folder.plugins)
    is_ours = folder.lock_holder is not None
    others = [name for name in folder.plugins if name.startswith("kubevirt-")]
    if others:
        seen = f"KubeVirt's GPU plugin serves here too ({', '.join(others)}): both give away the same GPUs"
        return _tell.fail("plugins", seen, "Remove one of the two DaemonSets from this node.")
    if served and not is_ours and folder.locks_are_seen:
        seen = f"another plugin than this one serves {served}"
        return _tell.warn(
            "plugins", seen, "Remove NVIDIA's sandbox device plugin from this node before this one starts."
        )
    if is_ours:
        who = f" (process {folder.lock_holder})" if folder.lock_holder else ""
        return _tell.passed("plugins", f"one plugin has the lock{who}")
    if served:
        return _tell.unseen("plugins", f"{served} is served, by whom cannot be seen from here")
    return _tell.passed("plugins", "none runs")


def _pod_resources(node: Node, pods: PodResources) -> Iterator[Finding]:
    kata = node.settings.consumer.reads_cdi
    if pods.trouble is not None:
        action = "Mount its folder into the pod." if node.in_container else f"{_START} It makes this socket itself."
        seen = f"{pods.path}: {pods.trouble}"
        if kata:
            yield _tell.fail("pod-resources", f"{seen}: Kata asks it which GPUs a pod has", action)
        elif node.settings.dra:
            yield _tell.fail("pod-resources", f"{seen}: without it no claim is prepared", action)
        else:
            yield _tell.warn("pod-resources", seen, action)
        return
    yield _tell.passed("pod-resources", "List answers")
    if not kata:
        return
    if pods.has_get is None:
        yield _tell.unseen("pod-resources-get", f"the kubelet did not answer: {pods.get_said}")
    elif pods.has_get:
        yield _tell.passed("pod-resources-get", "Get answers: Kubernetes 1.34 or later, or its feature gate")
    else:
        seen = f"the kubelet has no Get ({pods.get_said}), which Kata needs for every GPU"
        action = "Update the kubelet to 1.34, or start it with --feature-gates=KubeletPodResourcesGet=true."
        yield _tell.fail("pod-resources-get", seen, action)
