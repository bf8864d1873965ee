"""CDI specs as they are rendered, held against a strict reader of the format.

The reader (cdi_reader.py) shares nothing with the package, and is tested here itself: it must refuse what Kata refuses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cdi_bench import offered
from cdi_reader import Refused, nodes_of, read_folder, read_spec
from hypothesis import given
from hypothesis import strategies as st
from names import NVSWITCH, PGPU
from specs import as_text, document

from sandbox_plugin.cdi.render import MARK, ids_in_spec, read_rendered, render_spec, render_specs
from sandbox_plugin.cdi.text import NotYaml, load
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device

PLAIN = f"""{MARK}cdiVersion: "0.5.0"
kind: "nvidia.com/pgpu"
devices:
  - name: "4"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/devices/vfio4"
  - name: "12"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/47"
"""


def offering(*devices: Device) -> Inventory:
    kinds = {d.resource for d in devices}
    return Inventory(version=1, resources={k: tuple(d for d in devices if d.resource == k) for k in kinds})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.5.0", "0.7.0"),
        ('"12"', '"4"'),
        ('"12"', "12"),
        ("path", "mode"),
        ('- path: "/dev/vfio/47"', ""),
    ],
)
def test_the_strict_reader_refuses_what_kata_could_stumble_over(before: str, after: str) -> None:
    assert read_spec(PLAIN).devices == {"4": ("/dev/vfio/devices/vfio4",), "12": ("/dev/vfio/47",)}
    with pytest.raises(Refused):
        read_spec(PLAIN.replace(before, after))


def test_the_strict_reader_refuses_a_folder_for_one_device_in_two_specs_or_a_node_that_is_not_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.yaml").write_bytes(as_text(document()))
    (tmp_path / "not-a-spec.txt").write_bytes(b"whatever")
    assert read_folder(tmp_path) == {"vendor.com/class=0": ("/dev/null",)}
    with pytest.raises(Refused, match="/dev/null does not exist"):
        read_folder(tmp_path, nodes_of(tmp_path))
    (tmp_path / "b.json").write_text(json.dumps(document()))
    with pytest.raises(Refused, match=r"b\.json: vendor.com/class=0 is in another spec too"):
        read_folder(tmp_path)


def test_a_spec_is_one_entry_a_device_and_its_node_and_no_field_that_is_not_needed() -> None:
    assert render_specs(offering(offered(PGPU, 4), offered(PGPU, 12, node="/dev/vfio/47"))) == {PGPU: PLAIN}


def test_a_device_whose_node_is_gone_is_in_no_spec_and_a_resource_without_any_other_has_none() -> None:
    lost = [offered(kind, 4, node_exists=False) for kind in (PGPU, NVSWITCH)]
    specs = render_specs(offering(*lost, offered(PGPU, 5)))
    assert specs.keys() == {PGPU}
    assert read_spec(specs[PGPU]).devices.keys() == {"5"}


def test_only_what_stands_in_a_spec_of_ours_with_a_node_that_exists_counts_as_in_it() -> None:
    content = render_spec(PGPU, [offered(PGPU, number) for number in (1, 2, 3)]).encode()
    moved, lost = offered(PGPU, 2, node="/dev/vfio/2"), offered(PGPU, 3, node_exists=False)
    now = [offered(PGPU, 1), moved, lost, offered(PGPU, 4)]
    assert ids_in_spec(content, PGPU, now) == {"1"}
    assert ids_in_spec(content, NVSWITCH, now) == set()
    assert ids_in_spec(content.removeprefix(MARK.encode()), PGPU, now) == set()


@pytest.mark.parametrize("resource", ["true.com/null", "a.b-c/d-d", "null.e5/on"])
def test_names_and_ids_that_look_like_something_else_in_yaml_stay_text(resource: str) -> None:
    spec = read_spec(render_spec(resource, [offered(resource, number) for number in (0, 10, 1 << 40)]))
    assert spec.kind == resource
    assert list(spec.devices) == ["0", "10", "1099511627776"]


@pytest.mark.parametrize("numbers", [(), (4,), (0, 10, 1 << 40), (7, 7)], ids=str)
def test_what_is_written_as_we_write_it_is_read_like_yaml_without_its_parser(numbers: tuple[int, ...]) -> None:
    content = render_spec(PGPU, [offered(PGPU, number) for number in numbers]).encode()
    parsed = load(content)
    assert read_rendered(content) == parsed | {"devices": parsed["devices"] or []}


@given(st.data())
def test_of_a_spec_that_was_changed_nothing_is_read_that_yaml_would_not_say(data: st.DataObject) -> None:
    content = PLAIN.encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 30)))
    changed = content[:start] + data.draw(st.sampled_from([b"", b'"', b"\n", b"4", b"\xff", b"# "])) + content[end:]
    read = read_rendered(changed)
    try:
        assert read in (None, load(changed))
    except NotYaml:
        assert read is None
