"""Runs a command as a container without privileges would run it: own network namespace, uid 65534, no capability."""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNET = 0x40000000
_PR_SET_NO_NEW_PRIVS = 38


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        sys.exit(f"unprivileged: {os.strerror(ctypes.get_errno())}")
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # of a process that was root the kernel takes all capabilities with this
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
