"""All that vfio can pass: Grace's GPUs, vGPUs, virtual functions, and what resource rules take of other vendors.

Tables are asked of the inventory, which is pure; the real process, with a kubelet played by grpcio, serves the rest.
Cases of single conditions and of files that are wrong are in test_devices.py and test_config_file.py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from conftest import StartDaemon
from daemon import Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from mediated import Mediated
from names import AUDIO, GEFORCE, PGPU, T4
from outputs import assert_allocates, cdi_of, read_cdi
from trials import QUICK, wait_until

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.file import parse_config
from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import At, FunctionSpec, Kernel, Model, Preset, RootBus
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import GROUPS_ONLY, PRESETS, WITH_CDEVS
from sandbox_plugin.fake.tree import create_link
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import NVIDIA, HostFacts, PciFunction

A, B, C = (f"0000:0{bus}:00.0" for bus in (1, 2, 3))
NAMES = ModelNames.load()
GRACE = "nvgrace_gpu_vfio_pci"
KERNELS = pytest.mark.parametrize("kernel", [WITH_CDEVS, GROUPS_ONLY], ids=["cdevs", "groups"])


def find(facts: HostFacts, config: str = "") -> Found:
    """What a daemon with this config file makes of a host."""
    said = parse_config(config, "config file x")
    given = {name: each.value for name, each in said.settings.items()}
    names = {model: each.value for model, each in said.model_names.items()}
    settings = Settings(**given, resources=said.resources, model_names=names)
    return find_devices(facts, Rules(settings, NAMES))


def offered(found: Found) -> dict[str, list[str]]:
    """Resource -> addresses of the functions that make its devices."""
    resources: dict[str, list[str]] = {}
    for device in found.devices:
        resources.setdefault(device.resource, []).extend(p.address for p in device.placements)
    return resources


def on_disk(places: Places, *, text: str) -> str:
    """The flag for a config file with this text."""
    path = places.top / "plugin.toml"
    path.write_text(text)
    return f"--config={path}"


def made(places: Places, preset: Preset) -> FakeNode:
    return FakeNode.create(places.top / "node", preset)


def nodes_of(node: FakeNode, *addresses: str) -> dict[str, str]:
    """Device ID -> path of the VFIO node, as these functions have them now."""
    found = {}
    for address in addresses:
        function = node.function(address)
        assert function.vfio is not None
        if node.kernel.cdevs:
            found[str(function.vfio.number)] = f"/dev/vfio/devices/vfio{function.vfio.number}"
        else:
            found[str(function.iommu_group)] = f"/dev/vfio/{function.iommu_group}"
    return found


def wait_for_specs(places: Places, wanted: Mapping[str, str]) -> None:
    """Until the CDI specs hold just these nodes; a look that falls into the middle of a change says nothing."""

    def are_there() -> bool:
        with suppress(AssertionError, FileNotFoundError):
            return read_cdi(places.cdi) == wanted
        return False

    wait_until(are_there, f"the specs should hold {wanted}")


def assert_serves(kubelet: GrpcKubelet, places: Places, resources: Mapping[str, Mapping[str, str]]) -> None:
    """The kubelet sees these devices Healthy and no others; each Allocate and all CDI specs hold just their nodes."""
    wanted = {resource: set(nodes) for resource, nodes in resources.items()}
    kubelet.wait_for(lambda: {r: kubelet.healthy(r) for r in kubelet.resources()} == wanted)
    specs: dict[str, str] = {}
    for resource, nodes in resources.items():
        assert kubelet.unhealthy(resource) == set()
        assert_allocates(kubelet.plugin(resource), [[device_id] for device_id in nodes], nodes)
        specs |= cdi_of(resource, nodes)
    wait_for_specs(places, specs)


# What is offered of a host

NewFunction = Callable[..., PciFunction]
"""`gpu`, on a kernel with cdevs or without."""
VGPU, T4_1Q = str(uuid.UUID(int=1)), "nvidia.com/GRID_T4-1Q"
EXCLUDE_B = f'[[resources]]\nexclude = true\naddress = "{B}"\n'
NIC_RULE = '[[resources]]\nname = "intel.com/nic"\nvendor = "8086"\nclass = "02"\n'
GRACE_RULE = f'[[resources]]\nname = "nvidia.com/grace"\ndriver = "{GRACE}"\nclass = "0302"\n'


def a_vgpu(new: NewFunction) -> list[PciFunction]:
    return [new(A, vfio=1), new(VGPU, group=60, driver="nvidia-vgpu-vfio", mdev_type="GRID T4-1Q")]


def a_grace_beside_another(new: NewFunction) -> list[PciFunction]:
    memory = new(A[:-1] + "1", vfio=2, driver=GRACE, device=0x22B8, class_code=0x050200)
    return [new(A, vfio=1, driver=GRACE), memory, new(B, vfio=3, group=51)]


def a_nic_with_a_part(new: NewFunction) -> list[PciFunction]:
    """Its virtual function has a group of its own."""
    nic: dict[str, Any] = {"vendor": 0x8086, "class_code": 0x020000}
    part = new(B, vfio=2, group=62, physical_function=A, **nic)
    return [new(A, vfio=1, virtual_functions=1, **nic), part]


def a_virtual_function_with_its_carrier(new: NewFunction) -> list[PciFunction]:
    return [new(A, vfio=1, virtual_functions=1), new(B, vfio=2, physical_function=A)]


def gpus(new: NewFunction) -> list[PciFunction]:
    """Two in one group, the third in another."""
    return [new(A, vfio=1), new(B, vfio=2), new(C, vfio=3, group=51)]


def with_a_bridge(new: NewFunction) -> list[PciFunction]:
    return [new(A), new(B, vfio=None, driver="pcieport", class_code=0x060400)]


def vgpu_rule(what: str) -> str:
    return f'[[resources]]\n{what}\ndriver = "nvidia-vgpu-vfio"\n'


EXCLUDED = "excluded by resources[0]"
HAS_PART = "has 1 SR-IOV virtual functions enabled"
BOTH, CDEVS, GROUPS = (True, False), (True,), (False,)


@pytest.mark.parametrize(
    ("make", "kernels", "config", "takes", "unoffered"),
    [
        (lambda new: [new(A, driver="nvidia")], CDEVS, "", {PGPU: [A]}, {}),  # it has a vfio device
        (lambda new: [new(A, vfio=None, driver=GRACE)], GROUPS, "", {PGPU: [A]}, {}),  # before there was such
        (a_grace_beside_another, BOTH, GRACE_RULE, {"nvidia.com/grace": [A], PGPU: [B]}, {}),
        (a_vgpu, BOTH, vgpu_rule('name = "nvidia.com/desk"'), {PGPU: [A], "nvidia.com/desk": [VGPU]}, {}),
        (a_vgpu, BOTH, vgpu_rule("exclude = true"), {PGPU: [A]}, {VGPU: EXCLUDED}),
        (a_vgpu, BOTH, NIC_RULE.replace("8086", "10de").replace("02", "03"), {"intel.com/nic": [A], T4_1Q: [VGPU]}, {}),
        (a_nic_with_a_part, BOTH, NIC_RULE, {"intel.com/nic": [B]}, {A: f"{HAS_PART}; only those can be offered"}),
        (
            a_virtual_function_with_its_carrier,
            GROUPS,
            "",
            {},
            {A: f"{HAS_PART}; only those can be offered", B: f"shares IOMMU group 50 with {A}, which {HAS_PART}"},
        ),
        (
            gpus,
            GROUPS,
            EXCLUDE_B,
            {PGPU: [C]},
            {A: f"shares IOMMU group 50 with {B}, which resources[0] excludes", B: EXCLUDED},
        ),
        (with_a_bridge, BOTH, EXCLUDE_B, {PGPU: [A]}, {B: EXCLUDED}),
    ],
)
def test_each_function_is_offered_under_one_name_or_it_is_said_why_not(
    make: Callable[[NewFunction], Sequence[PciFunction]],
    kernels: Sequence[bool],
    config: str,
    takes: dict[str, list[str]],
    unoffered: dict[str, str],
) -> None:
    for cdev in kernels:
        found = find(host(*make(partial(gpu, cdev=cdev))), config)
        assert (offered(found), found.unoffered) == (takes, unoffered)


# vGPUs: mediated devices


def workstation(places: Places, kernel: Kernel) -> FakeNode:
    return made(places, replace(PRESETS["workstation"], kernel=replace(kernel, first_group=10)))


@KERNELS
def test_vgpus_come_and_go_while_the_daemon_runs_each_type_as_a_resource(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, kernel: Kernel
) -> None:
    node = workstation(places, kernel)
    node.bind(T4, "nvidia")
    whole = {PGPU: nodes_of(node, GEFORCE)}
    running = daemon(node, QUICK)
    assert_serves(kubelet, places, whole)

    vgpus = Mediated(node, T4)
    first, second = (vgpus.add(n, "nvidia-222", "GRID T4-1Q", 70 + n) for n in (1, 2))
    other = vgpus.add(3, "nvidia-230", "GRID T4-2Q", 73)
    running.wait_for("not offered", pci_address=T4, reason="carries mediated devices (vGPUs): do not bind it")
    small, large = "nvidia.com/GRID_T4-1Q", "nvidia.com/GRID_T4-2Q"
    kept = {large: vgpus.node_of(other)} | whole
    assert_serves(kubelet, places, {small: vgpus.node_of(first) | vgpus.node_of(second)} | kept)

    gone = vgpus.node_of(first)
    vgpus.remove(first)
    kubelet.wait_for(lambda: kubelet.unhealthy(small) == set(gone))
    assert kubelet.healthy(small) == set(vgpus.node_of(second))
    running.wait_for("device changed", resource=small, reason=f"gone: {first} is not there any more")
    without = cdi_of(small, vgpus.node_of(second)) | cdi_of(large, kept[large]) | cdi_of(PGPU, whole[PGPU])
    wait_for_specs(places, without)

    again = vgpus.add(4, "nvidia-222", "GRID T4-1Q", 71)
    assert_serves(kubelet, places, {small: vgpus.node_of(again) | vgpus.node_of(second)} | kept)


# SR-IOV


def carry(node: FakeNode, carrier: str, *addresses: str) -> None:
    """The kernel makes virtual functions: they are there, linked, before any driver takes them."""
    for number, address in enumerate(addresses):
        parent = node.folder(carrier).parent.name
        node.add(FunctionSpec(address=address, model=models.T4, parent=parent))
        create_link(f"{node.folder(address)}/physfn", str(node.folder(carrier)))
        create_link(f"{node.folder(carrier)}/virtfn{number}", str(node.folder(address)))


def carry_nothing(node: FakeNode, carrier: str) -> None:
    for link in node.folder(carrier).glob("virtfn*"):
        address = link.resolve().name
        link.unlink()
        node.remove(address)


@KERNELS
def test_virtual_functions_are_devices_and_what_carries_them_is_not_until_they_are_gone(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, kernel: Kernel
) -> None:
    node = workstation(places, kernel)
    running = daemon(node, QUICK)
    whole = {PGPU: nodes_of(node, GEFORCE, T4)}
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(whole[PGPU]))

    parts = ("0000:02:00.4", "0000:02:00.5", "0000:02:00.6")
    carry(node, T4, *parts)
    for address in parts[:2]:  # the third stays without a driver
        node.bind(address)
    resource = "nvidia.com/TU104GL_TESLA_T4_VF"
    kubelet.wait_for(lambda: kubelet.healthy(resource) == set(nodes_of(node, *parts[:2])))
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == set(nodes_of(node, T4)))
    assert kubelet.healthy(PGPU) == set(nodes_of(node, GEFORCE))
    why = f"not-bound: {T4} is no longer offered: it has 3 SR-IOV virtual functions enabled"
    running.wait_for("device changed", resource=PGPU, pci_address=T4, reason=why)
    parts_now = nodes_of(node, *parts[:2])
    assert_allocates(kubelet.plugin(resource), [[device_id] for device_id in parts_now], parts_now)
    wait_for_specs(places, cdi_of(PGPU, nodes_of(node, GEFORCE)) | cdi_of(resource, parts_now))

    carry_nothing(node, T4)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(whole[PGPU]))
    kubelet.wait_for(lambda: kubelet.unhealthy(resource) == set(parts_now))
    assert_allocates(kubelet.plugin(PGPU), [list(whole[PGPU])], whole[PGPU])


# Resource rules

ADDRESSES = [f"0000:{bus:02x}:00.{function}" for bus in (1, 2) for function in range(4)]
rules = st.builds(
    ResourceRule,
    label=st.sampled_from(["resources[0]", "resources[1]"]),
    name=st.sampled_from(["a.example/x", "b.example/y", PGPU, None]),
    vendors=st.sets(st.sampled_from([NVIDIA, 0x1002]), max_size=1).map(frozenset),
    classes=st.sampled_from([(), ("03",), ("0302",), ("02", "0680")]),
    addresses=st.lists(st.sampled_from([*ADDRESSES, "0000:01:*", "*.1"]), max_size=2).map(tuple),
)


@st.composite
def crowded(draw: st.DrawFn) -> HostFacts:
    """Few groups, many functions in each, of both vendors and several kinds, some carrying virtual functions."""
    cdev = draw(st.booleans())
    addresses = draw(st.lists(st.sampled_from(ADDRESSES), unique=True))
    return host(
        *(
            gpu(
                address,
                vfio=number,
                group=draw(st.integers(50, 52)),
                cdev=cdev,
                vendor=draw(st.sampled_from([NVIDIA, 0x1002])),
                class_code=draw(st.sampled_from([0x030200, 0x030000, 0x020000, 0x068000])),
                virtual_functions=draw(st.sampled_from([0, 0, 0, 2])),
            )
            for number, address in enumerate(addresses)
        )
    )


@given(crowded(), st.lists(rules, max_size=4).map(tuple))
def test_whatever_the_rules_no_device_is_of_two_resources_and_every_claim_is_kept_or_explained(
    facts: HostFacts, rules: tuple[ResourceRule, ...]
) -> None:
    settings = Settings(resources=rules)
    found = find_devices(facts, Rules(settings, NAMES))
    nodes = [device.node for device in found.devices]
    assert len(nodes) == len(set(nodes))
    taken = [p.address for device in found.devices for p in device.placements]
    assert len(taken) == len(set(taken))
    for device in found.devices:
        offers = [Rules(settings, NAMES).offer(facts.functions[p.address]) for p in device.placements]
        assert {answer.resource for answer in offers if answer} == {device.resource}
    wanted = {address for address, function in facts.functions.items() if Rules(settings, NAMES).offer(function)}
    assert wanted == set(taken) | found.unoffered.keys()
    assert not set(taken) & found.unoffered.keys()


RX7900 = Model(vendor=0x1002, device=0x744C, class_code=0x030000, subsystem=(0x1002, 0x0E3B), host_driver="amdgpu")
PM9A3 = Model(vendor=0x144D, device=0xA80A, class_code=0x010802, subsystem=(0x144D, 0xA801), host_driver="nvme")
CARD = {
    "h100": "0000:41:00.0",
    "radeon": "0000:42:00.0",
    "boot": "0000:43:00.0",
    "data": "0000:44:00.0",
    "spare": "0000:45:00.0",
    "port0": "0000:46:00.0",
    "port1": "0000:46:00.1",
}
RULES = f"""
gpu-alias = ""

[names]
"10de:2330" = "H100-80G"

[[resources]]
exclude = true
address = "{CARD["spare"]}"

[[resources]]
name = "storage.example.com/nvme"
class = "0108"

[[resources]]
name = "amd.com/gpu"
vendor = "1002"
subsystem = "1002:0e3b"
driver = ["vfio-pci"]

[[resources]]
name = "intel.com/nic"
address = "{CARD["port1"]}"

[[resources]]
name = "intel.com/spare-nic"
vendor = "8086"
device = "1572"
"""


CARDS = (
    (At("41:00.0", models.H100_SXM5, vfio="vfio-pci"),),
    (At("42:00.0", RX7900, vfio="vfio-pci"),),
    (At("43:00.0", PM9A3),),
    (At("44:00.0", PM9A3, vfio="vfio-pci"),),
    (At("45:00.0", PM9A3, vfio="vfio-pci"),),
    tuple(At(f"46:00.{port}", models.X710, vfio="vfio-pci", group="nic") for port in range(2)),
)
PORTS = tuple(At(f"40:01.{n}", models.EPYC_ROOT_PORT, below) for n, below in enumerate(CARDS, 1))
SERVER = Preset(
    summary="a card of each kind; both ports of the NIC are in one IOMMU group",
    kernel=GROUPS_ONLY,
    buses=(RootBus(name="pci0000:40", numa_node=0, functions=(At("40:00.0", models.EPYC_HOST_BRIDGE), *PORTS)),),
)


def test_gpus_nics_and_nvmes_of_any_vendor_are_served_by_rules(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = made(places, SERVER)
    daemon(node, on_disk(places, text=RULES))
    served = {
        "nvidia.com/H100-80G": nodes_of(node, CARD["h100"]),
        "amd.com/gpu": nodes_of(node, CARD["radeon"]),
        "storage.example.com/nvme": nodes_of(node, CARD["data"]),
        "intel.com/nic": nodes_of(node, CARD["port1"]),
    }
    assert_serves(kubelet, places, served)


# `list --all`


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Prints a node's functions; returns those of the JSON by address."""

    def run(node: FakeNode, *flags: str) -> dict[str, dict[str, Any]]:
        status = main(["list", f"--fake-sysfs={node.root}", "--all", "--output=json", *flags])
        document = json.loads(capsys.readouterr().out)
        assert status == (0 if document["well"] else 1)
        functions = document["functions"]
        assert [f["pci_address"] for f in functions] == sorted(f["pci_address"] for f in functions)
        assert len(functions) == len({f["pci_address"] for f in functions})
        return {function["pci_address"]: function for function in functions}

    return run


def verdicts(functions: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str | None, ...]]:
    return {address: (f["resource"], f["rule"], f["reason"]) for address, f in functions.items()}


def test_list_all_tells_of_every_function_which_rule_took_it_or_why_none_did(places: Places, listed: Any) -> None:
    node = made(places, SERVER)
    node.unbind(CARD["radeon"])
    functions = listed(node, on_disk(places, text=RULES))
    assert functions.keys() == {function.address for function in node.functions()}
    group = node.function(CARD["port0"]).iommu_group
    assert verdicts({address: functions[address] for address in CARD.values()}) == {
        CARD["h100"]: ("nvidia.com/H100-80G", "NVIDIA GPU", None),
        # without its driver the rule that asks for it does not match, and no other does
        CARD["radeon"]: (None, None, "no rule matches"),
        CARD["boot"]: ("storage.example.com/nvme", "resources[1]", "bound to nvme, not to vfio-pci"),
        CARD["data"]: ("storage.example.com/nvme", "resources[1]", None),
        CARD["spare"]: (None, "resources[0]", "excluded by resources[0]"),
        CARD["port0"]: (
            "intel.com/spare-nic",
            "resources[4]",
            f"shares IOMMU group {group} with a function that resources[3] offers as intel.com/nic",
        ),
        CARD["port1"]: ("intel.com/nic", "resources[3]", None),
    }
    rest = {verdict for address, verdict in verdicts(functions).items() if address not in CARD.values()}
    assert rest == {(None, None, "a bridge")}
    # of a function on a host driver no more is read
    assert functions[CARD["boot"]]["facts"].keys() < functions[CARD["data"]]["facts"].keys()


def test_list_all_as_json_tells_what_was_read_of_a_function(places: Places, listed: Any) -> None:
    node = workstation(places, GROUPS_ONLY)
    node.set_attribute(T4, "enable", "many")
    assert listed(node)[T4] == {
        "pci_address": T4,
        "model": "TU104GL [Tesla T4]",
        "class": "030200",
        "id": "10de:1eb8",
        "driver": "vfio-pci",
        "iommu_group": 13,
        "resource": "nvidia.com/pgpu",
        "rule": "NVIDIA GPU",
        "rides_along_with": None,
        "reason": None,
        "remarks": [],
        "facts": {
            "subsystem": "10de:12a2",
            "mdev_type": None,
            "vgpu_type": None,
            "physical_function": None,
            "bridges": ["pci0000:00", "0000:00:1b.0"],
            "enable": None,
            "revision": "a1",
            "virtual_functions": 0,
            "numa_node": None,
            "vfio_device": 4,
            "cdev": None,
            "power_state": "D3hot",
            "runtime_status": None,
            "has_power": None,
            "link_speed": "8.0 GT/s PCIe",
            "link_width": 4,
            "link_limits": [{"speed": "8.0 GT/s PCIe", "width": 16}, {"speed": "8.0 GT/s PCIe", "width": 4}],
            "fatal_errors": 0,
            "nonfatal_errors": 0,
            "correctable_errors": 0,
            "bars": [
                bar(0, 16 << 20, 0x9000_0000),
                bar(1, 256 << 20, 0x2000_0000_0000, prefetchable=True, wide=True),
                bar(3, 32 << 20, 0x2000_1000_0000, prefetchable=True, wide=True),
            ],
            "reset_methods": ["flr", "bus"],
            "unread": ["enable: 'many' is not a number"],
        },
    }


def bar(index: int, size: int, start: int, *, prefetchable: bool = False, wide: bool = False) -> dict[str, Any]:
    flags = {"prefetchable": prefetchable, "wide": wide, "io": False, "unset": False}
    return {"index": index, "size": size, "start": start} | flags


def test_list_all_tells_of_vgpus_and_of_what_cannot_be_read(places: Places, listed: Any) -> None:
    node = workstation(places, WITH_CDEVS)
    vgpu = Mediated(node, T4).add(1, "nvidia-222", "GRID T4-1Q", 71)
    node.set_attribute(AUDIO, "class", "nonsense")
    found = listed(node)
    assert verdicts(found)[vgpu] == ("nvidia.com/GRID_T4-1Q", "NVIDIA vGPU", None)
    assert found[AUDIO] == {
        "pci_address": AUDIO,
        **dict.fromkeys(("model", "class", "id", "driver", "iommu_group", "resource", "rule", "facts")),
        "rides_along_with": None,
        "remarks": [],
        "reason": "unreadable: class is 'nonsense', not a hexadecimal number",
    }
