"""The checkpoint: one small file for each claim that is prepared, written before the kubelet is told.

A file for each, and not one for all: on a full disk a claim can still be given back, two calls need not wait for each
other, and what happens to one file concerns one claim. Reading and writing block: they run on threads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog

from sandbox_plugin.dra.claims import ClaimId, Given, Prepared, Refused, Wanted
from sandbox_plugin.dra.config import NodeKind
from sandbox_plugin.host.files import LARGEST
from sandbox_plugin.inventory.ledger import Places

_VERSION = 1
_FOLDER = "claims"

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class NotACheckpoint(ValueError):
    """Says what is wrong with a file."""


def checkpoint_folder(plugin_folder: Path) -> Path:
    return plugin_folder / _FOLDER


def checkpoint_path(plugin_folder: Path, uid: str) -> Path:
    return checkpoint_folder(plugin_folder) / f"{uid}.json"


def encode(prepared: Prepared, boot: str) -> bytes:
    """What the file of a claim says. `boot`: as `boot_id`."""
    claim = prepared.claim
    devices = [
        {
            "request": given.wanted.request,
            "pool": given.wanted.pool,
            "device": given.wanted.device,
            "nodeKind": str(given.wanted.node),
            "node": given.places.node,
            "group": given.places.group,
            "addresses": sorted(given.places.addresses),
            "formerNodes": list(given.former_nodes),
        }
        for given in prepared.devices
    ]
    document = {
        "version": _VERSION,
        "boot": boot,
        "namespace": claim.namespace,
        "name": claim.name,
        "uid": claim.uid,
        "podClaim": prepared.pod_claim,
        "devices": devices,
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def decode(content: bytes, boot: str) -> Prepared:
    """The claim that a file says. `boot`: as `boot_id`. Raises NotACheckpoint."""
    try:
        document = json.loads(content)
        if document["version"] != _VERSION:
            raise NotACheckpoint(f"its version is {document['version']!r:.40}, and this plugin knows {_VERSION}")
        claim = ClaimId(**{name: _text(document[name]) for name in ("namespace", "name", "uid")})
        claim.check()
        pod_claim = document["podClaim"]
        devices = tuple(map(_device, document["devices"]))
        if not devices or not (pod_claim is None or isinstance(pod_claim, str)):
            raise NotACheckpoint("it has no devices, or no sensible podClaim")
        if document["boot"] != boot:
            devices = tuple(given.after_boot() for given in devices)
        return Prepared(claim=claim, pod_claim=pod_claim, devices=devices)
    except NotACheckpoint:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, Refused) as error:
        raise NotACheckpoint(f"it is not what this plugin writes: {type(error).__name__}: {error}"[:200]) from None


def _device(entry: Any) -> Given:
    wanted = Wanted(
        request=_text(entry["request"]),
        pool=_text(entry["pool"]),
        device=_text(entry["device"]),
        node=NodeKind(entry["nodeKind"]),
    )
    wanted.check()
    group, addresses = entry["group"], frozenset(map(_text, entry["addresses"]))
    if not addresses or isinstance(group, bool) or not (group is None or isinstance(group, int)):
        raise NotACheckpoint("a device has no address, or no sensible group")
    places = Places(node=_text(entry["node"]), group=group, addresses=addresses)
    return Given(wanted=wanted, places=places, former_nodes=tuple(map(_text, entry["formerNodes"])))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def read_all(plugin_folder: Path, boot: str) -> dict[str, Prepared]:
    """All claims that are prepared, by UID. Raises OSError where the folder, or a file in it, cannot be read.

    A file that makes no sense is left where it is, and logged: PodResources names the claims of running pods.
    """
    folder = checkpoint_folder(plugin_folder)
    prepared: dict[str, Prepared] = {}
    if not folder.is_dir():
        return prepared
    for path in sorted(folder.iterdir()):
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        with path.open("rb") as file:
            content = file.read(LARGEST)
        try:
            claim = decode(content, boot)
            if path.stem != claim.claim.uid:
                raise NotACheckpoint(f"it is of the claim with UID {claim.claim.uid}")
        except NotACheckpoint as error:
            action = "remove it when no pod of this node has a claim on this driver"
            log.error("claim checkpoint not understood", path=str(path), reason=str(error), action=action)
            continue
        prepared[claim.claim.uid] = claim
    return prepared
