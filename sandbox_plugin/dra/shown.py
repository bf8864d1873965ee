"""What `status` says of claims and of what serves them (pure), in values that JSON can take: docs/status.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sandbox_plugin.dra.claims import Prepared
from sandbox_plugin.dra.names import pool_name
from sandbox_plugin.dra.plan import Pool
from sandbox_plugin.dra.publisher import PublisherStatus
from sandbox_plugin.dra.registration import RegistrationStatus
from sandbox_plugin.inventory.ledger import ClaimPod


class KnownClaim(NamedTuple):
    """A claim that is prepared, and what is known of it beside that."""

    prepared: Prepared
    pod: ClaimPod | None
    """As `Ledger.pod_of_claim`."""
    abandoned_since: float | None
    """As `Releaser.abandoned_since`."""
    remark: str | None
    """As `Releaser.remark`."""


def shown(
    *,
    pool: Pool,
    registration: RegistrationStatus,
    folder: Path,
    slices: PublisherStatus,
    claims: Iterable[KnownClaim],
    now: float,
) -> dict[str, Any]:
    """All of it. `folder`: where the kubelet looks for the driver. `now` is in monotonic seconds."""
    return {
        "driver": pool.driver,
        "registration": _registration(registration, folder, now),
        "slices": {
            "pool": pool_name(pool.node),
            "published": slices.published,
            "slices": slices.slices,
            "devices": slices.devices,
            "generation": slices.generation,
            "writes": slices.writes,
            "trouble": slices.trouble,
            "refused": slices.refused,
        },
        "claims": [_claim(each, now) for each in claims],
    }


def _registration(status: RegistrationStatus, folder: Path, now: float) -> dict[str, Any]:
    if status.registered_at is not None:
        state = "registered"
    elif status.trouble is not None and status.is_listening:
        state = "refused"
    else:
        state = "serving" if status.is_listening else "not begun"
    return {
        "state": state,
        "registered_seconds": None if status.registered_at is None else now - status.registered_at,
        "registrations": status.registrations,
        "folder": str(folder),
        "trouble": status.trouble,
    }


def _claim(known: KnownClaim, now: float) -> dict[str, Any]:
    claim = known.prepared.claim
    pod, container = known.pod or (None, None)
    return {
        "namespace": claim.namespace,
        "name": claim.name,
        "uid": claim.uid,
        "pod": pod,
        "container": container,
        "abandoned_seconds": None if known.abandoned_since is None else now - known.abandoned_since,
        "remark": known.remark,
        "devices": [
            {
                "request": given.wanted.request,
                "name": given.wanted.device,
                "pci_address": min(given.places.addresses),
                "node": given.places.node,
            }
            for given in known.prepared.devices
        ],
    }
