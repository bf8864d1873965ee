"""What the parts know of themselves, as the metrics need it: values, handed in by the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox_plugin.durations import Durations
from sandbox_plugin.outputs import document


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What became of the kubelet's calls about one resource."""

    took: Mapping[tuple[str, str], Durations] = field(default_factory=dict)
    """By method and by the name of the gRPC status."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """By reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimParts:
    """What the parts of Dynamic Resource Allocation know, beside what `status` shows of them."""

    took: Mapping[tuple[str, str], Durations] = field(default_factory=dict)
    """How long each claim of a call took, by method and outcome."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """By reason."""
    registered_at: float | None = None
    """Since when the driver is registered, in monotonic seconds."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Of the API server, by kind."""
    released: int = 0
    """Claims that were given back unasked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All of it, at the moment of a scrape."""

    shown: document.Parts
    """What `status` shows of them."""
    registered_at: Mapping[str, float] = field(default_factory=dict)
    """Since when each resource is registered that is, in monotonic seconds."""
    calls: Mapping[str, Calls] = field(default_factory=dict)
    """By resource."""
    kubelet_restarts: int = 0
    scans: Durations = field(default_factory=Durations)
    scan_triggers: Mapping[str, int] = field(default_factory=dict)
    scan_failures: int = 0
    last_scan_at: float | None = None
    """Monotonic seconds."""
    cdi_writes: Mapping[str, int] = field(default_factory=dict)
    """By resource."""
    cdi_failures: Mapping[str, int] = field(default_factory=dict)
    foreign_specs: Mapping[str, int] = field(default_factory=dict)
    """By what is wrong with them."""
    claims: ClaimParts | None = None
    """None: this plugin serves no claims."""
