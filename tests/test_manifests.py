"""The manifests as a cluster gets them: built by the real kubectl, held against Kubernetes' own schemas."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from itertools import permutations
from pathlib import Path

import pytest
from daemon import run_command
from deployed import (
    COMPONENTS,
    KATA,
    KUBERNETES,
    KUBEVIRT,
    OVERLAYS,
    ROOT,
    Installed,
    build,
    installed,
    overlay_of,
    validate,
)

from sandbox_plugin import __version__
from sandbox_plugin.cdi.foreign import cdi_folders
from sandbox_plugin.config.load import load_settings, unknown_variables
from sandbox_plugin.config.settings import Settings

ADMINISTRATORS = "examples/overlay"
SIDE_BY_SIDE = [KATA, KUBEVIRT, "manifests/overlays/dev"]
"""The other overlays are one of these with a component."""


@pytest.fixture(scope="module")
def kata() -> Installed:
    return installed(KATA)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", ["manifests/base", *OVERLAYS, ADMINISTRATORS])
def test_everything_that_is_built_is_valid(name: str, version: str) -> None:
    validate(build(name), version)


@pytest.mark.parametrize("base", [KATA, KUBEVIRT])
def test_all_components_go_together_on_either_consumer(base: str, tmp_path: Path) -> None:
    others = {f"gpu-operator-{each}" for each in ("kata", "kubevirt")} - {f"gpu-operator-{Path(base).name}"}
    for version in KUBERNETES:
        validate(build(overlay_of(tmp_path, base, set(COMPONENTS) - others)), version)
    overlay = installed(str(tmp_path))
    images = {container["image"] for container in (overlay.container, *overlay.pod["initContainers"])}
    assert images == {"registry.example/mine:9"}
    assert overlay.container["args"] == installed(base).container["args"]


# The base, as the overlay for Kata has it


def test_a_daemon_set_its_powerless_identity_and_a_closed_network_are_installed(kata: Installed) -> None:
    assert sorted(kata.by_kind) == ["DaemonSet", "Namespace", "NetworkPolicy", "ServiceAccount"]
    namespace, account = kata.by_kind["Namespace"]["metadata"], kata.by_kind["ServiceAccount"]
    assert {kata.by_kind[kind]["metadata"]["namespace"] for kind in kata.by_kind if kind != "Namespace"} == {
        namespace["name"]
    }
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "privileged", "it must admit host paths"
    assert kata.pod["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is kata.pod["automountServiceAccountToken"] is False
    policy, daemon_set = kata.by_kind["NetworkPolicy"]["spec"], kata.by_kind["DaemonSet"]["spec"]
    assert policy["podSelector"] == daemon_set["selector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & policy.keys()


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
        # Every kubelet has its sockets' folder there. Whatever else is missing must not keep the pod from starting.
        kind = "Directory" if path == str(settings.kubelet_dir) else "DirectoryOrCreate"
        assert mount["volume"]["hostPath"] == {"path": path, "type": kind}


def test_it_runs_on_every_kata_node_however_tainted_and_is_not_the_first_to_be_evicted(kata: Installed) -> None:
    assert kata.pod["nodeSelector"]["katacontainers.io/kata-runtime"] == "true"
    assert kata.pod["tolerations"] == [{"operator": "Exists"}]
    assert kata.pod["priorityClassName"] == "system-node-critical"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_node_that_is_left_to_dra_is_left_alone(name: str) -> None:
    mode = ("nvidia.com/gpu-operator.resource-allocation.mode", "NotIn", ("dra",))
    assert mode in installed(name).unwanted_nodes()


@pytest.mark.parametrize("name", [*OVERLAYS, ADMINISTRATORS])
def test_the_daemon_is_started_as_this_version_with_arguments_and_variables_that_it_knows(name: str) -> None:
    overlay = installed(name)
    for container in (overlay.container, *overlay.pod.get("initContainers", ())):
        assert container["image"].endswith(f"sandbox-plugin:{__version__}")
    assert "envFrom" not in overlay.container
    assert unknown_variables(overlay.variables) == []
    assert overlay.pod["enableServiceLinks"] is False, "services would set variables"
    assert run_command(*overlay.container["args"], "--help").returncode == 0


def test_overlays_for_two_kinds_of_nodes_stand_beside_each_other_in_one_cluster() -> None:
    builds = [build(name) for name in SIDE_BY_SIDE]
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


def test_for_kubevirt_it_is_told_so_and_mounts_no_cdi_folder() -> None:
    overlay = installed(KUBEVIRT)
    assert overlay.container["args"] == ["run", "--consumer", "kubevirt"]
    settings = Settings()
    folders = (settings.kubelet_dir, settings.pod_resources_socket.parent, settings.status_socket.parent)
    assert overlay.mounts().keys() == {*map(str, folders)}
    assert len(overlay.pod["volumes"]) == len(folders)
    assert overlay.pod["nodeSelector"]["kubevirt.io/schedulable"] == "true"


# Components: what each one changes, on either consumer


@pytest.fixture(params=[KATA, KUBEVIRT], ids=["kata", "kubevirt"])
def base(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_on_k0s_the_socket_of_pod_resources_is_taken_from_its_kubelets_root(base: str, tmp_path: Path) -> None:
    overlay = installed(overlay_of(tmp_path, base, ["k0s"]))
    plain = installed(base)
    moved = overlay.volumes().pop("pod-resources")["hostPath"]
    assert moved == {"path": "/var/lib/k0s/kubelet/pod-resources", "type": "DirectoryOrCreate"}
    assert overlay.volumes() | {"pod-resources": None} == plain.volumes() | {"pod-resources": None}
    assert overlay.container["volumeMounts"] == plain.container["volumeMounts"], "inside, nothing has moved"


def test_the_patch_that_nodes_md_shows_moves_that_socket_anywhere(tmp_path: Path) -> None:
    section = (ROOT / "docs/nodes.md").read_text().partition("--root-dir")[2]
    shown = re.search(r"\n    patches:\n((?:    .*\n)+)", section)
    assert shown is not None
    folder = overlay_of(tmp_path, KATA, [])
    with (tmp_path / "kustomization.yaml").open("a") as file:
        file.write("patches:\n" + re.sub(r"^    ", "", shown[1], flags=re.MULTILINE))
    assert installed(folder).volumes()["pod-resources"]["hostPath"]["path"] == "/data/kubelet/pod-resources"


def test_for_selinux_the_type_of_device_plugins_is_set_and_no_categories_that_the_next_pod_would_not_have(
    base: str, tmp_path: Path
) -> None:
    overlay = installed(overlay_of(tmp_path, base, ["selinux"]))
    context = overlay.container["securityContext"]
    assert context.pop("seLinuxOptions") == {"type": "container_device_plugin_t", "level": "s0"}
    assert context == installed(base).container["securityContext"]


def test_openshift_allows_just_what_the_pod_has_to_its_service_account_alone(base: str, tmp_path: Path) -> None:
    overlay = installed(overlay_of(tmp_path, base, ["openshift"]))
    namespace = overlay.by_kind["Namespace"]["metadata"]
    allowed, context = overlay.by_kind["SecurityContextConstraints"], overlay.container["securityContext"]
    for key, value in allowed.items():
        if key.startswith("allow"):
            assert value in (False, []) or key == "allowHostDirVolumePlugin", key
    assert set(allowed["volumes"]) == {"hostPath", "emptyDir", "configMap"}, "the last for a config file"
    assert {kind for v in overlay.pod["volumes"] for kind in v if kind != "name"} <= set(allowed["volumes"])
    assert allowed["runAsUser"] == {"type": "MustRunAs", "uid": context["runAsUser"]}
    assert allowed["seLinuxContext"] == {"type": "MustRunAs", "seLinuxOptions": context["seLinuxOptions"]}
    assert allowed["requiredDropCapabilities"] == context["capabilities"]["drop"] == ["ALL"]
    assert allowed["readOnlyRootFilesystem"] is context["readOnlyRootFilesystem"] is True
    assert allowed["seccompProfiles"] == ["runtime/default"]
    assert allowed["users"] == allowed["groups"] == allowed["defaultAddCapabilities"] == []
    role, binding = overlay.by_kind["Role"], overlay.by_kind["RoleBinding"]
    assert role["rules"] == [
        {
            "apiGroups": ["security.openshift.io"],
            "resources": ["securitycontextconstraints"],
            "resourceNames": [allowed["metadata"]["name"]],
            "verbs": ["use"],
        }
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = overlay.pod["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace["name"]}]
    assert allowed["metadata"]["name"] == namespace["name"], "another overlay has another one"
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == namespace["name"]
    template = overlay.by_kind["DaemonSet"]["spec"]["template"]["metadata"]
    assert template["annotations"] == {"openshift.io/required-scc": namespace["name"]}
    assert namespace["annotations"] == {"openshift.io/node-selector": ""}


def test_on_openshift_the_operators_own_label_says_which_nodes_have_kata() -> None:
    overlay = installed("manifests/overlays/openshift")
    assert overlay.pod["nodeSelector"] == {"kubernetes.io/os": "linux", "node-role.kubernetes.io/kata-oc": ""}
    assert overlay.by_kind["SecurityContextConstraints"]


def test_for_monitoring_the_probes_go_over_http_and_only_the_port_of_metrics_is_open(base: str, tmp_path: Path) -> None:
    overlay = installed(overlay_of(tmp_path, base, ["monitoring"]))
    (port,) = overlay.container["ports"]
    number = port["containerPort"]
    assert overlay.variables == {"SANDBOX_PLUGIN_METRICS_ADDRESS": f":{number}"}
    asked = {name: overlay.container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"] for name, probe in asked.items()} == {
        name: {"path": path, "port": port["name"]}
        for name, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/healthz"))
    }
    assert not [probe for probe in asked.values() if "exec" in probe]
    policy = overlay.by_kind["NetworkPolicy"]["spec"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": number}]]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    annotations = overlay.by_kind["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(number)}


def test_binding_is_done_by_a_container_that_ends_before_the_plugin_starts_and_that_gains_no_rights_by_it(
    base: str, tmp_path: Path
) -> None:
    overlay, plain = installed(overlay_of(tmp_path, base, ["vfio-bind"])), installed(base)
    assert {**overlay.container, "image": None} == {**plain.container, "image": None}
    assert not {"hostNetwork", "hostPID", "hostIPC", "securityContext"} & set(overlay.pod)
    (binder,) = overlay.pod["initContainers"]
    assert binder["securityContext"]["privileged"] is True
    hosts = {path: mount["volume"]["hostPath"]["path"] for path, mount in overlay.mounts(binder).items()}
    assert hosts == {path: path for path in ("/lib/modules", "/run/sandbox-plugin")}


@pytest.mark.parametrize(("status", "goes_on"), [(0, True), (1, True), (2, False), (127, False)])
def test_a_gpu_that_cannot_be_bound_does_not_keep_the_plugin_from_the_others_but_a_wrong_setting_does(
    status: int, goes_on: bool, tmp_path: Path
) -> None:
    (binder,) = installed("manifests/overlays/vfio-bind").pod["initContainers"]
    program = tmp_path / "sandbox-plugin"
    program.write_text(f'#!/bin/sh\n[ "$*" = "vfio bind --all" ] && exit {status}\nexit 99\n')
    program.chmod(0o755)
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert (subprocess.run(binder["command"], env=own, check=False, timeout=30).returncode == 0) is goes_on


@pytest.mark.parametrize("mode", ["kata", "kubevirt"])
def test_with_the_gpu_operator_it_runs_where_the_operators_own_plugin_would(mode: str, tmp_path: Path) -> None:
    overlay = installed(overlay_of(tmp_path, f"manifests/overlays/{mode}", [f"gpu-operator-{mode}"]))
    plugin = "kata-sandbox-device-plugin" if mode == "kata" else "sandbox-device-plugin"
    assert overlay.pod["nodeSelector"] == {"kubernetes.io/os": "linux", f"nvidia.com/gpu.deploy.{plugin}": "true"}


@pytest.mark.parametrize(
    ("overlay", "component"),
    [(name, name) for name in ("monitoring", "vfio-bind")] + [("gpu-operator", "gpu-operator-kata")],
)
def test_an_overlay_that_is_called_like_a_component_is_kata_with_it(
    overlay: str, component: str, tmp_path: Path
) -> None:
    mine = build(overlay_of(tmp_path, KATA, [component]))
    assert str(mine).replace("registry.example/mine:9", f"sandbox-plugin:{__version__}") == str(
        build(f"manifests/overlays/{overlay}")
    )


# The example of an overlay


def test_the_example_of_an_overlay_gives_the_daemon_a_config_file_that_it_reads_with_and_without_its_comments(
    tmp_path: Path,
) -> None:
    overlay = installed(ADMINISTRATORS)
    assert overlay.container["image"] == f"registry.example/gpu/sandbox-plugin:{__version__}"
    variables = overlay.variables
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


def edited(folder: Path, pattern: str, replacement: str) -> tuple[str, int]:
    """A copy of the example with lines changed: its path, and how many there were."""
    for name in ("examples", "manifests"):
        shutil.copytree(ROOT / name, folder / name)
    file = folder / ADMINISTRATORS / "kustomization.yaml"
    text, changed = re.subn(pattern, replacement, file.read_text(), flags=re.MULTILINE)
    file.write_text(text)
    return str(folder / ADMINISTRATORS), changed


def test_the_example_of_an_overlay_is_one_for_kubevirt_when_the_two_lines_that_say_so_are_changed(
    tmp_path: Path,
) -> None:
    folder, changed = edited(tmp_path, r"^(\s*\S+ )\S+ # for KubeVirt: ([^\s,]+).*", r"\1\2")
    assert changed == 2
    overlay = installed(folder)
    namespaces = {m["metadata"]["namespace"] for kind, m in overlay.by_kind.items() if kind != "Namespace"}
    assert namespaces == {overlay.by_kind["Namespace"]["metadata"]["name"]}
    assert overlay.container["args"] == ["run", "--consumer", "kubevirt"]


OFFERED = re.findall(r"^#  - \S+/components/(\S+)", (ROOT / ADMINISTRATORS / "kustomization.yaml").read_text(), re.M)


@pytest.mark.parametrize("component", OFFERED)
def test_the_example_of_an_overlay_has_a_line_to_use_for_what_clusters_differ_in(
    component: str, tmp_path: Path
) -> None:
    assert len(OFFERED) >= 6
    folder, changed = edited(tmp_path, rf"^#(  - \S+/{component}\b)", r"\1")
    assert changed == 1
    assert build(folder) != build(ADMINISTRATORS)
    for version in KUBERNETES:
        validate(build(folder), version)
