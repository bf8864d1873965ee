"""The daemon on a real kernel: prepares a machine, boots it, and ends with the status of the cases in the guest.

    python tests/vm/run.py [WORK FOLDER]

`just test-vm` installs QEMU and calls this with .venv's Python. docs/vm-test.md tells more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from machine import run_machine
from prepare import ROOT, prepare

_PATIENCE = 600.0
"""Seconds for everything in the guest."""


def main() -> int:
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".cache/vm"
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    kernel, initrd = prepare(work)
    print(f"{kernel.name}, initramfs of {initrd.stat().st_size >> 20} MiB, ready in {time.monotonic() - started:.0f} s")
    status = run_machine(kernel, initrd, _PATIENCE)
    print(f"all in {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
