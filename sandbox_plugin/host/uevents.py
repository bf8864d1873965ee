"""Kernel uevents over netlink: the fastest word of a bind, an unbind, a hot-add, a hot-remove or a PCIe error.

Every message is only a reason to look, except for the outcome of an error recovery (AER), which sysfs does not tell.
They reach a process in its own network namespace and without capabilities, but not one in a user namespace of its
own: then, or where the socket cannot be had at all, the timer alone is still right.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
"""Multicast group of the kernel's own messages; udev sends to group 2 (include/uapi/linux/netlink.h)."""
_MESSAGE_BYTES = 16384
"""Above the 2 KiB that the kernel allots to a message (UEVENT_BUFFER_SIZE)."""
_SUBSYSTEMS = frozenset({"pci", "vfio", "vfio-dev", "drivers", "module", "class", "mdev", "iommu"})


@dataclass(kw_only=True)
class UeventSource:
    """Calls `on_change` for each message that may concern a device, and `on_aer(pci_address, error_event)` before it
    for each step of an error recovery (`BEGIN_RECOVERY`, `SUCCESSFUL_RECOVERY`, `FAILED_RECOVERY`)."""

    on_change: Callable[[], None]
    on_aer: Callable[[str, str], None]
    retry: float = 60.0
    """Seconds before a socket that could not be had is tried again."""
    _failing: bool = False

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self._listen()
            except OSError as error:
                if not self._failing:
                    reason = f"{error.strerror or error}; until that works, changes are found by inotify and the timer"
                    log.warning("no kernel events", reason=reason)
                self._failing = True
                await asyncio.sleep(self.retry)

    async def _listen(self) -> None:
        """Reads messages until the socket fails. Raises OSError."""
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT) as netlink:
            netlink.bind((0, _KERNEL_GROUP))
            self._failing = False
            broken: asyncio.Future[None] = loop.create_future()
            loop.add_reader(netlink, self._drain, netlink, broken)
            try:
                self.on_change()  # for what happened before we listened
                await broken
            finally:
                loop.remove_reader(netlink)

    def _drain(self, netlink: socket.socket, broken: asyncio.Future[None]) -> None:
        while True:
            try:
                message, _, _, sender = netlink.recvmsg(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some messages were lost: all the more reason to look
                    self.on_change()
                    continue
                if not broken.done():
                    broken.set_exception(error)
                return
            if sender[0] == 0:  # from the kernel: a process may send to this group too
                self._take(parse_uevent(message))

    def _take(self, fields: dict[str, str]) -> None:
        if fields.get("SUBSYSTEM") not in _SUBSYSTEMS:
            return
        if "ERROR_EVENT" in fields and "PCI_SLOT_NAME" in fields:
            self.on_aer(fields["PCI_SLOT_NAME"], fields["ERROR_EVENT"])
        self.on_change()


def parse_uevent(message: bytes) -> dict[str, str]:
    """The `KEY=value` fields of one message (lib/kobject_uevent.c). The header, and what is malformed, is left out."""
    fields = {}
    for part in message.split(b"\0"):
        key, separator, value = part.partition(b"=")
        if separator:
            fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    return fields
