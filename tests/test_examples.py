"""The examples: valid where Kubernetes knows them, else as the API that they are for has it; and true to the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import KUBERNETES, ROOT, Manifest, validate

from sandbox_plugin import __version__
from sandbox_plugin.config.load import unknown_variables
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.naming import type_name

EXAMPLES = ROOT / "examples"
MANIFESTS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
FILES = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.is_file())
PGPU, NVSWITCH = f"nvidia.com/{Settings().gpu_alias}", f"nvidia.com/{Settings().nvswitch_alias}"


def load(name: str) -> Manifest:
    (manifest,) = yaml.safe_load_all((EXAMPLES / name).read_text())
    assert isinstance(manifest, dict)
    return manifest


def pod_of(manifest: Manifest) -> Manifest:
    """The spec of the pod that it is, or makes."""
    spec: Manifest = manifest["spec"]
    return spec["template"]["spec"] if "template" in spec else spec


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MANIFESTS)
def test_every_example_is_valid(name: str, version: str) -> None:
    manifest = load(name)
    assert manifest["metadata"]["name"]
    validate([manifest], version)


@pytest.mark.parametrize("name", [name for name in FILES if "/" not in name or name.startswith("node/")])
def test_every_example_is_in_the_index_and_says_at_the_top_what_to_expect(name: str) -> None:
    index = (EXAMPLES / "README.md").read_text()
    if name == "README.md":
        assert set(re.findall(r"\]\(([^)]+)\)", index)) <= set(FILES)
        return
    assert index.count(f"]({name})") == 1
    lines = (EXAMPLES / name).read_text().splitlines()
    top = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert any("Expect: " in line for line in top), "what somebody sees who uses it"
    assert max(map(len, lines)) <= 120


KATA: dict[str, tuple[str, dict[str, int]]] = {
    "kata-pod.yaml": ("", {PGPU: 1}),
    "kata-four-gpus-pod.yaml": ("", {PGPU: 4}),
    "kata-job.yaml": ("", {PGPU: 1}),
    "kata-deployment.yaml": ("", {PGPU: 1}),
    "kata-confidential-pod.yaml": ("-snp", {PGPU: 1}),
    "kata-confidential-tdx-pod.yaml": ("-tdx", {PGPU: 1}),
    "kata-hgx-hopper-pod.yaml": ("-snp", {PGPU: 8, NVSWITCH: 4}),
    "kata-hgx-blackwell-pod.yaml": ("-tdx", {PGPU: 8}),
}
"""The end of the runtime class, and the devices."""


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("kata-")])
def test_the_pods_for_kata_ask_for_their_devices_in_one_container_by_the_default_names(name: str) -> None:
    ending, devices = KATA[name]
    pod = pod_of(load(name))
    assert pod["runtimeClassName"] == f"kata-qemu-nvidia-gpu{ending}"
    assert "initContainers" not in pod, "Kata cannot cold-plug the devices of an init container"
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert {key: limits[key] for key in limits if "/" in key} == devices
    assert limits.keys() > devices.keys() | {"cpu"}, "the VM is as large as the limits say"
    platform = {"-snp": "amd.feature.node.kubernetes.io/snp", "-tdx": "intel.feature.node.kubernetes.io/tdx"}
    if ending:
        assert pod["nodeSelector"].pop(platform[ending]) == "true"
        ready = {"nvidia.com/cc.mode.state": "ppcie"} if NVSWITCH in devices else {"nvidia.com/cc.ready.state": "true"}
        assert pod["nodeSelector"] == ready


@pytest.mark.parametrize(("name", "preset"), [("kata-hgx-hopper-pod.yaml", "hgx-h100")])
def test_a_whole_board_is_all_that_the_node_has(name: str, preset: str, tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", preset)
    classes = [function.class_code for function in node.functions() if function.driver == "vfio-pci"]
    assert KATA[name][1] == {PGPU: classes.count(0x030200), NVSWITCH: classes.count(0x068000)}


def test_the_service_never_waits_for_a_gpu_that_only_its_old_pod_could_free() -> None:
    spec = load("kata-deployment.yaml")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


# KubeVirt


VMS = {
    "kubevirt-vm.yaml": [PGPU] * 2,
    "kubevirt-vgpu-vm.yaml": [f"nvidia.com/{type_name('GRID T4-2Q')}"],
    "kubevirt-vgpu-function-vm.yaml": [f"nvidia.com/{type_name('NVIDIA L40S-24Q')}"],
}


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("kubevirt-") and "vm" in name])
def test_the_machines_for_kubevirt_name_the_resources_as_they_are_served_and_as_the_cr_permits_them(name: str) -> None:
    devices = load(name)["spec"]["domain"]["devices"]
    assert [gpu["deviceName"] for gpu in devices["gpus"]] == VMS[name]
    assert set(VMS[name]) <= {entry["resourceName"] for entry in permitted()}


def permitted() -> Iterator[dict[str, Any]]:
    lists = load("kubevirt-cr.yaml")["spec"]["configuration"]["permittedHostDevices"]
    assert lists.keys() == {"pciHostDevices", "mediatedDevices"}
    for entries in lists.values():
        yield from entries


def test_the_cr_says_of_each_resource_what_it_is_and_that_another_plugin_serves_it() -> None:
    for entry in permitted():
        assert entry.pop("externalResourceProvider") is True
        name = entry.pop("resourceName")
        ((key, value),) = entry.items()
        if key == "pciVendorSelector":
            assert re.fullmatch(r"[0-9A-F]{4}:[0-9A-F]{4}", value)
        else:
            assert (key, name) == ("mdevNameSelector", f"nvidia.com/{type_name(value)}")


def test_consumers_md_shows_the_cr_as_the_example_has_it() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/consumers.md").read_text(), re.DOTALL)
    (cr,) = (text for text in shown if "kind: KubeVirt\n" in text)
    assert yaml.safe_load(cr) == load("kubevirt-cr.yaml")


# The cluster


def test_the_cluster_policy_puts_this_version_into_the_place_of_the_operators_plugin() -> None:
    policy = load("gpu-operator-clusterpolicy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("nvidia.com/v1", "ClusterPolicy")
    spec = policy["spec"]
    assert spec["sandboxWorkloads"] == {"enabled": True, "mode": "kata", "defaultWorkload": "vm-passthrough"}
    plugin = spec["kataSandboxDevicePlugin"]
    assert plugin["enabled"] is True
    assert (plugin["image"], plugin["version"]) == ("sandbox-plugin", __version__)
    variables = {each["name"]: each["value"] for each in plugin["env"]}
    assert unknown_variables(variables) == []
    assert variables["P_GPU_ALIAS"] == Settings().gpu_alias


def unit(text: str) -> dict[str, list[tuple[str, str]]]:
    """Sections of a systemd unit, whose keys may be there more than once."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            sections[heading[1]] = []
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            sections[list(sections)[-1]].append((key, value))
    return sections


def test_the_cdi_folder_gets_the_label_that_the_plugins_type_may_write_on_openshift_as_elsewhere() -> None:
    here = unit((EXAMPLES / "node/cdi-folder.service").read_text())
    config = load("openshift-machineconfig.yaml")["spec"]["config"]
    (there,) = config["systemd"]["units"]
    assert there["enabled"] is True
    assert unit(there["contents"]) == here
    commands = [value.split() for key, value in here["Service"] if key == "ExecStart"]
    folder = str(Settings().cdi_dir).replace("/var/run/", "/run/")
    assert commands == [["mkdir", "-p", folder], ["chcon", "system_u:object_r:container_file_t:s0", folder]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit() -> None:
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", EXAMPLES / "node/cdi-folder.service"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


# A node


HANDLER = "kata-qemu-nvidia-gpu"


def node_file(name: str) -> dict[str, Any]:
    return tomllib.loads((EXAMPLES / "node" / name).read_text())


def test_both_runtimes_start_kata_with_one_configuration_under_the_name_that_the_pods_use() -> None:
    containerd = node_file("containerd.toml")
    assert containerd["version"] == 3
    ((handler, there),) = containerd["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"].items()
    ((same, crio),) = node_file("crio.toml")["crio"]["runtime"]["runtimes"].items()
    assert handler == same == HANDLER
    assert there["runtime_type"] == f"io.containerd.{HANDLER}.v2"
    assert there["options"]["ConfigPath"] == crio["runtime_config_path"]
    assert there["runtime_path"] == crio["runtime_path"]
    assert there["privileged_without_host_devices"] is crio["privileged_without_host_devices"] is True


def test_kata_waits_no_longer_than_the_kubelet_does() -> None:
    kubelet = load("node/kubelet.yaml")
    assert kubelet["kind"] == "KubeletConfiguration"
    assert kubelet["featureGates"] == {"KubeletPodResourcesGet": True}
    minutes = re.fullmatch(r"(\d+)m", kubelet["runtimeRequestTimeout"])
    assert minutes is not None
    assert int(minutes[1]) * 60 >= node_file("kata.toml")["runtime"]["create_container_timeout"]
    assert f"runtimeRequestTimeout: {minutes[0]}" in (ROOT / "docs/nodes.md").read_text()
