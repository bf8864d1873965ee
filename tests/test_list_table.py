"""How what `list` says fits a terminal, and what goes first where it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import MakeNode

from sandbox_plugin.cli.list_table import narrow_lines, wide_lines
from sandbox_plugin.cli.main import main
from sandbox_plugin.cli.tables import Table, painted, text_of
from sandbox_plugin.fake.presets import PRESETS

Document = dict[str, Any]
Listed = Callable[..., Document]


@pytest.fixture
def listed(fake_node: MakeNode, capsys: pytest.CaptureFixture[str]) -> Listed:
    """The document of a preset, with everything in it."""

    def run(preset: str, *flags: str) -> Document:
        main(["list", f"--fake-sysfs={fake_node(preset).root}", "--output=json", *flags])
        document: Document = json.loads(capsys.readouterr().out)
        return document

    return run


def device(**changes: Any) -> Document:
    return {
        "id": "4",
        "pci_addresses": ["0000:1b:00.0"],
        "model": "GH100 [H100 SXM5 80GB]",
        "node": "/dev/vfio/devices/vfio4",
        "iommu_group": 59,
        "numa_nodes": [0],
        "health": "Healthy",
        "reason": None,
        "detail": "",
        "riders": [],
    } | changes


def of(*devices: Mapping[str, Any], resource: str = "nvidia.com/pgpu", **changes: Any) -> Document:
    """A document with these devices, and what else."""
    counts = {"not_offered": 0, "riders": 0, "bridges": 0, "others": 0}
    return {
        "summary": counts | {"devices": len(devices), "healthy": sum(d["health"] == "Healthy" for d in devices)},
        "resources": [{"name": resource, "devices": list(devices)}] if devices else [],
        "not_offered": [],
        "unreachable": None,
    } | changes


def refused(*reasons: str, model: str | None = "AD102GL [L40S]") -> Document:
    entries = [{"pci_address": f"0000:2{n}:00.0", "model": model, "reason": reason} for n, reason in enumerate(reasons)]
    document = of(not_offered=entries)
    document["summary"]["not_offered"] = len(entries)
    return document


def narrow(document: Document, width: int = 80) -> list[str]:
    lines = [painted(line, colors=False) for line in narrow_lines(document, width)]
    assert lines == [line.rstrip() for line in lines]
    return lines


def wide(document: Document) -> list[str]:
    return [painted(line, colors=False) for line in wide_lines(document)]


@pytest.mark.parametrize("flags", [(), ("--all",), ("--gpu-alias=", "--nvswitch-alias=")], ids=["", "all", "by model"])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_line_is_wider_than_the_terminal(listed: Listed, preset: str, flags: tuple[str, ...]) -> None:
    document = listed(preset, *flags)
    for width in (60, 80, 100, 120, 200):
        lines = narrow(document, width)
        assert max(map(len, lines)) <= width, lines
        if preset != "empty":
            assert "HEALTH" in lines[0], lines


def heading(document: Document, width: int) -> list[str]:
    """Names of the columns, and the model that the first row ends with."""
    first, second, *_ = narrow(document, width)
    return [*re.split(r"\s{2,}", first), *([re.split(r"\s{2,}", second)[-1]] if "MODEL" in first else [])]


def test_what_follows_from_other_columns_goes_first_and_health_never() -> None:
    document = of(device())
    always = ["RESOURCE", "ID", "PCI FUNCTION", "HEALTH"]
    whole, short = "GH100 [H100 SXM5 80GB]", "H100 SXM5 80GB"
    forms = {tuple(heading(document, width)): width for width in range(120, 39, -1)}
    assert list(forms) == [
        (*always, "NUMA", "GROUP", "NODE", "MODEL", whole),
        (*always, "NUMA", "GROUP", "MODEL", whole),
        (*always, "NUMA", "GROUP", "MODEL", short),
        (*always, "NUMA", "MODEL", short),
        *((*always, "NUMA", "MODEL", f"{short[:kept]}…") for kept in range(12, 6, -1)),
        (*always, "NUMA"),
        tuple(always),
    ]


def test_a_group_that_is_the_id_goes_before_the_model_is_shortened() -> None:
    document = of(device(id="59", node="/dev/vfio/59"))
    assert heading(document, 75)[4:] == ["NUMA", "MODEL", "GH100 [H100 SXM5 80GB]"]


def test_a_resource_that_is_too_long_loses_its_beginning_and_the_summary_has_it_whole() -> None:
    resource = "nvidia.com/GB202GL_RTX_PRO_6000_BLACKWELL_SERVER_EDITION"
    lines = narrow(of(device(), resource=resource))
    assert re.fullmatch(r"…\S*_BLACKWELL_SERVER_EDITION  4   0000:1b:00.0  Healthy  0", lines[1])
    assert " ".join(lines[3:]) == f"1 device, 1 Healthy: 1 of 1 {resource}."


def test_what_a_terminal_would_obey_counts_as_wide_as_it_is_shown() -> None:
    document = of(device(model="\x1b" * 30), not_offered=refused("\x1b" * 90)["not_offered"])
    assert max(map(len, narrow(document))) == 80
    assert re.search(r"  (\\x1b)+\S*…$", narrow(document)[1])


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("GH100 [H100 SXM5 80GB]", "H100 SXM5 80GB"),
        ("NVIDIA L40S-24Q on AD102GL [L40S]", "NVIDIA L40S-24Q on L40S"),
        ("unknown model 10de:2fff", "unknown model 10de:2fff"),
    ],
)
def test_a_model_is_called_what_it_is_sold_as_where_its_whole_name_is_too_long(model: str, short: str) -> None:
    width = len(narrow(of(device(model=model)), 200)[1]) - len("/dev/vfio/devices/vfio4  ")
    assert narrow(of(device(model=model)), width)[1].endswith(f"  {model}")
    assert narrow(of(device(model=model)), width - 1)[1].endswith(f"  {short}")


def test_why_a_device_is_unhealthy_is_below_it_in_lines_that_fit_and_in_wide_in_its_own() -> None:
    sick = device(health="Unhealthy", reason="not-viable", detail="0000:1b:00.1 is bound to snd_hda_intel " * 3)
    table = narrow(of(sick, device(id="5")))
    assert table[1].split()[3] == "Unhealthy"
    assert table[2].startswith("    not-viable: 0000:1b:00.1 is bound to")
    assert table[3].startswith("    ")
    assert table[4].split()[1] == "5"
    assert wide(of(sick))[1].endswith(f"  not-viable: {sick['detail']}")


def test_a_device_of_several_functions_has_a_line_for_each_and_in_wide_one_for_all() -> None:
    two = device(pci_addresses=["0000:1b:00.0", "0000:1c:00.0"], model="A [a] + B [b]", riders=["0000:1b:00.1"] * 2)
    _, first, second, *_ = narrow(of(two, device()), 200)
    assert (first.split()[2], first[-5:]) == ("0000:1b:00.0", "A [a]")
    assert second.split() == ["0000:1c:00.0", "B", "[b]"]
    row = re.split(r"\s{2,}", wide(of(two))[1])
    assert (row[2], row[7:9]) == ("0000:1b:00.0,0000:1c:00.0", ["A [a] + B [b]", "0000:1b:00.1,0000:1b:00.1"])


def test_a_reason_is_folded_in_its_column_and_no_name_with_a_hyphen_is_torn() -> None:
    reason = "bound to nvidia and carries SR-IOV virtual functions: do not bind it to vfio-pci, whatever else you do"
    table = narrow(refused(reason))[3:]
    assert table[:3] == [
        "NOT OFFERED   MODEL           REASON",
        "0000:20:00.0  AD102GL [L40S]  bound to nvidia and carries SR-IOV virtual",
        "                              functions: do not bind it to vfio-pci, whatever",
    ]
    for width in range(60, 100):
        assert not any(line.endswith("-") for line in narrow(refused(reason), width))
    assert wide(refused(reason))[3].endswith(reason)


def test_a_model_leaves_room_for_the_reason() -> None:
    document = refused("bound to nvidia, not to vfio-pci", model="GB202GL [RTX PRO 6000 Blackwell Server Edition]")
    assert narrow(document, 70)[4] == "0000:20:00.0  RTX PRO 6000 Blackwel…  bound to nvidia, not to vfio-pci"
    assert narrow(refused("of no use", model=None))[4] == "0000:20:00.0  -      of no use"


def test_the_summary_counts_why_functions_are_not_offered() -> None:
    def last(*reasons: str) -> str:
        return " ".join(narrow(refused(*reasons), 200)[-1:])

    assert last("excluded by resources[0]") == "1 function not offered: excluded by resources[0]."
    assert last("no type (it is 0)", "no type (it is 0)") == "2 functions not offered: no type."
    reasons = ("a: x", "b", "a: y", "c", "d", "e")
    assert last(*reasons) == "6 functions not offered: a (2), b (1), c (1), for other reasons (2)."


def test_what_is_not_shown_is_counted() -> None:
    def last(devices: list[Document], **counts: int) -> str:
        document = of(*devices)
        document["summary"] |= counts
        return narrow(document, 200)[-1]

    one, two = device(riders=["0000:1b:00.1"]), device(pci_addresses=["0000:43:00.0"], riders=["0000:43:00.1"])
    assert last([one], riders=1) == "Not shown: 1 function that rides along with 0000:1b:00.0 (--all)."
    assert last([one, two], riders=2, bridges=1, others=1) == (
        "Not shown: 2 functions that ride along with 2 devices, 1 bridge, 1 function that no rule takes (--all)."
    )
    assert last([device()]) == "1 device, 1 Healthy: 1 of 1 nvidia.com/pgpu."


def test_the_table_of_all_functions_leaves_out_class_and_id_before_it_folds_to_slivers() -> None:
    entry = dict.fromkeys(("resource", "rule"), None) | {"remarks": [], "class": "030200", "id": "10de:2330"}
    entry |= {"pci_address": "0000:1b:00.0", "driver": "nvgrace_gpu_vfio_pci", "iommu_group": 59}
    entry |= {"reason": "so " * 20}

    def columns(width: int) -> int:
        return len(re.split(r"\s{2,}", narrow(of(functions=[entry]), width)[3]))

    assert [columns(width) for width in (98, 97, 90, 89, 79, 78, 60)] == [6, 5, 5, 4, 4, 3, 3]


def test_a_table_without_rows_is_its_heading() -> None:
    assert [text_of(line) for line in Table(("A", "B")).folded(10, least=5).lines()] == ["A  B"]
