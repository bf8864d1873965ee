"""Whether this process is in the host's own namespaces, or in a container's."""

from __future__ import annotations

import os

from sandbox_plugin.host.paths import HostPaths

_OF_THE_HOST = {"pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB}
"""Inode numbers, the same on every kernel: PROC_PID_INIT_INO and PROC_CGROUP_INIT_INO of include/linux/proc_ns.h."""


def is_the_hosts(paths: HostPaths, kind: str) -> bool | None:
    """Whether the namespace of this kind, `pid` or `cgroup`, is the host's own; None where that cannot be seen."""
    try:
        return os.readlink(paths.root / "proc/self/ns" / kind) == f"{kind}:[{_OF_THE_HOST[kind]}]"
    except OSError:
        return None
