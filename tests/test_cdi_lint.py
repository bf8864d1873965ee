"""What is said of one CDI spec, and who may replace a file with the name of ours: pure, from bytes to words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU
from specs import as_text, device, document, reference

from sandbox_plugin.cdi.lint import Reading, lint, read_spec
from sandbox_plugin.cdi.owner import Ownership, ownership
from sandbox_plugin.cdi.render import MARK
from sandbox_plugin.cdi.stale import read_stale


def in_edits(**edits: Any) -> bytes:
    return as_text(document(devices=[device(**edits)]))


def node(**fields: Any) -> bytes:
    return in_edits(deviceNodes=[{"path": "/dev/null"} | fields])


EVERYTHING = document(
    annotations={"vendor.com/why": "because"},
    containerEdits={"env": ["A=b"]},
    devices=[
        device(
            "all",
            deviceNodes=[
                {"path": "/a", "hostPath": "/d", "type": "c", "major": 1, "minor": -1}
                | {"fileMode": 432, "permissions": "rwm", "uid": 0, "gid": 0},
                {"path": "/b", "hostPath": None},
            ],
            hooks=[{"hookName": "prestart", "path": "/bin/true", "args": ["true", 1], "env": ["A=b"], "timeout": 1}],
            mounts=[{"hostPath": "/a", "containerPath": "/b", "type": "bind", "options": ["ro"]}],
        )
        | {"annotations": {}},
        device(0),
    ],
)
GOOD: dict[str, tuple[bytes, dict[str, tuple[str, ...]]]] = {
    "the plainest": (as_text(document()), {"vendor.com/class=0": ("/dev/null",)}),
    "JSON with tabs": (json.dumps(document(), indent="\t").encode(), {"vendor.com/class=0": ("/dev/null",)}),
    "every field": (as_text(EVERYTHING), {"vendor.com/class=all": ("/a", "/b"), "vendor.com/class=0": ("/dev/null",)}),
    "empty edits for all devices, as Go writes them": (
        as_text(document(cdiVersion="v0.5.0", containerEdits={})),
        {"vendor.com/class=0": ("/dev/null",)},
    ),
    "the oldest version": (
        as_text(document(cdiVersion="0.1.0", devices=[device()])),
        {"vendor.com/class=d0": ("/dev/null",)},
    ),
    "a device without nodes": (in_edits(env=["A=b"]), {"vendor.com/class=d0": ()}),
}
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"# nothing yet\n", "it is empty"),
    "no YAML": (b"kind: [unclosed\n", "not valid YAML or JSON: while parsing a flow sequence at line 1"),
    "no text": (b"\xff\xfe\x00", "not valid YAML or JSON"),
    "two documents": (as_text(document()) + b"---\n" + as_text(document()), "expected a single document"),
    "a key twice": (as_text(document()) + b"kind: vendor.com/class\n", "the mapping at line 1 has a key twice"),
    "a key that is a list": (b"[a]: b\n", "unhashable key"),
    "a list": (b"[]", "it is not a mapping"),
    "no version": (as_text(document(cdiVersion=None)), "cdiVersion is None"),
    "a version that only Rust reads": (
        as_text(document(cdiVersion="0.7.0", devices=[device(additionalGids=[1])])),
        "cdiVersion is '0.7.0': Kata reads 0.1.0 to 0.6.0, its runtime-rs alone up to 1.1.0",
    ),
    "no kind": (as_text(document(kind=None)), "kind is None, which is not vendor/class"),
    "a kind without a vendor": (as_text(document(kind="class")), "kind is 'class', which is not vendor/class"),
    "a class that begins with a digit": (as_text(document(kind="vendor.com/0class")), "kind is 'vendor.com/0class'"),
    "a class of one letter": (as_text(document(kind="vendor.com/c")), "two characters each"),
    "a vendor of one letter": (as_text(document(kind="v/class")), "two characters each"),
    "no devices": (as_text(document(devices=None)), "it has no devices"),
    "empty devices": (as_text(document(devices=[])), "it has no devices"),
    "devices by name": (as_text(document(devices={"0": {}})), "devices is not a list"),
    "a device that is text": (as_text(document(devices=["0"])), "devices[0] is not a mapping"),
    "a device that is null": (as_text(document(devices=[None])), "None is not a valid device name"),
    "a device twice": (as_text(document(devices=[device("0"), device("0")])), "device '0' is listed twice"),
    "a name with a slash": (as_text(document(devices=[device("a/b")])), "'a/b' is not a valid device name"),
    "a device whose edits are empty": (in_edits(deviceNodes=[]), "device 'd0' has no containerEdits"),
    "a node without a path": (in_edits(deviceNodes=[None]), "device 'd0' has a node without a path"),
    "an unknown field of the spec": (
        as_text(document(vendor="x")),
        "the spec has the field 'vendor', which CDI 0.6.0 does not know",
    ),
    "an unknown field of a device": (
        as_text(document(devices=[device("0"), device() | {"id": 1}])),
        "devices[1] has the field 'id'",
    ),
    "an unknown field of edits": (in_edits(additionalGids=[1]), "devices[0].containerEdits has the field"),
    "an unknown field of a node": (node(mode=1), "devices[0].containerEdits.deviceNodes[0] has the field 'mode'"),
    "a digit first before 0.5.0": (
        as_text(document(cdiVersion="0.4.0")),
        "cdiVersion is 0.4.0, and device name '0' (starts with a digit) needs 0.5.0",
    ),
}
UNREAD: dict[str, tuple[bytes, str]] = {
    "something very large": (b"#" * (1 << 19), "it has more than 262144 bytes"),
    "aliases": (b"a: &a {k: v}\nb: {<<: *a}\n", "it has YAML aliases"),
    "a deep list": (b"[" * 120_000, "it is nested more than 32 levels deep"),
    "a deep list in lines": (b"- " * 120_000, "it is nested more than 32 levels deep"),
}
"""What Kata may be able to read, and what would cost minutes, or the life of the process: libyaml's stack overflows."""


@pytest.mark.parametrize("name", GOOD)
def test_of_a_spec_that_kata_takes_the_devices_and_their_nodes_are_read(name: str) -> None:
    content, devices = GOOD[name]
    assert read_spec(content) == Reading(kind="vendor.com/class", devices=devices)


@pytest.mark.parametrize("name", BAD)
def test_of_a_spec_that_kata_refuses_it_is_said_what_is_wrong_and_where(name: str) -> None:
    content, words = BAD[name]
    reading = read_spec(content)
    assert reading.wrong is not None
    assert words in reading.wrong
    assert "\n" not in reading.wrong
    assert len(reading.wrong) < 400
    assert reading.devices == {}


@pytest.mark.parametrize("name", UNREAD)
def test_what_would_cost_too_much_is_left_unread(name: str) -> None:
    content, words = UNREAD[name]
    assert read_spec(content) == Reading(unread=words)
    assert ownership(content, PGPU) == Ownership(may_replace=False, why=words)


def test_the_kind_of_a_spec_is_known_whatever_else_is_wrong_with_it() -> None:
    assert read_spec(as_text(document(devices=[], vendor="x"))).kind == "vendor.com/class"


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_at_all_break_the_judge(content: bytes, ours: bool) -> None:
    read_spec(content)
    read_stale("nvidia.com-pgpu.yaml", content, lambda kind: ours)
    assert ownership(content, PGPU).why


def test_of_two_specs_of_one_folder_with_one_device_the_other_is_to_blame_and_not_ours() -> None:
    ours, theirs = read_spec(MARK.encode() + as_text(document())), read_spec(as_text(document()))
    folder = Path("/cdi")
    for name in ("a.yaml", "z.yaml"):
        assert lint({folder / "m.yaml": ours, folder / name: theirs}) == {
            folder / name: "device vendor.com/class=0 is in m.yaml too"
        }
    assert lint({folder / "a.yaml": theirs, folder / "b.yaml": theirs}) == {
        folder / "b.yaml": "device vendor.com/class=0 is in a.yaml too"
    }
    assert lint({folder / "sub/a.yaml": theirs, folder / "z.yaml": ours}) == {
        folder / "sub/a.yaml": "device vendor.com/class=0 is in /cdi/z.yaml too"
    }


# Who may replace it


THEIRS = reference("other.com/pgpu")
SERVED = "it has the name and the kind of a resource that this plugin serves"
OWNED: dict[str, tuple[bytes, bool, str]] = {
    "the reference's": (b"---\n" + as_text(reference(PGPU)), True, SERVED),
    "JSON": (json.dumps(reference(PGPU), indent=2).encode(), True, SERVED),
    "an empty file": (b"", True, "it is empty"),
    "an empty mapping": (b"{}", True, "it is empty"),
    "half of one": (b"---\ncdiVersion: 0.5.0\ncontainerEd", True, "it is not valid YAML or JSON"),
    "half of one that is valid": (
        b"---\ncdiVersion: 0.5.0\ndevices:\n- containerEd",
        True,
        "it is unfinished: it has no kind",
    ),
    "half of our kind": (
        b"cdiVersion: 0.5.0\nkind: nvidia.com/pg",
        True,
        "it is unfinished: it breaks off within its kind",
    ),
    "ours": (MARK.encode() + as_text(THEIRS), True, "this plugin wrote it"),
    "another kind": (as_text(THEIRS), False, "kind other.com/pgpu"),
    "a kind that ours begins with": (b"cdiVersion: 0.5.0\nkind: nvidia.com/pg\n", False, "kind nvidia.com/pg"),
    "another kind in JSON with tabs": (json.dumps(THEIRS, indent="\t").encode(), False, "kind other.com/pgpu"),
    "our kind further down": (as_text(THEIRS | {"annotations": {"kind": PGPU}}), False, "kind other.com/pgpu"),
    "a text": (b"do not touch this\n", False, "it is not a CDI spec"),
    "an empty list": (b"[]", False, "it is not a CDI spec"),
}
"""What is in our file, whether it may be replaced, and why."""


@pytest.mark.parametrize("name", OWNED)
def test_what_has_our_name_may_be_replaced_if_it_has_our_mark_or_kind_or_is_a_broken_rest(name: str) -> None:
    content, may_replace, why = OWNED[name]
    assert ownership(content, PGPU) == Ownership(may_replace=may_replace, why=why)
