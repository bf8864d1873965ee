"""Everything that is looked at, and what follows from it. Nothing here waits for what hangs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from grpclib import GRPCError, Status

from sandbox_plugin.api import v1
from sandbox_plugin.cdi.foreign import cdi_folders, read_specs
from sandbox_plugin.config.settings import OPTIONS, Settings
from sandbox_plugin.doctor import reading
from sandbox_plugin.doctor.checks import findings_of
from sandbox_plugin.doctor.findings import Finding
from sandbox_plugin.doctor.kata import read_kata
from sandbox_plugin.doctor.node import CdiFolder, Maybe, Node, PodResources, Unread
from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.inventory.advance import advance
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.kubelet.podresources import list_pods
from sandbox_plugin.model import HostFacts
from sandbox_plugin.rpc.client import NoAnswerError, call

_PATIENCE = 2.0
"""Seconds for each part: one on a dead mount never answers."""
_NOBODY = v1.GetPodResourcesRequest(pod_name="sandbox-plugin-doctor-asks", pod_namespace="default")
"""Asks for a pod that there is not."""
_DISABLED = "Get method disabled"
"""In what the kubelet answers without its feature gate (v1PodResourcesServer.Get in pkg/kubelet/apis/podresources)."""
_ON_HOST = ("kubelet_dir", "pod_resources_socket", "cdi_dir")
"""Settings whose defaults are paths of the host."""

_T = TypeVar("_T")


async def examine(settings: Settings, rules: Rules) -> list[Finding]:
    """All findings, in the order from the firmware to the pod."""
    return findings_of(await read_node(settings, rules))


async def read_node(settings: Settings, rules: Rules) -> Node:
    """All that is looked at."""
    settings = below_its_root(settings)
    paths = HostPaths(settings.host_root)
    host = await _scan(paths)
    inventory, _ = advance(Inventory(), host, Signals(), time.monotonic(), rules)
    ours = [f.address for f in host.functions.values() if rules.offer(f) is not None and f.mdev_type is None]
    async with asyncio.TaskGroup() as group:
        in_container = group.create_task(_patiently(partial(reading.is_in_container, paths)))
        kernel = group.create_task(_patiently(partial(reading.read_kernel, paths)))
        displays = group.create_task(_patiently(partial(reading.read_displays, paths, ours)))
        kubelet = group.create_task(_patiently(partial(reading.read_kubelet_folder, settings.kubelet_dir, paths)))
        pod_resources = group.create_task(_ask_pod_resources(settings.pod_resources_socket))
        cdi = [
            group.create_task(_patiently(partial(_read_cdi, folder, settings.host_root)))
            for folder in await cdi_folders(settings)
        ]
        kata = group.create_task(_patiently(partial(read_kata, settings.host_root)))
        limits = group.create_task(_patiently(partial(reading.read_limits, paths)))
    return Node(
        settings=settings,
        rules=rules,
        host=host,
        inventory=inventory,
        is_fake=settings.host_root != Path("/"),
        in_container=in_container.result() is True,
        kernel=kernel.result(),
        displays=displays.result(),
        kubelet=kubelet.result(),
        pod_resources=pod_resources.result(),
        cdi=tuple(task.result() for task in cdi),
        kata=kata.result(),
        limits=limits.result(),
    )


def below_its_root(settings: Settings) -> Settings:
    """On a fake host, paths that nobody has given are below its root as well."""
    if settings.host_root == Path("/"):
        return settings
    defaults = {option.name: option.default for option in OPTIONS if option.name in _ON_HOST}
    untouched = {name: path for name, path in defaults.items() if getattr(settings, name) == path}
    return replace(settings, **{name: settings.host_root / path.relative_to("/") for name, path in untouched.items()})


async def _scan(paths: HostPaths) -> HostFacts:
    try:
        return await HostScanner(paths, on_late=lambda: None).scan()
    except sysfs.OutOfResources as error:
        return HostFacts(unreachable=str(error))


async def _patiently(work: Callable[[], _T]) -> Maybe[_T]:
    """What it returns; or why it did not."""
    try:
        async with asyncio.timeout(_PATIENCE):
            return await on_thread(work)()
    except TimeoutError:
        return Unread(f"no answer within {_PATIENCE:g} s")
    except (OSError, sysfs.OutOfResources) as error:
        return Unread(str(error))


def _read_cdi(folder: Path, root: Path) -> CdiFolder:
    """Raises OSError."""
    readings = {file: known.says for file, known in read_specs(folder, {}).items()}
    nodes = {node for reading in readings.values() for paths in reading.devices.values() for node in paths}
    return CdiFolder(
        path=folder,
        exists=folder.is_dir(),
        writable=os.access(folder, os.W_OK),
        readings=readings,
        missing=frozenset(node for node in nodes if not os.path.lexists(root / node.lstrip("/"))),
    )


async def _ask_pod_resources(socket: Path) -> PodResources:
    """Whether List and Get answer. Get is asked for a pod that there is not."""
    try:
        async with asyncio.timeout(_PATIENCE):
            await list_pods(socket)
    except FileNotFoundError:
        return PodResources(path=socket, trouble="there is no such socket")
    except TimeoutError:
        return PodResources(path=socket, trouble=f"no answer within {_PATIENCE:g} s")
    except GRPCError as error:
        return PodResources(path=socket, trouble=f"{error.status.name}: {error.message}")
    except (PermissionError, NoAnswerError) as error:
        return PodResources(path=socket, trouble=getattr(error, "strerror", None) or str(error))
    try:
        async with asyncio.timeout(_PATIENCE):
            await call(socket, lambda channel: v1.PodResourcesListerStub(channel).get(_NOBODY))
    except GRPCError as error:
        said = f"{error.status.name}: {error.message}"
        has_get = error.status is not Status.UNIMPLEMENTED and _DISABLED not in (error.message or "")
        return PodResources(path=socket, has_get=has_get, get_said=said)
    except (OSError, TimeoutError, NoAnswerError) as error:
        return PodResources(path=socket, get_said=str(error) or f"no answer within {_PATIENCE:g} s")
    return PodResources(path=socket, has_get=True)
