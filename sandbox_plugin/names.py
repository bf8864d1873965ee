"""Names that the kubelet and CDI take: of resources, and of the files that carry a resource's name. Pure."""

from __future__ import annotations

import hashlib
import re

SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket: sun_path of 108 bytes with its end (unix(7))."""
SHORTEST_SOCKET_NAME = 18
"""Bytes below which `socket_name` cannot go: a digest with its dash, and `.sock`."""
NAME_LENGTH = 63
"""Longest last part of a resource name (IsQualifiedName in k8s.io/apimachinery/pkg/util/validation)."""

_CLAIMED = re.compile(r"pci-([0-9a-f]{4,})-([0-9a-f]{2})-([0-9a-f]{2})-([0-9a-f])|mdev-([0-9a-f-]{36})")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]")
"""A CDI class that the kubelet takes as a resource's name too: it begins with a letter, and has no dot. Two characters
at least: Kata's Go library panics at a vendor or class of one (pkg/parser of CDI)."""
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
"""A DNS subdomain in lower case (IsDNS1123Subdomain)."""
_QUOTA = "requests."
"""What the kubelet puts before a resource name to see whether a quota could name it (IsExtendedResourceName)."""
_DOMAIN_LENGTH = 253 - len(_QUOTA)
"""Longest domain: a DNS subdomain has 253 characters, and a quota's name of the resource must fit too."""
_CDI_FILE_BYTES = 200
"""Longest name of a CDI spec: a file name has 255 bytes at most, and it is written under a longer one first."""


def is_alias(name: str) -> bool:
    """Whether `name` is a valid last part of a resource name."""
    return len(name) <= NAME_LENGTH and _CLASS.fullmatch(name) is not None


def check_alias(alias: str) -> None:
    """Raises ValueError, saying what is allowed, unless `alias` is a valid last part of a resource name."""
    if not is_alias(alias):
        raise ValueError(
            f"{alias!r} is not a valid resource name: allowed are 2 to {NAME_LENGTH} letters, digits, `-` and `_`, "
            "a letter first and a letter or digit last"
            + ("; give only the part after `nvidia.com/`" if alias.startswith("nvidia.com/") else "")
        )


def check_resource_name(resource: str) -> None:
    """Raises ValueError, saying what is allowed, unless `resource` is a `domain/name` for the kubelet and for CDI."""
    domain, separator, name = resource.partition("/")
    if len(domain) > _DOMAIN_LENGTH:
        raise ValueError(f"{resource!r}: the domain has {len(domain)} characters; at most {_DOMAIN_LENGTH} are allowed")
    if not separator or not _DOMAIN.fullmatch(domain):
        raise ValueError(f"{resource!r} is not domain/name with a domain in lower case, such as 'example.com/gpu'")
    if not domain[0].isalpha() or len(domain) < 2:
        raise ValueError(f"{resource!r}: for CDI the domain must begin with a letter and have at least 2 characters")
    if "kubernetes.io" in domain:  # IsNativeResource in k8s.io/kubernetes/pkg/apis/core/v1/helper
        raise ValueError(f"{resource!r}: names with kubernetes.io in them belong to Kubernetes")
    if domain.startswith(_QUOTA):  # DefaultResourceRequestsPrefix in k8s.io/api/core/v1
        raise ValueError(f"{resource!r}: a domain that begins with {_QUOTA!r} is reserved for Kubernetes quotas")
    check_alias(name)


def check_driver_name(name: str) -> None:
    """Raises ValueError, saying what is allowed, unless `name` is one for a DRA driver, and for the vendor of a CDI
    kind (validateDriverName in pkg/apis/resource/validation of Kubernetes)."""
    if len(name) > NAME_LENGTH or not _DOMAIN.fullmatch(name) or not name[0].isalpha() or len(name) < 2:
        raise ValueError(
            f"{name!r} is not a DNS name in lower case with 2 to {NAME_LENGTH} characters, a letter first, "
            "such as 'vfio.example.com'"
        )
    if name in ("gpu.nvidia.com", "compute-domain.nvidia.com"):
        raise ValueError(f"{name!r} is the name of NVIDIA's own driver")


def check_node_name(name: str) -> None:
    """Raises ValueError unless a node of Kubernetes can have this name (ValidateNodeName in pkg/apis/core)."""
    if len(name) > 253 or not _DOMAIN.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a node: a DNS name in lower case with at most 253 characters")


def socket_name(resource: str, *, max_bytes: int) -> str:
    """File name of a resource's socket: `sandbox-pgpu.sock`, with the domain in it where that is not nvidia.com.

    A name over `max_bytes` is shortened, with a digest of the whole in it, so that it is still unique; so is one whose
    domain has no dot, which could be a name of nvidia.com's. The digest stays whole: under `SHORTEST_SOCKET_NAME` the
    name is longer than `max_bytes`, and no socket can be bound to it.
    """
    domain, _, name = resource.partition("/")
    stem = f"sandbox-{name}" if domain == "nvidia.com" else f"sandbox-{domain}-{name}"
    return _file_name(stem, ".sock", resource, max_bytes, clear="." in domain and _ends_clearly(domain))


def cdi_file_name(resource: str) -> str:
    """File name of a resource's CDI spec, e.g. `nvidia.com-pgpu.yaml`; shortened as a socket's where it must be."""
    stem, domain = resource.replace("/", "-", 1), resource.partition("/")[0]
    return _file_name(stem, ".yaml", resource, _CDI_FILE_BYTES, clear=_ends_clearly(domain))


def address_of_claimed(name: str) -> str | None:
    """PCI address, or UUID, of the device that ResourceSlices and claims call so; None: no device of ours is called so.

    dra/names.py makes these names.
    """
    found = _CLAIMED.fullmatch(name)
    if found is None:
        return None
    domain, bus, slot, function, uuid = found.groups()
    return uuid if uuid is not None else f"{domain}:{bus}:{slot}.{function}"


def _ends_clearly(domain: str) -> bool:
    """Whether `<domain>-<name>` tells where the domain ends: `a.b-c/d` and `a.b/c-d` look the same."""
    return "-" not in domain.rpartition(".")[2]


def _file_name(stem: str, ending: str, resource: str, max_bytes: int, *, clear: bool) -> str:
    if clear and len(stem) + len(ending) <= max_bytes:
        return stem + ending
    suffix = f"-{hashlib.sha256(resource.encode()).hexdigest()[:12]}{ending}"
    return stem[: max(0, max_bytes - len(suffix))] + suffix
