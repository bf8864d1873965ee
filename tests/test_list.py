"""`sandbox-plugin list`: what would be advertised, and why the rest would not be; also on trees that are broken.

What each fault of a device is called is for test_health.py, test_devices.py and test_host_read.py. How a table fits a
terminal is for test_list_table.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode
from daemon import ROOT, Places, clean_environment, run_command
from kubelet import TIMEOUT
from mediated import Mediated
from names import AUDIO, GEFORCE, T4

from sandbox_plugin.cli.main import main
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.naming import ModelNames

GH200 = "0009:01:00.0"


@pytest.fixture
def node(places: Places) -> FakeNode:
    """A workstation to break."""
    return places.node("workstation")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `list` prints of a tree."""

    def run(root: Path, *flags: str, status: int = 0) -> str:
        assert main(["list", f"--fake-sysfs={root}", *flags]) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def listed(shown: Callable[..., str]) -> Callable[..., Any]:
    """What `list --output json` says of a tree."""
    return lambda root, *flags, status=0: json.loads(shown(root, "--output=json", *flags, status=status))


def healths(document: Any) -> dict[str, str]:
    """PCI address of a device's first function -> `Healthy`, or its reason."""
    devices = [device for resource in document["resources"] for device in resource["devices"]]
    return {device["pci_addresses"][0]: device["reason"] or device["health"] for device in devices}


def not_offered(document: Any) -> dict[str, str]:
    return {entry["pci_address"]: entry["reason"] for entry in document["not_offered"]}


# Whole trees


def test_the_json_tells_all_about_a_device(fake_node: MakeNode, listed: Callable[..., Any]) -> None:
    node = fake_node("gh200")
    device = {
        "id": "0",
        "pci_addresses": [GH200],
        "model": "GH100 [GH200 120GB / 480GB]",
        "numa_nodes": [0],
        "node": "/dev/vfio/devices/vfio0",
        "iommu_group": node.function(GH200).iommu_group,
        "health": "Healthy",
        "reason": None,
        "detail": "",
        "riders": [],
    }
    assert listed(node.root) == {
        "schema": 1,
        "well": True,
        "remarks": [],
        "summary": {"devices": 1, "healthy": 1, "not_offered": 0, "riders": 0, "bridges": 2, "others": 1},
        "resources": [{"name": "nvidia.com/pgpu", "devices": [device]}],
        "not_offered": [],
        "unreachable": None,
    }


def test_the_table_has_a_line_for_each_device_and_a_summary(fake_node: MakeNode, shown: Callable[..., str]) -> None:
    table, summary = shown(fake_node("hgx-h100").root, "--output=wide").split("\n\n")
    header, *rows = (re.split(r"\s{2,}", line) for line in table.splitlines())
    columns = ["RESOURCE", "ID", "PCI FUNCTION", "HEALTH", "NUMA", "GROUP", "NODE", "MODEL", "RIDES ALONG", "REASON"]
    assert header == columns
    assert [row[0] for row in rows] == ["nvidia.com/nvswitch"] * 4 + ["nvidia.com/pgpu"] * 8
    assert [row[1] for row in rows] == [str(number) for number in range(12)]
    model, node = "GH100 [H100 SXM5 80GB]", "/dev/vfio/devices/vfio11"
    assert rows[-1] == ["nvidia.com/pgpu", "11", "0000:df:00.0", "Healthy", "1", "122", node, model, "-", "-"]
    assert summary.splitlines() == [
        "12 devices, 12 Healthy: 4 of 4 nvidia.com/nvswitch, 8 of 8 nvidia.com/pgpu.",
        "Not shown: 54 bridges, 18 functions that no rule takes (--all).",
    ]


def test_what_rides_along_with_a_device_is_counted_and_shown_when_asked_for(
    node: FakeNode, shown: Callable[..., str], listed: Callable[..., Any]
) -> None:
    riders = [AUDIO, "0000:01:00.2", "0000:01:00.3"]
    document = listed(node.root, "--all")
    assert {d["pci_addresses"][0]: d["riders"] for d in document["resources"][0]["devices"]} == {
        GEFORCE: riders,
        T4: [],
    }
    tied = {f["pci_address"]: f["reason"] for f in document["functions"] if f["rides_along_with"] == GEFORCE}
    assert tied == dict.fromkeys(riders, f"rides along with {GEFORCE}")
    folded = shown(node.root)
    assert f"Not shown: 3 functions that ride along with {GEFORCE}, 3 bridges, 4 functions\nthat no rule" in folded
    assert AUDIO not in folded
    unfolded = shown(node.root, "--all")
    assert re.search(rf"^{AUDIO} .* rides along with {GEFORCE}$", unfolded, re.MULTILINE)
    assert re.search(r"^0000:00:01.0 .* a bridge$", unfolded, re.MULTILINE)
    assert "Not shown" not in unfolded


def test_the_topology_tells_how_close_two_devices_are(fake_node: MakeNode, listed: Callable[..., Any]) -> None:
    one, other = listed(fake_node("workstation").root, "--topology")["topology"]
    assert one == {"id": one["id"], "links": {other["id"]: other["links"][one["id"]]}}


def test_the_matrix_of_many_devices_fits_and_wide_has_all_of_it(fake_node: MakeNode, shown: Callable[..., str]) -> None:
    root = fake_node("hgx-h100").root
    lines = shown(root, "--topology").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-7 - 12 - 1].split() == [str(number) for number in range(12)]
    assert "11    NUMA  PCI ADDRESS" in shown(root, "--topology", "--output=wide")


def test_a_node_without_devices_has_nothing_to_advertise_and_that_is_no_fault(
    fake_node: MakeNode, listed: Callable[..., Any], shown: Callable[..., str]
) -> None:
    root = fake_node("empty").root
    document = listed(root)
    assert (document["resources"], document["not_offered"], document["well"]) == ([], [], True)
    for output in ("table", "wide"):
        nothing, rest = shown(root, "--topology", f"--output={output}").split("\n\n")
        assert nothing.startswith("Nothing would be advertised: no GPU, NVSwitch or other device")
        assert rest == "Not shown: 5 bridges, 3 functions that no rule takes (--all).\n", (
            "there is no matrix of nothing"
        )


def test_a_bus_that_cannot_be_read_is_said_and_is_a_failure(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    (node.root / "sys/bus/pci").rename(node.root / "sys/bus/gone")
    why = f"{node.root}/sys/bus/pci/devices: No such file or directory"
    line = f"sandbox-plugin: the PCI bus cannot be read: {why}\n"
    assert main(["list", f"--fake-sysfs={node.root}"]) == 1
    assert capsys.readouterr() == ("", line)
    assert main(["list", f"--fake-sysfs={node.root}", "--output=json"]) == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (document["unreachable"], document["well"], said.err) == (why, False, line)


def test_as_a_process_it_prints_json_for_other_programs_and_changes_nothing(node: FakeNode) -> None:
    def state() -> list[tuple[Path, int]]:
        return [(path, path.lstat().st_mtime_ns) for path in sorted(node.root.rglob("*"))]

    before = state()
    done = run_command("list", f"--fake-sysfs={node.root}", "--output=json", P_GPU_ALIAS="gpus")
    assert (done.returncode, done.stderr) == (0, "")
    assert [resource["name"] for resource in json.loads(done.stdout)["resources"]] == ["nvidia.com/gpus"]
    assert state() == before


# Why something is not offered, or not healthy


def test_what_is_not_offered_has_a_reason_also_where_a_rule_excludes_it(
    node: FakeNode, listed: Callable[..., Any], shown: Callable[..., str], tmp_path: Path
) -> None:
    config = tmp_path / "rules.toml"
    config.write_text('[[resources]]\nexclude = true\nvendor = "10de"\ndevice = "1eb8"\n')
    node.bind(GEFORCE, "nvidia")
    document = listed(node.root, f"--config={config}")
    assert document["resources"] == []
    assert not_offered(document) == {GEFORCE: "bound to nvidia, not to vfio-pci", T4: "excluded by resources[0]"}
    assert re.search(rf"{T4} +TU104GL \[Tesla T4\] +excluded by resources", shown(node.root, f"--config={config}"))


def test_a_device_that_is_unhealthy_says_why_and_all_shows_what_was_read_of_it(
    node: FakeNode, listed: Callable[..., Any], shown: Callable[..., str]
) -> None:
    node.bind(AUDIO, "snd_hda_intel")
    node.sicken(T4, cold=True)
    document = listed(node.root, "--all", status=1)
    assert healths(document) == {GEFORCE: "not-viable", T4: "off-the-bus"}
    (geforce,) = (d for d in document["resources"][0]["devices"] if d["pci_addresses"] == [GEFORCE])
    assert geforce["health"] == "Unhealthy"
    assert f"{AUDIO} in its IOMMU group {geforce['iommu_group']} is bound to snd_hda_intel" in geforce["detail"]
    (facts,) = (function["facts"] for function in document["functions"] if function["pci_address"] == T4)
    assert (facts["power_state"], facts["runtime_status"], facts["has_power"]) == ("D3cold", "suspended", True)
    (row,) = (line for line in shown(node.root, "--output=wide", status=1).splitlines() if f" {T4} " in line)
    assert re.search(rf" Unhealthy .* off-the-bus: {T4} does not answer", row)


def test_a_device_that_is_unhealthy_makes_it_fail_and_one_line_says_so(
    node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(output: str) -> str:
        assert main(["list", f"--fake-sysfs={node.root}", f"--output={output}"]) == 1
        return capsys.readouterr().err

    node.sicken(T4)
    for output in ("table", "wide", "json"):
        assert lines(output) == "sandbox-plugin: 1 device is Unhealthy\n"
    node.bind(AUDIO, "snd_hda_intel")
    assert lines("table") == "sandbox-plugin: 2 devices are Unhealthy\n"
    node.heal(T4)
    (node.folder("0000:00:1f.6") / "vendor").unlink()
    assert lines("table") == "sandbox-plugin: 1 device is Unhealthy, 1 PCI function cannot be read\n"
    (node.folder("0000:00:1f.4") / "vendor").unlink()
    assert lines("table") == "sandbox-plugin: 1 device is Unhealthy, 2 PCI functions cannot be read\n"


def test_what_is_odd_about_a_gpu_is_said_of_all_and_is_no_reason_not_to_offer_it(
    node: FakeNode, listed: Callable[..., Any], shown: Callable[..., str]
) -> None:
    first = (node.folder(T4) / "resource").read_text().splitlines()[0]
    node.set_attribute(T4, "resource", "\n".join([first, *["0x0 0x0 0x0"] * 12]))
    for address in (T4, AUDIO):
        node.set_attribute(address, "reset_method", "")
    document = listed(node.root, "--all")
    assert healths(document) == {GEFORCE: "Healthy", T4: "Healthy"}
    remarked = {f["pci_address"]: f["remarks"] for f in document["functions"] if f["remarks"]}
    assert remarked.keys() == {T4}, "that an audio function cannot be reset alone is nothing odd"
    lost, no_reset = remarked[T4]
    assert lost == "of its BARs only BAR 0 is left: there was no room for the others"
    wide = shown(node.root, "--all", "--output=wide")
    assert re.search(rf"^{T4} .* {re.escape(f'{lost}; {no_reset}')}$", wide, re.MULTILINE)
    folded = re.sub(r"\s+", " ", shown(node.root, "--all"))
    assert f"nvidia.com/pgpu (NVIDIA GPU) note: {lost} note: {no_reset}" in folded


@pytest.mark.parametrize("preset", ["hgx-h100", "workstation", "gh200"])
def test_nothing_is_odd_about_a_node_that_is_well(fake_node: MakeNode, listed: Callable[..., Any], preset: str) -> None:
    assert [f["remarks"] for f in listed(fake_node(preset).root, "--all")["functions"] if f["remarks"]] == []


# Broken trees


def test_an_entry_that_is_broken_costs_that_function_alone(node: FakeNode, listed: Callable[..., Any]) -> None:
    (node.folder(T4) / "vendor").unlink()
    (node.root / "sys/bus/pci/devices/nonsense").symlink_to(node.folder(T4))
    document = listed(node.root, "--all", status=1)
    assert healths(document) == {GEFORCE: "Healthy"}
    why = not_offered(document)
    assert why == {T4: why[T4], "nonsense": "'nonsense' is not a PCI address"}
    assert why[T4].startswith("vendor is missing")
    in_all = {function["pci_address"]: function["reason"] for function in document["functions"]}
    assert in_all[T4] == f"unreadable: {why[T4]}"


def test_a_function_whose_read_hangs_is_named_and_the_command_ends(node: FakeNode) -> None:
    (node.folder(T4) / "numa_node").unlink()
    os.mkfifo(node.folder(T4) / "numa_node")
    document = json.loads(run_command("list", f"--fake-sysfs={node.root}", "--output=json").stdout)
    assert healths(document) == {GEFORCE: "Healthy"}
    assert "does not answer" in not_offered(document)[T4]


# Names from vendors and sysfs, which may hold anything


def test_names_are_printed_as_they_are_whatever_a_table_could_make_of_them(
    node: FakeNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "[/b] x :ab: [nForce 730a] [bold]"
    monkeypatch.setattr(ModelNames, "load", lambda: ModelNames({node.function(T4).model_id: name}))
    (node.folder(AUDIO) / "vendor").unlink()
    assert main(["fake-node", "show", str(node.root)]) == 0
    assert name in capsys.readouterr().out
    (node.folder(AUDIO) / "vendor").write_text(name)
    assert main(["list", f"--fake-sysfs={node.root}", "--all", "--topology", "--output=wide"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"{T4} .* {re.escape(name)} ", out)
    assert f"vendor is {name!r}" in out


ESCAPE = "\x1b]0;x\x07\x9b31mvf\nio\u202e"
SHOWN = r"\x1b]0;x\x07\x9b31mvf\nio\u202e"


def assert_printable(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(node: FakeNode, shown: Callable[..., str]) -> None:
    node.unbind(GEFORCE)
    (node.folder(GEFORCE) / "driver").symlink_to(f"../drivers/{ESCAPE}")
    Mediated(node, T4).add(1, "nvidia-1", ESCAPE, 40)
    table = shown(node.root, "--all", "--output=wide")
    assert f"bound to {SHOWN}, not to vfio-pci" in table
    assert re.search(rf"^{GEFORCE} .* {re.escape(SHOWN)} ", table, re.MULTILINE), table
    assert_printable(table)
    for flags in ([], ["--all"]):
        assert_printable(shown(node.root, *flags))


def test_in_the_log_on_a_console_names_are_shown_and_not_obeyed(node: FakeNode, places: Places) -> None:
    node.unbind(T4)
    (node.folder(T4) / "driver").symlink_to(f"../drivers/{ESCAPE}")
    flags = [*places.flags(node), f"--kubelet-dir={places.top}/\x1b]0;x"]  # a value without a blank, and so unquoted
    command = [sys.executable, "-m", "sandbox_plugin", "run", *flags, "--log-format=console"]
    said = ""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=clean_environment({}), text=True) as process:
        assert process.stderr is not None
        while "not offered" not in said and (line := process.stderr.readline()):
            said += line
        process.terminate()
        said += process.stderr.read()
    assert SHOWN in said
    assert rf"kubelet_dir={places.top}/\x1b]0;x" in said
    assert_printable(said)


def test_on_a_terminal_no_line_has_blanks_at_its_end_and_none_is_folded_of_show(node: FakeNode) -> None:
    lines = on_terminal(["fake-node", "show", str(node.root)], columns=40)
    assert "\x1b[" in lines[0], "no colours: it did not take this for a terminal"
    assert bare(lines) == [line.rstrip() for line in bare(lines)]
    assert max(map(len, bare(lines))) > 80


def test_on_a_terminal_it_is_as_wide_as_that_and_unhealthy_is_red_and_nowhere_else(node: FakeNode) -> None:
    node.sicken(T4)
    command = ["list", f"--fake-sysfs={node.root}"]
    narrow, wide = on_terminal(command, 80, status=1), on_terminal(command, 200, status=1)
    assert max(map(len, bare(narrow))) <= 80
    assert "/dev/vfio/13" not in "\n".join(narrow)
    assert "/dev/vfio/13" in "\n".join(wide)
    assert [line for line in bare(wide) if line != line.rstrip()] == []
    red = [line for line in narrow if "\x1b[31m" in line]
    assert red == [line for line in narrow if "\x1b[31mUnhealthy\x1b[0m" in line]
    assert len(red) == 1
    assert T4 in red[0]
    assert not any("\x1b" in line for line in on_terminal(command, 80, status=1, NO_COLOR="1"))
    piped = run_command(*command, COLUMNS="200")
    assert piped.stdout.splitlines() == bare(narrow)[:-1], "as 80 columns, and the last line is that on stderr"


def bare(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def on_terminal(arguments: list[str], columns: int, status: int = 0, **environment: str) -> list[str]:
    """What a command prints on a terminal of its own, stderr too."""
    ours, its = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = [sys.executable, "-m", "sandbox_plugin", *arguments]
        own = clean_environment({"TERM": "xterm-256color", **environment})
        own.pop("COLUMNS", None)  # of a test runner; it would count for more than the terminal
        process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=ROOT, env=own)
        os.close(its)
        text = b""
        with suppress(OSError):  # EIO: nobody has the terminal any more
            while piece := screen.read(65536):
                text += piece
        assert process.wait(TIMEOUT) == status
    return text.decode().splitlines()
