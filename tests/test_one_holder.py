"""A VFIO node, an IOMMU group and a PCI address are never in the hands of two pods at once.

Whatever resource name and number they were given by, and by whatever run of the plugin; and the hands of a VM that
outlives its pod count as well. Stories that take a kernel, a kubelet and several plugins (shorter ones are in
test_ledger.py), and a random search for others, over the pure middle in a world of its own (`helpers/world.py`): it
raises `TwoHolders` by itself wherever a pod gets what is in other hands.

`ONE_HOLDER_STEPS` makes the search longer; `just one-holder` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import world
from names import NVSWITCH, PGPU
from search import search
from world import World

from sandbox_plugin.config.settings import Consumer, Settings
from sandbox_plugin.inventory import ledger, uses
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.registry import Registry

STEPS = int(os.environ.get("ONE_HOLDER_STEPS", "15000"))
_PARTS = 3
OTHER = "nvidia.com/other"
OTHER_ALIAS = Settings(gpu_alias="other")
KUBEVIRT = Settings(consumer=Consumer.KUBEVIRT)
GRACE = "example.com/grace"
A, B = "0000:01:00.0", "0000:01:00.1"
"""Of most layouts: two functions of one group. In `mates` GPUs 0 and 1, in `riders` GPU 0 and its audio function."""
FIRST, SECOND, SWITCH = "0000:01:00.0", "0000:02:00.0", "0000:04:00.0"
"""Of the layout `singles`: each alone in its group. On a kernel with cdevs GPUs 0 and 1, and NVSwitch 3."""


def serving(
    layout: str, settings: Settings | None = None, *, cdevs: bool = True, pod_resources: str = "there"
) -> World:
    """A world in which a plugin serves, and has been told that no pod has anything."""
    world = World(layout=layout, cdevs=cdevs, pod_resources=pod_resources, settings=settings)
    world.start_plugin(world.settings)
    world.tell()
    return world


def restart(world: World, settings: Settings | None = None) -> None:
    world.end_plugin()
    world.start_plugin(settings or world.settings)


def bind_again(world: World, *addresses: str, driver: str = "vfio-pci") -> None:
    """In this order, after all of them were unbound; the plugins see it."""
    functions = [world.kernel.functions[address] for address in addresses]
    for function in functions:
        world.kernel.unbind(function)
    for function in functions:
        world.kernel.bind(function, driver, world.now)
    world.look()


def unbind(world: World, address: str) -> None:
    world.kernel.unbind(world.kernel.functions[address])
    world.look()


# An old holder hides a new grant


def test_a_mate_is_not_given_for_as_long_as_a_vm_runs_after_pod_resources_went_away() -> None:
    world = serving("mates")
    old = world.give(PGPU, "0", "1")
    assert old is not None
    world.tell()
    world.pod_resources = "absent"
    world.end_pod(old)
    new = world.give(PGPU, "0")
    assert new is not None
    world.start_vm(new)
    for _ in range(4):
        world.wait(3600)
        assert world.give(PGPU, "1") is None


def test_a_promise_for_a_number_does_not_hide_who_has_the_group_that_the_number_is_in_now() -> None:
    world = serving("mates")
    holder, dropped = world.give(PGPU, "1"), world.give(PGPU, "2")
    assert holder is not None
    assert dropped is not None
    world.end_pod(dropped)
    bind_again(world, SECOND, A)  # they change their numbers
    assert world.kernel.functions[A].number == 2
    assert world.give(PGPU, "2") is None


# Another run of the plugin


@pytest.mark.parametrize("consumer", list(Consumer))
@pytest.mark.parametrize("cdevs", [True, False])
def test_what_a_pod_holds_under_the_old_alias_is_not_given_under_the_new_one(consumer: Consumer, cdevs: bool) -> None:
    world = serving("singles", Settings(consumer=consumer), cdevs=cdevs)
    held, free = ("0", "1") if cdevs else ("1", "2")
    assert world.give(PGPU, held)
    restart(world, Settings(consumer=consumer, gpu_alias="other"))
    assert world.give(OTHER, held) is None
    world.tell()
    assert world.give(OTHER, held) is None
    assert world.give(OTHER, free)


@pytest.mark.parametrize("consumer", list(Consumer))
@pytest.mark.parametrize("pod_resources", ["there", "silent"])
def test_a_plugin_that_takes_over_under_another_alias_does_not_give_what_the_other_one_gave(
    pod_resources: str, consumer: Consumer
) -> None:
    world = serving("singles", Settings(consumer=consumer))
    world.start_plugin(Settings(consumer=consumer, gpu_alias="other"), serves=False)
    assert world.give(PGPU, "0")
    world.end_plugin()
    world.pod_resources = pod_resources
    world.take_over()
    world.wait(60)
    assert world.give(OTHER, "0") is None


def test_a_node_that_moved_to_another_resource_is_not_given_before_pod_resources_has_told_who_holds_it() -> None:
    world = serving("singles")
    assert world.give(PGPU, "0")
    unbind(world, FIRST)
    bind_again(world, SWITCH)
    world.pod_resources = "silent"
    restart(world)
    world.wait(60)
    assert world.give(NVSWITCH, "0") is None


def test_a_gpu_that_another_plugin_gave_under_another_alias_is_still_its_launchers_when_it_is_bound_again() -> None:
    world = serving("singles", KUBEVIRT)
    world.start_plugin(Settings(consumer=Consumer.KUBEVIRT, gpu_alias="other"), serves=False)
    world.look()
    assert world.give(PGPU, "0")
    bind_again(world, SWITCH, FIRST)
    world.end_plugin()
    world.take_over()
    world.wait(60)
    assert world.give(OTHER, "3") is None


@pytest.mark.parametrize("pod_resources", ["silent", "of a young kubelet"])
def test_at_start_no_mate_is_given_before_it_is_known_who_holds_what(pod_resources: str) -> None:
    for seed in range(10):  # a young kubelet names some of its pods
        world = serving("mates")
        world.dice.seed(seed)
        assert world.give(PGPU, "0")
        if pod_resources == "silent":
            world.pod_resources = pod_resources
        else:
            world.restart_kubelet()
        restart(world)
        world.wait(20)
        assert world.give(PGPU, "1") is None
        assert world.give(NVSWITCH, "3") is None


@pytest.mark.parametrize("cdevs", [True, False])
def test_virtual_functions_are_not_given_while_a_pod_holds_their_physical_function(cdevs: bool) -> None:
    virtual = "nvidia.com/GH100_H100_SXM5_80GB_VF"
    world = serving("virtual", cdevs=cdevs)
    assert world.give(PGPU, "1" if cdevs else "2")
    world.kernel.carry(world.kernel.functions[SECOND], world.now)
    restart(world)
    world.tell()
    world.look()
    ids = [d.id for d in world.current.resources[virtual]]
    assert len(ids) == 2
    assert world.give(virtual, ids[0]) is None


@pytest.mark.parametrize("cdevs", [True, False])
def test_virtual_functions_are_not_given_before_it_is_known_who_holds_their_physical_function(cdevs: bool) -> None:
    """The kubelet keeps that one's ID from other pods, and theirs are new."""
    virtual = "nvidia.com/GH100_H100_SXM5_80GB_VF"
    for seed in range(10):  # a young kubelet names some of its pods
        world = serving("virtual", cdevs=cdevs)
        world.dice.seed(seed)
        assert world.give(PGPU, "1" if cdevs else "2")
        world.kernel.carry(world.kernel.functions[SECOND], world.now)
        world.restart_kubelet()
        restart(world)
        world.wait(20)
        ids = [d.id for d in world.current.resources[virtual]]
        assert len(ids) == 2
        assert world.give(virtual, ids[0]) is None


# A VM that outlives its pod


def test_the_mate_of_what_was_unbound_under_a_vm_is_not_given_although_its_pod_is_gone_and_it_is_not_listed() -> None:
    world = serving("mates")
    pod = world.give(PGPU, "0")
    assert pod is not None
    world.start_vm(pod)
    world.look()
    unbind(world, A)
    world.end_pod(pod)
    for _ in range(40):
        world.wait(5)
    assert world.current.device(PGPU, "0") is None
    assert world.give(PGPU, "1") is None


@pytest.mark.parametrize("pod_resources", ["there", "absent"])
def test_short_pods_do_not_get_a_gpu_whose_vm_does_not_end(pod_resources: str) -> None:
    world = serving("mates", pod_resources=pod_resources)
    pod = world.give(PGPU, "2")
    assert pod is not None
    world.start_vm(pod)
    world.end_pod(pod)
    for _ in range(8):
        assert world.give(PGPU, "2") is None
        assert "2" not in world.healthy(PGPU)
        world.wait(20)


# What must come back


@pytest.mark.parametrize("consumer", list(Consumer))
@pytest.mark.parametrize("cdevs", [True, False])
@pytest.mark.parametrize("pod_resources", ["there", "absent"])
@pytest.mark.parametrize("layout", ["singles", "mates", "riders", "mixed", "virtual"])
def test_with_no_pods_everything_is_offered_after_the_first_scan_and_the_first_answer(
    layout: str, pod_resources: str, cdevs: bool, consumer: Consumer
) -> None:
    serving(layout, Settings(consumer=consumer), cdevs=cdevs, pod_resources=pod_resources).must_offer_everything()


@pytest.mark.parametrize("was_there", ["since its start", "until just now"])
def test_without_pod_resources_everything_is_offered_again_ten_minutes_after_the_last_pod(was_there: str) -> None:
    world = serving("mates", pod_resources="absent" if was_there == "since its start" else "there")
    assert world.give(PGPU, "0")
    assert world.give(NVSWITCH, "3")
    if was_there == "until just now":
        world.tell()
        world.pod_resources = "absent"
    world.settle()


# The search


@pytest.mark.timeout(max(120, STEPS // 100))
@pytest.mark.parametrize("part", range(_PARTS))
def test_nothing_is_ever_in_two_hands_and_everything_is_offered_again(part: int) -> None:
    outcome = search(STEPS // _PARTS, first_seed=1_000_000 * part)
    assert outcome.failed is None, outcome.story()
    assert outcome.granted > outcome.steps / 100, "pods get something at all"
    assert outcome.claimed > outcome.steps / 400, "and claims do"
    assert outcome.released > outcome.steps / 20_000, "and what the kubelet forgets comes back"


# What the search finds when the daemon forgets one of its rules


def _returning(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def _unchanged(first: object, *_: object, **__: object) -> object:
    return first


def _without_news(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The registry is never told this."""

    def forget(patch: pytest.MonkeyPatch) -> None:
        learn = Registry.learn
        patch.setattr(
            Registry, "learn", lambda self, **news: learn(self, **{k: v for k, v in news.items() if k != name})
        )

    return forget


def _every_answer_is_complete(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "Holdings", lambda **told: ledger.Holdings(**{**told, "complete": True}))


def _places_without(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A grant does not remember the node, the group or the addresses of its device."""

    def some(places: ledger.Places) -> list[ledger.Place]:
        every: dict[str, list[ledger.Place]] = {
            "node": [places.node],
            "group": [] if places.group is None else [places.group],
            "addresses": [*places.addresses],
        }
        return [place for name, those in every.items() if name != kind for place in those]

    return _replacing(ledger.Places, "all", property(some))


def _replacing(where: object, name: str, by: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(where, name, by)


FORGOTTEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "that a pod has ended when the kubelet gives its ID again": _replacing(
        ledger.Ledger, "are_one_pods", _returning(True)
    ),
    "that an Allocate is younger than the answer": _replacing(ledger, "_is_over", _returning(True)),
    "that the kubelet shows a new pod late": _replacing(ledger, "ADMISSION", 0.0),
    "that a pod may use nothing for a while": _replacing(ledger, "GRANT_UNUSED", 5.0),
    "that another plugin may have served until now": _replacing(ledger, "serve_since", _unchanged),
    "that a young kubelet does not name all pods": _every_answer_is_complete,
    "that PodResources is there and will answer": _without_news("pod_resources"),
    "that a name may be of an earlier run": _replacing(Rules, "was_perhaps_ours", _returning(False)),
    "which node a pod has": _places_without("node"),
    "which group a pod has": _places_without("group"),
    "that what is not bound may be a pod's": _replacing(ledger.Ledger, "unplaced", property(_returning([]))),
    "what a look found in use": _without_news("busy"),
    "what a scan saw in use": _replacing(uses, "observe", _unchanged),
    "what claims hold": _replacing(ledger, "claim", _unchanged),
    "that the API server has a claim for a pod which the kubelet has forgotten": _replacing(
        world, "why_lost", _returning("it is gone")
    ),
    "to look before Allocate": _replacing(World, "_look", _returning(None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", FORGOTTEN)
def test_the_search_finds_that_the_daemon_forgets(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CDI specs of earlier runs say, and which addresses a pod has, are too seldom all that tells: test_ledger.py
    has stories of those."""
    FORGOTTEN[rule](monkeypatch)
    outcome = search(200_000, first_seed=4_000_000)
    assert isinstance(outcome.error, AssertionError), f"nothing found in {outcome.steps} steps"
