"""Upgrade, roll back, uninstall: what pods that run meanwhile, and the plugin that comes next, find.

docs/upgrading.md has the procedures. The way from the reference plugin is in test_drop_in.py, a change of the alias in
test_holders.py and test_cdi_stale.py, and what two plugins do at the same time in test_two_plugins.py.
"""

from __future__ import annotations

import subprocess
from itertools import chain
from pathlib import Path

import pytest
from cdi_reader import nodes_of, read_folder, reading
from conftest import MakeNode, Serve, StartDaemon
from daemon import ROOT, Places, run_command
from kubelet import GrpcKubelet
from names import PGPU
from outputs import GPU_NODES, assert_allocates
from pods import PodResources
from test_drop_in import by_name, leave_specs, reference_devices
from trials import QUICK

from sandbox_plugin.kubelet.lock import LOCK_NAME
from sandbox_plugin.rpc.sockets import identity

HELD = ["4", "5"]


@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_over_two_upgrades_in_a_row_a_pod_finds_its_devices_at_every_moment_and_no_other_pod_gets_them(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources, places: Places, killed: bool
) -> None:
    pods.start(age=3600)
    node, running, agree = serve("hgx-h100", QUICK)
    kubelet.plugin(PGPU).allocate(HELD)
    pods.hold("vm", PGPU, *HELD)
    wanted = {f"{PGPU}={number}": (GPU_NODES[number],) for number in HELD}

    def look() -> None:
        specs = read_folder(places.cdi, nodes_of(node.root))
        assert specs.items() >= wanted.items()

    with reading(look) as faults:
        for _ in range(2):
            new = daemon(node, QUICK)
            new.wait_for("standing by")
            running.kill() if killed else running.terminate()
            new.wait_for("registered", resource=PGPU)
            agree()
            running = new
    assert not faults
    free = sorted(GPU_NODES.keys() - set(HELD))
    assert_allocates(kubelet.plugin(PGPU), [free], GPU_NODES)
    running.close()  # before those that it came after, which are judged by what they left


def test_a_new_version_that_does_not_start_leaves_the_old_one_at_work(
    serve: Serve, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    """As with a setting that the new one does not know."""
    node, _, agree = serve("workstation", QUICK)
    before = {path.name: identity(path) for path in chain(places.kubelet.iterdir(), places.cdi.iterdir())}
    ran = run_command("run", *places.flags(node), "--health-interval=never")
    assert ran.returncode == 2, ran.stderr
    assert {path.name: identity(path) for path in chain(places.kubelet.iterdir(), places.cdi.iterdir())} == before
    agree()
    assert kubelet.calls == 1


@pytest.mark.parametrize("by_model", [False, True], ids=["aliases", "by model"])
@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_back_to_the_reference_every_file_that_is_left_is_one_that_it_writes_itself_with_the_same_devices(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, preset: str, by_model: bool
) -> None:
    node = fake_node(preset)
    devices = reference_devices(node.root, by_model=by_model)
    plugin = daemon(node, QUICK, **({"P_GPU_ALIAS": "", "NVSWITCH_ALIAS": ""} if by_model else {}))
    kubelet.wait_for(lambda: {r: set(ids) for r, ids in devices.items()} == {r: kubelet.healthy(r) for r in devices})
    plugin.terminate()
    assert {path.name for path in places.kubelet.iterdir()} == {"kubelet.sock", LOCK_NAME}, "no socket is in its way"
    left = {path.name for path in places.cdi.iterdir()}
    assert read_folder(places.cdi) == {name: (path,) for name, path in by_name(devices).items()}, "for running pods"
    leave_specs(places, devices)  # what the reference does when it starts
    assert {path.name for path in places.cdi.iterdir()} == left, "nothing of ours beside its own"
    assert read_folder(places.cdi).keys() == by_name(devices).keys()


def test_the_commands_of_the_doc_remove_all_that_an_uninstalled_plugin_left_and_nothing_of_others(
    serve: Serve, places: Places
) -> None:
    _, plugin, _ = serve("hgx-h100", QUICK)
    plugin.terminate()
    foreign = places.cdi / "vendor.com-nic.yaml"
    foreign.write_text("cdiVersion: 0.5.0\nkind: vendor.com/nic\ndevices: []\n")
    assert len(list(places.cdi.iterdir())) == 3, "two of ours"
    for command in _commands_under("## Uninstall"):
        if "kubectl" not in command:
            here = command.replace("/var/lib/kubelet/device-plugins", str(places.kubelet))
            here = here.replace("/var/run/cdi", str(places.cdi))
            assert here != command
            subprocess.run(["bash", "-euo", "pipefail", "-c", here], check=True, timeout=30)
    assert [path.name for path in places.cdi.iterdir()] == [foreign.name]
    assert [path.name for path in places.kubelet.iterdir()] == ["kubelet.sock"]


def _commands_under(heading: str) -> list[str]:
    """The indented lines of that section of docs/upgrading.md."""
    text = Path(ROOT, "docs/upgrading.md").read_text()
    section = text.partition(f"{heading}\n")[2].partition("\n## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    assert commands
    return commands
