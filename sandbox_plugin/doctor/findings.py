"""What the doctor says: one finding for each condition of a node, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How it is with one condition."""

    PASS = "pass"
    WARN = "warn"
    """Pods can start, but not all of them, or not as well as they could."""
    FAIL = "fail"
    """Some pod with a GPU will not start, or some GPU is not offered."""
    UNSEEN = "unseen"
    """It cannot be seen from here."""


class Group(StrEnum):
    """What a condition is about, in the order from the firmware to the pod."""

    PLATFORM = "firmware and kernel"
    VFIO = "vfio"
    DEVICES = "devices"
    KUBELET = "kubelet"
    CDI = "cdi"
    KATA = "kata"
    LIMITS = "limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One condition, and how it is."""

    group: Group
    check: str
    """Which condition: a name that stays the same in later versions, such as `iommu`."""
    status: Status
    seen: str
    """What was seen, for people."""
    action: str = ""
    """The one thing to do about it. Empty where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Teller:
    """Makes the findings of one group: `tell.fail("iommu", "there are no groups", "switch it on")`."""

    group: Group

    def passed(self, check: str, seen: str) -> Finding:
        return Finding(group=self.group, check=check, status=Status.PASS, seen=seen)

    def warn(self, check: str, seen: str, action: str) -> Finding:
        return Finding(group=self.group, check=check, status=Status.WARN, seen=seen, action=action)

    def fail(self, check: str, seen: str, action: str) -> Finding:
        return Finding(group=self.group, check=check, status=Status.FAIL, seen=seen, action=action)

    def unseen(self, check: str, why: str) -> Finding:
        return Finding(group=self.group, check=check, status=Status.UNSEEN, seen=why)
