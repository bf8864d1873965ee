#!/usr/bin/env python3
"""What each consumer gets, into docs/consumers.md, or with --check whether it stands there as it is.

    scripts/show-consumers.py [--check]

For each consumer the daemon is started on a fake node, a kubelet played by grpcio asks for what the example pod asks
for, and the pod, the answer and the spec go between two marks in the document. Uses the kubelet and the harness of
tests/helpers, so it needs what the tests need: `python3 scripts/dev.py setup`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

import yaml  # noqa: E402
from daemon import Daemon, places  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from kubelet import GrpcKubelet  # noqa: E402
from mediated import Mediated  # noqa: E402

from sandbox_plugin.fake.node import FakeNode  # noqa: E402

DOCUMENT = ROOT / "docs/consumers.md"
NO_SPEC = "# none is written, and no CDI folder is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One consumer on one node, as the document shows it."""

    name: str
    """Of the marks in the document."""
    preset: str
    flags: tuple[str, ...] = ()
    example: str
    """The pod, in examples/."""
    resource: str = "nvidia.com/pgpu"
    size: int = 1
    """Devices that the pod asks for."""
    prepare: Callable[[FakeNode], object] = lambda node: None
    """What happens to the node before the daemon starts."""


def _one_vgpu(node: FakeNode) -> None:
    node.bind("0000:02:00.0", "nvidia")
    Mediated(node, "0000:02:00.0").add(1, "nvidia-231", "GRID T4-2Q", 70)


CONSUMERS = (
    Shown(name="kata", preset="workstation", example="kata-pod.yaml"),
    Shown(
        name="confidential", preset="rtx-pro-6000", flags=("--require-iommufd",), example="kata-confidential-pod.yaml"
    ),
    Shown(
        name="kubevirt",
        preset="workstation",
        flags=("--consumer", "kubevirt"),
        example="kubevirt-vm.yaml",
        size=2,
    ),
    Shown(
        name="vgpu",
        preset="workstation",
        flags=("--consumer", "kubevirt"),
        example="kubevirt-vgpu-vm.yaml",
        resource="nvidia.com/GRID_T4-2Q",
        prepare=_one_vgpu,
    ),
    Shown(
        name="vgpu-function",
        preset="vgpu",
        flags=("--consumer", "kubevirt"),
        example="kubevirt-vgpu-function-vm.yaml",
        resource="nvidia.com/NVIDIA_L40S-24Q",
    ),
)


def show(shown: Shown) -> str:
    """Runs the daemon for this consumer. Returns what stands between its marks."""
    with places() as place, GrpcKubelet(place.kubelet) as kubelet:
        kubelet.start()
        node = place.node(shown.preset)
        shown.prepare(node)
        with Daemon(place, node, *shown.flags):
            kubelet.wait_for(lambda: len(kubelet.healthy(shown.resource)) >= shown.size)
            plugin = kubelet.plugin(shown.resource)
            answer = plugin.allocate(plugin.prefer(sorted(kubelet.healthy(shown.resource)), shown.size))
            specs = {file.name: file.read_text() for file in sorted(place.cdi.glob("*.yaml"))}
    answered = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    command = " ".join(["sandbox-plugin run", *shown.flags])
    lines = (ROOT / "examples" / shown.example).read_text().splitlines(keepends=True)
    pod = "".join(dropwhile(lambda line: line.startswith("#"), lines))
    cells = {
        f"the pod: `examples/{shown.example}`": pod,
        f"Allocate, answered by `{command}`": yaml.safe_dump(answered, sort_keys=False),
        "the CDI spec": "".join(f"# {name}\n{text}" for name, text in specs.items()) or NO_SPEC,
    }
    heads = "".join(f"<th>\n\n{head}\n\n</th>\n" for head in cells)
    bodies = "".join(f"<td>\n\n```yaml\n{text.rstrip()}\n```\n\n</td>\n" for text in cells.values())
    return f'\n<table>\n<tr>\n{heads}</tr>\n<tr valign="top">\n{bodies}</tr>\n</table>\n'


def with_runs(document: str) -> str:
    """The document with what a run shows now. Exits when it lacks the marks of a consumer."""
    for shown in CONSUMERS:
        begin, end = f"<!-- a run: {shown.name} -->\n", "<!-- end -->"
        before, found, rest = document.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            sys.exit(f"{DOCUMENT}: no marks {begin.strip()!r} and {end!r}")
        document = before + begin + show(shown) + end + after
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the document is out of date")
    check: bool = parser.parse_args().check
    document = DOCUMENT.read_text()
    now = with_runs(document)
    if check:
        if now != document:
            print(f"{DOCUMENT} is out of date: run scripts/show-consumers.py", file=sys.stderr)
        return int(now != document)
    DOCUMENT.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
