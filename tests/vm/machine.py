"""The machine: QEMU with an emulated IOMMU, two NUMA nodes, devices in groups of their own and in a shared one.

The guest speaks over its serial line: `@@INIT` says that it has booted, `@@QMP {...}` asks for something on the
machine's outside (hot-plug), `@@END n` is its exit status. KVM hangs stock kernels on some hosts, so the emulator runs
the code itself (TCG) unless asked.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_DEVICES = (
    # Root ports: for devices that are there from the start; rp3 for hot-plug; rp4 on the second NUMA node.
    "pcie-root-port,id=rp1,bus=pcie.0,chassis=1,slot=1,addr=04.0,multifunction=on",
    "pcie-root-port,id=rp2,bus=pcie.0,chassis=2,slot=2,addr=04.1",
    "pcie-root-port,id=rp3,bus=pcie.0,chassis=3,slot=3,addr=04.2",
    "pcie-root-port,id=rp5,bus=pcie.0,chassis=5,slot=5,addr=04.3",
    "pcie-root-port,id=rp6,bus=pcie.0,chassis=6,slot=6,addr=04.4",
    "pcie-root-port,id=rp7,bus=pcie.0,chassis=7,slot=7,addr=04.5",
    "pxb-pcie,id=pxb1,bus=pcie.0,bus_nr=128,numa_node=1",
    "pcie-root-port,id=rp4,bus=pxb1,chassis=4,slot=4",
    # 01:00.0 a "GPU" alone; 02:00.0 one with another function in its group; 81:00.0 one on the other NUMA node.
    "virtio-gpu-pci,id=gpu0,bus=rp1,aer=on",
    "virtio-gpu-pci,id=gpu1,bus=rp2,addr=00.0,multifunction=on",
    "virtio-rng-pci,id=rng1,bus=rp2,addr=00.1",
    "virtio-gpu-pci,id=gpu2,bus=rp4",
    # 04:00.0 and 04:00.1 two that are offered, in one group; neither of them can be reset. 05:00.0 and 06:00.0 alone.
    "ati-vga,id=card0,bus=rp5,addr=00.0,multifunction=on,romfile=",
    "intel-hda,id=sound0,bus=rp5,addr=00.1",
    "e1000e,id=nic0,bus=rp6,romfile=",
    "nvme,id=disk0,bus=rp7,serial=0",
)
_KERNEL_LINE = (
    "console=ttyS0 intel_iommu=on loglevel=4 panic=-1 pcie_ports=native rdinit=/guest/init"
    # Not clocksource=tsc: on a busy host the kernel measures the emulator's TSC wrong, ten times too fast or too slow.
    # A timer that repeats: on a busy host the emulator now and then loses the interrupt of one that is set anew each
    # time, and then nothing on that CPU wakes by time any more ("rcu_sched detected stalls").
    " nohz=off highres=off"
    " mitigations=off"  # they protect nobody here, and cost most where every instruction is emulated
)
_BOOT_SECONDS, _BOOTS = 120.0, 3
"""The emulator boots in 6 to 20 s, and now and then not at all; then it is what is tried again, never a case. So it is
when QEMU itself crashes, as it did once in some thirty runs."""
_SILENCE = 400.0
"""Seconds without a word from a guest that would say after 300 that it is stuck (`STUCK` in guest/cases.py): the
emulator has lost its timers, so that nothing in it wakes by time any more. Then it is booted anew, too."""


def run_machine(kernel: Path, initrd: Path, seconds: float, *, parameters: str = "") -> int:
    """Boots, obeys and prints until the guest ends. Returns its exit status, or 1 when it ended otherwise.

    Of the kernel's `parameters` those that it does not know become the environment of the guest's init. A machine that
    does not come as far as that, or whose emulator crashes or stops, is booted anew.
    """
    for boot in range(1, _BOOTS + 1):
        with tempfile.TemporaryDirectory(prefix="sandbox-vm-") as folder:
            serial, control = f"{folder}/serial", f"{folder}/qmp"
            command = _command(kernel, initrd, f"{_KERNEL_LINE} {parameters}", serial, control)
            qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            with _killed_after(_BOOT_SECONDS, qemu) as booting, _killed_after(seconds, qemu):
                is_silent = False
                try:
                    with _connect(control, qemu) as commands, _connect(serial, qemu) as lines:
                        lines.settimeout(_SILENCE)
                        status = _converse(commands.makefile("rw"), lines.makefile("rb"), booting)
                except TimeoutError:
                    is_silent = True
                finally:
                    qemu.kill()
                    qemu.wait()
        if is_silent:
            print(f"no word for {_SILENCE:g} s, boot {boot} of {_BOOTS}: all of it once more")
        elif qemu.returncode == -signal.SIGSEGV:  # it was not we who ended it
            print(f"QEMU has crashed (SIGSEGV), boot {boot} of {_BOOTS}: all of it once more")
        elif status is not None:
            return status
        else:
            print(f"boot {boot} of {_BOOTS} did not reach init in {_BOOT_SECONDS:g} s")
    return 1


@contextmanager
def _killed_after(seconds: float, qemu: subprocess.Popen[bytes]) -> Iterator[threading.Timer]:
    watchdog = threading.Timer(seconds, qemu.kill)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.cancel()
        watchdog.join()


def _command(kernel: Path, initrd: Path, kernel_line: str, serial: str, control: str) -> list[str]:
    accelerator = os.environ.get("SANDBOX_VM_ACCEL", "tcg")
    options = [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"q35,accel={accelerator}", "-cpu", "max", "-smp", "2", "-m", "1536"),
        *("-object", "memory-backend-ram,id=m0,size=768M", "-numa", "node,nodeid=0,cpus=0,memdev=m0"),
        *("-object", "memory-backend-ram,id=m1,size=768M", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
        *("-device", "intel-iommu,intremap=on"),
        *("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),  # hot-plug the PCIe way
        *("-serial", f"unix:{serial},server=on,wait=off", "-qmp", f"unix:{control},server=on,wait=off"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", kernel_line),
    ]
    devices = [word for device in _DEVICES for word in ("-device", device)]
    return ["qemu-system-x86_64", *options, *devices]


def _connect(path: str, qemu: subprocess.Popen[bytes]) -> socket.socket:
    """Connects as soon as QEMU listens. Raises RuntimeError when it ends instead."""
    while qemu.poll() is None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            time.sleep(0.05)
        else:
            return connection
    raise RuntimeError(f"QEMU ended with status {qemu.returncode}")


def _converse(commands: IO[str], lines: IO[bytes], booting: threading.Timer) -> int | None:
    """Obeys and prints until the guest ends. Returns its exit status; 1 when it ended without; None without init."""
    commands.readline()  # QMP's greeting
    _ask(commands, '{"execute": "qmp_capabilities"}')
    started = time.monotonic()
    has_booted = False
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip()
        if match := re.match(r"@@END (\d+)", line):
            return int(match[1])
        if line.startswith("@@QMP "):
            _ask(commands, line.removeprefix("@@QMP "))
        elif line == "@@INIT":
            booting.cancel()
            has_booted = True
        else:
            print(f"[{time.monotonic() - started:6.1f}] {line}", flush=True)
    if not has_booted:
        return None
    print("the machine ended without a result")
    return 1


def _ask(commands: IO[str], command: str) -> None:
    commands.write(command + "\n")
    commands.flush()
    for line in commands:
        answer = json.loads(line)
        if "error" in answer:
            print(f"QMP: {answer['error']}")
        if "return" in answer or "error" in answer:
            return
