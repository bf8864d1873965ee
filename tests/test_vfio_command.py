"""`sandbox-plugin vfio` on fake nodes: what it does, says and returns."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_plugin.cli import vfio as command
from sandbox_plugin.cli.main import main
from sandbox_plugin.cli.signals import Interrupted
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.sysfs import FakeKernel
from sandbox_plugin.host.bind import HostKernel

GPU, AUDIO, T4 = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
CARD = [f"0000:01:00.{n}" for n in range(4)]
HOST_DRIVERS = ["nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    """A workstation, as it is before anybody thought of passthrough."""
    made = FakeNode.create(tmp_path / "node", "workstation")
    for address, driver in zip([*CARD, T4], [*HOST_DRIVERS, "nvidia"], strict=True):
        made.bind(address, driver)
    return made


@pytest.fixture
def run(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb on that node. Returns its status, and what it printed to stdout and stderr."""

    def run_verb(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["vfio", *arguments, "--fake-sysfs", str(node.root)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_verb


def drivers(node: FakeNode, addresses: list[str] = CARD) -> list[str | None]:
    return [node.function(address).driver for address in addresses]


def overrides(node: FakeNode) -> list[str]:
    return [(node.folder(address) / "driver_override").read_text().strip() for address in CARD]


def test_bind_takes_a_card_with_all_its_functions_and_unbind_gives_each_its_driver_back(
    node: FakeNode, run: Run
) -> None:
    node.bind(AUDIO, "pci-stub")  # somebody's choice, which no probe would make
    status, said, _ = run("bind", "01:00.0")
    assert (status, said.splitlines()) == (0, [f"{address}: vfio-pci, /dev/vfio/11" for address in CARD])
    assert drivers(node) == ["vfio-pci"] * 4
    status, said, _ = run("unbind", GPU)
    assert status == 0
    assert drivers(node) == ["nvidia", "pci-stub", "xhci_hcd", "nvidia-gpu"]
    assert overrides(node) == ["(null)"] * 4


def test_binding_again_changes_nothing_and_forgets_nothing(node: FakeNode, run: Run) -> None:
    run("bind", "--all")
    assert run("bind", "--all")[:2] == (0, "nothing to do: a vfio driver has all of them\n")
    run("unbind", "--all")
    assert drivers(node) == HOST_DRIVERS
    assert run("unbind", "--all")[:2] == (0, "nothing to do: no vfio driver has any of them\n")


def test_a_driver_that_no_probe_would_choose_is_remembered_over_the_command(node: FakeNode, run: Run) -> None:
    node.bind(T4, "nouveau")
    run("bind", T4)
    document = json.loads((node.root / "run/sandbox-plugin/vfio.json").read_text())
    assert document["functions"] == {T4: {"driver": "nouveau", "model": "10de:1eb8"}}
    assert json.loads(run("status", "--output", "json")[1])["functions"][-1]["remembered_driver"] == "nouveau"


@pytest.mark.parametrize("spoiled", ["another boot", "another device", "nonsense", "a list", "another version"])
def test_what_was_remembered_of_another_boot_or_device_is_not_believed(node: FakeNode, run: Run, spoiled: str) -> None:
    node.bind(T4, "pci-stub")
    run("bind", T4)
    file = node.root / "run/sandbox-plugin/vfio.json"
    if spoiled == "another boot":
        (node.root / "proc/sys/kernel/random/boot_id").write_text("another\n")
    text = file.read_text()
    changed = {"another device": text.replace("1eb8", "1eb9"), "another version": text.replace(": 1,", ": 2,")}
    file.write_text(changed.get(spoiled, {"nonsense": "{", "a list": "[]"}.get(spoiled, text)))
    assert run("unbind", T4)[0] == 0
    assert drivers(node, [T4]) == ["nvidia"]  # the kernel's choice


def test_a_memory_that_cannot_be_written_costs_no_more_than_that(node: FakeNode, run: Run) -> None:
    (node.root / "run").write_text("")
    status, _, complaint = run("bind", T4)
    assert (status, drivers(node, [T4])) == (0, ["vfio-pci"])
    assert "will leave the driver to the kernel" in complaint
    assert run("unbind", T4)[0] == 0


def test_a_memory_that_cannot_be_cleared_is_reported(node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("bind", T4)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sandbox_plugin.vfio.memory.replace_text", full)
    status, _, complaint = run("unbind", T4)
    assert (status, drivers(node, [T4])) == (0, ["nvidia"])
    assert "No space left" in complaint


def test_dry_run_prints_each_write_as_a_line_for_a_shell_and_does_nothing(node: FakeNode, run: Run) -> None:
    shutil.rmtree(node.root / "sys/bus/pci/drivers/vfio-pci")
    status, said, _ = run("bind", T4, "--dry-run")
    assert status == 0
    assert said.splitlines() == [
        "# IOMMU group 13",
        "modprobe vfio_pci",
        f"# {T4}: nvidia -> vfio-pci",
        f"echo vfio-pci > /sys/bus/pci/devices/{T4}/driver_override",
        f"echo {T4} > /sys/bus/pci/drivers/nvidia/unbind",
        f"echo {T4} > /sys/bus/pci/drivers_probe",
    ]
    assert drivers(node, [T4]) == ["nvidia"]
    assert not (node.root / "run").exists()
    assert run("unbind", T4, "--dry-run")[:2] == (0, "# nothing to do\n")


def test_a_module_that_is_not_loaded_is_loaded(node: FakeNode, run: Run) -> None:
    shutil.rmtree(node.root / "sys/bus/pci/drivers/vfio-pci")
    assert run("bind", T4)[0] == 0
    assert drivers(node, [T4]) == ["vfio-pci"]


def test_a_module_that_cannot_be_loaded_leaves_all_as_it_was(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(node.root / "sys/bus/pci/drivers/vfio-pci")

    def missing(*_: object) -> None:
        raise OSError(errno.ENOENT, "there is no modprobe here")

    monkeypatch.setattr(FakeKernel, "load", missing)
    status, _, complaint = run("bind", T4)
    assert (status, complaint) == (1, "sandbox-plugin: nothing is changed: there is no modprobe here\n")


def test_a_grace_hopper_gets_its_own_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode.create(tmp_path / "node", "gh200")
    address = "0009:01:00.0"
    node.bind(address, "vfio-pci")
    assert main(["vfio", "bind", "--all", "--fake-sysfs", str(node.root)]) == 0
    assert drivers(node, [address]) == ["nvgrace_gpu_vfio_pci"]
    assert capsys.readouterr().out == f"{address}: nvgrace_gpu_vfio_pci, /dev/vfio/devices/vfio0\n"
    assert main(["vfio", "bind", "--all", "--persist", "--fake-sysfs", str(node.root)]) == 0
    said = capsys.readouterr()
    assert "options" not in said.out
    assert f"run `vfio bind` at every boot for {address} (nvgrace_gpu_vfio_pci)" in said.err


def test_what_a_vm_has_is_refused_and_the_others_are_done(node: FakeNode, run: Run) -> None:
    run("bind", "--all")
    node.set_enable(T4, 1)
    status, said, complaint = run("unbind", "--all")
    assert status == 1
    assert complaint == f"sandbox-plugin: refused, IOMMU group 13: {T4}: a VM has it (enable is 1)\n"
    assert drivers(node) == HOST_DRIVERS
    assert drivers(node, [T4]) == ["vfio-pci"]
    assert said.count("\n") == 4


def test_a_write_that_waits_for_a_vm_ends_the_command_with_status_1(node: FakeNode, run: Run) -> None:
    run("bind", T4)
    node.set_enable(T4, 1)
    status, _, complaint = run("unbind", T4, "--force", "--timeout", "0.5")
    assert status == 1
    assert f"{T4}: the kernel waits in unbind until whoever uses it lets go" in complaint
    assert "back to" not in complaint
    status, _, complaint = run("bind", T4)
    assert (status, "enabled without a driver" in complaint) == (1, True)
    node.set_enable(T4, 0)
    assert run("bind", T4)[0] == 0


def test_a_vm_that_takes_the_device_at_the_last_moment_keeps_it(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("bind", "--all")
    write = FakeKernel.write

    def quick(kernel: FakeKernel, path: str, text: str) -> None:
        write(kernel, path, text)
        if path.endswith(f"{GPU}/driver_override") and text == "nvidia":
            node.set_enable(GPU, 1)

    monkeypatch.setattr(FakeKernel, "write", quick)
    status, _, complaint = run("unbind", GPU)
    assert status == 1
    assert complaint.splitlines() == [
        f"sandbox-plugin: {GPU}: a VM has just taken it",
        f"sandbox-plugin: {GPU}: back to vfio-pci",
    ]
    assert drivers(node) == ["vfio-pci"] * 4
    assert overrides(node) == ["vfio-pci"] * 4


@pytest.fixture
def failing_probe(monkeypatch: pytest.MonkeyPatch) -> str:
    """The probe of one function of the card fails: the kernel says nothing, and binds nothing."""
    write, failing = FakeKernel.write, CARD[2]

    def writes(kernel: FakeKernel, path: str, text: str) -> None:
        if (path.rpartition("/")[2], text) != ("drivers_probe", failing):
            write(kernel, path, text)

    monkeypatch.setattr(FakeKernel, "write", writes)
    return failing


def test_a_probe_that_fails_puts_the_whole_group_back_and_leaves_other_groups_alone(
    node: FakeNode, run: Run, failing_probe: str
) -> None:
    node.override(GPU, "nvidia")
    status, said, complaint = run("bind", "--all")
    assert status == 1
    assert f"{failing_probe}: vfio-pci did not take it (no driver has it): see dmesg" in complaint
    for address, driver in zip(CARD, HOST_DRIVERS, strict=True):
        assert f"{address}: back to {driver}" in complaint
    assert drivers(node) == HOST_DRIVERS
    assert overrides(node) == ["nvidia", *["(null)"] * 3]
    assert said == f"{T4}: vfio-pci, /dev/vfio/13\n"


def test_nothing_is_persisted_of_what_failed(node: FakeNode, run: Run, failing_probe: str) -> None:
    assert run("bind", GPU, "--persist")[0] == 1
    assert list((node.root / "etc/modprobe.d").iterdir()) == []


def test_a_signal_puts_the_group_back_too(node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FakeKernel.write

    def interrupted(kernel: FakeKernel, path: str, text: str) -> None:
        if path.endswith(f"{AUDIO}/driver_override") and text == "vfio-pci":
            raise Interrupted(15)
        write(kernel, path, text)

    monkeypatch.setattr(FakeKernel, "write", interrupted)
    assert run("bind", GPU)[0] == 128 + 15
    assert drivers(node) == HOST_DRIVERS


def test_what_cannot_be_written_is_said_with_the_kernels_word(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FakeKernel, "write", read_only)
    assert run("bind", T4) == (1, "", f"sandbox-plugin: {T4}: driver_override: Read-only file system\n")
    monkeypatch.setattr(FakeKernel, "read", read_only)
    assert run("bind", T4) == (1, "", f"sandbox-plugin: {T4}: driver_override: Read-only file system\n")


def test_what_cannot_be_put_back_is_said(node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FakeKernel.write

    def then_read_only(kernel: FakeKernel, path: str, text: str) -> None:
        if path.endswith("drivers_probe"):
            monkeypatch.setattr(FakeKernel, "write", refuses)
            raise OSError(errno.EIO, "Input/output error")
        write(kernel, path, text)

    def refuses(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FakeKernel, "write", then_read_only)
    status, _, complaint = run("bind", T4)
    assert status == 1
    assert complaint.splitlines() == [
        f"sandbox-plugin: {T4}: drivers_probe: Input/output error",
        f"sandbox-plugin: {T4}: cannot be put back: Read-only file system",
    ]


def test_a_driver_that_went_meanwhile_cannot_have_it_back(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FakeKernel.write

    def unloads(kernel: FakeKernel, path: str, text: str) -> None:
        if path.endswith("drivers_probe"):
            shutil.rmtree(node.root / "sys/bus/pci/drivers/nvidia")
        else:
            write(kernel, path, text)

    monkeypatch.setattr(FakeKernel, "write", unloads)
    status, _, complaint = run("bind", T4)
    assert status == 1
    assert f"{T4}: not as it was, but with no driver" in complaint


def test_unbind_fails_when_a_vfio_driver_takes_it_again(node: FakeNode, run: Run) -> None:
    run("bind", T4)
    (node.root / ".fake-node/claims" / T4).write_text("vfio-pci")
    (node.root / "run/sandbox-plugin/vfio.json").unlink()
    status, _, complaint = run("unbind", T4)
    assert status == 1
    assert "vfio-pci takes it again, by the IDs that it was given" in complaint


def test_a_function_that_is_bound_without_a_node_is_not_taken_for_bound(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FakeKernel.write

    def without_node(kernel: FakeKernel, path: str, text: str) -> None:
        write(kernel, path, text)
        if path.endswith("drivers_probe"):
            (node.root / "dev/vfio/13").unlink()

    monkeypatch.setattr(FakeKernel, "write", without_node)
    status, _, complaint = run("bind", T4)
    assert status == 1
    assert f"{T4}: vfio-pci has it, and there is no VFIO node" in complaint


def test_a_function_that_vanishes_is_reported(node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FakeKernel.write

    def vanishes(kernel: FakeKernel, path: str, text: str) -> None:
        write(kernel, path, text)
        if path.endswith("drivers_probe"):
            node.remove(T4)

    monkeypatch.setattr(FakeKernel, "write", vanishes)
    status, _, complaint = run("bind", T4)
    assert (status, T4 in complaint, "vanishing" in complaint) == (1, True, True)


def test_persist_writes_what_makes_vfio_pci_come_first(node: FakeNode, run: Run) -> None:
    status, said, _ = run("bind", "--all", "--persist")
    assert status == 0
    loaded = (node.root / "etc/modules-load.d/sandbox-plugin.conf").read_text()
    settings = (node.root / "etc/modprobe.d/sandbox-plugin.conf").read_text()
    assert loaded.splitlines()[1:] == ["vfio-pci"]
    assert settings.splitlines()[1:] == [
        "options vfio-pci ids=10de:1aeb,10de:1aec,10de:1aed,10de:1eb8,10de:21c4",
        *(f"softdep {m} pre: vfio-pci" for m in ("i2c_nvidia_gpu", "nouveau", "nvidia", "snd_hda_intel", "xhci_pci")),
    ]
    assert settings.strip() in said
    assert "intel_iommu=on" in said
    assert sorted(p.name for p in (node.root / "etc/modprobe.d").iterdir()) == ["sandbox-plugin.conf"]


def test_persist_with_dry_run_writes_nothing(node: FakeNode, run: Run) -> None:
    status, said, _ = run("bind", "--all", "--persist", "--dry-run")
    assert (status, "/etc/modprobe.d/sandbox-plugin.conf would be written" in said) == (0, True)
    assert list((node.root / "etc/modprobe.d").iterdir()) == []


def test_persist_without_the_hosts_etc_is_an_error(node: FakeNode, run: Run) -> None:
    (node.root / "etc/modules-load.d").rmdir()
    status, _, complaint = run("bind", T4, "--persist")
    assert (status, "is the host's /etc mounted here?" in complaint) == (1, True)
    assert list((node.root / "etc/modprobe.d").iterdir()) == []


def test_persist_says_where_modules_alias_is_missing(node: FakeNode, run: Run) -> None:
    shutil.rmtree(node.root / "lib")
    status, _, complaint = run("bind", T4, "--persist")
    assert (status, "no softdep lines" in complaint) == (0, True)


def test_persist_does_not_take_a_function_that_was_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = FakeNode.create(tmp_path / "node", "hgx-h100")
    arguments = ["vfio", "bind", "1b:00.0", "--persist", "--fake-sysfs", str(node.root)]
    assert main(arguments) == 1
    assert "by their IDs vfio-pci would also take 0000:43:00.0" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_a_file_that_cannot_be_written_whole_is_not_written(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sandbox_plugin.vfio.memory.os.fsync", full)
    run("bind", T4)
    status, _, complaint = run("bind", T4, "--persist")
    assert (status, complaint) == (
        1,
        f"sandbox-plugin: {node.root}/etc/modules-load.d/sandbox-plugin.conf: No space left on device\n",
    )
    assert list((node.root / "etc/modules-load.d").iterdir()) == []


def test_status_shows_each_function_and_what_bind_would_do(node: FakeNode, run: Run) -> None:
    run("bind", T4)
    node.set_enable(T4, 1)
    (node.folder(GPU) / "boot_vga").write_text("1\n")
    status, said, _ = run("status")
    assert status == 0
    table, notes = said.split("\n\n")
    assert [line.split()[:5] for line in table.splitlines()[1:]] == [
        [GPU, "11", "nvidia", "yes", "refuse"],
        *([address, "11", driver, "no", "refuse"] for address, driver in zip(CARD[1:], HOST_DRIVERS[1:], strict=True)),
        [T4, "13", "vfio-pci", "yes", "keep"],
    ]
    assert notes.splitlines() == [
        f"{GPU}: it is the display that this machine booted with",
        f"{T4}: a VM has it (enable is 1)",
    ]


def test_status_as_json(node: FakeNode, run: Run) -> None:
    document = json.loads(run("status", "--output", "json")[1])
    assert document["schema"] == 1
    assert document["functions"][-1] == {
        "pci_address": T4,
        "model": "TU104GL [Tesla T4]",
        "driver": "nvidia",
        "iommu_group": 13,
        "in_use": [],
        "bind": "vfio-pci",
        "refusals": [],
        "remembered_driver": None,
    }


def test_status_fits_a_terminal(node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    assert max(map(len, run("status")[1].splitlines())) <= 80


def test_status_lists_what_cannot_be_read_and_bind_leaves_it_out(node: FakeNode, run: Run) -> None:
    node.set_attribute(GPU, "vendor", "nonsense")
    assert f"{GPU}: cannot be read: vendor is" in run("status")[1]
    status, _, complaint = run("bind", "--all")
    assert (status, f"left out: {GPU} cannot be read" in complaint) == (0, True)
    assert run("bind", GPU)[0] == 2
    node.set_attribute(T4, "vendor", "nonsense")
    assert run("bind", T4)[0] == 2


def test_a_machine_without_gpus_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vfio", "bind", "--all", "--fake-sysfs", "empty"]) == 0
    assert "no function here is one of these" in capsys.readouterr().out
    assert main(["vfio", "status", "--fake-sysfs", "empty"]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_what_has_no_iommu_group_is_shown_and_refused(node: FakeNode, run: Run) -> None:
    (node.folder(T4) / "iommu_group").unlink()
    status, _, complaint = run("bind", T4)
    assert (status, "IOMMU group -:" in complaint) == (1, True)
    assert f"{T4}  -      nvidia" in run("status")[1]


def test_a_bus_that_cannot_be_read_is_an_error(node: FakeNode, run: Run) -> None:
    shutil.rmtree(node.root / "sys/bus/pci/devices")
    status, _, complaint = run("bind", "--all")
    assert (status, "the PCI bus cannot be read" in complaint) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "give one of: --all"),
        (["--all", GPU], "give one of: --all"),
        (["0000:77:00.0"], "there is no PCI function '0000:77:00.0'"),
        (["--model", "h100"], "is not VENDOR:DEVICE"),
        (["--all", "--timeout", "soon"], "is not a number of seconds"),
        (["--all", "--timeout", "0"], "is not a number of seconds"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(run: Run, arguments: list[str], why: str) -> None:
    status, _, complaint = run("bind", *arguments)
    assert (status, complaint.count("\n"), why in complaint) == (2, 1, True)


def test_a_model_is_given_by_its_ids(node: FakeNode, run: Run) -> None:
    assert run("bind", "--model", "10DE:1eb8")[0] == 0
    assert drivers(node) == HOST_DRIVERS
    assert drivers(node, [T4]) == ["vfio-pci"]


def test_a_tree_of_files_without_a_kernel_can_only_be_looked_at(node: FakeNode, run: Run) -> None:
    shutil.rmtree(node.root / ".fake-node")
    status, _, complaint = run("bind", T4)
    assert (status, "no kernel obeys" in complaint) == (2, True)
    assert run("bind", T4, "--dry-run")[0] == 0
    assert run("status")[0] == 0


def test_a_real_host_is_written_to_by_a_process_of_its_own() -> None:
    with command._kernel(Settings(), 1.0) as kernel:
        assert isinstance(kernel, HostKernel)


@pytest.mark.parametrize(
    ("path", "text", "number"),
    [
        ("devices/0000:02:00.0/enable", "1", errno.EACCES),
        ("drivers/nvidia/bind", T4, errno.ENODEV),
        ("drivers/vfio-pci/unbind", T4, errno.ENODEV),
        ("drivers/absent/bind", T4, errno.ENOENT),
        ("drivers/nvidia/unbind", "0000:77:00.0", errno.EBUSY),
    ],
)
def test_a_fake_kernel_refuses_what_a_kernel_would(node: FakeNode, path: str, text: str, number: int) -> None:
    with pytest.raises(OSError, match=rf"Errno {number}\b") as caught:
        FakeKernel(node).write(f"/sys/bus/pci/{path}", text)
    assert caught.value.errno == number


def test_a_probe_of_a_fake_kernel_takes_nothing_from_a_driver(node: FakeNode) -> None:
    node.override(T4, "vfio-pci")
    FakeKernel(node).write("/sys/bus/pci/drivers_probe", T4)
    assert drivers(node, [T4]) == ["nvidia"]
