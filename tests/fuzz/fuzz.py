"""Coverage-guided fuzzing of everything that reads foreign input: sysfs values, the config file, request messages.

    python tests/fuzz/fuzz.py TARGET [libFuzzer arguments] CORPUS...

Targets: sysfs, config, messages. A target fails on any exception that the code under it does not promise. Apart from
the tests because atheris takes over the process; `just fuzz` runs all targets for a while each.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sandbox_plugin"]):
    from grpclib import GRPCError

    from sandbox_plugin.api import v1, v1beta1
    from sandbox_plugin.config_file import parse_config
    from sandbox_plugin.host import read
    from sandbox_plugin.host.paths import HostPaths
    from sandbox_plugin.host.uevents import parse_uevent
    from sandbox_plugin.inventory.advance import advance
    from sandbox_plugin.inventory.naming import ModelNames
    from sandbox_plugin.inventory.state import Inventory, Signals
    from sandbox_plugin.kubelet.podresources import holdings
    from sandbox_plugin.kubelet.servicer import DevicePluginServicer
    from sandbox_plugin.kubelet.wellformed import MalformedMessage
    from sandbox_plugin.model import Device, HostFacts, IommuGroup, PciFunction, VfioDev
    from sandbox_plugin.registry import Registry
    from sandbox_plugin.settings import Consumer, Policy, Settings, UsageError

ADDRESS = "0000:01:00.0"
ATTRIBUTES = (
    "vendor",
    "device",
    "class",
    "subsystem_vendor",
    "subsystem_device",
    "revision",
    "numa_node",
    "current_link_speed",
    "current_link_width",
    "enable",
    "power_state",
    "resource",
    "sriov_numvfs",
    "aer_dev_fatal",
    "vfio-dev/vfio3/dev",
)
SENSIBLE = {"vendor": "0x10de", "device": "0x2330", "class": "0x030200", "vfio-dev/vfio3/dev": "511:3"}


def sysfs(folder: Path) -> Callable[[bytes], None]:
    """One attribute of a bound GPU says anything at all: the function is read, or is unreadable, and that is judged."""
    paths = HostPaths(folder)
    real = folder / "sys/devices/pci0000:00" / ADDRESS
    (real / "vfio-dev/vfio3").mkdir(parents=True)
    for link, target in {
        folder / "sys/bus/pci/devices" / ADDRESS: real,
        real / "driver": folder / "sys/bus/pci/drivers/vfio-pci",
        real / "iommu_group": folder / "sys/kernel/iommu_groups/59",
    }.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    names, settings = ModelNames(), Settings(gpu_alias="", nvswitch_alias="")

    def one(data: bytes) -> None:
        attribute = ATTRIBUTES[data[0] % len(ATTRIBUTES)] if data else "vendor"
        for name in ATTRIBUTES:
            (real / name).write_bytes(data[1:] if name == attribute else SENSIBLE.get(name, "0").encode())
        try:
            function = read.read_function(paths, ADDRESS)
        except read.FunctionUnreadable:
            return
        facts = HostFacts(functions={ADDRESS: function}, groups=read.read_groups(paths, {ADDRESS: function}))
        advance(Inventory(), facts, Signals(), 0.0, settings, names)

    return one


def config(_: Path) -> Callable[[bytes], None]:
    """Any text is a config or gets a one-line UsageError."""

    def one(data: bytes) -> None:
        try:
            parse_config(data.decode("utf-8", "replace"), "config file x", frozenset({"gpu-alias", "health-interval"}))
        except UsageError as error:
            if not str(error).startswith("config file x: "):
                raise

    return one


def messages(_: Path) -> Callable[[bytes], None]:
    """Any request gets an answer or a status. What cannot be parsed is grpclib's to refuse."""
    servicer = asyncio.run(_servicer())

    def one(data: bytes) -> None:
        kind, body = data[:1], data[1:]
        try:
            if kind < b"\x40":
                request = v1beta1.PreferredAllocationRequest().parse(body)
            elif kind < b"\x80":
                asked = v1beta1.AllocateRequest().parse(body)
            elif kind < b"\xc0":
                answer = v1.ListPodResourcesResponse().parse(body)
            else:
                parse_uevent(body)
                return
        except Exception:  # betterproto raises whatever it likes on what is no message
            return
        try:
            if kind < b"\x40":
                asyncio.run(servicer.get_preferred_allocation(request))
            elif kind < b"\x80":
                asyncio.run(servicer.allocate(asked))
            else:
                holdings(answer, 0.0)
        except (GRPCError, MalformedMessage):
            return

    return one


async def _servicer() -> DevicePluginServicer:
    gpus = {
        f"0000:{n:02x}:00.0": PciFunction(
            address=f"0000:{n:02x}:00.0",
            vendor=0x10DE,
            device=0x2330,
            class_code=0x030200,
            driver="vfio-pci",
            iommu_group=40 + n,
            vfio=VfioDev(number=n, cdev=f"511:{n}"),
            bridges=("pci0000:00",),
        )
        for n in range(8)
    }
    groups = {40 + n: IommuGroup(number=40 + n, members=(address,)) for n, address in enumerate(gpus)}
    registry = Registry(Settings(), ModelNames(), requires_cdi=False)
    registry.observe(HostFacts(functions=gpus, groups=groups))

    async def fine(devices: Sequence[Device]) -> Mapping[str, str]:
        return {}

    return DevicePluginServicer(
        resource="nvidia.com/pgpu",
        registry=registry,
        policy=Policy.PACKED,
        consumer=Consumer.KUBEVIRT,
        stream=nullcontext,
        why_not=fine,
    )


TARGETS = {"sysfs": sysfs, "config": config, "messages": messages}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [libFuzzer arguments] CORPUS...")
    target = TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(prefix="sandbox-fuzz-") as folder:
        atheris.Setup(sys.argv, target(Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
