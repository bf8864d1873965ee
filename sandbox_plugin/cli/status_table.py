"""The status document for people: lines that fit the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandbox_plugin.cli.screen import wrapped
from sandbox_plugin.cli.tables import Line, Styled, Table, print_lines, terminal_width

_NARROWEST = 40
_BAD = "red"


def print_status(document: Mapping[str, Any]) -> None:
    """Prints it, as wide as the terminal is, or 80 columns."""
    print_lines(status_lines(document, terminal_width()))


def status_lines(document: Mapping[str, Any], columns: int) -> list[Line]:
    """What a person sees, in lines that are not wider than that."""
    columns = max(columns, _NARROWEST)
    plugin, turn, scan = document["plugin"], document["turn"], document["scan"]
    lines: list[Line] = []
    head = f"sandbox-plugin {plugin['version']} on {plugin['node']}, up {_age(plugin['uptime_seconds'])}, "
    lines += wrapped(head + _with_reason(turn["state"], turn["reason"]), columns)
    for why in document["not_ready"]:
        lines += _indented(f"not ready: {why}", columns, indent="", style=_BAD)
    for why in document["remarks"]:
        lines += _indented(why, columns, indent="", style=_BAD)
    for resource in document["resources"]:
        lines += [[""], *_resource(resource, columns)]
    if document["held_without_device"]:
        lines += [[""], [Styled("held by pods, but no device here", "bold")]]
        for held in document["held_without_device"]:
            lines += _indented(f"{held['resource']}={held['id']}: {_holder(held['holder'])}", columns)
    if document.get("dra") is not None:
        lines += [[""], *_claims(document["dra"], columns)]
    lines.append([""])
    if document["cdi"] is not None:
        for file in document["cdi"]["files"]:
            lines += wrapped(f"CDI spec {file['path']}: {file['devices']} devices", columns)
    for source in document["events"]:
        style = _BAD if source["state"] == "down" else ""
        lines += wrapped(f"{source['source']}: {_with_reason(source['state'], source['reason'])}", columns, style)
    if scan["age_seconds"] is not None:
        lines += wrapped(
            f"last scan {_age(scan['age_seconds'])} ago, took {scan['took_seconds'] * 1000:.1f} ms", columns
        )
    return lines


def _resource(resource: Mapping[str, Any], columns: int) -> list[Line]:
    registration, devices = resource["registration"], resource["devices"]
    healthy = sum(device["health"] == "Healthy" for device in devices)
    state = registration["state"]
    if state == "registered":
        state += f" {_age(registration['registered_seconds'])} ago, streams: {registration['streams']}"
    elif state == "off":
        state = "by claims alone"
    text = (
        f"{resource['name']}: {healthy} of {len(devices)} Healthy, {_with_reason(state, registration.get('trouble'))}"
    )
    lines = wrapped(text, columns, "bold")
    table = Table(("ID", "PCI FUNCTION", "HEALTH", "HELD BY"))
    for device in devices:
        health = Styled(device["health"], "" if device["health"] == "Healthy" else _BAD)
        address = (device["pci_addresses"] or ["-"])[0]
        table.add_row(device["id"], address, health, _holder(device["holder"]))
    heading, *rows = table.lines()
    lines.append(heading)
    for device, row in zip(devices, rows, strict=True):
        lines.append(_cut(row, columns))
        if device["reason"]:
            lines += _indented(f"{device['reason']}: {device['detail']}", columns)
    return lines


def _claims(dra: Mapping[str, Any], columns: int) -> list[Line]:
    """Dynamic Resource Allocation: the driver at the kubelet, its slices, and the claims that are prepared."""
    registration, slices = dra["registration"], dra["slices"]
    state = registration["state"]
    if state == "registered":
        state += f" {_age(registration['registered_seconds'])} ago"
    lines = wrapped(f"DRA driver {dra['driver']}: {_with_reason(state, registration['trouble'])}", columns, "bold")
    if slices is not None:
        lines += _indented(_slices(slices), columns, style=_BAD if slices["trouble"] else "")
    for claim in dra["claims"]:
        devices = ", ".join(device["pci_address"] for device in claim["devices"])
        pod = f"pod {claim['pod']}" if claim["pod"] else "PodResources names no pod"
        if claim["abandoned_seconds"] is not None:
            pod += f", looks abandoned for {_age(claim['abandoned_seconds'])}"
        lines += _indented(f"claim {claim['namespace']}/{claim['name']}: {devices}; {pod}", columns)
    return lines


def _slices(slices: Mapping[str, Any]) -> str:
    if not slices["published"]:
        return f"slices are not published: {slices['trouble'] or 'not yet'}"
    text = f"pool {slices['pool']}, generation {slices['generation']}: "
    text += f"{slices['devices']} devices in {slices['slices']} slice{'s' * (slices['slices'] != 1)}"
    return text if slices["trouble"] is None else f"{text}; out of date: {slices['trouble']}"


def _holder(holder: Mapping[str, str | None] | None) -> str:
    if holder is None:
        return ""
    if holder["pod"] is None:
        claim = holder["claim"]
        return "a pod that PodResources has not named yet" if claim is None else f"claim {holder['namespace']}/{claim}"
    pod = "/".join(part for part in (holder["namespace"], holder["pod"], holder["container"]) if part)
    return pod if holder["claim"] is None else f"{pod}, claim {holder['claim']}"


def _cut(line: Line, columns: int) -> Line:
    """A row whose last cell ends with an ellipsis where the terminal ends."""
    *others, last = line
    if not isinstance(last, str):
        return line
    room = max(columns - sum(len(part if isinstance(part, str) else part.text) for part in others), 1)
    return [*others, last if len(last) <= room else last[: room - 1] + "…"]


def _indented(text: str, columns: int, indent: str = "    ", style: str = "") -> list[Line]:
    return [[indent, *line] for line in wrapped(text, columns - len(indent), style)]


def _with_reason(state: str, reason: str | None) -> str:
    return f"{state}: {reason}" if reason else state


def _age(seconds: float) -> str:
    """A duration in one unit that says enough."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
