"""The checks: pure, facts in, findings out. A module for each group.

Each condition is named by one finding, and what merely follows from it is not named again: without an IOMMU nothing is
said of the drivers.
"""

from __future__ import annotations

from sandbox_plugin.doctor.checks import cdi, devices, kata, kubelet, limits, platform, vfio
from sandbox_plugin.doctor.findings import Finding
from sandbox_plugin.doctor.node import Node

_CHECKS = (platform, vfio, devices, kubelet, cdi, kata, limits)


def findings_of(node: Node) -> list[Finding]:
    """All findings, in the order from the firmware to the pod."""
    return [finding for check in _CHECKS for finding in check.findings(node)]
