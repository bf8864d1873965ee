"""What a cluster sees of the plugin, as it is deployed: the components for labels, for events, and for Prometheus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployed import KATA, KUBEVIRT, NEWEST_KUBERNETES, Installed, build, installed, overlay_of, validate

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import FEATURES_FOLDER

CONSUMERS = pytest.mark.parametrize("base", [KATA, KUBEVIRT])


def with_components(folder: Path, base: str, *components: str) -> Installed:
    """An overlay of somebody's own, which names its namespace as the example does."""
    overlay_of(folder, base, components)
    with (folder / "kustomization.yaml").open("a") as file:
        file.write(f"namespace: {installed(base).by_kind['Namespace']['metadata']['name']}\n")
    validate(build(str(folder)), NEWEST_KUBERNETES)
    return installed(str(folder))


@CONSUMERS
def test_the_component_for_labels_mounts_nfds_folder_and_names_it_and_adds_no_power(tmp_path: Path, base: str) -> None:
    plain, labelling = installed(base), with_components(tmp_path, base, "node-features")
    assert load_settings({}, labelling.variables).features_folder == FEATURES_FOLDER
    (added,) = labelling.mounts().keys() - plain.mounts().keys()
    assert added == str(FEATURES_FOLDER)
    assert labelling.mounts()[added]["volume"]["hostPath"] == {"path": added, "type": "DirectoryOrCreate"}
    assert not labelling.mounts()[added].get("readOnly")
    assert labelling.container["securityContext"] == plain.container["securityContext"]
    assert labelling.by_kind.keys() == plain.by_kind.keys()


@CONSUMERS
def test_the_component_for_the_prometheus_operator_finds_the_pods_and_brings_the_alerts_and_the_dashboard(
    tmp_path: Path, base: str
) -> None:
    """The operator's own kinds are no part of Kubernetes: the fields here are those of its API."""
    plain, watched = installed(base), with_components(tmp_path, base, "monitoring", "prometheus-operator")
    assert watched.by_kind.keys() - plain.by_kind.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    monitor, rule, dashboard = (watched.by_kind[kind] for kind in ("PodMonitor", "PrometheusRule", "ConfigMap"))
    namespace = watched.by_kind["Namespace"]["metadata"]["name"]
    assert {each["metadata"]["namespace"] for each in (monitor, rule, dashboard)} == {namespace}
    assert {each["apiVersion"] for each in (monitor, rule)} == {"monitoring.coreos.com/v1"}
    labels = watched.by_kind["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in watched.container["ports"]]
    assert endpoint["honorLabels"] is True
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]
    assert rule["spec"]["groups"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["sandbox-plugin.json"])["panels"]


@CONSUMERS
def test_the_component_for_node_events_gives_the_right_to_create_events_and_no_other(tmp_path: Path, base: str) -> None:
    plain, telling = installed(base), with_components(tmp_path, base, "node-events")
    assert telling.by_kind.keys() - plain.by_kind.keys() == {"ClusterRole", "ClusterRoleBinding"}
    role, binding = telling.by_kind["ClusterRole"], telling.by_kind["ClusterRoleBinding"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    name = f"sandbox-plugin-events:{telling.by_kind['Namespace']['metadata']['name']}"
    assert role["metadata"]["name"] == binding["metadata"]["name"] == binding["roleRef"]["name"] == name
    account = telling.by_kind["ServiceAccount"]["metadata"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])
    assert telling.pod["automountServiceAccountToken"] is True
    assert telling.container["securityContext"] == plain.container["securityContext"]
    in_a_pod = {**telling.variables, "NODE_NAME": "gpu-1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert load_settings({}, in_a_pod).node_events
    assert telling.by_kind["NetworkPolicy"]["spec"]["egress"] == [{"ports": [{"port": 443}, {"port": 6443}]}]
    assert "egress" not in plain.by_kind["NetworkPolicy"]["spec"]


def test_rights_for_events_stand_beside_those_for_claims(tmp_path: Path) -> None:
    manifests = build(overlay_of(tmp_path, "manifests/overlays/dra", ["node-events"]))
    roles = {each["metadata"]["name"]: each["rules"] for each in manifests if each["kind"] == "ClusterRole"}
    assert len(roles) == 2
    assert [rules for name, rules in roles.items() if name.startswith("sandbox-plugin-events:")] == [
        [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    ]
