"""Coverage-guided fuzzing of what reads foreign input: sysfs, the config file, messages, kernel events, CDI specs,
HTTP.

    python tests/fuzz/fuzz.py TARGET [libFuzzer arguments] CORPUS...

Targets: sysfs, config, messages, uevent, cdi, http. A target fails on any exception that the code under it does not
promise. Apart from the tests because atheris takes over the process; `just fuzz` runs all targets for a while each.
FUZZ_PLANT=TARGET plants an exception, which must be found: it shows that a failure is seen at all.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import atheris
import structlog

with atheris.instrument_imports(include=["sandbox_plugin", "yaml"]):
    from grpclib import GRPCError

    from sandbox_plugin.api import v1, v1beta1
    from sandbox_plugin.cdi.lint import read_spec
    from sandbox_plugin.cdi.stale import read_stale
    from sandbox_plugin.config.file import parse_config
    from sandbox_plugin.config.settings import Consumer, Policy, Settings, UsageError
    from sandbox_plugin.host import bus, pci_function
    from sandbox_plugin.host.paths import HostPaths
    from sandbox_plugin.host.uevents import parse_uevent
    from sandbox_plugin.inventory.advance import advance
    from sandbox_plugin.inventory.rules import Rules
    from sandbox_plugin.inventory.state import Inventory, Signals
    from sandbox_plugin.kubelet.podresources import holdings
    from sandbox_plugin.kubelet.servicer import DevicePluginServicer
    from sandbox_plugin.model import Device, HostFacts, IommuGroup, Objection, PciFunction, VfioDev
    from sandbox_plugin.outputs.http import Answer, HttpServer
    from sandbox_plugin.registry import Registry
    from sandbox_plugin.rpc.codec import MalformedMessage, MessageCodec, RequestCodec

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
    "reset_method",
    "sriov_numvfs",
    "aer_dev_fatal",
    "vfio-dev/vfio3/dev",
    "aer_dev_nonfatal",
    "aer_dev_correctable",
    "max_link_speed",
    "max_link_width",
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
    rules = Rules(Settings(gpu_alias="", nvswitch_alias=""))

    def one(data: bytes) -> None:
        attribute = ATTRIBUTES[data[0] % len(ATTRIBUTES)] if data else "vendor"
        for name in ATTRIBUTES:
            (real / name).write_bytes(data[1:] if name == attribute else SENSIBLE.get(name, "0").encode())
        try:
            function = pci_function.read_function(paths, ADDRESS)
        except pci_function.FunctionUnreadable:
            return
        facts = HostFacts(functions={ADDRESS: function}, groups=bus.read_groups(paths, {ADDRESS: function}))
        advance(Inventory(), facts, Signals(), 0.0, rules)

    return one


def config(_: Path) -> Callable[[bytes], None]:
    """Any text is a config or gets a one-line UsageError."""

    def one(data: bytes) -> None:
        try:
            parse_config(data.decode("utf-8", "replace"), "config file x")
        except UsageError as error:
            if not str(error).startswith("config file x: "):
                raise

    return one


def messages(_: Path) -> Callable[[bytes], None]:
    """Any request gets an answer or a status, and any answer of PodResources is understood or refused."""
    servicer = asyncio.run(_servicer())
    requests, answers = RequestCodec(), MessageCodec()

    def one(data: bytes) -> None:
        kind, body = data[:1], data[1:]
        with suppress(GRPCError, MalformedMessage):
            if kind < b"\x55":
                asked = requests.decode(body, v1beta1.PreferredAllocationRequest)
                asyncio.run(servicer.get_preferred_allocation(asked))
            elif kind < b"\xaa":
                asyncio.run(servicer.allocate(requests.decode(body, v1beta1.AllocateRequest)))
            else:
                holdings(answers.decode(body, v1.ListPodResourcesResponse), 0.0, complete=True, driver="d")

    return one


def uevent(_: Path) -> Callable[[bytes], object]:
    """Any datagram is an event or none."""
    return parse_uevent


def cdi(_: Path) -> Callable[[bytes], object]:
    """Any file that others put into the CDI folder is a spec, or is said to be wrong; and it is ours or not."""
    return lambda data: (read_spec(data), read_stale("nvidia.com-pgpu.yaml", data, lambda _: True))


def http(_: Path) -> Callable[[bytes], None]:
    """Requests to the metrics' address. The bytes up to the first empty line are the head."""

    async def page(_: str) -> Answer:
        return Answer(b"")

    server = HttpServer(address=("", 0), pages={"/metrics": page})

    def one(data: bytes) -> None:
        with suppress(StopIteration):  # it waits for nothing, so it ends at once
            server._answer(data).send(None)
            raise AssertionError("it waits")

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
    registry = Registry(Rules(), requires_cdi=False)
    registry.observe(HostFacts(functions=gpus, groups=groups))

    async def fine(devices: Sequence[Device], functions: Mapping[str, PciFunction]) -> Mapping[str, Objection]:
        return {}

    return DevicePluginServicer(
        resource="nvidia.com/pgpu",
        registry=registry,
        policy=Policy.PACKED,
        consumer=Consumer.KUBEVIRT,
        stream=nullcontext,
        last_look=fine,
    )


TARGETS: dict[str, Callable[[Path], Callable[[bytes], object]]] = {
    "sysfs": sysfs,
    "config": config,
    "messages": messages,
    "uevent": uevent,
    "cdi": cdi,
    "http": http,
}


def planted(run: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """The same with a fault in it."""

    def one(data: bytes) -> None:
        run(data)
        if len(data) > 3:
            raise RuntimeError("a planted fault")

    return one


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [libFuzzer arguments] CORPUS...")
    name = sys.argv.pop(1)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # a line for each Allocate is no help here
    with tempfile.TemporaryDirectory(prefix="sandbox-fuzz-") as folder:
        run = TARGETS[name](Path(folder))
        atheris.Setup(sys.argv, planted(run) if os.environ.get("FUZZ_PLANT") == name else run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
