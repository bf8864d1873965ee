"""`sandbox-plugin demo --dra`: ResourceSlices and claims, with a fake API server and a toy of a scheduler, too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from sandbox_plugin.cli.demo_stage import HEALTH_INTERVAL
from sandbox_plugin.cli.screen import flowed, heading
from sandbox_plugin.cli.tables import Line, Part, Styled
from sandbox_plugin.fake.api_server import NODES, FakeApiServer
from sandbox_plugin.fake.claims_story import ClaimsStory
from sandbox_plugin.fake.dra_kubelet import ClaimInfo, DraKubelet
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.scheduler import Object, allocated, attribute, devices_of, is_kept_back
from sandbox_plugin.fake.story import counted

_FREE, _CLAIMED, _TAINTED = "green", "yellow", "bold red"
"""As the devices of the other demo."""
_LEGEND = (
    "devices: ",
    Styled("free", _FREE),
    "  ",
    Styled("[in a claim]", _CLAIMED),
    "  ",
    Styled("!tainted", _TAINTED),
)
_NONE: list[Line] = [[Styled("none", "dim")]]


class ClaimsPlay:
    """The demo of Dynamic Resource Allocation, with KubeVirt as the consumer: it can use claims today."""

    subject = "what happened, and how long until it was seen"
    seen_by = "the API server and the kubelet"
    fewest_log_lines = 4

    def __init__(self, preset: str, node: FakeNode, folder: Path) -> None:
        self.title = f"Fake node {preset}, kubelet, API server; the real daemon. Ctrl-C ends it."
        self.about: Sequence[str] = (
            f"A fake node ({PRESETS[preset].summary}), a fake kubelet, API server and scheduler, and between them the "
            "real daemon, which offers the GPUs by Dynamic Resource Allocation: `sandbox-plugin run --dra`, here with "
            "`--device-plugin off` and `--consumer kubevirt`.",
            "Times run from the change until the API server and the kubelet have seen it, measured in this run.",
        )
        self._preset = preset
        self._node = node
        self._folder = folder
        self._api = FakeApiServer()
        self._kubelet = DraKubelet(folder, folder / "pod-resources.sock", self._api)

    @asynccontextmanager
    async def surroundings(self) -> AsyncIterator[Sequence[str]]:
        """As in `Play`."""
        (self._folder / "kubelet").mkdir()
        self._api.put(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._preset}})
        async with self._api, self._kubelet:
            yield (
                *("--dra", "on", "--device-plugin", "off", "--consumer", "kubevirt"),
                *("--node-name", self._preset, "--api-server", self._api.url),
            )

    def story(self, started_at: float) -> ClaimsStory:
        """As in `Play`."""
        return ClaimsStory(
            node=self._node,
            api=self._api,
            kubelet=self._kubelet,
            cdi_dir=self._folder / "cdi",
            started_at=started_at,
            health_interval=HEALTH_INTERVAL,
        )

    def effort(self) -> str:
        """As in `Play`."""
        kubelet, writes = self._kubelet, len(self._api.history_of_devices())
        return (
            f"{counted(kubelet.registrations, 'registration')}, {counted(writes, 'write')} of slices, "
            f"{counted(kubelet.lists, 'message')} about health, and {counted(kubelet.prepares, 'claim')} prepared"
        )

    # The screen

    def panel(self, columns: int) -> list[Line]:
        """As in `Play`."""
        slices, claims = self._api.slices(), self._api.claims()
        devices = {device["name"]: device for device in devices_of(slices)}
        taken = allocated(claims)
        cells = _Cells(devices=devices, taken=taken, prefix=_common(taken.union(devices)))
        names = f"   names begin with {cells.prefix}" if cells.prefix else ""
        lines: list[Line] = [
            heading("ResourceSlices: what the scheduler sees", columns),
            [*_LEGEND, Styled(names, "dim")],
        ]
        for each in slices:
            lines += _slice(each, cells, columns)
        lines += _NONE if not slices else []
        lines.append(heading("ResourceClaims: what pods have been given", columns))
        for claim in claims:
            lines += _claim(claim, self._kubelet.claims.get(claim["metadata"]["uid"]), cells, columns)
        return lines + (_NONE if not claims else [])


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """How devices are shown, by name."""

    devices: Mapping[str, Object]
    taken: Collection[str]
    prefix: str
    """What all names begin with."""

    def of(self, name: str) -> Styled:
        """One of them."""
        shown, style = name.removeprefix(self.prefix), _FREE
        if name in self.devices and is_kept_back(self.devices[name]):
            shown, style = f"!{shown}", _TAINTED
        if name in self.taken:
            shown, style = f"[{shown}]", _CLAIMED if style == _FREE else style
        return Styled(shown, style)


def _common(names: Iterable[str]) -> str:
    """What all of these names begin with, up to a hyphen: `pci-0000-`."""
    distinct = {name: name.split("-") for name in names}
    if len(distinct) < 2:
        return ""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*distinct.values(), strict=False))
    return "".join(f"{part}-" for part, *_ in same)


def _slice(one: Object, cells: _Cells, columns: int) -> list[Line]:
    """A slice, and its devices by type and NUMA node."""
    pool, devices = one["spec"]["pool"], one["spec"]["devices"]
    counts = f"generation {pool['generation']}, {counted(len(devices), 'device')}"
    lines: list[Line] = [
        [Styled(one["metadata"]["name"], "bold"), f"  {counts}, {sum(map(is_kept_back, devices))} tainted"]
    ]
    rows: dict[str, list[Part]] = {}
    for device in devices:
        numa = attribute(device, "resource.kubernetes.io/numaNode")
        title = f"{attribute(device, 'type')}, {'no NUMA node' if numa is None else f'NUMA {numa}'}:"
        rows.setdefault(title, []).append(cells.of(device["name"]))
    for title in sorted(rows):
        lines += [["  ", *line] for line in flowed([Styled(title, "dim"), *rows[title]], columns - 2)]
    return lines


def _claim(claim: Object, info: ClaimInfo | None, cells: _Cells, columns: int) -> list[Line]:
    """A claim, how far it is, and its devices."""
    state = Styled("allocated")
    if info is not None and info.devices:
        state = Styled("prepared", _FREE)
    elif info is not None and info.error:
        state = Styled("refused", _TAINTED)
    pod = claim["status"]["reservedFor"][0]["name"]
    name: Part = Styled(claim["metadata"]["name"], "bold")
    return flowed([name, f"of {pod}:", state, *map(cells.of, sorted(allocated([claim])))], columns)
