"""`sandbox-plugin demo`: a fake node and a fake kubelet, and between them the real daemon as a process of its own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sandbox_plugin.cli.demo_stage import HEALTH_INTERVAL, LOG_LINES, Play, perform, summary
from sandbox_plugin.cli.options import require_aiohttp
from sandbox_plugin.cli.screen import flowed, heading
from sandbox_plugin.cli.signals import run_until_signal
from sandbox_plugin.cli.stdout import say
from sandbox_plugin.cli.tables import Line, Styled
from sandbox_plugin.cli.temporary import temporary_folder
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.kubelet import FakeKubelet, Listed
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.story import Story, StoryError, Told, counted, where_ids_begin
from sandbox_plugin.hints import not_one_of
from sandbox_plugin.trouble import first_failure

_FREE, _IN_A_POD, _UNHEALTHY = "green", "yellow", "bold red"
"""How a device is shown: each also differs in its letters, for those who see no colours."""
_LEGEND = (
    "devices: ",
    Styled("free", _FREE),
    "  ",
    Styled("[in a pod]", _IN_A_POD),
    "  ",
    Styled("!unhealthy", _UNHEALTHY),
)


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a fake node and a fake kubelet in a temporary folder, runs the daemon on them, and shows what the "
        "kubelet sees while things happen to the node. On a terminal it goes on until Ctrl-C; otherwise it tells the "
        "story once, in plain lines."
    )
    parser.add_argument("--preset", metavar="PRESET", default="hgx-h100", help="the fake node; default: hgx-h100")
    parser.add_argument(
        "--dra",
        action="store_true",
        help="show Dynamic Resource Allocation instead: ResourceSlices and claims, with a fake API server, too",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # The story is one of whole GPUs.
    playable = [name for name, preset in PRESETS.items() if name != "empty" and not preset.vgpu_cards]
    if args.preset not in playable:
        raise UsageError(f"--preset: {not_one_of(args.preset, playable)}")
    if args.dra:
        require_aiohttp("--dra")
    with temporary_folder("sandbox-demo-", _short_folder(30 if args.dra else 50)) as folder:
        node, told = FakeNode.create(folder / "node", args.preset), list[Told]()
        play = _play(args.preset, node, folder, claims=args.dra)
        try:
            run_until_signal(lambda: perform(play, folder, told), {})
        except BaseExceptionGroup as failures:
            error = first_failure(failures)
            if isinstance(error, OSError):
                raise error from None
            if not isinstance(error, StoryError):
                raise
            print(f"sandbox-plugin: the demo stopped: {error}", file=sys.stderr)
            return 1
    say("\n".join(("", summary(play, told), "", *_what_next())))
    return 0


def _play(preset: str, node: FakeNode, folder: Path, *, claims: bool) -> Play:
    """The demo of claims, or that of the device plugin API."""
    if not claims:
        return _DevicesPlay(preset, node, folder)
    from sandbox_plugin.cli.demo_claims import ClaimsPlay  # few need it, and it needs aiohttp

    return ClaimsPlay(preset, node, folder)


def _what_next() -> Sequence[str]:
    """What to try next."""
    program = _program()
    return (
        "What to try next: what another node offers, and what one lacks;",
        f"  {program} list --fake-sysfs workstation",
        f"  {program} doctor --fake-sysfs empty",
        "a node to change yourself, and how.",
        f"  {program} fake-node create hgx-h100 /tmp/node",
        f"  {program} fake-node --help",
    )


def _program() -> str:
    """How a person would start this program here: `scripts/dev.py` installs it into the checkout."""
    path, here = Path(sys.argv[0]).absolute(), Path.cwd()
    is_ours = path.name == "sandbox-plugin" and path.is_relative_to(here)
    return str(path.relative_to(here)) if is_ours else "sandbox-plugin"


def _short_folder(room: int) -> str | None:
    """Where unix sockets fit in, whose paths have 107 bytes at most; None: the usual folder for temporary files, which
    is shorter than `room`."""
    return None if len(tempfile.gettempdir()) < room else "/tmp"


class _DevicesPlay:
    """The demo of the device plugin API."""

    subject = "what happened, and how long until the kubelet saw it"
    seen_by = "the kubelet"
    fewest_log_lines = LOG_LINES

    def __init__(self, preset: str, node: FakeNode, folder: Path) -> None:
        self.title = f"The fake node {preset}, a fake kubelet, the real daemon. Ctrl-C ends it."
        self._ids, about_ids = where_ids_begin(node)
        about = f"A fake node ({PRESETS[preset].summary}), a fake kubelet, and the real daemon between them."
        self.about: Sequence[str] = (
            f"{about} {about_ids}",
            "Times run from the change until the kubelet sees it, measured in this run.",
        )
        self._node = node
        self._kubelet = FakeKubelet(folder / "kubelet", folder / "pod-resources.sock")

    @asynccontextmanager
    async def surroundings(self) -> AsyncIterator[Sequence[str]]:
        """As in `Play`."""
        async with self._kubelet:
            yield ()

    def story(self, started_at: float) -> Story:
        """As in `Play`."""
        return Story(node=self._node, kubelet=self._kubelet, started_at=started_at, health_interval=HEALTH_INTERVAL)

    def effort(self) -> str:
        """As in `Play`."""
        registrations, lists = (
            counted(self._kubelet.registrations, "registration"),
            counted(self._kubelet.lists, "list"),
        )
        return f"{registrations}, {lists} of devices and {counted(self._kubelet.allocates, 'Allocate')}"

    def panel(self, columns: int) -> list[Line]:
        """As in `Play`."""
        resources = (line for name in self._kubelet.resources() for line in _resource(self._kubelet, name, columns))
        return [
            heading("what the kubelet sees", columns),
            [*_LEGEND, "   ", Styled(self._ids, "dim")],
            *resources,
        ]


def _resource(kubelet: FakeKubelet, resource: str, columns: int) -> list[Line]:
    """How many devices of a resource are healthy, and each of them below, by NUMA nodes."""
    devices = kubelet.devices(resource)
    lines: list[Line] = [[Styled(resource, "bold"), f"  {len(kubelet.healthy(resource))} of {len(devices)} healthy"]]
    for node in sorted({device.numa_nodes for device in devices.values()}):
        title = f"NUMA {','.join(map(str, node))}:" if node else "no NUMA node:"
        cells = [
            _device_cell(device, is_held=kubelet.holder(resource, device.id) is not None)
            for device in sorted(devices.values(), key=lambda device: int(device.id))
            if device.numa_nodes == node
        ]
        lines += [["  ", *line] for line in flowed([Styled(title, "dim"), *cells], columns - 2)]
    return lines


def _device_cell(device: Listed, *, is_held: bool) -> Styled:
    if not device.healthy:
        return Styled(f"!{device.id}", _UNHEALTHY)
    return Styled(f"[{device.id}]", _IN_A_POD) if is_held else Styled(device.id, _FREE)
