"""CDI specs as data: those that Kata takes, those that it refuses, and what may lie where one of ours should be."""

from __future__ import annotations

import json
from typing import Any

import yaml
from names import PGPU


def document(**changes: Any) -> dict[str, Any]:
    """A good spec as values, with changes at its top; None takes a field away."""
    made = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/class",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}}],
    } | changes
    return {key: value for key, value in made.items() if value is not None}


def device(name: Any = "d0", **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits or {"deviceNodes": [{"path": "/dev/null"}]}}


def with_node(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(deviceNodes=[{"path": "/dev/null"} | fields])])


def with_hook(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(hooks=[{"hookName": "prestart", "path": "/bin/true"} | fields])])


def with_mount(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(mounts=[{"hostPath": "/a", "containerPath": "/b"} | fields])])


def as_text(spec: object) -> bytes:
    return yaml.safe_dump(spec).encode()


GOOD: dict[str, bytes] = {
    "the plainest": as_text(document()),
    "as JSON": json.dumps(document()).encode(),
    "as JSON with tabs": json.dumps(document(), indent="\t").encode(),
    "the version with a v": as_text(document(cdiVersion="v0.5.0")),
    "an old version": as_text(document(cdiVersion="0.3.0", devices=[device()])),
    "names that are text in YAML 1.2, and in 1.1 a number, a date and a truth": b"""
cdiVersion: 0.6.0
kind: nvidia.com/gpu
annotations: {made: 2026-08-01}
devices:
- {name: 1:0, containerEdits: {env: [A=b]}}
- {name: on, containerEdits: {env: [A=b]}}
""",
    "a class with a dot": as_text(document(kind="a.b/c.d")),
    "annotations": as_text(document(annotations={"vendor.com/why": "because"})),
    "edits for all devices": as_text(document(containerEdits={"env": ["A=b", "C="]})),
    "empty edits for all devices, as Go writes them": as_text(document(containerEdits={})),
    "every field of a node": as_text(
        with_node(hostPath="/d", type="c", major=1, minor=-1, fileMode=432, permissions="rwm", uid=0, gid=0)
    ),
    "every field of a hook": as_text(with_hook(args=["true"], env=["A=b"], timeout=1)),
    "every field of a mount": as_text(with_mount(type="bind", options=["ro"])),
    "fields that are null": as_text(with_node(hostPath=None, type=None, major=None)),
    "a device whose name is a number": as_text(document(devices=[device(0)])),
    "a device whose name is a number in JSON": json.dumps(document(devices=[device(0)])).encode(),
    "names that are a truth and a fraction": as_text(document(devices=[device(True), device(1.5)])),
    "arguments that are a number, a truth and null": as_text(with_hook(args=[1, True, None])),
    "an option that is a number": as_text(with_mount(options=[755])),
    "an annotation that is a number": as_text(document(annotations={"a": 1})),
    "annotations without a value": b"annotations:\n" + as_text(document()),
    "a path that is a number": as_text(with_mount(hostPath=1)),
    "numbers in other bases": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices: [{name: x, containerEdits: {deviceNodes: [{path: /x, major: 0x1F, minor: -0b11, fileMode: 0o666}]}}]
""",
    "the largest numbers": as_text(with_node(major=(1 << 63) - 1, minor=-(1 << 63), uid=(1 << 32) - 1)),
    "a YAML 1.1 header": b"%YAML 1.1\n---\n" + as_text(document()),
    "a byte order mark before JSON": b"\xef\xbb\xbf" + json.dumps(document()).encode(),
    "anchors and aliases": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- {name: x, containerEdits: &edits {env: [A=b]}}
- {name: z, containerEdits: *edits}
""",
    "the end of a document": as_text(document()) + b"...\n",
}


BAD: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "a YAML 1.2 header": b"%YAML 1.2\n---\n" + as_text(document()),
    "a byte order mark before YAML": b"\xef\xbb\xbf" + as_text(document()),
    "UTF-16": as_text(document()).decode().encode("utf-16"),
    "Latin-1": as_text(document()) + b"# caf\xe9\n",
    "an empty second document": as_text(document()) + b"---\n",
    "a merge key": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- &x {name: x, containerEdits: {env: [A=b]}}
- {<<: *x, name: z}
""",
    "an alias of nothing": as_text(document()).replace(b"name: '0'", b"name: *a"),
    "an anchor that contains itself": b"cdiVersion: 0.6.0\nkind: vendor.com/class\ndevices: &d [*d]\n",
    "a key of another case": as_text(document() | {"Kind": "vendor.com/class"}),
    "no YAML": b"kind: [unclosed\n",
    "no text": b"\xff\xfe\x00",
    "two documents": as_text(document()) + b"---\n" + as_text(document()),
    "half of it": as_text(document())[:-20],
    "no version": as_text(document(cdiVersion=None)),
    "a version that is a number": as_text(document(cdiVersion=0.5)),
    "a version too new": as_text(document(cdiVersion="0.7.0")),
    "a version much too new": as_text(document(cdiVersion="1.0.0")),
    "no kind": as_text(document(kind=None)),
    "a kind without a vendor": as_text(document(kind="class")),
    "a class of one letter": as_text(document(kind="vendor.com/c")),
    "a vendor of one letter": as_text(document(kind="v/class")),
    "a class that begins with a digit": as_text(document(kind="vendor.com/0class")),
    "a class that ends with a dash": as_text(document(kind="vendor.com/class-")),
    "a vendor that begins with a digit": as_text(document(kind="3com.com/nic")),
    "two slashes": as_text(document(kind="vendor.com/a/b")),
    "no devices": as_text(document(devices=None)),
    "empty devices": as_text(document(devices=[])),
    "devices by name": as_text(document(devices={"0": {}})),
    "a device that is text": as_text(document(devices=["0"])),
    "a device twice": as_text(document(devices=[device("0"), device("0")])),
    "a device without a name": as_text(document(devices=[{"containerEdits": {"env": ["A=b"]}}])),
    "a device whose name is null": as_text(document(devices=[device(None)])),
    "a device whose name is a list": as_text(document(devices=[device(["a"])])),
    "a device whose name Go writes with a plus": as_text(document()).replace(b"name: '0'", b"name: 1e9"),
    "two names that are the same number for Go": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- {name: 8, containerEdits: {env: [A=b]}}
- {name: 010, containerEdits: {env: [A=b]}}
""",
    "a device whose name has a slash": as_text(document(devices=[device("a/b")])),
    "a device whose name ends with a colon": as_text(document(devices=[device("a:")])),
    "a device without edits": as_text(document(devices=[{"name": "0"}])),
    "a device with empty edits": as_text(document(devices=[{"name": "0", "containerEdits": {}}])),
    "a device whose edits are empty lists": as_text(document(devices=[device(deviceNodes=[])])),
    "a device with null for edits": as_text(document(devices=[{"name": "0", "containerEdits": None}])),
    "an unknown field of the spec": as_text(document(vendor="x")),
    "an unknown field of a device": as_text(document(devices=[device() | {"id": 1}])),
    "an unknown field of edits": as_text(document(devices=[device(additionalGids=[1])])),
    "an unknown field of the spec's edits": as_text(document(containerEdits={"intelRdt": {}})),
    "an unknown field of a node": as_text(with_node(mode=1)),
    "an unknown field of a hook": as_text(with_hook(cwd="/")),
    "an unknown field of a mount": as_text(with_mount(source="/a")),
    "a key twice": as_text(document()) + b"kind: vendor.com/class\n",
    "a key twice in a device": b"""
cdiVersion: 0.5.0
kind: a.b/c
devices: [{name: x, name: x, containerEdits: {env: [A=b]}}]
""",
    "a key twice in JSON": json.dumps(document()).replace('"kind"', '"kind": "a.b/c", "kind"').encode(),
    "a node without a path": as_text(document(devices=[device(deviceNodes=[{"hostPath": "/d"}])])),
    "a node with an empty path": as_text(with_node(path="")),
    "a node of an unknown type": as_text(with_node(type="x")),
    "a node with wrong permissions": as_text(with_node(permissions="rwx")),
    "a node whose major is text": as_text(with_node(major="195")),
    "a node whose mode is text": as_text(with_node(fileMode="0666")),
    "a node whose mode has a leading zero": as_text(with_node(fileMode=438)).replace(b"438", b"0666"),
    "a node whose major is a fraction": as_text(with_node(major=1.0)),
    "a node whose major has more than 64 bits": as_text(with_node(major=1 << 63)),
    "a node whose minor has more than 64 bits": as_text(with_node(minor=-(1 << 63) - 1)),
    "a node whose major has thousands of digits": as_text(with_node(major=195)).replace(b"195", b"9" * 5000),
    "a node whose owner has more than 32 bits": as_text(with_node(uid=1 << 32)),
    "a node that is null": as_text(document(devices=[device(deviceNodes=[None])])),
    "a hook whose timeout has more than 64 bits": as_text(with_hook(timeout=1 << 63)),
    "a node with a negative owner": as_text(with_node(uid=-1)),
    "nodes that are no list": as_text(document(devices=[device(deviceNodes={"path": "/d"})])),
    "a variable without =": as_text(document(containerEdits={"env": ["A"]})),
    "a variable without a name": as_text(document(containerEdits={"env": ["=b"]})),
    "variables by name": as_text(document(containerEdits={"env": {"A": "b"}})),
    "a hook of an unknown name": as_text(with_hook(hookName="before")),
    "a hook without a path": as_text(document(devices=[device(hooks=[{"hookName": "prestart"}])])),
    "a hook with a wrong variable": as_text(with_hook(env=["A"])),
    "a mount from nowhere": as_text(with_mount(hostPath="")),
    "a mount to nowhere": as_text(document(devices=[device(mounts=[{"hostPath": "/a"}])])),
    "options that are text": as_text(with_mount(options="ro")),
    "annotations that are a list": as_text(document(annotations=["a"])),
    "annotations that are null": as_text(document() | {"annotations": None}),
    "an annotation that is a list": as_text(document(annotations={"a": []})),
    "an annotation whose key is null": as_text(document(annotations={None: "a"})),
    "an annotation whose prefix has two dots": as_text(document(annotations={"a..b/c": "d"})),
    "an annotation with a wrong key": as_text(document(annotations={"a b": "c"})),
    "a digit first before 0.5.0": as_text(document(cdiVersion="0.4.0")),
    "a hostPath before 0.5.0": as_text(with_node(hostPath="/d") | {"cdiVersion": "0.4.0"}),
    "a mount's type before 0.4.0": as_text(with_mount(type="bind") | {"cdiVersion": "0.3.0"}),
    "an annotation before 0.6.0": as_text(document(cdiVersion="0.5.0", annotations={"a": "b"})),
    "a device's annotation before 0.6.0": as_text(
        document(cdiVersion="0.5.0", devices=[device() | {"annotations": {"a": "b"}}])
    ),
    "a class with a dot before 0.6.0": as_text(document(cdiVersion="0.5.0", kind="a.b/c.d")),
}
"""Specs that Kata refuses, each for one reason: test_neighbours.py asks the daemon about them, too."""


BOMB = b"\n".join(
    [
        b"a: &a [x,x,x,x,x,x,x,x,x]",
        *(b"%c: &%c [%b]" % (b, b, b",".join([b"*%c" % (b - 1)] * 9)) for b in b"bcdefgh"),
    ]
)
"""Eight lines that stand for 387 million scalars."""


def reference(kind: str) -> dict[str, Any]:
    return document(cdiVersion="0.5.0", kind=kind, containerEdits={})


REPLACED: dict[str, tuple[bytes, str]] = {
    "the reference's": (b"---\n" + as_text(reference(PGPU)), "it has the name and the kind of a resource"),
    "one with quotes": (f"\"kind\" : '{PGPU}'\n".encode(), "it has the name and the kind of a resource"),
    "one with indented keys": (
        f"  kind: {PGPU}\n  devices: []\n".encode(),
        "it has the name and the kind of a resource",
    ),
    "flow style": (f"{{kind: {PGPU}, devices: []}}".encode(), "it has the name and the kind of a resource"),
    "JSON": (json.dumps(reference(PGPU), indent=2).encode(), "it has the name and the kind of a resource"),
    "JSON in one line": (json.dumps(reference(PGPU), separators=(",", ":")).encode(), "it has the name and the kind"),
    "our kind, broken further down": (f"kind: {PGPU}\ndevices: [".encode(), "it has the name and the kind"),
    "an empty file": (b"", "it is empty"),
    "comments alone": (b"# nothing yet\n", "it is empty"),
    "an empty mapping": (b"{}", "it is empty"),
    "half of one": (b"---\ncdiVersion: 0.5.0\ncontainerEd", "it is not valid YAML or JSON"),
    "half of one that is valid": (
        b"---\ncdiVersion: 0.5.0\ndevices:\n- containerEd",
        "it is unfinished: it has no kind",
    ),
    "half of one in flow style": (b"{cdiVersion: 0.5.0, devi", "it is not valid YAML or JSON"),
    "half of one in JSON": (b'{"cdiVersion": "0.5.0", "devi', "it is not valid YAML or JSON"),
    "half of our kind": (b"cdiVersion: 0.5.0\nkind: nvidia.com/pg", "it is unfinished: it has no kind"),
    "no text": (b"\0\xff", "it is not valid YAML or JSON"),
}
"""What is in our file, and why the log says that it was replaced."""


KEPT: dict[str, tuple[bytes, str]] = {
    "something nested deeper than any spec": (b"cdiVersion: " + b"[" * 1000, "nested deeper than any CDI spec"),
    "another kind": (as_text(reference("other.com/pgpu")), "kind other.com/pgpu"),
    "another class": (as_text(reference("nvidia.com/gpu")), "kind nvidia.com/gpu"),
    "another kind with indented keys": (b"  cdiVersion: 0.5.0\n  kind: other.com/pgpu\n", "kind other.com/pgpu"),
    "another kind in flow style": (
        b'{cdiVersion: "0.5.0", kind: other.com/pgpu, devices: [{name: x, containerEdits: {env: [A=b]}}]}',
        "kind other.com/pgpu",
    ),
    "another kind in JSON": (json.dumps(reference("other.com/pgpu")).encode(), "kind other.com/pgpu"),
    "another kind in JSON in one line": (
        json.dumps(reference("other.com/pgpu"), separators=(",", ":")).encode(),
        "kind other.com/pgpu",
    ),
    "another kind in JSON with tabs": (
        json.dumps(reference("other.com/pgpu"), indent="\t").encode(),
        "kind other.com/pgpu",
    ),
    "another kind in UTF-16": (as_text(reference("other.com/pgpu")).decode().encode("utf-16"), "kind other.com/pgpu"),
    "another kind in a second document": (
        as_text(reference(PGPU)) + b"---\nkind: other.com/pgpu\n",
        "kind other.com/pgpu",
    ),
    "another kind, broken further down": (b"kind: other.com/pgpu\ndevices: [", "kind other.com/pgpu"),
    "half of another kind in flow style": (b'{cdiVersion: "0.5.0", kind: other.com/pgpu, dev', "kind other.com/pgpu"),
    "our kind further down": (
        as_text(reference("other.com/pgpu") | {"annotations": {"kind": PGPU}}),
        "kind other.com/pgpu",
    ),
    "our kind in JSON further down": (
        json.dumps({"annotations": {"kind": PGPU}, "kind": "other.com/pgpu"}).encode(),
        "kind other.com/pgpu",
    ),
    "a kind behind an alias": (b"annotations: {a: &k other.com/pgpu}\nkind: *k\n", "its kind is not a string"),
    "no kind, and something else": (b"hosts: [a, b]\n", "no kind, and the field 'hosts', which CDI does not have"),
    "something else, broken": (b"hosts: [a,\n", "no kind, and the field 'hosts', which CDI does not have"),
    "a text": (b"do not touch this\n", "it is not a CDI spec"),
    "a list": (b"- a\n- b\n", "it is not a CDI spec"),
    "something very large": (b"#" * (1 << 19), "more than 262144 bytes, and not written by this plugin"),
    "aliases that want to be huge": (b"kind: other.com/pgpu\n" + BOMB, "kind other.com/pgpu"),
}
"""What is in our file, and what the words say about it."""
