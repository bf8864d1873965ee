"""docs/operations.md quotes `status` and `doctor` on nodes that are broken in certain ways: they say it like that."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
from conftest import MakeNode, StartDaemon
from daemon import ROOT, Places, run_command
from kubelet import GrpcKubelet
from names import PGPU
from pods import PodResources

from sandbox_plugin.fake.node import FakeNode

PAGE = (ROOT / "docs/operations.md").read_text()
GPU, CARD, AUDIO = "0000:1b:00.0", "0000:01:00.0", "0000:01:00.1"
OTHER_KIND = "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices: []\n"
TOO_NEW = "cdiVersion: 0.7.0\nkind: example.com/nic\ndevices: []\n"


def bound_to_nvidia(node: FakeNode, _: Places) -> None:
    for function in node.functions():
        if function.class_code == 0x030200:
            node.bind(function.address, "nvidia")


def without_iommu(node: FakeNode, _: Places) -> None:
    shutil.rmtree(node.root / "sys/kernel/iommu_groups")
    for link in node.root.glob("sys/devices/**/iommu_group"):
        link.unlink()


def off_the_bus(node: FakeNode, _: Places) -> None:
    node.sicken(GPU)


def audio_on_the_host(node: FakeNode, _: Places) -> None:
    node.bind(AUDIO, "snd_hda_intel")


def bad_spec(_: FakeNode, places: Places) -> None:
    places.cdi.mkdir()
    (places.cdi / "other-tool.yaml").write_text(TOO_NEW)


def spec_of_another(_: FakeNode, places: Places) -> None:
    places.cdi.mkdir()
    (places.cdi / "nvidia.com-pgpu.yaml").write_text(OTHER_KIND)


Break = Callable[[FakeNode, Places], None]
QUOTES: list[tuple[str, Break, str, str]] = [
    ("hgx-h100", bound_to_nvidia, "doctor", f"FAIL driver {GPU}, "),
    ("hgx-h100", without_iommu, "doctor", "FAIL iommu "),
    ("hgx-h100", off_the_bus, "doctor", "FAIL answers "),
    ("hgx-h100", off_the_bus, "status", f"4 {GPU} Unhealthy off-the-bus: "),
    ("workstation", audio_on_the_host, "doctor", f"FAIL group {CARD}: "),
    ("workstation", audio_on_the_host, "status", f"{PGPU}=11 ({CARD}) is Unhealthy: not-viable: "),
    ("hgx-h100", bad_spec, "doctor", "FAIL specs /tmp/fake/cdi/other-tool.yaml: "),
    ("hgx-h100", bad_spec, "status", "serving /tmp/fake/cdi/other-tool.yaml: "),
    ("hgx-h100", spec_of_another, "doctor", "FAIL specs /tmp/fake/cdi/nvidia.com-pgpu.yaml: "),
    ("hgx-h100", spec_of_another, "status", f"not ready: {PGPU}: /tmp/fake/cdi/nvidia.com-pgpu.yaml belongs "),
]


def quoted() -> list[str]:
    """The outputs on the page, without their line breaks, each as far as it has no gap."""
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", PAGE, re.MULTILINE)
    return [
        " ".join(piece.split()) for block in blocks for piece in re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE)
    ]


@pytest.mark.parametrize(("preset", "broken", "command", "quote"), QUOTES, ids=[case[-1] for case in QUOTES])
def test_the_page_quotes_what_the_command_says(
    preset: str,
    broken: Break,
    command: str,
    quote: str,
    fake_node: MakeNode,
    kubelet: GrpcKubelet,
    places: Places,
    pods: PodResources,
    daemon: StartDaemon,
) -> None:
    (whole,) = (piece for piece in quoted() if quote in piece)
    node = fake_node(preset)
    broken(node, places)
    pods.start(age=3600)
    flags = places.flags(node)
    if command == "status":
        daemon(node).wait_for("running")
        flags = flags[:1]  # the fake node: where its status socket is follows
    told = run_command(command, *flags).stdout
    said = " ".join(told.replace(str(places.cdi), "/tmp/fake/cdi").split())
    assert whole[whole.index(quote) :].removesuffix(" 5 0000:43:00.0 Healthy") in said


def test_every_failure_that_the_page_quotes_is_one_of_these() -> None:
    failures = [piece for piece in quoted() if piece.startswith("FAIL")]
    tried = [quote for *_, quote in QUOTES if quote.startswith("FAIL")]
    assert len(failures) > 6
    untried = [piece for piece in failures if not any(piece.startswith(quote) for quote in tried)]
    assert [piece.partition(" /")[0] for piece in untried] == ["FAIL registration nobody listens at"]
