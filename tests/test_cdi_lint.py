"""What is said of other people's CDI specs, and whose a file with the name of ours is: pure, from bytes to words."""

from __future__ import annotations

import json
import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from names import PGPU
from specs import as_text, device, document, reference

from sandbox_plugin.cdi import text as spec_text
from sandbox_plugin.cdi.lint import Reading, lint, read_spec
from sandbox_plugin.cdi.owner import MARK, ownership, stated_kind

# One spec


def in_edits(**edits: Any) -> bytes:
    return as_text(document(devices=[device(**edits)]))


def node(**fields: Any) -> bytes:
    return in_edits(deviceNodes=[{"path": "/dev/null"} | fields])


def hook(**fields: Any) -> bytes:
    return in_edits(hooks=[{"hookName": "prestart", "path": "/bin/true"} | fields])


def mount(**fields: Any) -> bytes:
    return in_edits(mounts=[{"hostPath": "/a", "containerPath": "/b"} | fields])


ZERO: dict[str, tuple[str, ...]] = {"vendor.com/class=0": ("/dev/null",)}
GOOD: dict[str, tuple[bytes, dict[str, tuple[str, ...]]]] = {
    "the plainest": (as_text(document()), ZERO),
    "JSON": (json.dumps(document()).encode(), ZERO),
    "JSON with tabs": (json.dumps(document(), indent="\t").encode(), ZERO),
    "the version with a v": (as_text(document(cdiVersion="v0.5.0")), ZERO),
    "the oldest version": (
        as_text(document(cdiVersion="0.1.0", devices=[device()])),
        {"vendor.com/class=d0": ("/dev/null",)},
    ),
    "a class with a dot": (as_text(document(kind="a.b/c.d")), {"a.b/c.d=0": ("/dev/null",)}),
    "annotations": (as_text(document(annotations={"vendor.com/why": "because"})), ZERO),
    "edits for all devices": (as_text(document(containerEdits={"env": ["A=b", "C="]})), ZERO),
    "empty edits for all devices, as Go writes them": (as_text(document(containerEdits={})), ZERO),
    "every field of a node": (
        node(hostPath="/d", type="c", major=1, minor=-1, fileMode=432, permissions="rwm", uid=0, gid=0),
        {"vendor.com/class=d0": ("/dev/null",)},
    ),
    "every field of a hook": (hook(args=["true", 1], env=["A=b"], timeout=1), {"vendor.com/class=d0": ()}),
    "every field of a mount": (mount(type="bind", options=["ro"]), {"vendor.com/class=d0": ()}),
    "fields that are null": (node(hostPath=None, type=None, major=None), {"vendor.com/class=d0": ("/dev/null",)}),
    "a name that is a number": (as_text(document(devices=[device(0)])), ZERO),
    "a mode in octal digits": (
        node(fileMode=438).replace(b"438", b"0o666"),
        {"vendor.com/class=d0": ("/dev/null",)},
    ),
    "two devices": (
        as_text(document(devices=[device("0"), device("all", deviceNodes=[{"path": "/a"}, {"path": "/b"}])])),
        {**ZERO, "vendor.com/class=all": ("/a", "/b")},
    ),
    "a node that does not exist": (
        as_text(document(devices=[device("x", deviceNodes=[{"path": "/dev/nowhere"}])])),
        {"vendor.com/class=x": ("/dev/nowhere",)},
    ),
}
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty"),
    "comments": (b"# nothing yet\n", "it is empty"),
    "no YAML": (b"kind: [unclosed\n", "not valid YAML or JSON: while parsing a flow sequence at line 1"),
    "half of it": (as_text(document())[:-20], "not valid YAML or JSON"),
    "no text": (b"\xff\xfe\x00", "not UTF-8: invalid start byte at byte 0"),
    "two documents": (as_text(document()) + b"---\n" + as_text(document()), "expected a single document"),
    "an anchor that contains itself": (b"devices: &d [*d]\n", "unconstructable recursive node"),
    "an alias of nothing": (b"devices: *d\n", "undefined alias"),
    "a key twice": (as_text(document()) + b"kind: vendor.com/class\n", "duplicate key 'kind'"),
    "a key twice in JSON": (b'{"kind": "a.b/cc", "kind": "a.b/cc"}', "duplicate key 'kind'"),
    "a key that is a list": (b"[a]: b\n", "a key that is not a string"),
    "a list": (b"[]", "the spec is not a mapping"),
    "no version": (as_text(document(cdiVersion=None)), "cdiVersion is missing"),
    "a version that is a list": (as_text(document(cdiVersion=["0.5.0"])), "cdiVersion is a list"),
    "a version that only Rust reads": (
        as_text(document(cdiVersion="0.7.0", devices=[device(additionalGids=[1])])),
        "cdiVersion is '0.7.0', which runtime-rs reads since Kata 4.0, and Kata's Go runtime, which reads 0.1.0 to "
        "0.6.0, does not",
    ),
    "the newest version that only Rust reads": (as_text(document(cdiVersion="1.1.0")), "which runtime-rs reads"),
    "a version that nobody reads": (
        as_text(document(cdiVersion="1.2.0")),
        "cdiVersion is '1.2.0', and Kata reads 0.1.0 to 0.6.0",
    ),
    "no kind": (as_text(document(kind=None)), "kind is missing"),
    "a kind without a vendor": (as_text(document(kind="class")), "kind is 'class', which is not vendor/class"),
    "a class that begins with a digit": (
        as_text(document(kind="vendor.com/0class")),
        "kind is 'vendor.com/0class', which is not vendor/class, each beginning with a letter",
    ),
    "a class of one letter": (
        as_text(document(kind="vendor.com/c")),
        "kind is 'vendor.com/c', and Kata fails at a vendor or a class of one letter",
    ),
    "a vendor of one letter": (as_text(document(kind="v/class")), "a vendor or a class of one letter"),
    "no devices": (as_text(document(devices=None)), "it has no devices"),
    "empty devices": (as_text(document(devices=[])), "it has no devices"),
    "devices by name": (as_text(document(devices={"0": {}})), "devices is not a list"),
    "a device that is text": (as_text(document(devices=["0"])), "devices[0] is not a mapping"),
    "a device that is null": (as_text(document(devices=[None])), "devices[0].name is missing"),
    "a device twice": (as_text(document(devices=[device("0"), device("0")])), "device '0' is listed twice"),
    "a name that is a list": (as_text(document(devices=[device(["a"])])), "devices[0].name is a list"),
    "a name with a slash": (as_text(document(devices=[device("a/b")])), "'a/b' is not a valid device name"),
    "a device without edits": (as_text(document(devices=[{"name": "0"}])), "device '0' has no containerEdits"),
    "a device whose edits are empty": (in_edits(deviceNodes=[]), "device 'd0' has no containerEdits"),
    "an unknown field of the spec": (
        as_text(document(vendor="x")),
        "the spec has the field 'vendor', which CDI 0.6.0 does not know",
    ),
    "an unknown field of a device": (
        as_text(document(devices=[device("0"), device() | {"id": 1}])),
        "devices[1] has the field 'id', which CDI 0.6.0 does not know",
    ),
    "an unknown field of edits": (
        in_edits(additionalGids=[1]),
        "devices[0].containerEdits has the field 'additionalGids', which CDI 0.6.0 does not know",
    ),
    "an unknown field of a node": (
        node(mode=1),
        "devices[0].containerEdits.deviceNodes[0] has the field 'mode', which CDI 0.6.0 does not know",
    ),
    "a node without a path": (
        in_edits(deviceNodes=[{"hostPath": "/d"}]),
        "devices[0].containerEdits.deviceNodes[0].path is missing",
    ),
    "a node with an empty path": (node(path=""), "deviceNodes[0].path is '', which is not of the form .+"),
    "nodes that are no list": (in_edits(deviceNodes={"path": "/d"}), "deviceNodes is not a list"),
    "a node of an unknown type": (node(type="x"), "deviceNodes[0].type is 'x', which is not of the form [bcup]?"),
    "a node whose major is text": (node(major="195"), "deviceNodes[0].major is '195', and not a whole number"),
    "a variable without =": (in_edits(env=["B=", "A"]), "env[1] is 'A', which is not of the form [^=]+=.*"),
    "an unknown hook": (hook(hookName="before"), "hooks[0].hookName is 'before', which is not of the form prestart|"),
    "a mount to nowhere": (in_edits(mounts=[{"hostPath": "/a"}]), "mounts[0].containerPath is missing"),
    "annotations that are a list": (as_text(document(annotations=["a"])), "annotations is a list, and not a mapping"),
    "a digit first before 0.5.0": (
        as_text(document(cdiVersion="0.4.0")),
        "cdiVersion is 0.4.0, and device name '0' (does not start with a letter) needs 0.5.0",
    ),
    "a hostPath before 0.5.0": (
        node(hostPath="/d").replace(b"0.6.0", b"0.4.0"),
        "cdiVersion is 0.4.0, and a device node with a hostPath needs 0.5.0",
    ),
    "a mount's type before 0.4.0": (mount(type="bind").replace(b"0.6.0", b"0.3.0"), "a mount with a type needs 0.4.0"),
    "an annotation before 0.6.0": (
        as_text(document(cdiVersion="0.5.0", annotations={"a": "b"})),
        "an annotation needs 0.6.0",
    ),
    "a class with a dot before 0.6.0": (
        as_text(document(cdiVersion="0.5.0", kind="a.b/c.d")),
        "a class with a dot needs 0.6.0",
    ),
}
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"\n".join(
    b"%c: &%c [%b]" % (b, b, b",".join([b"*%c" % (b - 1)] * 9)) for b in b"bcdefgh"
)
"""Eight lines that stand for 387 million scalars."""
UNREAD: dict[str, tuple[bytes, str]] = {
    "something very large": (b"#" * (1 << 19), "it has more than 262144 bytes"),
    "aliases": (BOMB, "it has YAML aliases"),
    "merged aliases": (b"a: &a {k: v}\nb: {<<: *a}\n", "it has YAML aliases"),
    "a deep list": (b"[" * 120_000, "it is nested more than 32 levels deep"),
    "a deep list that is ended": (b"[" * 60_000 + b"]" * 60_000, "it is nested more than 32 levels deep"),
    "a deep mapping": (b"{" * 120_000, "it is nested more than 32 levels deep"),
    "a deep list in lines": (b"- " * 120_000, "it is nested more than 32 levels deep"),
    "deep keys": (b"? " * 120_000, "it is nested more than 32 levels deep"),
}
"""What would cost minutes, or the life of the process: libyaml's stack overflows."""


@pytest.mark.parametrize("name", GOOD)
def test_of_a_spec_that_kata_takes_the_devices_and_their_nodes_are_read(name: str) -> None:
    content, devices = GOOD[name]
    assert read_spec(content) == Reading(devices=devices)


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
    assert stated_kind(content) is None
    assert ownership(content, PGPU).why == words
    assert not ownership(content, PGPU).may_replace


def test_without_pyyamls_binding_to_libyaml_the_verdicts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CBaseLoader")
    without = runpy.run_path(spec_text.__file__)
    load: Callable[[bytes], spec_text.Value] = without["load"]
    for content, _ in GOOD.values():
        assert load(content) == spec_text.load(content)
    for name in ("no YAML", "half of it", "two documents", "an alias of nothing", "a key twice", "a key twice in JSON"):
        with pytest.raises(without["NotYaml"]):
            load(BAD[name][0])
    for content, _ in UNREAD.values():
        with pytest.raises(without["NotRead"]):
            load(content)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_the_judge(content: bytes) -> None:
    read_spec(content)
    assert ownership(content, PGPU).why


def test_a_kind_that_would_fill_the_memory_in_the_names_of_many_devices_is_left_unread() -> None:
    content = as_text(document(kind=f"{'a' * 60_000}/{'b' * 60_000}", devices=[device(f"d{n}") for n in range(1_000)]))
    tracemalloc.start()
    try:
        assert read_spec(content).unread == "its kind has 120001 characters, and no more than 512 are looked at"
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


# The specs of a folder


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


# Whose it is


THEIRS = as_text(reference("other.com/pgpu"))
REPLACED: dict[str, tuple[bytes, str]] = {
    "the reference's": (b"---\n" + as_text(reference(PGPU)), "it has the name and the kind of a resource"),
    "JSON": (json.dumps(reference(PGPU), indent=2).encode(), "it has the name and the kind of a resource"),
    "an empty file": (b"", "it is empty"),
    "comments alone": (b"# nothing yet\n", "it is empty"),
    "an empty mapping": (b"{}", "it is empty"),
    "half of one": (b"---\ncdiVersion: 0.5.0\ncontainerEd", "it is not valid YAML or JSON"),
    "half of one that is valid": (b"---\ncdiVersion: 0.5.0\ndevices:\n- containerEd", "it has no kind"),
    "half of one in JSON": (b'{"cdiVersion": "0.5.0", "devi', "it is not valid YAML or JSON"),
    "half of our kind": (b"cdiVersion: 0.5.0\nkind: nvidia.com/pg", "it breaks off within its kind"),
    "no text": (b"\0\xff", "it is not valid YAML or JSON"),
    "ours": (MARK.encode() + THEIRS, "this plugin wrote it"),
}
"""What is in our file, and why it may be replaced."""
KEPT: dict[str, tuple[bytes, str]] = {
    "another kind": (THEIRS, "kind other.com/pgpu"),
    "another class": (as_text(reference("nvidia.com/gpu")), "kind nvidia.com/gpu"),
    "a kind that ours begins with": (b"cdiVersion: 0.5.0\nkind: nvidia.com/pg\n", "kind nvidia.com/pg"),
    "another kind in JSON with tabs": (
        json.dumps(reference("other.com/pgpu"), indent="\t").encode(),
        "kind other.com/pgpu",
    ),
    "our kind further down": (
        as_text(reference("other.com/pgpu") | {"annotations": {"kind": PGPU}}),
        "kind other.com/pgpu",
    ),
    "a text": (b"do not touch this\n", "it is not a CDI spec"),
    "a list": (b"- a\n- b\n", "it is not a CDI spec"),
    "an empty list": (b"[]", "it is not a CDI spec"),
}
"""What is in our file, and what the words say about it."""


@pytest.mark.parametrize("name", REPLACED)
def test_what_has_our_name_and_our_mark_or_kind_or_is_a_broken_rest_may_be_replaced(name: str) -> None:
    content, words = REPLACED[name]
    found = ownership(content, PGPU)
    assert (found.may_replace, words in found.why) == (True, True), found


@pytest.mark.parametrize("name", KEPT)
def test_what_has_our_name_and_is_somebody_elses_stays(name: str) -> None:
    content, why = KEPT[name]
    found = ownership(content, PGPU)
    assert (found.may_replace, found.why) == (False, why)


def test_the_kind_of_a_spec_is_known_whatever_else_is_wrong_with_it() -> None:
    assert stated_kind(as_text(document(devices=[], vendor="x"))) == "vendor.com/class"
    assert [stated_kind(content) for content in (b"", b"[]", b"kind: [a]", b"kind: a\nx: [")] == [None] * 4
