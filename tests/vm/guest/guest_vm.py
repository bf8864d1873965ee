"""A pretend VM: holds a device through its group node, as QEMU does, until its standard input closes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

_BASE = ord(";") << 8
_SET_IOMMU, _SET_CONTAINER, _GET_DEVICE = _BASE | 102, _BASE | 104, _BASE | 106
"""VFIO_SET_IOMMU, VFIO_GROUP_SET_CONTAINER and VFIO_GROUP_GET_DEVICE_FD of include/uapi/linux/vfio.h."""
_TYPE1 = 1


def main() -> None:
    group, address = sys.argv[1:]
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    node = os.open(f"/dev/vfio/{group}", os.O_RDWR)
    fcntl.ioctl(node, _SET_CONTAINER, struct.pack("i", container))
    fcntl.ioctl(container, _SET_IOMMU, _TYPE1)
    device = ctypes.CDLL(None, use_errno=True).ioctl(node, _GET_DEVICE, ctypes.c_char_p(address.encode()))
    if device < 0:
        raise OSError(ctypes.get_errno(), "VFIO_GROUP_GET_DEVICE_FD")
    print("holds", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error}")
