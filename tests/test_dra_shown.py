"""What `status` says of the driver, its slices and its claims, from what the parts know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_plugin.dra.claims import ClaimId, Given, Prepared, Wanted
from sandbox_plugin.dra.plan import Pool
from sandbox_plugin.dra.publisher import PublisherStatus
from sandbox_plugin.dra.registration import RegistrationStatus
from sandbox_plugin.dra.shown import KnownClaim, shown
from sandbox_plugin.inventory.ledger import Places

NEW = RegistrationStatus(is_listening=False, registered_at=None, registrations=0, trouble=None)
SLICES = PublisherStatus(
    slices=2, devices=130, generation=3, writes=7, failures={}, published=True, trouble="it is away", refused=False
)
PREPARED = Prepared(
    claim=ClaimId(namespace="default", name="gpus", uid="uid-1"),
    pod_claim=None,
    devices=(
        Given(
            wanted=Wanted(request="gpu", pool="node-1", device="pci-0000-01-00-0"),
            places=Places(
                node="/dev/vfio/devices/vfio3", group=50, addresses=frozenset({"0000:01:00.1", "0000:01:00.0"})
            ),
        ),
    ),
)


def show(registration: RegistrationStatus = NEW, *claims: KnownClaim) -> dict[str, Any]:
    pool = Pool(driver="vfio.sandbox-plugin", node="node-1")
    return shown(
        pool=pool, registration=registration, folder=Path("/registry"), slices=SLICES, claims=claims, now=100.0
    )


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "not begun"),
        ({"trouble": "no such folder"}, "not begun"),
        ({"is_listening": True}, "serving"),
        ({"is_listening": True, "trouble": "none of them is supported"}, "refused"),
        ({"is_listening": True, "registered_at": 58.0, "registrations": 2}, "registered"),
    ],
)
def test_one_word_says_how_the_driver_stands_with_the_kubelet(changes: dict[str, Any], state: str) -> None:
    said = show(replace(NEW, **changes))["registration"]
    assert said == {
        "state": state,
        "registered_seconds": 42.0 if state == "registered" else None,
        "registrations": changes.get("registrations", 0),
        "folder": "/registry",
        "trouble": changes.get("trouble"),
    }


def test_the_slices_are_those_of_the_nodes_pool_and_say_why_they_are_out_of_date() -> None:
    assert show()["driver"] == "vfio.sandbox-plugin"
    assert show()["slices"] == {
        "pool": "node-1",
        "published": True,
        "slices": 2,
        "devices": 130,
        "generation": 3,
        "writes": 7,
        "trouble": "it is away",
        "refused": False,
    }


def test_a_claim_says_its_devices_who_has_it_and_for_how_long_it_has_looked_abandoned() -> None:
    used = KnownClaim(prepared=PREPARED, pod=("vm", "main"), abandoned_since=None, remark=None)
    lost = KnownClaim(prepared=PREPARED, pod=None, abandoned_since=40.0, remark="look at it")
    of_used, of_lost = show(NEW, used, lost)["claims"]
    node = "/dev/vfio/devices/vfio3"
    both = {
        "namespace": "default",
        "name": "gpus",
        "uid": "uid-1",
        "devices": [{"request": "gpu", "name": "pci-0000-01-00-0", "pci_address": "0000:01:00.0", "node": node}],
    }
    assert of_used == {**both, "pod": "vm", "container": "main", "abandoned_seconds": None, "remark": None}
    assert of_lost == {**both, "pod": None, "container": None, "abandoned_seconds": 60.0, "remark": "look at it"}
