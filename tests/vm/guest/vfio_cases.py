"""`sandbox-plugin vfio` on this kernel: a sibling, a roll back, and a device that a VM has.

Its own module because these are cases of a command, while the daemon runs and must agree with what comes of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from judge import vm
from kernel import PCI, driver, expect, wait_until

HOST_DRIVER = "virtio-pci"
_ENDS_WITHIN = 240.0
"""Seconds that the emulator may need for one command; a write that the kernel holds takes for ever."""


def vfio(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command until its process is reaped and its output closed: both hang if a write can hold it up.

    Raises subprocess.TimeoutExpired.
    """
    command = [sys.executable, "-m", "sandbox_plugin", "vfio", *arguments, "--config", "/guest/rules.toml"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_ENDS_WITHIN)


def expect_status(status: int, *arguments: str) -> str:
    """Runs the command, and returns what it said. Raises AssertionError."""
    ended = vfio(*arguments)
    said = ended.stdout + ended.stderr
    expect(ended.returncode == status, f"vfio {' '.join(arguments)}: status {ended.returncode}: {said}")
    return said


def takes_the_sibling_back_and_forth(gpu: str, sibling: str) -> None:
    """There by the command, back by the lines of --dry-run in a shell, and there again."""
    expect_status(0, "unbind", gpu)
    _expect_drivers(HOST_DRIVER, gpu, sibling)
    lines = expect_status(0, "bind", gpu, "--dry-run")
    _expect_drivers(HOST_DRIVER, gpu, sibling)
    subprocess.run(["sh", "-e"], input=lines, text=True, check=True)
    _expect_drivers("vfio-pci", gpu, sibling)
    expect_status(0, "unbind", gpu)
    _expect_drivers(HOST_DRIVER, gpu, sibling)
    said = expect_status(0, "bind", gpu)
    expect(f"{sibling}: vfio-pci, /dev/vfio/" in said, said)
    _expect_drivers("vfio-pci", gpu, sibling)
    expect("nothing to do" in expect_status(0, "bind", gpu), "a second bind does something")
    expect_status(0, "unbind", gpu)
    _expect_drivers(HOST_DRIVER, gpu, sibling)  # as remembered


def is_put_back_when_a_probe_fails(gpu: str, sibling: str) -> None:
    """Nobody probes: what was written to drivers_probe went into a file that lies over it."""
    hole = Path("/tmp/drivers_probe")
    hole.touch()
    subprocess.run(["mount", "--bind", str(hole), str(PCI / "drivers_probe")], check=True)
    try:
        said = expect_status(1, "bind", gpu)
    finally:
        subprocess.run(["umount", str(PCI / "drivers_probe")], check=True)
    expect(hole.read_text() != "", "the command did not ask for a probe")
    expect(f"{gpu}: vfio-pci did not take it" in said, said)
    for address in (gpu, sibling):
        expect(f"{address}: back to {HOST_DRIVER}" in said, said)
        override = (PCI / "devices" / address / "driver_override").read_text().strip()
        expect(override == "(null)", f"driver_override of {address} is {override}")
    _expect_drivers(HOST_DRIVER, gpu, sibling)
    expect_status(0, "bind", gpu)


def is_not_taken_from_a_vm(gpu: str) -> None:
    """Refused; with --force the write waits in the kernel, and the command ends all the same."""
    with vm(gpu) as user:
        said = expect_status(1, "unbind", gpu)
        expect("a VM has it" in said, said)
        expect(driver(gpu) == "vfio-pci", "it was refused, and done")
        said = expect_status(1, "unbind", gpu, "--force", "--timeout", "5")
        expect("the kernel waits in unbind" in said, said)
        expect(driver(gpu) is None, "the unbind did not begin")
        said = expect_status(1, "bind", gpu, "--timeout", "5")
        expect("enabled without a driver" in said, said)
        user.let_go()
        enable = PCI / "devices" / gpu / "enable"
        wait_until(lambda: enable.read_text().strip() == "0", "the end of the unbind")
    expect_status(0, "bind", gpu)
    expect(driver(gpu) == "vfio-pci", f"{gpu} has driver {driver(gpu)}")


def _expect_drivers(name: str, *addresses: str) -> None:
    found = {address: driver(address) for address in addresses}
    expect(set(found.values()) == {name}, f"{name} expected: {found}")
