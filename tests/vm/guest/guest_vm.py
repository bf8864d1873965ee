"""A pretend VM: holds a device through its node, as QEMU does, until its standard input closes."""

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
_BIND_IOMMUFD, _ATTACH_IOMMUFD, _IOAS_ALLOC = _BASE | 118, _BASE | 119, _BASE | 0x81
"""VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_ATTACH_IOMMUFD_PT; IOMMU_IOAS_ALLOC of include/uapi/linux/iommufd.h."""


def main() -> None:
    path, address = sys.argv[1:]
    node = os.open(path, os.O_RDWR)
    if path.startswith("/dev/vfio/devices/"):
        _hold_cdev(node)
    else:
        _hold_group(node, address)
    print("holds", flush=True)
    sys.stdin.read()


def _hold_cdev(node: int) -> None:
    """Binds the device to an address space of its own (Documentation/driver-api/vfio.rst, "VFIO device cdev")."""
    iommufd = os.open("/dev/iommu", os.O_RDWR)
    fcntl.ioctl(node, _BIND_IOMMUFD, bytearray(struct.pack("=IIiI", 16, 0, iommufd, 0)))
    space = bytearray(struct.pack("=III", 12, 0, 0))
    fcntl.ioctl(iommufd, _IOAS_ALLOC, space)
    (space_id,) = struct.unpack_from("=I", space, 8)
    fcntl.ioctl(node, _ATTACH_IOMMUFD, bytearray(struct.pack("=III", 12, 0, space_id)))


def _hold_group(node: int, address: str) -> None:
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    fcntl.ioctl(node, _SET_CONTAINER, struct.pack("i", container))
    fcntl.ioctl(container, _SET_IOMMU, _TYPE1)
    device = ctypes.CDLL(None, use_errno=True).ioctl(node, _GET_DEVICE, ctypes.c_char_p(address.encode()))
    if device < 0:
        raise OSError(ctypes.get_errno(), "VFIO_GROUP_GET_DEVICE_FD")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error}")
