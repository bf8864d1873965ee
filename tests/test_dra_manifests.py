"""The overlay `dra` and the examples of claims: what a cluster gets, and that it fits what the daemon asks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from daemon import run_command
from deployed import build
from slices import TERMS, facts_of, registry_of

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.slices import render_devices
from sandbox_plugin.fake.api_server import Account
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS

ROOT = Path(__file__).parent.parent
DRIVER = Settings().dra_driver_name
NAMESPACE = "sandbox-plugin-dra"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("dra-*.yaml"))


@pytest.fixture(scope="module")
def overlay() -> dict[tuple[str, str], Any]:
    """By kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in build("manifests/overlays/dra")}


@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_the_overlay_and_the_examples_are_valid(version: str) -> None:
    examples = [one for name in EXAMPLES for one in yaml.safe_load_all((ROOT / "examples" / name).read_text())]
    for each in [*build("manifests/overlays/dra"), *examples]:
        if not each["apiVersion"].startswith("kubevirt.io/"):
            kubernetes_validate.validate(each, version, strict=True)


def test_what_belongs_to_no_namespace_says_none(overlay: dict[tuple[str, str], Any]) -> None:
    for (kind, _), each in overlay.items():
        assert each["metadata"].get("namespace") == (NAMESPACE if kind in ("DaemonSet", "ServiceAccount") else None)


def test_the_role_allows_what_the_daemon_asks_and_the_fake_api_server_no_more(
    overlay: dict[tuple[str, str], Any],
) -> None:
    rules = overlay["ClusterRole", NAMESPACE]["rules"]
    may = {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert may == Account(node="any").may
    (subject,) = overlay["ClusterRoleBinding", NAMESPACE]["subjects"]
    assert (subject["name"], subject["namespace"]) == ("sandbox-plugin", NAMESPACE)
    assert ("ServiceAccount", "sandbox-plugin") in overlay


def test_the_policy_is_about_this_very_account_and_driver_and_is_bound(overlay: dict[tuple[str, str], Any]) -> None:
    spec = overlay["ValidatingAdmissionPolicy", NAMESPACE]["spec"]
    (condition,) = spec["matchConditions"]
    assert f'"system:serviceaccount:{NAMESPACE}:sandbox-plugin"' in condition["expression"]
    assert spec["failurePolicy"] == "Fail"
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE", "UPDATE", "DELETE"], ["resourceslices"])
    assert any(f'"{DRIVER}"' in each["expression"] for each in spec["validations"])
    binding = overlay["ValidatingAdmissionPolicyBinding", NAMESPACE]["spec"]
    assert (binding["policyName"], binding["validationActions"]) == (NAMESPACE, ["Deny"])


def test_the_daemon_is_started_for_claims_alone_with_a_token_and_the_kubelets_folders(
    overlay: dict[tuple[str, str], Any],
) -> None:
    pod = overlay["DaemonSet", "sandbox-plugin"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert run_command(*container["args"], "--help").returncode == 0
    flags = {"dra": "true", "device_plugin": "off", "consumer": "kubevirt"}
    settings = load_settings(flags, {"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert container["args"] == ["run", "--consumer", str(settings.consumer), "--dra", "--device-plugin", "off"]
    assert pod["automountServiceAccountToken"] is True
    assert "NODE_NAME" in {variable["name"] for variable in container["env"]}
    kubelet = settings.kubelet_dir.parent
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {f"{kubelet}/plugins_registry", f"{kubelet}/plugins/{DRIVER}", str(settings.cdi_dir)} <= paths


@pytest.mark.parametrize("other", ["kata", "kubevirt"])
def test_a_node_is_either_this_overlays_or_another_ones(overlay: dict[tuple[str, str], Any], other: str) -> None:
    mine = overlay["DaemonSet", "sandbox-plugin"]["spec"]["template"]["spec"]
    assert mine["nodeSelector"]["sandbox-plugin/dra"] == "true"
    (theirs,) = (each for each in build(f"manifests/overlays/{other}") if each["kind"] == "DaemonSet")
    affinity = theirs["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "sandbox-plugin/dra", "operator": "DoesNotExist"} in term["matchExpressions"]
    mine_affinity = str(mine.get("affinity", ""))
    assert "sandbox-plugin/dra" not in mine_affinity


# Selectors, and what devices show


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The attributes of every device of every preset."""
    top = tmp_path_factory.mktemp("nodes")
    return [
        dict(device["attributes"])
        for name in PRESETS
        for device in render_devices(registry_of(facts_of(FakeNode.create(top / name, name))).current, TERMS)
    ]


def expressions(one: Any) -> list[str]:
    """Every CEL expression in it."""
    if isinstance(one, dict):
        return [text for key, each in one.items() for text in ([each] if key == "expression" else expressions(each))]
    return [text for each in one for text in expressions(each)] if isinstance(one, list) else []


def test_selectors_ask_for_attributes_that_every_device_has_or_ask_whether_it_has_them(
    overlay: dict[tuple[str, str], Any], shown: list[dict[str, Any]]
) -> None:
    always = set.intersection(*(set(each) for each in shown))
    sometimes = set.union(*(set(each) for each in shown))
    claims = [one for name in EXAMPLES for one in yaml.safe_load_all((ROOT / "examples" / name).read_text())]
    classes = [each for (kind, _), each in overlay.items() if kind == "DeviceClass"]
    assert len(classes) == 4
    found = [text for each in [*classes, *claims] for text in expressions(each)]
    for text in found:
        assert f'"{DRIVER}"' in text
        asked = re.findall(r'attributes\["[^"]+"\]\.(\??)(\w+)', text)
        assert asked
        for optional, name in asked:
            assert name in (sometimes if optional else always), text
        words = re.findall(r'\.type == "([\w-]+)"', text)
        assert all(any(each["type"] == {"string": word} for each in shown) for word in words)


def test_a_name_is_never_offered_by_both_apis_of_one_node(overlay: dict[tuple[str, str], Any]) -> None:
    extended = [each for (kind, _), each in overlay.items() if "extendedResourceName" in each.get("spec", {})]
    assert extended
    for each in extended:
        (text,) = expressions(each)
        assert f'!device.attributes["{DRIVER}"].devicePlugin' in text
        assert f'"{each["spec"]["extendedResourceName"]}"' in text


def test_the_virtual_machine_asks_for_each_device_by_a_request_of_its_own() -> None:
    template, vm = yaml.safe_load_all((ROOT / "examples/dra-kubevirt-vm.yaml").read_text())
    requests = template["spec"]["spec"]["devices"]["requests"]
    gpus = vm["spec"]["domain"]["devices"]["gpus"]
    assert [gpu["requestName"] for gpu in gpus] == [request["name"] for request in requests]
    (claim,) = vm["spec"]["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    assert {gpu["claimName"] for gpu in gpus} == {claim["name"]}
    assert all(request["exactly"].get("count", 1) == 1 for request in requests)


def test_claims_name_classes_attributes_and_capacities_that_there_are(overlay: dict[tuple[str, str], Any]) -> None:
    text = "".join((ROOT / "examples" / name).read_text() for name in EXAMPLES)
    classes = {name for kind, name in overlay if kind == "DeviceClass"}
    assert set(re.findall(r"deviceClassName: (\S+)", text)) <= classes | {"nic.example.com"}
    assert set(re.findall(r"matchAttribute: resource.kubernetes.io/(\w+)", text)) == {"numaNode", "pcieRoot"}
    assert "barMemory" in text
