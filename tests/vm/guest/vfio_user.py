"""The VM's side of VFIO: gets devices from the kernel as QEMU does, holds them, and lets them go.

    vfio_user.py [FOLDER]

Reads one command a line from standard input, and answers each with one line:

    hold NODE ADDRESS...    `in`, or `refused: what failed, where and why`; what was held before stays held
    try NODE ADDRESS...     the same, but it lets go of this device at once
    let-go                  `free`

NODE is a group's node or a device's cdev. Of a group the functions with these addresses are taken; a cdev is one
function, whatever its address. It ends, and lets go, when its standard input closes. With FOLDER it sees no more of
the file system than that folder, as a container does.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_VFIO = ord(";") << 8
_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = _VFIO | 100, _VFIO | 101, _VFIO | 102
_GET_STATUS, _SET_CONTAINER, _GET_DEVICE, _REGION_INFO = _VFIO | 103, _VFIO | 104, _VFIO | 106, _VFIO | 108
_BIND_IOMMUFD, _ATTACH_IOMMUFD = _VFIO | 118, _VFIO | 119
_IOAS_ALLOC = _VFIO | 0x81
"""The ioctls of include/uapi/linux/vfio.h, in the order of their numbers, and IOMMU_IOAS_ALLOC of linux/iommufd.h."""
_TYPE1V2 = 3
_VIABLE = 1
_CONFIG_REGION = 7
_NOBODY = b"\xff\xff"
"""What the vendor ID reads as where no device answers."""
_CDEVS = "/dev/vfio/devices/"


class Refused(Exception):
    """What failed, where and why, in words."""


def main() -> None:
    if sys.argv[1:]:
        os.chroot(sys.argv[1])
        os.chdir("/")
    held = ExitStack()
    for line in sys.stdin:
        command, *words = line.split()
        try:
            if command == "hold":
                held.push(take(words[0], words[1:]))
            elif command == "try":
                take(words[0], words[1:]).close()
            else:
                held.close()
            answer = "free" if command == "let-go" else "in"
        except Refused as refused:
            answer = f"refused: {refused}"
        print(answer, flush=True)


def take(node: str, addresses: list[str]) -> ExitStack:
    """Gets the device or devices behind a node. Closing what it returns lets go of them. Raises Refused."""
    with ExitStack() as stack:
        is_cdev = node.startswith(_CDEVS)
        devices = {node: _by_cdev(stack, node)} if is_cdev else _by_group(stack, node, addresses)
        for name, device in devices.items():
            _expect_answer(name, device)
        return stack.pop_all()


def _by_group(stack: ExitStack, node: str, addresses: list[str]) -> dict[str, int]:
    """A group in a container of its own (Documentation/driver-api/vfio.rst, "VFIO Usage Example")."""
    group = _open(stack, node)
    with _doing(f"VFIO_GROUP_GET_STATUS of {node}"):
        status = bytearray(struct.pack("=II", 8, 0))
        fcntl.ioctl(group, _GET_STATUS, status)
    if not struct.unpack_from("=I", status, 4)[0] & _VIABLE:
        raise Refused(f"VFIO_GROUP_GET_STATUS of {node}: the group is not viable")
    container = _open(stack, "/dev/vfio/vfio")
    with _doing("VFIO_GET_API_VERSION, VFIO_CHECK_EXTENSION"):
        if fcntl.ioctl(container, _GET_API_VERSION) != 0 or fcntl.ioctl(container, _CHECK_EXTENSION, _TYPE1V2) != 1:
            raise Refused("/dev/vfio/vfio: not version 0, or no IOMMU of type 1")
    with _doing(f"VFIO_GROUP_SET_CONTAINER of {node}"):
        fcntl.ioctl(group, _SET_CONTAINER, struct.pack("=i", container))
    with _doing(f"VFIO_SET_IOMMU with {node}"):
        fcntl.ioctl(container, _SET_IOMMU, _TYPE1V2)
    devices = {}
    for address in addresses:
        with _doing(f"VFIO_GROUP_GET_DEVICE_FD of {address} in {node}"):
            devices[address] = fcntl.ioctl(group, _GET_DEVICE, bytearray(address.encode() + b"\0"))
        stack.callback(os.close, devices[address])
    return devices


def _by_cdev(stack: ExitStack, node: str) -> int:
    """A device in an address space of its own (Documentation/driver-api/vfio.rst, "VFIO Device cdev Example")."""
    iommufd = _open(stack, "/dev/iommu")
    device = _open(stack, node)
    with _doing(f"VFIO_DEVICE_BIND_IOMMUFD of {node}"):
        fcntl.ioctl(device, _BIND_IOMMUFD, bytearray(struct.pack("=IIiI", 16, 0, iommufd, 0)))
    with _doing("IOMMU_IOAS_ALLOC"):
        space = bytearray(struct.pack("=III", 12, 0, 0))
        fcntl.ioctl(iommufd, _IOAS_ALLOC, space)
    with _doing(f"VFIO_DEVICE_ATTACH_IOMMUFD_PT of {node}"):
        (space_id,) = struct.unpack_from("=I", space, 8)
        fcntl.ioctl(device, _ATTACH_IOMMUFD, bytearray(struct.pack("=III", 12, 0, space_id)))
    return device


def _expect_answer(name: str, device: int) -> None:
    """Reads the vendor ID: the kernel also gives away a device that has lost its power. Raises Refused."""
    with _doing(f"VFIO_DEVICE_GET_REGION_INFO of {name}"):
        region = bytearray(struct.pack("=IIIIQQ", 32, 0, _CONFIG_REGION, 0, 0, 0))
        fcntl.ioctl(device, _REGION_INFO, region)
    with _doing(f"reading the configuration space of {name}"):
        vendor = os.pread(device, 2, struct.unpack_from("=Q", region, 24)[0])
    if vendor == _NOBODY:
        raise Refused(f"reading the configuration space of {name}: the device does not answer")


def _open(stack: ExitStack, path: str) -> int:
    with _doing(f"open of {path}"):
        descriptor = os.open(path, os.O_RDWR)
    stack.callback(os.close, descriptor)
    return descriptor


@contextmanager
def _doing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"{what}: {error.strerror}") from None


if __name__ == "__main__":
    main()
