"""A world for the pure middle: hardware, VMs, a kubelet, plugins that come and go, and a clock that is not real.

What is true is kept as plain objects, and judged without any idea of the daemon's: after each Allocate that was
granted, nothing that the pod got may be in other hands (`Hands`). The plugins in it are real registries, driven
directly; they see what a plugin sees, as late as a plugin sees it.

Usage:

    world = World(layout="mates")
    world.start_plugin(Settings())
    world.admit([(PGPU, 1)])              # raises `TwoHolders`
    world.settle()                        # everybody leaves; raises `NotOffered`

`search` does random things to it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hardware import Function, Kernel, Vm

from sandbox_plugin.config.settings import Consumer, Policy, ResourceRule, Settings
from sandbox_plugin.dra.abandoned import LONGEST_PAUSE, InUse, Look, Suspicion, in_use, judge, what_pods_say, why_lost
from sandbox_plugin.dra.claims import Asked, ClaimId, Prepared, Refused, Wanted, Why, choose, give, usable
from sandbox_plugin.dra.names import devices_by_name
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings, PreparedClaim
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.kubelet.podresources import YOUNG
from sandbox_plugin.model import Device, HostFacts, node_of_cdev, node_of_group
from sandbox_plugin.registry import Registry

NAMES = ModelNames({(0x10DE, 0x2330): "GH100 [H100 SXM5 80GB]", (0x10DE, 0x22A3): "GH100 [H100 NVSwitch]"})
UNUSED = 600.0
"""Seconds after which, without PodResources, a pod that uses nothing counts as gone: that is what is promised."""
BEGINNING = 1000.0
_MOMENT = 0.0001
_INTERVAL = 5.0
_PATIENCE, _FIRST_PATIENCE = 4.0, 1.0
"""Seconds that PodResources gets for an answer; at the start of a plugin less, since nothing else is done before."""
_PATIENCE_WITH_CLAIMS = 60.0
"""Seconds for which a claim must look abandoned. The driver waits for longer; nothing here is slower than this."""


class TwoHolders(AssertionError):
    """Something was given to a pod while it was in other hands."""


class OfferedAgain(AssertionError):
    """A device was Healthy although the plugin has seen that a VM has it, before Allocate and in a scan since."""


class NotOffered(AssertionError):
    """A device that nobody has is not offered."""


# Pods


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One device in an answer of Allocate, for as long as the kubelet keeps the answer."""

    key: DeviceKey
    node: str
    group_node: str | None
    """As well given, to KubeVirt."""
    functions: tuple[str, ...]
    """Addresses of what it was then,"""
    bindings: tuple[int, ...]
    """and how often they had been bound."""
    addresses: tuple[str, ...]
    """Those that are named in the environment, for KubeVirt."""
    consumer: Consumer
    plugin: Plugin
    at: float


@dataclass(eq=False, kw_only=True)
class Pod:
    name: str
    shows_at: float
    """When PodResources begins to name it."""
    grants: list[Grant] = field(default_factory=list)
    is_live: bool = True
    """The kubelet keeps its IDs from other pods."""
    vm: Vm | None = None
    claim: WorldClaim | None = None
    """By which it has its grants; None: by the device plugin API."""


@dataclass(kw_only=True)
class WorldClaim:
    """A ResourceClaim that the scheduler has allocated, for one pod."""

    id: ClaimId
    wanted: tuple[Wanted, ...]


Hands = frozenset[str | int]
"""What somebody has, or will have when the VM starts: paths of nodes, numbers of groups, addresses of functions."""


def groups_in(hands: Hands) -> set[int]:
    return {each for each in hands if isinstance(each, int)}


def nodes_in(hands: Hands) -> set[str]:
    return {each for each in hands if isinstance(each, str) and each.startswith("/dev")}


def addresses_in(hands: Hands) -> set[str]:
    return {each for each in hands if isinstance(each, str) and not each.startswith("/dev")}


# Plugins


@dataclass(eq=False, kw_only=True)
class Question:
    """One to PodResources that is not answered yet."""

    asked_at: float
    ends_at: float
    is_answered: bool = True
    """Else nobody waits any longer then."""
    of_this_lock: bool = False
    """It is asked once before the plugin serves."""
    answer: Mapping[DeviceKey, str] | None = None
    """Device -> pod, as it was when the kubelet got the question; None: it is to be made when the answer goes out."""


@dataclass(eq=False, kw_only=True)
class Plugin:
    """One run of the plugin: a registry, and what the daemon does around it."""

    name: str
    settings: Settings
    registry: Registry
    has_started: bool = False
    """It has asked PodResources once, and goes on with all the rest."""
    lock_since: float = math.inf
    """Since when it has the lock; inf: it has not."""
    serves: bool = False
    next_scan: float = 0.0
    scan: tuple[float, HostFacts] | None = None
    """One that is under way: when its facts come, and what they are."""
    scan_began: float = -math.inf
    """When the latest scan began that has been taken in."""
    next_question: float = 0.0
    questions: list[Question] = field(default_factory=list)
    has_answer: bool = False
    """PodResources has answered once, by a kubelet that knew its pods."""
    told_at: float = -math.inf
    """When it was asked what it has answered so."""
    is_heard: bool = False
    """It has answered since this plugin has the lock."""
    is_there: bool | None = None
    """Whether PodResources' socket was there when it was last asked."""
    named: dict[tuple[DeviceKey, str], float] = field(default_factory=dict)
    """Device and pod -> when the latest answer was asked for that says that the pod holds it."""
    bindings: set[int] = field(default_factory=set)
    """All that its scans have seen."""
    found_busy: dict[tuple[DeviceKey, str, Vm | None], float] = field(default_factory=dict)
    """A device, and what a VM had in its group -> when that was first a reason to refuse it."""
    in_cdi: Mapping[str, frozenset[str]] | None = None
    former: Mapping[DeviceKey, str] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    """Claims, by UID."""
    holds: dict[str, PreparedClaim] = field(default_factory=dict)
    """The same, as its registry knows them."""
    suspicions: dict[str, Suspicion] = field(default_factory=dict)
    """Of claims that nobody may give back, by UID."""

    @property
    def is_told(self) -> bool:
        """Whether PodResources has given a complete answer since this plugin has the lock."""
        return self.told_at >= self.lock_since


GRACE_RULE = ResourceRule(label="resources[0]", name="example.com/grace", drivers=frozenset({"nvgrace_gpu_vfio_pci"}))


def hardware(kind: str) -> list[Function]:
    """The functions of a machine, none bound yet. Group numbers are small, so that they meet those of vfioN."""

    def group(number: int, *kinds: str) -> list[Function]:
        addresses = tuple(f"0000:{number:02x}:00.{n}" for n in range(len(kinds)))
        return [
            Function(address=a, kind=k, group=number, mates=tuple(m for m in addresses if m != a))
            for a, k in zip(addresses, kinds, strict=True)
        ]

    layouts: dict[str, list[tuple[str, ...]]] = {
        "singles": [("gpu",), ("gpu",), ("gpu",), ("switch",)],
        "mates": [("gpu", "gpu"), ("gpu",), ("switch", "switch")],
        "switches": [("gpu",), ("gpu",), ("switch", "switch", "switch", "switch")],
        "riders": [("gpu", "audio"), ("gpu", "gpu", "audio"), ("switch",)],
        "mixed": [("gpu", "switch"), ("gpu", "audio"), ("gpu",)],
        "virtual": [("gpu",), ("gpu",), ("switch",)],
    }
    functions = [f for n, kinds in enumerate(layouts[kind], 1) for f in group(n, *kinds)]
    if kind == "virtual":
        for n in range(2):
            virtual = Function(address=f"0000:02:01.{n}", kind="vf", group=20 + n, carrier="0000:02:00.0")
            mediated = Function(address=f"00000000-0000-0000-0000-{n:012x}", kind="mdev", group=30 + n)
            virtual.is_present = mediated.is_present = False
            functions += [virtual, mediated]
    return functions


LAYOUTS = ("singles", "mates", "mates", "switches", "riders", "mixed", "virtual")


class World:
    """Everything, from one seed."""

    def __init__(
        self,
        *,
        cdevs: bool = True,
        layout: str = "mates",
        pod_resources: str = "there",
        settings: Settings | None = None,
        kubelet_age: float = 1000.0,
    ) -> None:
        self.now = BEGINNING
        self.kernel = Kernel(hardware(layout), cdevs=cdevs)
        for function in self.kernel.present:
            self.kernel.bind(function, "vfio-pci", self.now)
        self.pods: list[Pod] = []
        """Live ones, and those whose VM has outlived them."""
        self.allocated: dict[DeviceKey, Pod] = {}
        """The kubelet's own book."""
        self.pod_resources = pod_resources
        """`there`, `slow`, `silent` or `absent`."""
        self.kubelet_began = self.now - kubelet_age
        self.cdi: dict[str, dict[str, str]] = {}
        """Resource -> device name -> node: the specs that lie in the folder."""
        self.plugin: Plugin | None = None
        """The one that serves."""
        self.standby: Plugin | None = None
        self.settings = settings or Settings()
        self.slices: dict[str, bool] = {}
        """What the scheduler knows, be it old: device -> whether it may be given to a claim."""
        self.checkpoint: dict[str, Prepared] = {}
        """What lies on disk of claims, by UID."""
        self.forgotten: set[str] = set()
        """UIDs of claims that the kubelet has lost its records of: it names no pod with them, and gives none back."""
        self.released = 0
        """How many of those the plugins gave back by themselves."""
        self.granted = 0
        """How many Allocates, and claims."""
        self.claimed = 0
        """How many of these by claims."""
        self.history: list[str] | None = None
        self.dice = random.Random(0)
        self._names = 0

    def note(self, *words: object) -> None:
        """Something has happened. No two things happen at one time."""
        self.now += _MOMENT
        if self.history is not None:
            self.history.append(f"{self.now - BEGINNING:10.4f}  {' '.join(map(str, words))}")

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    # Time

    def wait(self, seconds: float) -> None:
        """Time goes on, and the plugins do what they do in it."""
        end = self.now + seconds
        piece = max(2.5, seconds / 6)
        while self.now < end:
            self.now = min(end, self.now + piece)
            for plugin in self.plugins:
                self._follow(plugin)

    @property
    def plugins(self) -> list[Plugin]:
        return [p for p in (self.plugin, self.standby) if p is not None]

    @property
    def current(self) -> Inventory:
        """What the plugin that serves offers."""
        assert self.plugin is not None
        return self.plugin.registry.current

    def _follow(self, plugin: Plugin) -> None:
        if plugin.scan is not None and self.now >= plugin.scan[0]:
            self._take_scan(plugin)
        for question in [q for q in plugin.questions if self.now >= q.ends_at]:
            self._end_question(plugin, question)
        if not plugin.has_started:
            return
        wake_at = plugin.registry._wake_at
        if plugin.scan is None and (self.now >= plugin.next_scan or (wake_at is not None and self.now >= wake_at)):
            self.begin_scan(plugin)
        if plugin.serves:
            self._release_forgotten(plugin)
        waits = plugin.registry.current.waits_for_holdings or not plugin.has_answer
        if waits and self.now >= plugin.next_question and all(q.of_this_lock for q in plugin.questions):
            self.ask(plugin)

    # What a plugin sees

    def look(self) -> None:
        """Every plugin scans the host."""
        for plugin in self.plugins:
            if plugin.has_started and plugin.scan is None:
                self.begin_scan(plugin)

    def tell(self) -> None:
        """Every plugin asks PodResources, and is answered at once."""
        for plugin in self.plugins:
            self.ask(plugin, at_once=True)

    def begin_scan(self, plugin: Plugin, takes: float = 0.0) -> None:
        self.now += _MOMENT
        plugin.next_scan = self.now + _INTERVAL
        plugin.scan = (self.now + takes, self.kernel.facts(self.now))
        if not takes:
            self._take_scan(plugin)

    def _take_scan(self, plugin: Plugin) -> None:
        assert plugin.scan is not None
        facts = plugin.scan[1]
        plugin.scan = None
        self.note(plugin.name, "takes in a scan of", f"{facts.began_at - BEGINNING:.4f}")
        plugin.registry.observe(facts)
        plugin.scan_began = facts.began_at
        plugin.bindings.update(f.vfio.binding or 0 for f in facts.functions.values() if f.vfio is not None)
        self._write_specs(plugin)

    def ask(self, plugin: Plugin, *, at_once: bool = False, of_this_lock: bool = False) -> None:
        """A question to PodResources."""
        self.now += _MOMENT
        if not of_this_lock:
            plugin.next_question = self.now + _INTERVAL
        if self.pod_resources == "absent":
            self.note(plugin.name, "finds no PodResources")
            self._learn_whether_there(plugin, is_there=False)
            self._go_on(plugin, of_this_lock=of_this_lock)
            return
        takes = 0.0
        if self.pod_resources == "silent":
            takes = math.inf
        elif self.pod_resources == "slow" and not at_once:
            takes = self.dice.choice((0.5, 2.0, 3.9, math.inf))
        patience = _FIRST_PATIENCE if of_this_lock or not plugin.has_started else _PATIENCE
        question = Question(
            asked_at=self.now,
            ends_at=self.now + min(takes, patience),
            is_answered=takes <= patience,
            of_this_lock=of_this_lock,
            answer=self._pods_by_device() if self.dice.random() < 0.5 else None,
        )
        plugin.questions.append(question)
        if not takes:
            self._end_question(plugin, question)

    def _pods_by_device(self) -> dict[DeviceKey, str]:
        """What the kubelet answers now."""
        named = [p for p in self.pods if p.is_live and p.shows_at <= self.now]
        if self.now - self.kubelet_began < YOUNG:
            named = [p for p in named if self.dice.random() < 0.5]
        return {g.key: p.name for p in named for g in p.grants if p.claim is None}

    def _claims_by_device(self) -> frozenset[tuple[str, str]]:
        """What PodResources says of claims."""
        named = [p for p in self.pods if p.is_live and p.claim is not None and p.shows_at <= self.now]
        named = [p for p in named if p.claim is not None and p.claim.id.uid not in self.forgotten]
        if self.now - self.kubelet_began < YOUNG:
            named = [p for p in named if self.dice.random() < 0.5]
        return frozenset((str(p.claim.id), g.functions[0]) for p in named if p.claim is not None for g in p.grants)

    def _end_question(self, plugin: Plugin, question: Question) -> None:
        plugin.questions.remove(question)
        if question.is_answered:
            is_young = question.asked_at - self.kubelet_began < YOUNG
            pods = question.answer if question.answer is not None else self._pods_by_device()
            words = "young" if is_young else "complete"
            self.note(plugin.name, f"hears ({words}, asked {question.asked_at - BEGINNING:.4f})", pods)
            plugin.has_answer |= not is_young
            plugin.is_heard |= question.asked_at >= plugin.lock_since
            if not is_young:
                plugin.told_at = max(plugin.told_at, question.asked_at)
            plugin.is_there = True
            plugin.named |= dict.fromkeys(pods.items(), question.asked_at)
            claims = self._claims_by_device() if question.asked_at >= self.now - _MOMENT else frozenset()
            complete = not is_young
            holdings = Holdings(asked_at=question.asked_at, pods=pods, complete=complete, claims=claims)
            plugin.registry.learn(holdings=holdings, pod_resources=True)
            self._write_specs(plugin)
        else:
            self.note(plugin.name, "gets no answer from PodResources")
            self._learn_whether_there(plugin, is_there=True)
        self._go_on(plugin, of_this_lock=question.of_this_lock)

    def _learn_whether_there(self, plugin: Plugin, *, is_there: bool) -> None:
        plugin.is_there = is_there
        plugin.registry.learn(pod_resources=is_there)
        self._write_specs(plugin)

    def _go_on(self, plugin: Plugin, *, of_this_lock: bool) -> None:
        """What waits for a question to end, however it ends."""
        if of_this_lock and plugin is self.plugin and not plugin.serves:
            self._serve(plugin)
        if not plugin.has_started:
            plugin.has_started = True
            self.begin_scan(plugin)

    def _write_specs(self, plugin: Plugin) -> None:
        """What the CDI writer does, where this plugin has one and the lock; before that, what is done for claims.

        The spec of a kind that no device needs any more stays as it is while a pod may need it.
        """
        self._follow_claims(plugin)
        if plugin.settings.consumer is not Consumer.KATA or not plugin.serves:
            return
        resources = plugin.registry.current.resources
        specs = {r: {d.id: d.node for d in listed if d.node_exists} for r, listed in resources.items()}
        specs = {resource: named for resource, named in specs.items() if named}
        held = {g.key[0] for p in self.pods if p.is_live for g in p.grants}
        self.cdi = {
            resource: named for resource, named in (self.cdi | specs).items() if resource in specs.keys() | held
        }
        in_cdi = {resource: frozenset(named) for resource, named in specs.items()}
        if in_cdi != plugin.in_cdi:
            plugin.in_cdi = in_cdi
            plugin.registry.learn(in_cdi=in_cdi)
        if self.dice.random() < 0.7:  # else later: the folder is read by itself
            self._learn_former(plugin, self.cdi.keys() - specs.keys())

    def _learn_former(self, plugin: Plugin, kinds: Iterable[str]) -> None:
        former = {(kind, name): node for kind in kinds for name, node in self.cdi[kind].items()}
        if former != plugin.former:
            plugin.former = former
            plugin.registry.learn(former=former)

    # Plugins come and go

    def start_plugin(self, settings: Settings, *, serves: bool = True) -> Plugin:
        """A new run: nothing is remembered."""
        needs_cdi = settings.consumer is Consumer.KATA
        registry = Registry(Rules(settings, NAMES), requires_cdi=needs_cdi, clock=lambda: self.now)
        plugin = Plugin(name=self._name("plugin"), settings=settings, registry=registry)
        self.note(plugin.name, "starts" if serves else "stands by", _words(settings))
        if serves:
            self.plugin = plugin
            self._begin_to_serve(plugin)
        else:
            self.standby = plugin
        if needs_cdi:
            self._learn_former(plugin, self.cdi)
        self.ask(plugin)
        return plugin

    def _show_all_pods(self) -> None:
        """That another plugin comes to serve takes longer than the kubelet takes to note an answer of the one before:
        whatever that gave is named by then, and nobody could know of it otherwise."""
        for pod in self.pods:
            pod.shows_at = min(pod.shows_at, self.now)

    def end_plugin(self) -> None:
        if self.plugin is not None:
            self.note(self.plugin.name, "ends")
        self.plugin = None

    def take_over(self) -> None:
        """The one that stands by gets the lock."""
        self.plugin, self.standby = self.standby, None
        assert self.plugin is not None
        self.note(self.plugin.name, "takes over")
        self._begin_to_serve(self.plugin)

    def swap_turns(self) -> None:
        """The lock goes to the other one, and both live on."""
        before = self.plugin
        assert before is not None
        before.serves, before.lock_since = False, math.inf
        self.take_over()
        self.standby = before

    def _begin_to_serve(self, plugin: Plugin) -> None:
        """It has the lock. Before it serves it asks PodResources, if it has not just started."""
        self._show_all_pods()
        plugin.lock_since, plugin.is_heard = self.now, False
        if plugin.registry.current.version:
            self.ask(plugin, of_this_lock=True)
        else:
            self._serve(plugin)

    def _serve(self, plugin: Plugin) -> None:
        plugin.suspicions = {}
        plugin.prepared = dict(self.checkpoint)
        plugin.holds = {uid: each.for_ledger() for uid, each in self.checkpoint.items()}
        plugin.registry.learn(claims=dict(plugin.holds))
        plugin.serves = True
        plugin.next_question = self.now
        plugin.registry.serve(plugin.lock_since)
        self._write_specs(plugin)

    # The kubelet

    def restart_kubelet(self) -> None:
        self.note("the kubelet restarts")
        self.kubelet_began = self.now
        for plugin in self.plugins:
            for question in plugin.questions:
                question.is_answered, question.ends_at = False, self.now
            plugin.next_question = self.now

    def healthy(self, resource: str) -> list[str]:
        """What the kubelet may give of a resource."""
        plugin = self.plugin
        if plugin is None or not plugin.serves:
            return []
        listed = plugin.registry.current.resources.get(resource, ())
        return [d.id for d in listed if d.health.healthy and (resource, d.id) not in self.allocated]

    def admit(
        self, wanted: Iterable[tuple[str, int | Sequence[str]]], *, shows_after: float = 0.0, again: float = 0.0
    ) -> Pod | None:
        """A pod with one container for each (resource, devices): so many, or these; None: it was refused.

        `again`: how likely a container takes over what an init container had before it, by another Allocate.
        """
        pod = Pod(name=self._name("pod"), shows_at=self.now + shows_after)
        self.pods.append(pod)
        for resource, asked in wanted:
            ids = self._choose(resource, asked) if isinstance(asked, int) else list(asked)
            if ids is None or not self.allocate(pod, resource, ids):
                self.end_pod(pod)
                return None
            if self.dice.random() < again:
                self.allocate(pod, resource, ids)
        return pod

    def give(self, resource: str, *ids: str) -> Pod | None:
        """A pod with these devices; None: it was refused."""
        return self.admit([(resource, ids)])

    def _choose(self, resource: str, count: int) -> list[str] | None:
        available = self.healthy(resource)
        if len(available) < count or self.plugin is None:
            return None
        if self.dice.random() < 0.1:
            devices = {d.id: d for d in self.plugin.registry.current.resources[resource]}
            return list(prefer(devices, available=available, must_include=(), size=count, policy=Policy.PACKED))
        return self.dice.sample(available, count)

    def allocate(self, pod: Pod, resource: str, ids: list[str]) -> bool:
        """The call, as the plugin answers it: from one snapshot, after one more look."""
        assert all(self.allocated.get((resource, i), pod) is pod for i in ids), "the kubelet keeps an ID from two pods"
        plugin = self.plugin
        if plugin is None or not plugin.serves or (devices := _all_healthy(plugin, resource, ids)) is None:
            return False
        against = {d.id: why for d in devices if (why := self._look(d)) is not None}
        if against:
            self.note(plugin.name, "refuses", pod.name, resource, against)
            if busy := {(resource, i): used for i, (_, used) in against.items() if used}:
                self._must_be_news(plugin, busy)
                plugin.registry.learn(busy=busy)
                self._write_specs(plugin)
            plugin.next_scan = self.now
            return False
        if plugin.scan is not None and self.dice.random() < 0.3:
            self._take_scan(plugin)
        if (devices := _all_healthy(plugin, resource, ids)) is None:
            return False
        self.note(plugin.name, "gives", pod.name, resource, [(d.id, d.address) for d in devices])
        plugin.registry.allocate([(resource, i) for i in ids])
        self._write_specs(plugin)
        before = self.hands(pod)
        given = [self._grant(device, plugin) for device in devices]
        self.allocated |= dict.fromkeys((grant.key for grant in given), pod)
        pod.grants += given
        self.granted += 1
        self._judge(pod, given, before)
        return True

    def _must_be_news(self, plugin: Plugin, busy: Mapping[DeviceKey, frozenset[str]]) -> None:
        for key, addresses in busy.items():
            for function in map(self.kernel.functions.__getitem__, addresses):
                seen = (key, function.address, function.user)
                is_known = function.binding in plugin.bindings  # else it may be another VM's use, for all that is seen
                if is_known and plugin.found_busy.setdefault(seen, self.now) < plugin.scan_began:
                    why = f"{function.address} is still in use as it was when it was refused"
                    raise OfferedAgain(f"{key} is Healthy, and {why}")

    def _grant(self, device: Device, plugin: Plugin) -> Grant:
        functions = [self.kernel.functions[p.address] for p in device.placements]
        consumer = plugin.settings.consumer
        return Grant(
            key=(device.resource, device.id),
            node=device.node,
            group_node=device.group_node if consumer is Consumer.KUBEVIRT else None,
            functions=tuple(f.address for f in functions),
            bindings=tuple(f.binding for f in functions),
            addresses=(device.address,) if consumer is Consumer.KUBEVIRT else (),
            consumer=consumer,
            plugin=plugin,
            at=self.now,
        )

    def _look(self, device: Device) -> tuple[str, frozenset[str]] | None:
        """The plugin's own, before it gives a device away: what speaks against it, and what a VM has in its group."""
        for placement in device.placements:
            function = self.kernel.functions[placement.address]
            if not function.is_present or self.kernel.node_of(function) != device.node:
                return "gone", frozenset()
            if function.is_off:
                return "off the bus", frozenset()
        members = [self.kernel.functions[address] for address in device.group_functions]
        if any(f.is_present and f.hangs for f in members):
            return "silent", frozenset()
        used = frozenset(f.address for f in members if f.is_present and f.is_enabled)
        return ("busy", used) if used else None

    def end_pod(self, pod: Pod) -> None:
        """The kubelet frees its IDs at once, and tells nobody. Its VM may go on."""
        if pod.is_live:
            self.note(pod.name, "ends", "" if pod.vm is None else "and its VM goes on")
        pod.is_live = False
        self.allocated = {key: holder for key, holder in self.allocated.items() if holder is not pod}
        if pod.vm is None:
            self.pods.remove(pod)

    # Claims

    def schedule(self, *names: str) -> Pod:
        """A pod whose claim the scheduler has allocated these devices for."""
        claim_id = ClaimId(namespace="default", name=self._name("claim"), uid=self._name("uid"))
        wanted = tuple(Wanted(request="gpu", pool="node", device=name) for name in names)
        pod = Pod(name=self._name("pod"), shows_at=self.now, claim=WorldClaim(id=claim_id, wanted=wanted))
        self.pods.append(pod)
        self.note("the scheduler gives", pod.name, claim_id.uid, names)
        return pod

    def allocated_by_claims(self) -> set[str]:
        """What the scheduler has given away: claims are kept until they are given back."""
        live = [pod.claim for pod in self.pods if pod.claim is not None and pod.is_live]
        known = [each for uid, each in self.checkpoint.items() if uid not in self.forgotten]
        kept = [given.wanted.device for each in known for given in each.devices]
        return {wanted.device for claim in live for wanted in claim.wanted} | set(kept)

    def prepare(self, pod: Pod, *, dies: str = "") -> bool:
        """The kubelet's call, as the driver answers it. `dies`: the plugin does so before that is done."""
        plugin, claim = self.plugin, pod.claim
        assert claim is not None
        if plugin is None or not plugin.serves or pod.grants:
            return False
        uid = claim.id.uid
        try:
            self._hold(plugin, claim)
            if dies == "before the checkpoint is written":
                self.end_plugin()
                return False
            devices = choose(uid, claim.wanted, plugin.registry.current)
        except Refused as error:
            self.note(plugin.name, "refuses claim", uid, error)
            plugin.next_scan = self.now
            return False
        self.forgotten.discard(uid)
        self._move(plugin, uid, devices)
        self.checkpoint[uid] = plugin.prepared[uid]
        self._write_specs(plugin)
        if dies == "before the answer":
            self.end_plugin()
            return False
        self.note(plugin.name, "prepares", pod.name, uid, [(d.id, d.address) for d in devices])
        before = self.hands(pod)
        pod.grants = [self._grant(device, plugin) for device in devices]
        self.granted += 1
        self.claimed += 1
        self._judge(pod, pod.grants, before)
        return True

    def _hold(self, plugin: Plugin, claim: WorldClaim) -> None:
        """Up to the ledger. Raises Refused."""
        devices = choose(claim.id.uid, claim.wanted, plugin.registry.current)
        looked_at = self.now
        for device in devices:
            if (why := self._look(device)) is not None:
                raise Refused(f"{device.address}: {why}", Why.LAST_LOOK)
        if plugin.scan is not None and self.dice.random() < 0.3:
            self._take_scan(plugin)
        again = choose(claim.id.uid, claim.wanted, plugin.registry.current)
        if [(d.node, d.as_bound) for d in devices] != [(d.node, d.as_bound) for d in again]:
            raise Refused("it changed", Why.CHANGED)
        self.now += _MOMENT
        if claim.id.uid in plugin.prepared:
            return
        prepared = give(claim.id, Asked(pod_claim=None, devices=claim.wanted), again)
        plugin.prepared[claim.id.uid] = prepared
        plugin.holds[claim.id.uid] = prepared.for_ledger(at=self.now, looked_at=looked_at)
        plugin.registry.learn(claims=dict(plugin.holds))

    def _move(self, plugin: Plugin, uid: str, devices: Sequence[Device | None]) -> None:
        prepared = plugin.prepared[uid]
        given = tuple(g if d is None else g.moved(d) for g, d in zip(prepared.devices, devices, strict=True))
        if given != prepared.devices:
            plugin.prepared[uid] = replace(prepared, devices=given)
            held = plugin.holds[uid]
            plugin.holds[uid] = plugin.prepared[uid].for_ledger(at=held.at, looked_at=held.looked_at)
            plugin.registry.learn(claims=dict(plugin.holds))

    def _follow_claims(self, plugin: Plugin) -> None:
        """What the driver does when the inventory changes: specs of claims say where their devices are now. Containers
        that were made before keep what they have."""
        if not plugin.serves or not plugin.registry.current.version:
            return
        for uid in [*plugin.prepared]:
            inventory = plugin.registry.current
            prepared, named = plugin.prepared[uid], devices_by_name(inventory)
            devices = [usable(prepared, given, named, inventory) for given in prepared.devices]
            self._move(plugin, uid, devices)
            self.checkpoint[uid] = plugin.prepared[uid]
            for pod in self.pods:
                if pod.claim is not None and pod.claim.id.uid == uid and pod.is_live and pod.grants:
                    new = [self._grant(d, plugin) for d in devices if d is not None]
                    known = {grant.node for grant in pod.grants}
                    pod.grants += [grant for grant in new if grant.node not in known]
        self.slices = {
            name: device.for_claims.healthy for name, device in devices_by_name(plugin.registry.current).items()
        }

    def unprepare(self, uid: str) -> bool:
        """The kubelet's call, when the pod has ended."""
        plugin = self.plugin
        if plugin is None or not plugin.serves or uid in self.forgotten:
            return False
        self.note(plugin.name, "takes back", uid)
        self._take_back(plugin, uid)
        return True

    def _take_back(self, plugin: Plugin, uid: str) -> None:
        self.checkpoint.pop(uid, None)
        if plugin.prepared.pop(uid, None) is not None:
            del plugin.holds[uid]
            plugin.registry.learn(claims=dict(plugin.holds))

    def lose_records(self) -> None:
        """The kubelet starts without those of claims. Those of devices are another file."""
        self.note("the kubelet loses its records of claims")
        self.forgotten |= self.checkpoint.keys()
        if self.plugin is not None:
            self.forgotten |= self.plugin.prepared.keys()
        self.restart_kubelet()

    def _release_forgotten(self, plugin: Plugin) -> None:
        """What the driver does about claims that nobody gives back, but that it is not so patient."""
        for uid, prepared in list(plugin.prepared.items()):
            known = plugin.suspicions.get(uid)
            if known is not None and self.now < known.at + known.pause:
                continue
            registry, after = plugin.registry, plugin.holds[uid].at if known is None else known.at
            pods = what_pods_say(prepared, registry.holdings, is_there=registry.has_pod_resources, after=after)
            is_away = self.dice.random() < 0.1
            lost = None if is_away else why_lost(prepared, self._claim_object(uid), driver="driver")
            look = Look(at=self.now, lost=lost, pods=pods, in_use=in_use(prepared, registry.current))
            found = judge(known, look, plugin.holds[uid].at)
            plugin.suspicions[uid] = found
            if found.since is not None and found.at - found.since >= _PATIENCE_WITH_CLAIMS:
                self.note(plugin.name, "releases", uid, found.why)
                self.released += 1
                del plugin.suspicions[uid]
                self._take_back(plugin, uid)

    def _claim_object(self, uid: str) -> dict[str, Any] | None:
        """The API server's: there is one for as long as a pod has it."""
        for pod in self.pods:
            if pod.is_live and pod.claim is not None and pod.claim.id.uid == uid:
                results = [{"driver": "driver", "pool": w.pool, "device": w.device} for w in pod.claim.wanted]
                return {"metadata": {"uid": uid}, "status": {"allocation": {"devices": {"results": results}}}}
        return None

    def _remove_by_hand(self) -> None:
        """A person does it where the plugin cannot know. Raises NotOffered if it could."""
        assert self.plugin is not None
        for uid in self.forgotten & self.plugin.prepared.keys():
            known = self.plugin.suspicions[uid]
            registry = self.plugin.registry
            is_idle = in_use(self.plugin.prepared[uid], registry.current) is InUse.NO
            if registry.has_pod_resources and is_idle:
                raise NotOffered(f"claim {uid} is not released: {known}")
            self.note("somebody removes the file of", uid)
            self.checkpoint.pop(uid, None)
        self.end_plugin()
        self.start_plugin(self.settings)

    def reconcile(self) -> None:
        """The kubelet gives back the claims of all pods that have ended."""
        live = {pod.claim.id.uid for pod in self.pods if pod.claim is not None and pod.is_live}
        for uid in [*self.checkpoint.keys() - live]:
            self.unprepare(uid)
        if self.plugin is not None and self.plugin.serves:
            for uid in [*self.plugin.prepared.keys() - live]:
                self.unprepare(uid)

    # VMs

    def start_vm(self, pod: Pod) -> bool:
        """Opens what the pod was given."""
        if pod.vm is not None or not pod.is_live or not pod.grants:
            return False
        functions: set[Function] = set()
        for grant in pod.grants:
            opened = self._functions_of(grant)
            if opened is None:
                return False
            functions |= opened
        vm = Vm(f"the VM of {pod.name}", self.now)
        if not self.kernel.open(vm, functions):
            self.note(pod.name, "cannot start its VM")
            return False
        self.note(pod.name, "starts its VM with", sorted(f.address for f in functions))
        pod.vm = vm
        return True

    def _functions_of(self, grant: Grant) -> set[Function] | None:
        """What a VM opens by this grant now; None: it is not there."""
        if grant.consumer is Consumer.KUBEVIRT:
            named = {self.kernel.functions[a] for a in grant.addresses}
            fits = all(f.is_bound and grant.group_node in (None, node_of_group(f.group)) for f in named)
            return named if fits else None
        if not _is_group_node(grant.node):
            function = self.kernel.at_node(grant.node)
            return None if function is None else {function}
        return {f for f in self.kernel.members(_group_of(grant.node)) if f.is_bound} or None

    def start_strangers_vm(self, function: Function) -> bool:
        """Somebody's QEMU, of which no kubelet knows."""
        vm = Vm(f"a stranger's VM with {function.address}", self.now)
        if not self.kernel.open(vm, {function}):
            return False
        self.note(vm.name, "starts")
        return True

    def stop_vm(self, vm: Vm) -> None:
        self.note(vm.name, "ends")
        self.kernel.close(vm, self.now)
        for pod in self.pods:
            if pod.vm is vm:
                pod.vm = None
        self.pods = [p for p in self.pods if p.is_live or p.vm is not None]

    # Who has what

    def hands(self, pod: Pod) -> Hands:
        """What a pod has by its grants while it lives, and what its VM has."""
        hands = self.hands_of_vm(pod.vm) if pod.vm is not None else Hands()
        return hands.union(*(self.hands_of_grant(grant) for grant in pod.grants if pod.is_live))

    def hands_of_vm(self, vm: Vm) -> Hands:
        nodes = {node for f in vm.functions if (node := self.kernel.node_of(f)) is not None}
        return Hands({*nodes, *vm.groups, *(f.address for f in vm.functions)})

    def hands_of_grant(self, grant: Grant) -> Hands:
        """A pod's VM opens nodes by their paths, whatever is behind them by then.

        A cdev that is gone comes back with whatever is bound next: with the function that was given, most likely, where
        that is not bound. Who was given a physical function has the virtual ones that it carries.
        """
        nodes = [node for node in (grant.node, grant.group_node) if node is not None]
        functions = self.functions_behind(grant)
        addresses = {f.address for f in functions}
        given = addresses.intersection(grant.functions)
        addresses |= {f.address for f in self.kernel.present if f.carrier in given}
        groups = {_group_of(node) for node in nodes if _is_group_node(node)} | {f.group for f in functions}
        return Hands({*nodes, *groups, *addresses})

    def functions_behind(self, grant: Grant) -> set[Function]:
        """Those that are there, of all that the nodes of a grant stand for by now."""
        functions = {self.kernel.functions[a] for a in grant.addresses}
        for node in (grant.node, grant.group_node):
            if node is not None and _is_group_node(node):
                functions.update(self.kernel.members(_group_of(node)))
        if not _is_group_node(grant.node):
            behind, _ = self.kernel.last_at_node[grant.node]
            is_there = behind.number is not None and node_of_cdev(behind.number) == grant.node
            if is_there or (behind.number is None and behind.address in grant.functions):
                functions.add(behind)
        return {f for f in functions if f.is_present}

    def _judge(self, pod: Pod, given: Sequence[Grant], before: Hands) -> None:
        """Whether what the pod has just got is in other hands."""
        got = self.hands(pod) - before
        addresses = frozenset(address for grant in given for address in grant.functions)
        for other in self.pods:
            if other is not pod and (common := got & self.hands(other)):
                self._accuse(pod, Clash(self, given[0].plugin, addresses, other, other.vm, common))
        owned = {p.vm for p in self.pods}
        for vm in self.kernel.vms:
            if vm not in owned and (common := got & self.hands_of_vm(vm)):
                self._accuse(pod, Clash(self, given[0].plugin, addresses, None, vm, common))

    def _accuse(self, pod: Pod, clash: Clash) -> None:
        for excuse in EXCUSES:
            if excuse(clash):
                self.note("excused:", excuse.__name__)
                return
        who = clash.vm.name if clash.vm is not None else "nobody"
        if clash.other is not None:
            who = clash.other.name if clash.other.is_live else f"{who}, which has outlived it,"
        raise TwoHolders(f"{pod.name} was given what {who} has: {sorted(map(str, clash.common))}")

    # Everybody leaves

    def settle(self) -> None:
        """All pods and VMs end, time passes, and everything must be on offer again."""
        for pod in list(self.pods):
            self.end_pod(pod)
        for vm in list(self.kernel.vms):
            self.stop_vm(vm)
        if self.pod_resources != "absent":
            self.pod_resources = "there"
        if self.plugin is None:
            self.start_plugin(self.settings)
        for _ in range(4):
            self.wait(180.0)
            self.reconcile()
        if self.forgotten & self.checkpoint.keys():
            self.wait(2 * LONGEST_PAUSE)
            self._remove_by_hand()
        self.wait(180.0)
        self.must_offer_everything()

    def must_offer_everything(self) -> None:
        """Every device that is bound, viable and answers is Healthy, whatever it is called."""
        assert self.plugin is not None
        listed = [d for devices in self.plugin.registry.current.resources.values() for d in devices]
        # Claims get nothing before PodResources has told once which pods hold what.
        are_told = self.pod_resources != "absent"
        offered = {d.node for d in listed if d.health.healthy and (d.for_claims.healthy or not are_told)}
        if missing := self.offerable() - offered:
            why = {d.node: f"{d.resource}={d.id} {d.health}, {d.for_claims}" for d in listed if d.node in missing}
            raise NotOffered("; ".join(why.get(node, f"{node} is not listed") for node in sorted(missing)))

    def offerable(self) -> set[str]:
        """Nodes of what could be given to a VM, by an independent reading."""
        nodes = set()
        for function in self.kernel.present:
            if not function.is_bound or function.kind == "audio" or function.carries:
                continue
            members = self.kernel.members(function.group)
            if not self.kernel.is_viable(function.group) or any(f.is_off or f.hangs for f in members):
                continue
            if not self.kernel.cdevs and any(f.carries for f in members):
                continue
            node = self.kernel.node_of(function)
            assert node is not None
            nodes.add(node)
        return nodes


def _all_healthy(plugin: Plugin, resource: str, ids: list[str]) -> list[Device] | None:
    devices = [plugin.registry.current.device(resource, i) for i in ids]
    healthy = [d for d in devices if d is not None and d.health.healthy]
    return healthy if len(healthy) == len(ids) else None


def _is_group_node(node: str) -> bool:
    return not node.startswith("/dev/vfio/devices/")


def _group_of(node: str) -> int:
    return int(node.rpartition("/")[2])


def _words(settings: Settings) -> str:
    rules = ", ".join(str(rule.name) for rule in settings.resources)
    return f"for {settings.consumer} as {settings.gpu_alias!r} {rules}"


# What nobody could know
#
# A clash that one of these explains is counted and not held against the daemon. Each says why.


@dataclass(frozen=True)
class Clash:
    """A pod was given what is in other hands."""

    world: World
    plugin: Plugin
    given: frozenset[str]
    """Addresses of the devices that were given."""
    other: Pod | None
    """Whose hands; None: those of a VM of nobody's."""
    vm: Vm | None
    """That pod's, or nobody's."""
    common: Hands

    @property
    def grants(self) -> list[Grant]:
        """Of the other pod: those by which it has what was given; none where only its VM has that."""
        if self.other is None or not self.other.is_live:
            return []
        return [grant for grant in self.other.grants if self.common & self.world.hands_of_grant(grant)]

    @property
    def shows_in_use(self) -> bool:
        """Whether a scan would see that the VM has the group."""
        return self.vm is not None and any(f.is_enabled and f.group in self.common for f in self.vm.functions)

    @property
    def are_others(self) -> bool:
        """Whether all of the other pod's grants are of other runs of the plugin."""
        return all(grant.plugin is not self.plugin for grant in self.grants)


def _no_witness(clash: Clash) -> bool:
    """Without PodResources a pod shows by nothing but the use of its devices. It was given them by another run of the
    plugin, or a VM has used them and has ended, or nobody has for ten minutes: that is as if the pod had ended. A
    PodResources that says nothing for ten minutes is none."""
    if not clash.grants or clash.other is None or clash.shows_in_use:
        return False
    plugin, functions = clash.plugin, clash.world.kernel.functions
    for grant in clash.grants:
        known_at = plugin.named.get((grant.key, clash.other.name), -math.inf)
        if grant.plugin is plugin:
            known_at = max(known_at, grant.at)
        is_old = clash.world.now - known_at >= UNUSED
        was_used = max(functions[address].let_go_at for address in grant.functions) >= known_at
        if not (is_old or was_used) if plugin.is_there is False else not (is_old and plugin.told_at < known_at):
            return False
    return True


def _mediated_device(clash: Clash) -> bool:
    """A mediated device has no `enable`: a VM that has one and outlives its pod does not show at all."""
    kinds = {clash.world.kernel.functions[address].kind for address in addresses_in(clash.common)}
    return clash.vm is not None and not clash.grants and kinds == {"mdev"}


def _unseen_use(clash: Clash) -> bool:
    """A VM of a pod that nothing tells of, begun after the last scan, on other functions of the group than those that
    are given: the look before Allocate sees those, and what the last scan saw bound."""
    if clash.vm is None or clash.vm.began_at < clash.plugin.scan_began:
        return False
    is_unknown = clash.other is None or (clash.plugin.is_there is False and clash.are_others)
    return is_unknown and clash.given.isdisjoint(f.address for f in clash.vm.functions)


def _unseen_bind(clash: Clash) -> bool:
    """A node that a pod has from before came to mean a function of the group, since the last scan: the look before
    Allocate sees the node of the device that is given, and no others."""
    began = [clash.world.kernel.last_at_node.get(grant.node, (None, -math.inf))[1] for grant in clash.grants]
    return bool(began) and min(began) >= clash.plugin.scan_began and not nodes_in(clash.common)


def _unseen_arrival(clash: Clash) -> bool:
    """What the other pod has of it was put in, or made, since the last scan, and came to a group or a number that the
    pod has from before: the look before Allocate sees the device that is given, and no others."""
    common, began = clash.common, clash.plugin.scan_began
    behind = [function for grant in clash.grants for function in clash.world.functions_behind(grant)]
    has = [function for function in behind if function.address in common or function.group in common]
    return bool(has) and not nodes_in(common) and all(function.came_at >= began for function in has)


def _bound_again_unwatched(clash: Clash) -> bool:
    """KubeVirt knows a GPU by its address, and the kubelet by the number that it had: a GPU that was bound again under
    another number, and that no scan of this run of the plugin saw under the first, cannot be told from any other."""
    if not clash.grants or not clash.are_others or clash.shows_in_use:
        return False
    bindings = {binding for grant in clash.grants for binding in grant.bindings}
    return bindings.isdisjoint(clash.plugin.bindings) and all(g.consumer is Consumer.KUBEVIRT for g in clash.grants)


def _name_of_another_domain(clash: Clash) -> bool:
    """It was given under a name in a domain that no rule has any more, and no CDI spec tells of it (KubeVirt has none):
    it might as well be a device of another plugin."""
    names = [rule.name or "" for rule in clash.plugin.settings.resources]
    domains = {"nvidia.com", *(name.partition("/")[0] for name in names)}
    keys = [grant.key for grant in clash.grants]
    is_foreign = all(key not in clash.plugin.former and key[0].partition("/")[0] not in domains for key in keys)
    return bool(keys) and is_foreign and not clash.shows_in_use


def _young_kubelet(clash: Clash) -> bool:
    """A kubelet that has just started does not name all of its pods for half a minute. To withhold everything for that
    long would fail the pods that it admits again after the node was booted, so what it says then counts, for devices
    that are alone in their group, where CDI specs tell what names there were. (A run for KubeVirt left none.)"""
    plugin, kernel = clash.plugin, clash.world.kernel
    if plugin.is_told or not plugin.is_heard or plugin.settings.consumer is not Consumer.KATA or clash.shows_in_use:
        return False
    if clash.other is None or any(
        g.key in plugin.former or (g.key, clash.other.name) in plugin.named for g in clash.grants
    ):
        return False
    is_shared = any(sum(f.kind != "audio" for f in kernel.members(n)) > 1 for n in groups_in(clash.common))
    return bool(clash.grants) and not (is_shared and kernel.cdevs)


EXCUSES: tuple[Callable[[Clash], bool], ...] = (
    _no_witness,
    _mediated_device,
    _unseen_use,
    _unseen_bind,
    _unseen_arrival,
    _bound_again_unwatched,
    _name_of_another_domain,
    _young_kubelet,
)
