"""The files by which a prepared claim's devices get into its containers: pure, from a claim to paths and texts.

- A CDI spec with one device for each device of the claim: what the container gets of it depends on the node's consumer.
- For KubeVirt the metadata of each request (KEP-5304), from which virt-launcher learns the PCI address of a device, and
  a CDI spec that mounts it.

The names are such that whoever finds a file knows whose it is: all files of this driver begin with its name, and have
the claim's UID in theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_plugin.config.settings import Consumer
from sandbox_plugin.dra.claims import Given, Prepared, Refused, Wanted, Why
from sandbox_plugin.dra.config import NodeKind
from sandbox_plugin.inventory.passing import by_cdev, by_group, egm_nodes
from sandbox_plugin.model import Device

_CDI_VERSION = "0.5.0"
"""The first that lets a device's name begin with a digit, as a UID may."""
_IN_CONTAINER = "/var/run/kubernetes.io/dra-device-attributes"
"""Where consumers look for metadata."""
_METADATA_VERSION = "metadata.resource.k8s.io/v1alpha1"
_METADATA_FOLDER = "dra-device-metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What decides what the files say, beside the claim and its devices."""

    driver: str
    """Its name."""
    consumer: Consumer
    cdi_dir: Path
    folder: Path
    """The driver's own, below the kubelet's `plugins`."""

    @property
    def has_metadata(self) -> bool:
        """Whether the consumer reads metadata. Kata must not find more than one node behind a CDI name's claim."""
        return self.consumer is Consumer.KUBEVIRT


# Names


def cdi_ids(prepared: Prepared, terms: Terms) -> list[list[str]]:
    """The CDI names of each device, in order. A request's metadata goes with its first device."""
    seen: set[str] = set()
    ids = []
    for given in prepared.devices:
        names = [f"{terms.driver}/claim={_device(prepared, given)}"]
        request = given.wanted.base_request
        if terms.has_metadata and request not in seen:
            names.append(f"{terms.driver}/metadata={_metadata(prepared, request)}")
        seen.add(request)
        ids.append(names)
    return ids


def spec_prefix(driver: str) -> str:
    """What the name of each CDI spec for claims on this driver begins with."""
    return f"{driver}_"


def metadata_folder(terms: Terms) -> Path:
    """Where the folders of all claims are, each as `claim_folder`."""
    return terms.folder / _METADATA_FOLDER


def claim_folder(prepared: Prepared) -> str:
    return f"{prepared.claim.namespace}_{prepared.claim.name}"


def _device(prepared: Prepared, given: Given) -> str:
    return f"{prepared.claim.uid}_{given.wanted.device}"


def _metadata(prepared: Prepared, request: str) -> str:
    return f"{prepared.claim.uid}_{request}"


def spec_path(prepared: Prepared, terms: Terms) -> Path:
    """The CDI spec with the devices themselves."""
    return terms.cdi_dir / f"{spec_prefix(terms.driver)}claim_{prepared.claim.uid}.json"


# Texts


def render_files(
    prepared: Prepared, devices: Sequence[Device | None], terms: Terms, egm_gpus: Mapping[str, frozenset[str]]
) -> dict[Path, bytes]:
    """All files of a claim. `devices` are those of the claim as they are now; None: that cannot be had now, and is left
    out, so that no spec names a node that is not there or is another's. `egm_gpus`: as in `HostFacts`."""
    files: dict[Path, bytes] = {}
    entries = []
    there = [device for device in devices if device is not None]
    extra = egm_nodes(there, egm_gpus) if terms.consumer is Consumer.KUBEVIRT else []
    for given, device in zip(prepared.devices, devices, strict=True):
        if device is not None:
            nodes = [*nodes_for(given.wanted, device, terms.consumer), *extra]
            edits = {"deviceNodes": [{"path": node} for node in nodes]}
            entries.append({"name": _device(prepared, given), "containerEdits": edits})
            extra = []
    if entries:
        files[spec_path(prepared, terms)] = _spec(f"{terms.driver}/claim", entries)
    return files | (_metadata_files(prepared, terms) if terms.has_metadata else {})


def nodes_for(wanted: Wanted, device: Device, consumer: Consumer) -> list[str]:
    """The nodes that a container gets of a device. Raises Refused where it has none of the kind that is asked for.

    Kata takes exactly one, which it passes through; KubeVirt all that libvirt may open.
    """
    cdev, group = by_cdev(device), by_group(device)
    if consumer is Consumer.KATA:
        cdev, group = cdev[:1], group[:1]
    match wanted.node:
        case NodeKind.CDEV:
            nodes = cdev
        case NodeKind.GROUP:
            nodes = group
        case NodeKind.DEFAULT:
            nodes = [device.node] if consumer is Consumer.KATA else [*cdev, *group]
    if not nodes:
        where = f"request {wanted.request}: device {wanted.device}"
        raise Refused(f"{where} has no {wanted.node} node on this kernel, or must not be passed by it", Why.NOT_ALLOWED)
    return nodes


def _spec(kind: str, devices: list[dict[str, Any]]) -> bytes:
    return _json({"cdiVersion": _CDI_VERSION, "kind": kind, "devices": devices})


def _metadata_files(prepared: Prepared, terms: Terms) -> dict[Path, bytes]:
    files: dict[Path, bytes] = {}
    for request in dict.fromkeys(given.wanted.base_request for given in prepared.devices):
        mine = [given for given in prepared.devices if given.wanted.base_request == request]
        host = metadata_folder(terms) / claim_folder(prepared) / request / "metadata.json"
        files[host] = _json(_metadata_of(prepared, mine, terms.driver))
        name = _metadata(prepared, request)
        mount = {
            "hostPath": str(host),
            "containerPath": f"{_IN_CONTAINER}/{_place(prepared)}/{request}/{terms.driver}-metadata.json",
            "options": ["ro", "bind"],
        }
        spec = terms.cdi_dir / f"{spec_prefix(terms.driver)}metadata_{name}.json"
        files[spec] = _spec(f"{terms.driver}/metadata", [{"name": name, "containerEdits": {"mounts": [mount]}}])
    return files


def _place(prepared: Prepared) -> str:
    """What a claim is found under: a pod knows only its own name for one that was made from a template."""
    if prepared.pod_claim is not None:
        return f"resourceclaimtemplates/{prepared.pod_claim}"
    return f"resourceclaims/{prepared.claim.name}"


def _metadata_of(prepared: Prepared, given: Sequence[Given], driver: str) -> dict[str, Any]:
    """Of one request. One that has alternatives goes by the name of the one that was chosen."""
    claim = prepared.claim
    metadata = {"name": claim.name, "namespace": claim.namespace, "uid": claim.uid, "generation": 1}
    devices = [
        {
            "driver": driver,
            "pool": each.wanted.pool,
            "name": each.wanted.device,
            "attributes": _attributes(each),
        }
        for each in given
    ]
    document: dict[str, Any] = {"apiVersion": _METADATA_VERSION, "kind": "DeviceMetadata", "metadata": metadata}
    if prepared.pod_claim is not None:
        document["podClaimName"] = prepared.pod_claim
    return document | {"requests": [{"name": given[0].wanted.request, "devices": devices}]}


def _attributes(given: Given) -> dict[str, dict[str, str]]:
    address = min(given.places.addresses)
    is_mediated = given.wanted.device.startswith("mdev-")
    return {"mdevUUID" if is_mediated else "resource.kubernetes.io/pciBusID": {"string": address}}


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"
