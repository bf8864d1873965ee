"""The document of `list` for people: lines that fit the terminal, or, for `--output wide`, all that there is to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sandbox_plugin.cli.tables import Line, Part, Styled, Table, wrap
from sandbox_plugin.inventory.rules import NOTHING_TO_OFFER

_Entry = Mapping[str, Any]
_BAD = "red"
_LEAST = 8
"""Characters that a cell keeps when it is cut."""
_LEAST_NAME = 24
"""Of a resource's name, while there is something else to leave out."""
_LEAST_WORDS = 36
"""Of a column of words, while there is something else to leave out: cells are folded instead."""
_MOST_REASONS = 3
"""Why functions are not offered, of those that the summary names."""


def narrow_lines(document: _Entry, width: int) -> list[Line]:
    """What a person sees, in lines that are not wider than `width`, from 40 on."""
    parts: list[list[Line]] = []
    if devices := list(_devices(document)):
        parts.append(_fitting(devices, width).lines(width))
    else:
        parts.append([[line] for line in wrap(_NOTHING, width)])
    if "functions" in document:
        parts.append(_functions(document["functions"], width).lines())
    elif document["not_offered"]:
        parts.append(_not_offered(document["not_offered"], width).lines())
    parts.append([[line] for text in _summary(document) for line in wrap(text, width)])
    return _apart(parts)


def wide_lines(document: _Entry) -> list[Line]:
    """The same and more, each device or function in one line, however long."""
    parts: list[list[Line]] = []
    if devices := list(_devices(document)):
        parts.append(_wide_devices(devices).lines())
    else:
        parts.append([[_NOTHING]])
    if document["not_offered"]:
        parts.append(_refusals(document["not_offered"], is_short=False).lines())
    if "functions" in document:
        parts.append(_wide_functions(document["functions"]).lines())
    parts.append([[text] for text in _summary(document)])
    return _apart(parts)


_NOTHING = f"Nothing would be advertised: {NOTHING_TO_OFFER}."


def _devices(document: _Entry) -> Iterator[tuple[str, _Entry]]:
    for resource in document["resources"]:
        for device in resource["devices"]:
            yield resource["name"], device


def _apart(parts: Sequence[list[Line]]) -> list[Line]:
    """With an empty line between two parts."""
    lines: list[Line] = []
    for part in parts:
        if part:
            lines += [[""], *part] if lines else part
    return lines


# Devices


def _fitting(devices: Sequence[tuple[str, _Entry]], width: int) -> Table:
    """The table of devices in the first of these forms that fits, or the last one. What follows from other columns goes
    first: the node from the ID, the code name of a chip from its model, the model from the resource.
    """
    whole, short = _device_table(devices, is_short=False), _device_table(devices, is_short=True)
    is_id = all(device["id"] == str(device["iommu_group"]) for _, device in devices)
    derived = ("NODE", "GROUP") if is_id else ("NODE",)
    few = short.without("NODE", "GROUP")
    bare = few.without("MODEL")
    forms = [whole, whole.without("NODE"), whole.without(*derived), short.without(*derived), few]
    forms += [few.squeezed("MODEL", width, least=_LEAST), bare]
    forms.append(bare.squeezed("RESOURCE", width, least=_LEAST_NAME, from_the_left=True))
    forms.append(bare.without("NUMA").squeezed("RESOURCE", width, least=_LEAST, from_the_left=True))
    return next((form for form in forms if form.width <= width), forms[-1])


def _device_table(devices: Sequence[tuple[str, _Entry]], *, is_short: bool) -> Table:
    table = Table(("RESOURCE", "ID", "PCI FUNCTION", "HEALTH", "NUMA", "GROUP", "NODE", "MODEL"))
    for resource, device in devices:
        models = device["model"].split(" + ")
        table.add_row(
            resource,
            device["id"],
            device["pci_addresses"],
            _health(device),
            _numa(device),
            str(device["iommu_group"]),
            device["node"],
            [_short(model) for model in models] if is_short else models,
        )
        if device["reason"]:
            table.add_note(f"{device['reason']}: {device['detail']}")
    return table


def _wide_devices(devices: Sequence[tuple[str, _Entry]]) -> Table:
    columns = ("RESOURCE", "ID", "PCI FUNCTION", "HEALTH", "NUMA", "GROUP", "NODE", "MODEL", "RIDES ALONG", "REASON")
    table = Table(columns)
    for resource, device in devices:
        table.add_row(
            resource,
            device["id"],
            ",".join(device["pci_addresses"]),
            _health(device),
            _numa(device),
            str(device["iommu_group"]),
            device["node"],
            device["model"],
            ",".join(device["riders"]) or "-",
            f"{device['reason']}: {device['detail']}" if device["reason"] else "-",
        )
    return table


def _health(device: _Entry) -> Part:
    return Styled(device["health"], "" if device["health"] == "Healthy" else _BAD)


def _numa(device: _Entry) -> str:
    return ",".join(map(str, device["numa_nodes"])) or "-"


def _short(model: str) -> str:
    """`H100 SXM5 80GB` for `GH100 [H100 SXM5 80GB]`: what it is sold as."""
    type_of_vgpu, on, card = model.rpartition(" on ")
    name = card.partition(" [")[2]
    return f"{type_of_vgpu}{on}{name[:-1]}" if name.endswith("]") else model


# Functions


def _not_offered(entries: Sequence[_Entry], width: int) -> Table:
    whole, short = _refusals(entries, is_short=False), _refusals(entries, is_short=True)
    too_long = short.width - short.width_before_last - _words(short)
    return _folded_in([whole, short, short.squeezed("MODEL", width + too_long, least=_LEAST)], width)


def _refusals(entries: Sequence[_Entry], *, is_short: bool) -> Table:
    table = Table(("NOT OFFERED", "MODEL", "REASON"))
    for each in entries:
        model = _or_dash(each["model"])
        table.add_row(each["pci_address"], _short(model) if is_short else model, each["reason"])
    return table


def _functions(functions: Sequence[_Entry], width: int) -> Table:
    """Every function; what takes it or why it is not offered in one column, together with what is odd about it."""
    table = Table(("PCI FUNCTION", "CLASS", "ID", "DRIVER", "GROUP", "OFFERED AS, OR WHY NOT"))
    for each in functions:
        why = each["reason"] or f"{each['resource']} ({each['rule']})"
        cells = [_or_dash(each[key]) for key in ("pci_address", "class", "id", "driver", "iommu_group")]
        table.add_row(*cells, [why, *(f"note: {remark}" for remark in each["remarks"])])
    forms = [table, table.without("CLASS"), table.without("CLASS", "ID"), table.without("CLASS", "ID", "GROUP")]
    return _folded_in(forms, width)


def _folded_in(forms: Sequence[Table], width: int) -> Table:
    """The first of these tables that leaves its last column room enough, or the last of them."""
    roomy = (form for form in forms if form.width_before_last + _words(form) <= width)
    return next(roomy, forms[-1]).folded(width, least=_LEAST)


def _words(table: Table) -> int:
    """How wide the last column should be at least."""
    return min(table.width - table.width_before_last, _LEAST_WORDS)


def _wide_functions(functions: Sequence[_Entry]) -> Table:
    columns = {
        "PCI FUNCTION": "pci_address",
        "CLASS": "class",
        "ID": "id",
        "DRIVER": "driver",
        "GROUP": "iommu_group",
        "RESOURCE": "resource",
        "RULE": "rule",
        "NOT OFFERED BECAUSE": "reason",
    }
    table = Table((*columns, "REMARKS"))
    for each in functions:
        table.add_row(*(_or_dash(each[key]) for key in columns.values()), "; ".join(each["remarks"]) or "-")
    return table


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


# Summary


def _summary(document: _Entry) -> list[str]:
    """How much there is of what, a line for each question."""
    counts = document["summary"]
    lines = []
    if counts["devices"]:
        healthy = [
            f"{sum(device['health'] == 'Healthy' for device in resource['devices'])} of {len(resource['devices'])} "
            f"{resource['name']}"
            for resource in document["resources"]
        ]
        lines.append(f"{_many(counts['devices'], 'device')}, {counts['healthy']} Healthy: {', '.join(healthy)}.")
    if counts["not_offered"]:
        why = Counter(_gist(each["reason"]) for each in document["not_offered"]).most_common()
        reasons = [f"{reason} ({count})" if len(why) > 1 else reason for reason, count in why[:_MOST_REASONS]]
        if others := sum(count for _, count in why[_MOST_REASONS:]):
            reasons.append(f"for other reasons ({others})")
        lines.append(f"{_many(counts['not_offered'], 'function')} not offered: {', '.join(reasons)}.")
    if "functions" not in document and (folded := _folded(document)):
        lines.append(f"Not shown: {', '.join(folded)} (--all).")
    return lines


def _folded(document: _Entry) -> list[str]:
    """What only `--all` shows."""
    counts = document["summary"]
    folded = []
    if counts["riders"]:
        carriers = [device["pci_addresses"][0] for _, device in _devices(document) if device["riders"]]
        whom = carriers[0] if len(carriers) == 1 else _many(len(carriers), "device")
        rides = "that rides" if counts["riders"] == 1 else "that ride"
        folded.append(f"{_many(counts['riders'], 'function')} {rides} along with {whom}")
    if counts["bridges"]:
        folded.append(_many(counts["bridges"], "bridge"))
    if counts["others"]:
        folded.append(f"{_many(counts['others'], 'function')} that no rule takes")
    return folded


def _gist(reason: str) -> str:
    """The beginning of a reason, without the details that differ from one function to the next."""
    return reason.partition(": ")[0].partition(" (")[0]


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
