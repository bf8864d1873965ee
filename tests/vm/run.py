"""The daemon on a real kernel: prepares a machine, boots it, and ends with the status of the cases in the guest.

    python tests/vm/run.py [--cdevs] [WORK FOLDER]

`just test-vm` installs QEMU and calls this with .venv's Python. `just test-vm-cdev` does so with --cdevs, and takes the
kernel that scripts/build-cdev-kernel.sh has built. docs/vm-test.md tells more.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from machine import run_machine
from prepare import ROOT, prepare

_PATIENCE = 1800.0
"""Seconds for everything in the guest."""
_CDEV_WORK = ROOT / ".cache/vm-cdev"


def main() -> int:
    parser = argparse.ArgumentParser(description="the daemon on a real kernel in QEMU")
    parser.add_argument("--cdevs", action="store_true", help="on the kernel with VFIO cdevs that was built here")
    parser.add_argument("work", nargs="?", type=Path, help="folder that keeps the downloads")
    arguments = parser.parse_args()
    work: Path = arguments.work or (_CDEV_WORK if arguments.cdevs else ROOT / ".cache/vm")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    kernel, initrd = prepare(work, _CDEV_WORK / "kernel" if arguments.cdevs else None)
    print(f"{kernel.name}, initramfs of {initrd.stat().st_size >> 20} MiB, ready in {time.monotonic() - started:.0f} s")
    status = run_machine(kernel, initrd, _PATIENCE, parameters="SANDBOX_CDEVS=1" if arguments.cdevs else "")
    print(f"all in {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
