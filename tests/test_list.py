"""`sandbox-plugin list`: what would be advertised, and why the rest would not be; also on trees that are broken.

What is broken costs the function that it belongs to, never another one. The trees are those of fake nodes; the command
runs within the test's own process, where nothing hangs, and else as a process of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemon import ROOT, Places, clean_environment, run_command
from daemon import places as make_places
from kubelet import TIMEOUT
from mediated import Mediated
from names import AUDIO, GEFORCE, T4

from sandbox_plugin.cli.main import main
from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import At, Preset, RootBus
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import WITH_CDEVS
from sandbox_plugin.inventory.naming import ModelNames

GH200 = "0009:01:00.0"

Break = Callable[[Path], object]
"""Breaks the folder of one PCI function."""


@pytest.fixture
def node(places: Places) -> FakeNode:
    """A workstation to break."""
    return places.node("workstation")


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, Path]]:
    """Every preset's tree, for tests that change nothing."""
    with make_places() as places:
        yield {preset: places.node(preset).root for preset in ("hgx-h100", "workstation", "gh200", "empty")}


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What `list --output json` says of a tree."""

    def run(root: Path, *flags: str) -> Any:
        assert main(["list", f"--fake-sysfs={root}", "--output=json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def healths(document: Any) -> dict[str, str]:
    """PCI address of a device's first function -> `Healthy`, or its reason."""
    devices = [device for resource in document["resources"] for device in resource["devices"]]
    return {device["pci_addresses"][0]: device["reason"] or device["health"] for device in devices}


def not_offered(document: Any) -> dict[str, str]:
    return {entry["pci_address"]: entry["reason"] for entry in document["not_offered"]}


# Whole trees


def test_the_json_tells_all_about_a_device(whole: dict[str, Path], listed: Callable[..., Any]) -> None:
    assert listed(whole["gh200"]) == {
        "resources": [
            {
                "name": "nvidia.com/pgpu",
                "devices": [
                    {
                        "id": "0",
                        "pci_addresses": [GH200],
                        "model": "GH100 [GH200 120GB / 480GB]",
                        "numa_nodes": [0],
                        "node": "/dev/vfio/devices/vfio0",
                        "iommu_group": FakeNode.open(whole["gh200"]).function(GH200).iommu_group,
                        "health": "Healthy",
                        "reason": None,
                        "detail": "",
                    }
                ],
            }
        ],
        "not_offered": [],
        "unreachable": None,
    }


def test_the_table_has_a_line_for_each_device(whole: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"--fake-sysfs={whole['hgx-h100']}"]) == 0
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert header == ["RESOURCE", "ID", "PCI ADDRESS", "MODEL", "NUMA", "NODE", "HEALTH"]
    assert [row[0] for row in rows] == ["nvidia.com/nvswitch"] * 4 + ["nvidia.com/pgpu"] * 8
    assert [row[1] for row in rows] == [str(number) for number in range(12)]
    model, node = "GH100 [H100 SXM5 80GB]", "/dev/vfio/devices/vfio11"
    assert rows[-1] == ["nvidia.com/pgpu", "11", "0000:df:00.0", model, "1", node, "Healthy"]


def test_lines_are_as_long_as_what_they_say_and_no_longer(
    whole: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", f"--fake-sysfs={whole['workstation']}", "--all", "--topology"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert max(map(len, lines)) > 100, "what a name says is not cut off or folded for a narrow terminal"


NAME = "[/b] x :ab: [nForce 730a] [bold]"
EVERYWHERE = [f"0000:{bus:02x}:00.0" for bus in range(256)]


@pytest.mark.parametrize("is_offered", [True, False])
def test_addresses_and_names_are_printed_as_they_are_whatever_is_in_them(
    places: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_offered: bool
) -> None:
    bus = RootBus(
        name="pci0000:00",
        functions=tuple(
            At(address.removeprefix("0000:"), models.T4, vfio="vfio-pci" if is_offered else None)
            for address in EVERYWHERE
        ),
    )
    preset = Preset(summary="", kernel=WITH_CDEVS, buses=(bus,))
    node = FakeNode.create(places.top / "node", preset)
    monkeypatch.setattr(ModelNames, "load", lambda: ModelNames({(models.T4.vendor, models.T4.device): NAME}))

    def lines(*arguments: str) -> list[str]:
        assert main([*arguments]) == 0
        return capsys.readouterr().out.splitlines()

    listed = f"--fake-sysfs={node.root}"
    for flags in ([], ["--topology"], ["--all"]):
        found = lines("list", listed, *flags)
        assert [word for line in found if NAME in line for word in line.split() if word in EVERYWHERE] == EVERYWHERE
    every = [line.split()[0] for line in lines("list", listed, "--all") if line.startswith("0000:")]
    assert every[-len(EVERYWHERE) :] == EVERYWHERE
    if is_offered:
        assert [line.split()[-1] for line in lines("list", listed, "--topology") if "PHB" in line][:256] == EVERYWHERE
    assert [line.split()[0] for line in lines("fake-node", "show", str(node.root)) if NAME in line] == EVERYWHERE


@pytest.mark.parametrize("vendor", ["[/b] x", "[nForce 730a]", ":ab:"])
def test_what_a_broken_file_says_is_printed_as_it_is(
    node: FakeNode, capsys: pytest.CaptureFixture[str], vendor: str
) -> None:
    _rewrite("vendor", f"{vendor}\n".encode())(node.folder(T4))
    for flags in ([], ["--all"]):
        assert main(["list", f"--fake-sysfs={node.root}", *flags]) == 0
        assert f"vendor is {vendor!r}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "printed"), [("[bold]x", "[bold]x"), (":ab:", ":ab:"), ("\udcff", "\\udcff")])
def test_what_a_driver_is_called_is_printed_as_it_is(
    node: FakeNode, capsys: pytest.CaptureFixture[str], name: str, printed: str
) -> None:
    node.unbind(T4)
    (node.folder(T4) / "driver").symlink_to(f"/drivers/{name}")
    assert main(["list", f"--fake-sysfs={node.root}"]) == 0
    assert f"bound to {printed}, not to vfio-pci" in capsys.readouterr().out
    assert main(["fake-node", "show", str(node.root)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(T4))
    assert f"  {printed}  " in line


def test_on_a_terminal_no_line_has_blanks_at_its_end_and_none_is_folded(whole: dict[str, Path]) -> None:
    for arguments in (["list", "--all", "--fake-sysfs"], ["fake-node", "show"]):
        lines = on_terminal([*arguments, str(whole["workstation"])], columns=40)
        assert "\x1b[" in lines[0], "no colours: it did not take this for a terminal"
        bare = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
        assert bare == [line.rstrip() for line in bare]
        assert max(map(len, bare)) > 80


def on_terminal(arguments: list[str], columns: int) -> list[str]:
    """What a command prints on a terminal of its own."""
    ours, its = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as shown:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = clean_environment({"TERM": "xterm-256color"})
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox_plugin", *arguments],
            stdin=its,
            stdout=its,
            stderr=its,
            cwd=ROOT,
            env=environment,
        )
        os.close(its)
        text = b""
        with suppress(OSError):  # EIO: nobody has the terminal any more
            while piece := shown.read(65536):
                text += piece
        assert process.wait(TIMEOUT) == 0
    return text.decode().splitlines()


def test_a_node_without_devices_has_nothing_to_advertise_and_that_is_no_fault(
    whole: dict[str, Path], listed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(whole["empty"]) == {"resources": [], "not_offered": [], "unreachable": None}
    assert main(["list", f"--fake-sysfs={whole['empty']}"]) == 0
    assert capsys.readouterr().out.startswith("Nothing would be advertised: no GPU, NVSwitch or other device")
    assert main(["list", "--topology", f"--fake-sysfs={whole['empty']}"]) == 0
    assert capsys.readouterr().out.count("\n") == 1, "there is no matrix of nothing"


def test_functions_that_ride_along_with_a_gpu_are_neither_devices_nor_missed(
    whole: dict[str, Path], listed: Callable[..., Any]
) -> None:
    document = listed(whole["workstation"])
    assert healths(document) == {GEFORCE: "Healthy", T4: "Healthy"}
    assert not_offered(document) == {}


def test_an_empty_alias_gives_each_model_its_name(whole: dict[str, Path], listed: Callable[..., Any]) -> None:
    names = [resource["name"] for resource in listed(whole["workstation"], "--gpu-alias=")["resources"]]
    assert names == ["nvidia.com/TU104GL_TESLA_T4", "nvidia.com/TU116_GEFORCE_GTX_1660_SUPER"]


def test_nothing_is_changed(node: FakeNode, listed: Callable[..., Any]) -> None:
    def state() -> list[tuple[str, int]]:
        paths = [Path(folder, name) for folder, *names in os.walk(node.root) for name in [*names[0], *names[1]]]
        return [(str(path), path.lstat().st_mtime_ns) for path in sorted(paths)]

    before = state()
    listed(node.root)
    assert state() == before


def test_a_bus_that_cannot_be_read_is_said_and_is_a_failure(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    (node.root / "sys/bus/pci").rename(node.root / "sys/bus/gone")
    line = f"sandbox-plugin: the PCI bus cannot be read: {node.root}/sys/bus/pci/devices: No such file or directory\n"
    assert main(["list", f"--fake-sysfs={node.root}"]) == 1
    assert capsys.readouterr() == ("", line)
    assert main(["list", f"--fake-sysfs={node.root}", "--output=json"]) == 1
    said = capsys.readouterr()
    assert said.err == line
    assert "No such file" in json.loads(said.out)["unreachable"]


def test_as_a_process_it_prints_json_for_other_programs(whole: dict[str, Path]) -> None:
    done = run_command("list", f"--fake-sysfs={whole['workstation']}", "--output=json", P_GPU_ALIAS="gpus")
    assert (done.returncode, done.stderr) == (0, "")
    assert [resource["name"] for resource in json.loads(done.stdout)["resources"]] == ["nvidia.com/gpus"]


# Why something is not offered


def test_what_a_host_driver_has_is_not_offered_nor_what_no_driver_has(
    node: FakeNode, listed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    node.bind(GEFORCE, "nvidia")
    node.unbind(T4)
    document = listed(node.root)
    assert document["resources"] == []
    assert not_offered(document) == {
        GEFORCE: "bound to nvidia, not to vfio-pci",
        T4: "bound to no driver",
    }
    assert main(["list", f"--fake-sysfs={node.root}"]) == 0
    table = capsys.readouterr().out
    assert "TU104GL [Tesla T4]" in table
    assert "bound to nvidia, not to vfio-pci" in table


def test_a_gpu_without_an_iommu_group_is_not_offered(node: FakeNode, listed: Callable[..., Any]) -> None:
    (node.folder(T4) / "iommu_group").unlink()
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert "in no IOMMU group" in not_offered(document)[T4]


def test_a_group_without_an_iommu_is_never_offered(node: FakeNode, listed: Callable[..., Any]) -> None:
    group = node.function(T4).iommu_group
    folder = node.root / "sys/class/vfio"
    (folder / f"{group}").rename(folder / f"noiommu-{group}")
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert "without an IOMMU" in not_offered(document)[T4]


def test_a_gpu_that_carries_virtual_functions_is_not_offered_whole(node: FakeNode, listed: Callable[..., Any]) -> None:
    for number in range(4):
        (node.folder(T4) / f"virtfn{number}").symlink_to(f"../0000:02:00.{4 + number}")
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert "4 SR-IOV virtual functions" in not_offered(document)[T4]


def test_where_there_are_cdevs_a_function_without_one_is_being_bound_and_never_a_group(
    places: Places, listed: Callable[..., Any]
) -> None:
    node = places.node("gh200")
    (node.folder(GH200) / "vfio-dev/vfio0/dev").unlink()
    document = listed(node.root)
    assert document["resources"] == []
    assert "still being bound" in not_offered(document)[GH200]


def test_what_a_rule_excludes_is_named_with_the_rule(
    node: FakeNode, listed: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "rules.toml"
    config.write_text('[[resources]]\nexclude = true\nvendor = "10de"\ndevice = "1eb8"\n')
    document = listed(node.root, f"--config={config}")
    assert healths(document) == {GEFORCE: "Healthy"}
    assert not_offered(document) == {T4: "excluded by resources[0]"}


# Why something is unhealthy


def test_a_group_mate_on_a_host_driver_makes_the_gpu_unhealthy(node: FakeNode, listed: Callable[..., Any]) -> None:
    node.bind(AUDIO, "snd_hda_intel")
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "not-viable", T4: "Healthy"}
    (geforce,) = (d for d in document["resources"][0]["devices"] if d["pci_addresses"] == [GEFORCE])
    assert geforce["health"] == "Unhealthy"
    assert f"{AUDIO} in its IOMMU group {geforce['iommu_group']} is bound to snd_hda_intel" in geforce["detail"]


def test_a_gpu_that_does_not_answer_is_unhealthy(
    node: FakeNode, listed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    node.sicken(T4)
    assert healths(listed(node.root)) == {GEFORCE: "Healthy", T4: "off-the-bus"}
    assert main(["list", f"--fake-sysfs={node.root}"]) == 0
    assert f"Unhealthy: off-the-bus: {T4} does not answer" in capsys.readouterr().out


def test_a_gpu_that_is_dead_in_d3cold_is_unhealthy(node: FakeNode, listed: Callable[..., Any]) -> None:
    node.sicken(T4, cold=True)
    document = listed(node.root, "--all")
    assert healths(document) == {GEFORCE: "Healthy", T4: "off-the-bus"}
    (facts,) = (function["facts"] for function in document["functions"] if function["pci_address"] == T4)
    assert (facts["power_state"], facts["runtime_status"], facts["has_power"]) == ("D3cold", "suspended", True)


def test_a_gpu_with_a_bar_that_has_no_address_is_unhealthy(node: FakeNode, listed: Callable[..., Any]) -> None:
    lines = (node.folder(T4) / "resource").read_text().splitlines()
    lines[1] = "0x0000000000000000 0x000000000fffffff 0x000000002014220c"
    node.set_attribute(T4, "resource", "\n".join(lines))
    assert healths(listed(node.root)) == {GEFORCE: "Healthy", T4: "no-address"}


def test_what_is_odd_about_a_gpu_is_said_of_all_and_is_no_reason_not_to_offer_it(
    node: FakeNode, listed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = (node.folder(T4) / "resource").read_text().splitlines()[0]
    node.set_attribute(T4, "resource", "\n".join([first, *["0x0 0x0 0x0"] * 12]))
    for address in (T4, AUDIO):
        node.set_attribute(address, "reset_method", "")
    document = listed(node.root, "--all")
    assert healths(document) == {GEFORCE: "Healthy", T4: "Healthy"}
    remarked = {f["pci_address"]: f["remarks"] for f in document["functions"] if f["remarks"] is not None}
    assert remarked.keys() == {T4}, "that an audio function cannot be reset alone is nothing odd"
    assert remarked[T4].startswith("of its BARs only BAR 0 is left: there was no room for the others; ")
    assert main(["list", f"--fake-sysfs={node.root}", "--all"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith(remarked[T4]))
    assert line.startswith(T4)


@pytest.mark.parametrize("preset", ["hgx-h100", "workstation", "gh200"])
def test_nothing_is_odd_about_a_node_that_is_well(
    whole: dict[str, Path], listed: Callable[..., Any], preset: str
) -> None:
    assert {function["remarks"] for function in listed(whole[preset], "--all")["functions"]} == {None}


def test_a_gpu_in_whose_group_the_firmware_maps_memory_is_unhealthy(node: FakeNode, listed: Callable[..., Any]) -> None:
    regions = node.root / f"sys/kernel/iommu_groups/{node.function(T4).iommu_group}/reserved_regions"
    regions.unlink()
    regions.write_text("0x000000007e000000 0x000000007e0fffff direct\n")
    assert healths(listed(node.root)) == {GEFORCE: "Healthy", T4: "firmware-mapping"}


def test_a_gpu_whose_node_is_not_in_dev_is_unhealthy(node: FakeNode, listed: Callable[..., Any]) -> None:
    (node.root / "dev/vfio" / str(node.function(T4).iommu_group)).unlink()
    assert healths(listed(node.root)) == {GEFORCE: "Healthy", T4: "no-node"}


# Broken trees


def _rewrite(name: str, content: bytes) -> Break:
    def rewrite(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(content)

    return rewrite


def _point(name: str, target: str) -> Break:
    def point(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return point


def _make_folder(name: str) -> Break:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return make


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        pytest.param(lambda folder: (folder / "vendor").unlink(), "vendor is missing", id="vendor is missing"),
        pytest.param(shutil.rmtree, "is missing", id="its folder is gone and the link is left"),
        pytest.param(_make_folder("class"), "class cannot be read: Is a directory", id="class is a folder"),
        pytest.param(_point("device", "device"), "device cannot be read: Too many levels", id="device leads to itself"),
        pytest.param(_point("vendor", "/nowhere"), "vendor is missing", id="vendor leads nowhere"),
        pytest.param(_rewrite("vendor", b""), "vendor is ''", id="vendor is empty"),
        pytest.param(_rewrite("vendor", b"NVIDIA\n"), "vendor is 'NVIDIA'", id="vendor is a word"),
        pytest.param(_rewrite("vendor", b"10de\n"), "vendor is '10de'", id="vendor without 0x"),
        pytest.param(_rewrite("device", b"0x1eb81eb8\n"), "device is '0x1eb81eb8'", id="device is too long"),
        pytest.param(_rewrite("class", b"-0x30000\n"), "class is '-0x30000'", id="class is negative"),
        pytest.param(_rewrite("class", b"\xff\xfe\x00\n"), "class is ", id="class is not text"),
        pytest.param(_rewrite("class", b"0" * 100_000), "class is '000", id="class has no end"),
        pytest.param(_rewrite("driver", b"vfio-pci"), "driver cannot be read: Invalid", id="driver is no link"),
        pytest.param(_point("iommu_group", "../none"), "iommu_group leads to 'none'", id="a group without a number"),
        pytest.param(_point("iommu_group", "../-1"), "iommu_group leads to '-1'", id="a negative group"),
        pytest.param(_rewrite("iommu_group", b"13"), "iommu_group cannot be read: Invalid", id="group is no link"),
    ],
)
def test_an_entry_that_is_broken_costs_that_function_alone(
    node: FakeNode, listed: Callable[..., Any], break_it: Break, reason: str
) -> None:
    break_it(node.folder(T4))
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert reason in not_offered(document)[T4]
    assert len(not_offered(document)[T4]) < 200
    assert document["unreachable"] is None


@pytest.mark.parametrize("name", ["numa_node", "power_state", "current_link_speed", "current_link_width", "resource"])
@pytest.mark.parametrize("content", [b"", b"nonsense\n", b"\xff\x00\xfe", b"-99\n", None], ids=repr)
def test_a_device_can_do_without_what_is_not_needed(
    node: FakeNode, listed: Callable[..., Any], name: str, content: bytes | None
) -> None:
    (_make_folder(name) if content is None else _rewrite(name, content))(node.folder(T4))
    assert healths(listed(node.root)) == {GEFORCE: "Healthy", T4: "Healthy"}


@pytest.mark.parametrize("name", ["nonsense", "0000:02:00", "0000:02:00.0 ", "0000:02:20.0", "\udcff", "x" * 200])
def test_an_entry_that_is_no_pci_address_is_told_and_costs_nothing(
    node: FakeNode, listed: Callable[..., Any], name: str
) -> None:
    (node.root / "sys/bus/pci/devices" / name).symlink_to(node.folder(T4))
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "Healthy", T4: "Healthy"}
    assert [reason for address, reason in not_offered(document).items() if "is not a PCI address" in reason]


def test_a_member_of_the_group_that_cannot_be_read_leaves_the_gpu_in_doubt(
    node: FakeNode, listed: Callable[..., Any]
) -> None:
    _rewrite("class", b"nonsense")(node.folder(AUDIO))
    document = listed(node.root)
    assert healths(document) == {GEFORCE: "not-viable", T4: "Healthy"}
    assert not_offered(document).keys() == {AUDIO}


def test_what_can_block_in_the_kernel_is_never_opened(places: Places) -> None:
    node = places.node("hgx-h100")
    traps = 0
    for function in node.functions():
        for name in ("config", "uevent", "driver_override", "sriov_numvfs"):
            path = node.folder(function.address) / name
            path.unlink(missing_ok=True)
            os.mkfifo(path)  # whoever opens it to read hangs
            traps += 1
    assert traps > 100
    done = run_command("list", f"--fake-sysfs={node.root}", "--output=json")
    assert list(healths(json.loads(done.stdout)).values()) == ["Healthy"] * 12


@pytest.mark.parametrize("asleep", [GH200, "0009:00:00.0"], ids=["the GPU", "the bridge above it"])
def test_the_link_of_a_device_is_not_read_while_that_would_wake_something(places: Places, asleep: str) -> None:
    node = places.node("gh200")
    node.set_attribute(asleep, "power_state", "D3cold")
    (node.folder(GH200) / "firmware_node/power_resources_D3hot").mkdir(parents=True)
    for name in ("current_link_speed", "current_link_width"):
        (node.folder(GH200) / name).unlink()
        os.mkfifo(node.folder(GH200) / name)
    done = run_command("list", f"--fake-sysfs={node.root}", "--output=json")
    assert healths(json.loads(done.stdout)) == {GH200: "Healthy"}


def test_a_function_whose_read_hangs_is_named_and_the_command_ends(places: Places) -> None:
    node = places.node("workstation")
    (node.folder(T4) / "numa_node").unlink()
    os.mkfifo(node.folder(T4) / "numa_node")
    done = run_command("list", f"--fake-sysfs={node.root}", "--output=json")
    document = json.loads(done.stdout)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert "does not answer" in not_offered(document)[T4]


# Names that a terminal would obey


ESCAPE = "\x1b]0;x\x07\x9b31mvf\nio\u202e"
SHOWN = r"\x1b]0;x\x07\x9b31mvf\nio\u202e"


def test_a_drivers_name_is_shown_and_not_obeyed(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.unbind(T4)
    (node.folder(T4) / "driver").symlink_to(f"../drivers/{ESCAPE}")
    assert main(["list", "--all", f"--fake-sysfs={node.root}"]) == 0
    table = capsys.readouterr().out
    assert f"bound to {SHOWN}, not to vfio-pci" in table
    assert re.search(rf"^{T4} .* {re.escape(SHOWN)} ", table, re.MULTILINE), table
    assert all(c.isprintable() or c == "\n" for c in table)


def test_a_type_of_mediated_devices_is_shown_and_not_obeyed(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    node = places.node("workstation")
    Mediated(node, T4).add(1, "nvidia-1", ESCAPE, 40)
    assert main(["list", f"--fake-sysfs={node.root}"]) == 0
    table = capsys.readouterr().out
    assert SHOWN in table
    assert all(c.isprintable() or c == "\n" for c in table)


def test_in_the_log_on_a_console_names_are_shown_and_not_obeyed(node: FakeNode, places: Places) -> None:
    node.unbind(T4)
    (node.folder(T4) / "driver").symlink_to(f"../drivers/{ESCAPE}")
    flags = [*places.flags(node), f"--kubelet-dir={places.top}/\x1b]0;x"]  # a value without a blank, and so unquoted
    command = [sys.executable, "-m", "sandbox_plugin", "run", *flags, "--log-format=console"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=clean_environment({}), text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "not offered" in line and T4 in line:
                break
        process.terminate()
        said += process.stderr
    assert any(SHOWN in line for line in said), said
    assert any(rf"kubelet_dir={places.top}/\x1b]0;x " in line for line in said), said
    assert all(c.isprintable() or c == "\n" for line in said for c in line), said


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fake-sysfs=nowhere"], ["--fake-sysfs", "'nowhere'", "hgx-h100"]),
        (["--output=xml"], ["--output", "table", "json"]),
        (["--gpu-alias=9"], ["--gpu-alias", "'9'"]),
        (["extra"], ["extra", "(see sandbox-plugin list --help)"]),
    ],
)
def test_what_is_given_wrong_is_named_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["list", *arguments])
    except SystemExit as end:  # argparse's own way
        status = end.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words)
