"""sandbox_plugin/api: it is what protos/ give, and it says on the wire what google.protobuf says."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import betterproto
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import load_wire

from sandbox_plugin.api import v1, v1beta1

ROOT = Path(__file__).resolve().parent.parent
WIRE = load_wire()
APIS = {"deviceplugin": v1beta1, "podresources": v1}
MESSAGES = [(api, name) for api in APIS for name in sorted(getattr(WIRE, api).DESCRIPTOR.message_types_by_name)]
SERVICES = [(api, name) for api in APIS for name in sorted(getattr(WIRE, api).DESCRIPTOR.services_by_name)]
TYPES = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_STRING: "string",
}
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


# What the kubelet speaks, message by message: `type name=number`, `[]` is repeated. Copied from the protocol's
# description and not from protos/, from which both implementations are generated.
V1BETA1 = """
    RegisterRequest: string version=1, string endpoint=2, string resource_name=3, DevicePluginOptions options=4
    DevicePluginOptions: bool pre_start_required=1, bool get_preferred_allocation_available=2
    Empty:
    ListAndWatchResponse: Device[] devices=1
    Device: string ID=1, string health=2, TopologyInfo topology=3
    TopologyInfo: NUMANode[] nodes=1
    NUMANode: int64 ID=1
    PreferredAllocationRequest: ContainerPreferredAllocationRequest[] container_requests=1
    ContainerPreferredAllocationRequest: string[] available_deviceIDs=1, string[] must_include_deviceIDs=2,
        int32 allocation_size=3
    PreferredAllocationResponse: ContainerPreferredAllocationResponse[] container_responses=1
    ContainerPreferredAllocationResponse: string[] deviceIDs=1
    AllocateRequest: ContainerAllocateRequest[] container_requests=1
    ContainerAllocateRequest: string[] devices_ids=1
    AllocateResponse: ContainerAllocateResponse[] container_responses=1
    ContainerAllocateResponse: map<string,string> envs=1, Mount[] mounts=2, DeviceSpec[] devices=3,
        map<string,string> annotations=4, CDIDevice[] cdi_devices=5
    Mount: string container_path=1, string host_path=2, bool read_only=3
    DeviceSpec: string container_path=1, string host_path=2, string permissions=3
    CDIDevice: string name=1
    PreStartContainerRequest: string[] devices_ids=1
    PreStartContainerResponse:
"""
V1 = """
    ListPodResourcesRequest:
    AllocatableResourcesRequest:
    ListPodResourcesResponse: PodResources[] pod_resources=1
    AllocatableResourcesResponse: ContainerDevices[] devices=1, int64[] cpu_ids=2, ContainerMemory[] memory=3
    GetPodResourcesRequest: string pod_name=1, string pod_namespace=2
    GetPodResourcesResponse: PodResources pod_resources=1
    PodResources: string name=1, string namespace=2, ContainerResources[] containers=3
    ContainerResources: string name=1, ContainerDevices[] devices=2, int64[] cpu_ids=3,
        ContainerMemory[] memory=4, DynamicResource[] dynamic_resources=5
    ContainerDevices: string resource_name=1, string[] device_ids=2, TopologyInfo topology=3
    ContainerMemory: string memory_type=1, uint64 size=2, TopologyInfo topology=3
    TopologyInfo: NUMANode[] nodes=1
    NUMANode: int64 ID=1
    DynamicResource: string claim_name=2, string claim_namespace=3, ClaimResource[] claim_resources=4
    ClaimResource: CDIDevice[] cdi_devices=1, string driver_name=2, string pool_name=3, string device_name=4,
        optional string share_id=5
    CDIDevice: string name=1
"""
METHODS = {
    "deviceplugin": {
        "/v1beta1.Registration/Register": "RegisterRequest -> Empty",
        "/v1beta1.DevicePlugin/GetDevicePluginOptions": "Empty -> DevicePluginOptions",
        "/v1beta1.DevicePlugin/ListAndWatch": "Empty -> stream ListAndWatchResponse",
        "/v1beta1.DevicePlugin/GetPreferredAllocation": "PreferredAllocationRequest -> PreferredAllocationResponse",
        "/v1beta1.DevicePlugin/Allocate": "AllocateRequest -> AllocateResponse",
        "/v1beta1.DevicePlugin/PreStartContainer": "PreStartContainerRequest -> PreStartContainerResponse",
    },
    "podresources": {
        "/v1.PodResourcesLister/List": "ListPodResourcesRequest -> ListPodResourcesResponse",
        "/v1.PodResourcesLister/GetAllocatableResources": "AllocatableResourcesRequest -> AllocatableResourcesResponse",
        "/v1.PodResourcesLister/Get": "GetPodResourcesRequest -> GetPodResourcesResponse",
    },
}

Fields = dict[int, tuple[str, str]]
"""Number -> type, with `[]`, `map<...>` or `optional` where it is so, and name."""


def specified(text: str) -> dict[str, Fields]:
    """The fields of each message of a table above."""
    messages = {}
    for message in re.split(r"\n {4}(?=\w)", text)[1:]:
        name, _, fields = message.partition(":")
        found = re.findall(r"((?:optional )?[\w<>,]+(?:\[\])?) (\w+)=(\d+)", fields)
        messages[name] = {int(number): (kind, name) for kind, name, number in found}
        assert len(messages[name]) == fields.count("="), message
    return messages


SPECIFIED = {"deviceplugin": specified(V1BETA1), "podresources": specified(V1)}


def generate(root: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts/generate-api.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=50)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The generator, its protos and what it made, to be broken at will."""
    root = tmp_path / "check out"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/generate-api.py", root / "scripts")
    shutil.copytree(ROOT / "protos", root / "protos")
    shutil.copytree(
        ROOT / "sandbox_plugin/api", root / "sandbox_plugin/api", ignore=shutil.ignore_patterns("__pycache__")
    )
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_api_is_up_to_date_from_whatever_folder_one_asks(tmp_path: Path) -> None:
    (tmp_path / "grpc_tools").mkdir()  # a package of that name where one stands must not count
    (tmp_path / "grpc_tools/__init__.py").touch()
    done = generate(ROOT, "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_check_shows_what_differs_and_changes_nothing(checkout: Path) -> None:
    module = checkout / "sandbox_plugin/api/v1.py"
    module.write_text(module.read_text().replace("string_field(1)", "string_field(9)", 1))
    (checkout / "sandbox_plugin/api/v1alpha.py").write_text("left = 'over'\n")
    before = contents(checkout)
    done = generate(checkout, "--check", cwd=checkout)
    assert done.returncode == 1
    assert {"--- committed/v1.py", "--- committed/v1alpha.py"} <= set(done.stdout.splitlines())
    assert any(line.startswith("-") and "string_field(9)" in line for line in done.stdout.splitlines())
    assert contents(checkout) == before


def test_a_generation_mends_what_differs_and_removes_what_no_proto_gives(checkout: Path) -> None:
    before = contents(checkout)
    (checkout / "sandbox_plugin/api/v1.py").write_text("")
    (checkout / "sandbox_plugin/api/v1alpha.py").write_text("left = 'over'\n")
    assert generate(checkout, cwd=checkout).returncode == 0
    assert contents(checkout) == before


def test_a_broken_proto_is_named_with_its_line_and_nothing_is_generated(checkout: Path) -> None:
    proto = checkout / "protos/podresources/v1/api.proto"
    proto.write_text(proto.read_text() + "message {\n")
    before = contents(checkout)
    done = generate(checkout, cwd=checkout)
    assert done.returncode == 1
    assert "podresources/v1/api.proto:" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(checkout) == before


@pytest.mark.parametrize("api", APIS)
def test_the_protos_have_the_kubelets_messages_and_no_others(api: str) -> None:
    assert {name for its_api, name in MESSAGES if its_api == api} == set(SPECIFIED[api])


@pytest.mark.parametrize(("api", "name"), MESSAGES)
def test_a_message_of_google_protobuf_has_the_kubelets_fields(api: str, name: str) -> None:
    theirs = getattr(WIRE, api).DESCRIPTOR.message_types_by_name[name]
    assert {field.number: (_type_of(field), field.name) for field in theirs.fields} == SPECIFIED[api][name]


@pytest.mark.parametrize(("api", "name"), MESSAGES)
def test_a_message_of_ours_has_the_kubelets_fields(api: str, name: str) -> None:
    hints = typing.get_type_hints(our_class(api, name), vars(APIS[api]))
    found = {}
    for field in dataclasses.fields(our_class(api, name)):
        known = betterproto.FieldMetadata.get(field)
        found[known.number] = (_our_type(known, hints[field.name]), _plain(field.name))
    assert found == {n: (kind.lower(), _plain(name)) for n, (kind, name) in SPECIFIED[api][name].items()}


def _type_of(field: FieldDescriptor) -> str:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return f"map<{','.join(_type_of(part) for part in entry.fields)}>"
    kind = entry.name if entry is not None else TYPES[field.type]
    if field.is_repeated:
        return f"{kind}[]"
    return f"optional {kind}" if field.has_presence and entry is None else kind


def _our_type(field: betterproto.FieldMetadata, hint: Any) -> str:
    """In lower case: betterproto writes NUMANode as NumaNode."""
    if field.map_types:
        return f"map<{','.join(field.map_types)}>"
    inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    kind = field.proto_type if field.proto_type != "message" else (inner[0] if inner else hint).__name__.lower()
    if typing.get_origin(hint) is list:
        return f"{kind}[]"
    return f"optional {kind}" if field.optional else kind


def _plain(name: str) -> str:
    """A field's name without case and underscores: betterproto makes available_device_i_ds of available_deviceIDs."""
    return name.replace("_", "").lower()


@pytest.mark.parametrize("api", APIS)
def test_the_services_have_the_kubelets_methods(api: str) -> None:
    services = getattr(WIRE, api).DESCRIPTOR.services_by_name.values()
    assert {
        f"/{service.full_name}/{method.name}": f"{'stream ' * method.client_streaming}{method.input_type.name}"
        f" -> {'stream ' * method.server_streaming}{method.output_type.name}"
        for service in services
        for method in service.methods
    } == METHODS[api]


@pytest.mark.parametrize(("api", "service"), SERVICES)
def test_the_servers_answer_to_the_paths_that_the_protos_name(api: str, service: str) -> None:
    descriptor = getattr(WIRE, api).DESCRIPTOR.services_by_name[service]
    server = getattr(APIS[api], f"{service}Base")()
    expected = {f"/{descriptor.full_name}/{method.name}": method.server_streaming for method in descriptor.methods}
    handlers = server.__mapping__()
    assert {path: handler.cardinality.server_streaming for path, handler in handlers.items()} == expected


def test_numa_node_0_stays_on_the_wire() -> None:
    device = v1beta1.Device(id="7", health="Healthy", topology=v1beta1.TopologyInfo(nodes=[v1beta1.NumaNode(id=0)]))
    seen = WIRE.deviceplugin.Device.FromString(bytes(device))
    assert seen.HasField("topology")
    assert [node.ID for node in seen.topology.nodes] == [0]


def test_a_device_without_a_topology_sets_none() -> None:
    seen = WIRE.deviceplugin.Device.FromString(bytes(v1beta1.Device(id="7", health="Healthy")))
    assert not seen.HasField("topology")
    back = v1beta1.Device().parse(WIRE.deviceplugin.Device(ID="7", health="Healthy").SerializeToString())
    assert not betterproto.serialized_on_wire(back.topology)


def test_the_field_that_betterproto_spells_oddly_carries_the_kubelets_ids() -> None:
    asked = WIRE.deviceplugin.ContainerPreferredAllocationRequest(
        available_deviceIDs=["4", "5"], must_include_deviceIDs=["5"], allocation_size=2
    )
    seen = v1beta1.ContainerPreferredAllocationRequest().parse(asked.SerializeToString())
    assert seen.available_device_i_ds == ["4", "5"]
    assert seen.must_include_device_i_ds == ["5"]
    assert seen.allocation_size == 2


def test_a_claim_without_a_share_and_one_with_an_empty_share_differ() -> None:
    assert not WIRE.podresources.ClaimResource.FromString(bytes(v1.ClaimResource())).HasField("share_id")
    assert WIRE.podresources.ClaimResource.FromString(bytes(v1.ClaimResource(share_id=""))).HasField("share_id")


@pytest.mark.parametrize(("api", "name"), MESSAGES)
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_google_protobuf_says_comes_back_unchanged_through_ours(
    api: str, name: str, data: st.DataObject
) -> None:
    descriptor = getattr(WIRE, api).DESCRIPTOR.message_types_by_name[name]
    said = data.draw(messages(descriptor))
    ours = our_class(api, name)().parse(said.SerializeToString())
    assert ours._unknown_fields == b""
    assert type(said).FromString(bytes(ours)) == said


def our_class(api: str, name: str) -> Any:
    """betterproto's class of a message: it writes NUMANode as NumaNode."""
    found = {attribute.lower(): value for attribute, value in vars(APIS[api]).items() if isinstance(value, type)}
    return found[name.lower()]


def messages(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Messages of google.protobuf, each field set or not."""
    cls = message_factory.GetMessageClass(descriptor)
    fields = {field.name: values(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda chosen: cls(**chosen))


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        # Not the empty key: betterproto 2.0.0b7 leaves an entry out whose key and value are both empty.
        return st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3)
    one = single(field)
    return st.lists(one, max_size=3) if field.is_repeated else one


def single(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.text(max_size=8)
    low, high = RANGES[field.cpp_type]
    return st.integers(low, high)
