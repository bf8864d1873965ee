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
from dataclasses import dataclass, field

import structlog

from sandbox_plugin.trouble import Trouble

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
"""Multicast group of the kernel's own messages; udev sends to group 2 (include/uapi/linux/netlink.h)."""
_MESSAGE_BYTES = 16384
"""Above the 2 KiB that the kernel allots to a message (UEVENT_BUFFER_SIZE)."""
_SUBSYSTEMS = frozenset({"pci", "vfio", "vfio-dev", "drivers", "module", "class", "mdev", "iommu"})


def open_netlink() -> socket.socket:
    """A socket that gets the kernel's messages. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    netlink = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
    netlink.bind((0, _KERNEL_GROUP))
    return netlink


@dataclass(kw_only=True, eq=False, repr=False)
class UeventSource:
    """Calls `on_change` for each message that may concern a device, and `on_aer(pci_address, error_event)` before it
    for each step of an error recovery (`BEGIN_RECOVERY`, `SUCCESSFUL_RECOVERY`, `FAILED_RECOVERY`)."""

    on_change: Callable[[], None]
    on_aer: Callable[[str, str], None]
    open_socket: Callable[[], socket.socket] = open_netlink
    retry: float = 60.0
    """Seconds before a socket that could not be had is tried again."""
    _trouble: Trouble = field(default_factory=Trouble)

    @property
    def trouble(self) -> str | None:
        """Why there are no kernel events; None: they come."""
        return self._trouble.now

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                with self.open_socket() as netlink:
                    await self._listen(netlink)
            except OSError as error:
                why = error.strerror or str(error)
                if self._trouble.update(why):
                    reason = f"{why}; until that works, changes are found by inotify and the timer"
                    log.warning("no kernel events", reason=reason)
                await asyncio.sleep(self.retry)

    async def _listen(self, netlink: socket.socket) -> None:
        """Reads messages until the socket fails. Raises OSError."""
        self._trouble.update(None)
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(netlink, readable.set)
        try:
            self.on_change()  # for what happened before we listened
            while True:
                await readable.wait()
                readable.clear()
                self._drain(netlink)
        finally:
            loop.remove_reader(netlink)

    def _drain(self, netlink: socket.socket) -> None:
        """Takes all messages that have come. Raises OSError."""
        while True:
            try:
                message, _, _, sender = netlink.recvmsg(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.on_change()  # some messages were lost: all the more reason to look
                continue
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
