"""Limits that stop a plugin or a runtime: inotify, open files, SELinux."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import Limits, Node, Unread

_tell = Teller(Group.LIMITS)
_DEFAULT_DESCRIPTORS = 1024
"""Linux's own soft limit (INR_OPEN_CUR)."""


def findings(node: Node) -> Iterator[Finding]:
    limits = node.limits
    if isinstance(limits, Unread):
        yield _tell.unseen("inotify", f"/proc: {limits.why}")
        return
    yield _inotify(node, limits)
    yield _descriptors(limits)
    yield _selinux(node, limits)


def _inotify(node: Node, limits: Limits) -> Finding:
    most, used = limits.inotify_instances, limits.inotify_used
    if most is None:
        return _tell.unseen("inotify", "/proc/sys/fs/inotify cannot be read")
    if used >= most:
        seen = f"this user has {used} inotify instances, and {most} are allowed: the kubelet and plugins get no more"
        return _tell.warn("inotify", seen, f"Run sysctl fs.inotify.max_user_instances={max(2 * most, 1024)}.")
    whose = "in this container" if node.in_container else "by this user"
    return _tell.passed("inotify", f"{used} of {most} instances used {whose}")


def _descriptors(limits: Limits) -> Finding:
    if limits.files is not None and limits.files[0] >= 0.9 * limits.files[1]:
        seen = f"{limits.files[0]} files are open on this machine, of {limits.files[1]} that may be"
        return _tell.warn("descriptors", seen, "Find who holds them (lsof), or raise the sysctl fs.file-max.")
    if limits.descriptors is not None and limits.descriptors < _DEFAULT_DESCRIPTORS:
        seen = (
            f"a process may open {limits.descriptors} files here, less than Linux's default of {_DEFAULT_DESCRIPTORS}"
        )
        return _tell.warn("descriptors", seen, "Raise the limit (ulimit -n, LimitNOFILE of the container runtime).")
    if limits.descriptors is None:
        return _tell.unseen("descriptors", "/proc/self/limits cannot be read")
    return _tell.passed("descriptors", f"{limits.descriptors} for each process")


def _selinux(node: Node, limits: Limits) -> Finding:
    if limits.selinux is None:
        return _tell.passed("selinux", "off, or not visible in this container" if node.in_container else "off")
    if not limits.selinux:
        return _tell.passed("selinux", "permissive")
    if ":container_t:" in limits.domain:
        seen = "enforcing, and this container's type container_t may not write to the kubelet's folder"
        return _tell.fail("selinux", seen, "Set securityContext.seLinuxOptions.type of the plugin's pod to spc_t.")
    return _tell.passed("selinux", "enforcing; the plugin's pod needs the type spc_t")
