"""Writes to the sysfs of a fake node, with the effect that a kernel gives them: what `vfio bind` does to it.

A fake tree is made of plain files, so a write by itself would change a text and nothing else.
"""

from __future__ import annotations

import errno
import re

from sandbox_plugin.fake.node import FakeNode, FakeNodeError


class FakeKernel:
    """The kernel of one fake node, with all modules."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def write(self, path: str, text: str) -> None:
        """Raises OSError where a kernel would, and TimeoutError where it would wait for a VM."""
        text = text.strip()
        try:
            self._write(path, text)
        except FakeNodeError as error:
            raise OSError(errno.EBUSY, str(error), path) from None

    def _write(self, path: str, text: str) -> None:
        if match := re.fullmatch(r"/sys/bus/pci/devices/([^/]+)/driver_override", path):
            self._node.override(match[1], text)
        elif path == "/sys/bus/pci/drivers_probe":
            self._node.probe(text)
        elif match := re.fullmatch(r"/sys/bus/pci/drivers/([^/]+)/(bind|unbind)", path):
            self._driver(match[1], match[2], text, path)
        else:
            raise OSError(errno.EACCES, "Permission denied", path)

    def _driver(self, driver: str, verb: str, address: str, path: str) -> None:
        if not (self._node.root / path.lstrip("/")).parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        function = self._node.function(address)
        if verb == "bind":
            if function.driver is not None or self._node.wanted_driver(address) != driver:
                raise OSError(errno.ENODEV, "No such device", path)
            self._node.bind(address, driver)
            return
        if function.driver != driver:
            raise OSError(errno.ENODEV, "No such device", path)
        self._node.unbind(address)
        if function.vfio is not None and function.enable:
            raise TimeoutError(errno.ETIMEDOUT, "a VM has it", path)

    def read(self, path: str) -> str:
        """Raises OSError."""
        return (self._node.root / path.lstrip("/")).read_text().strip()

    def load(self, module: str) -> None:
        """Makes the module's driver appear."""
        self._node.load(module)
