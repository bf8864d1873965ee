"""sandbox_plugin/api: it is what protos/ give, and it says on the wire what google.protobuf says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import load_wire

from sandbox_plugin.api import dra_v1, pluginregistration, v1, v1alpha1, v1beta1

ROOT = Path(__file__).resolve().parent.parent
WIRE = load_wire()
APIS = {
    "deviceplugin": v1beta1,
    "podresources": v1,
    "registration": pluginregistration,
    "dra": dra_v1,
    "health": v1alpha1,
}
MESSAGES = [(api, name) for api in APIS for name in sorted(getattr(WIRE, api).DESCRIPTOR.message_types_by_name)]
SCALARS = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.text(max_size=8),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 2),
}


def generate(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts/generate-api.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def test_a_check_shows_what_differs_and_a_generation_mends_it(tmp_path: Path) -> None:
    """That the api is up to date as it is, `dev.py lint` says."""
    for part in ("protos", "sandbox_plugin/api", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "sandbox_plugin/api/v1.py"
    module.write_text(module.read_text().replace("string_field(1)", "string_field(9)", 1))
    (tmp_path / "sandbox_plugin/api/v1alpha.py").write_text("left = 'over'\n")
    checked = generate(tmp_path, "--check")
    assert checked.returncode == 1
    assert {"--- committed/v1.py", "--- committed/v1alpha.py"} <= set(checked.stdout.splitlines())
    assert generate(tmp_path).returncode == 0
    for file in (ROOT / "sandbox_plugin/api").glob("*.py"):
        assert (tmp_path / "sandbox_plugin/api" / file.name).read_text() == file.read_text()
    assert not (tmp_path / "sandbox_plugin/api/v1alpha.py").exists()


@pytest.mark.parametrize(("api", "name"), MESSAGES)
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_google_protobuf_says_comes_back_unchanged_through_ours(
    api: str, name: str, data: st.DataObject
) -> None:
    said = data.draw(messages(getattr(WIRE, api).DESCRIPTOR.message_types_by_name[name]))
    ours = our_class(api, name)().parse(said.SerializeToString())
    assert ours._unknown_fields == b""
    assert type(said).FromString(bytes(ours)) == said


@pytest.mark.parametrize(("api", "name"), MESSAGES)
def test_fields_of_a_newer_kubelet_are_passed_over_and_kept(api: str, name: str) -> None:
    newer = b"\xf2\x3f\x03new" + b"\xf8\x3f\x07"  # field 1022 is a string, 1023 a number
    assert bytes(our_class(api, name)().parse(newer)) == newer


def test_numa_node_0_stays_on_the_wire_and_a_device_without_a_topology_sets_none() -> None:
    device = v1beta1.Device(id="7", topology=v1beta1.TopologyInfo(nodes=[v1beta1.NumaNode(id=0)]))
    seen = WIRE.deviceplugin.Device.FromString(bytes(device))
    assert [node.ID for node in seen.topology.nodes] == [0]
    assert not WIRE.deviceplugin.Device.FromString(bytes(v1beta1.Device(id="7"))).HasField("topology")


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
        value = values(entry.fields_by_name["value"])
        return st.dictionaries(st.text(min_size=1, max_size=5), value, max_size=3)
    one = SCALARS[field.cpp_type] if entry is None else messages(entry)
    return st.lists(one, max_size=3) if field.is_repeated else one
