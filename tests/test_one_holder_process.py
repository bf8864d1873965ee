"""The same promise as in test_one_holder.py, kept by the real process: nothing is in the hands of two pods.

Pods, VMs, hardware and plugins come and go at random on a fake node; the kubelet and PodResources speak grpcio. Pods
get devices by the device plugin API and by claims. What is given is judged by what the tree shows then, without any
idea of the daemon's.

`ONE_HOLDER_PROCESS_STEPS` makes it longer, `ONE_HOLDER_PROCESS_SEED` repeats one.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

import grpc
import pytest
from conftest import MakeNode
from daemon import Daemon, Places, is_failure
from dra_manager import DRIVER, NODE, DraManager, NotPrepared, api_server
from kubelet import GrpcKubelet
from pods import PodResources

from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import FunctionSpec
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.model import PciFunction

STEPS = int(os.environ.get("ONE_HOLDER_PROCESS_STEPS", "60"))
SEED = int(os.environ.get("ONE_HOLDER_PROCESS_SEED", "1"))
HOUR = 3600.0
_GPU = FunctionSpec(address="", model=models.H100_SXM5, parent="0000:40:03.1", numa_node=0, driver="vfio-pci")
_SWITCH = replace(_GPU, model=models.NVSWITCH3)
Hands = frozenset[str]
"""Nodes, groups and addresses."""


@dataclass(eq=False)
class Pod:
    """One that the kubelet knows, or whose VM has outlived it."""

    name: str
    ids: set[tuple[str, str]]
    hands: Hands
    addresses: set[str]
    is_live: bool = True
    vm: set[str] = field(default_factory=set)
    """Addresses that its VM has open."""
    claim: str | None = None
    """Name of its claim; None: it has its devices by the device plugin API."""


class Walk:
    """One node, one kubelet, its pods, and one plugin that serves at a time."""

    def __init__(
        self, places: Places, node: FakeNode, kubelet: GrpcKubelet, pods: PodResources, manager: DraManager
    ) -> None:
        self.places, self.node, self.kubelet, self.pod_resources = places, node, kubelet, pods
        self.manager = manager
        self.dice = random.Random(SEED)
        self.pods: list[Pod] = []
        self.story: list[str] = []
        self.counts: Counter[str] = Counter()
        self._names = 0
        self._alias = "pgpu"
        # One GPU stays bound, so that there is always something to register.
        _, *self._addresses = sorted(f.address for f in node.functions() if f.class_code in (0x030200, 0x068000))
        self._daemon = self._start()
        self._daemon.wait_for("registered")

    def _start(self) -> Daemon:
        flags = ["--health-interval=0.1", f"--gpu-alias={self._alias}"]
        return Daemon(self.places, self.node, *flags, *self.manager.flags)

    @staticmethod
    def _end(daemon: Daemon) -> None:
        """In order, but for what those left behind that were killed."""
        daemon.terminate()
        failures = [event for event in daemon.events() if is_failure(event)]
        daemon.kill()  # nothing but its log is left to be closed
        assert not failures

    def close(self) -> None:
        self._end(self._daemon)

    def step(self) -> None:
        likely = (
            [self.admit] * 5
            + [self.claim] * 5
            + [self.give_back]
            + [self.end_pod] * 3
            + [self.start_vm] * 3
            + [self.end_vm] * 2
        )
        likely += [self.unbind] * 2 + [self.bind] * 3 + [self.wait_for_an_answer]
        rare = [self.restart, self.take_over, self.change_alias, self.restart_kubelet]
        self.dice.choice(rare if self.dice.random() < 0.04 else likely)()

    # Pods and their VMs

    def admit(self) -> None:
        """A pod asks for what is listed Healthy and that no other pod has by its ID."""
        held = {key for pod in self.pods if pod.is_live for key in pod.ids}
        free = [(r, i) for r in self.kubelet.resources() for i in self.kubelet.healthy(r) if (r, i) not in held]
        if not free:
            return
        resource, _ = self.dice.choice(sorted(free))
        ids = sorted(i for r, i in free if r == resource)
        ids = self.dice.sample(ids, k=min(len(ids), self.dice.choice((1, 1, 2))))
        try:
            answer = self.kubelet.plugin(resource).allocate(ids)
        except grpc.RpcError as error:
            self.counts["refused"] += 1
            self.story.append(f"{resource} {ids} refused: {error}")
            return
        nodes = [spec.host_path for spec in answer.container_responses[0].devices]
        functions = [self._function_of(node) for node in nodes]
        self._names += 1
        hands = frozenset(nodes) | {h for f in functions for h in (f.address, f"group {f.iommu_group}")}
        pod = Pod(f"pod-{self._names}", {(resource, i) for i in ids}, hands, {f.address for f in functions})
        self.story.append(f"{pod.name} gets {resource} {ids}: {sorted(hands)}")
        self.counts["given"] += 1
        self._judge(pod)
        self.pod_resources.hold(pod.name, resource, *ids)

    def _judge(self, pod: Pod) -> None:
        for other in self.pods:
            common = sorted(pod.hands & other.hands)
            assert not common, "\n".join([*self.story, f"{other.name} has {common}"])
        self.pods.append(pod)

    def claim(self) -> None:
        """The scheduler gives a claim what is healthy and no other claim has; the kubelet has it prepared."""
        taken = {device for claim in self.manager.claims.values() for device in claim.allocated}
        driver = self.manager.driver
        health = {} if driver is None else dict(driver.health)
        free = sorted(name for name, (status, _) in health.items() if status == "HEALTHY" and name not in taken)
        if not free:
            return
        devices = self.dice.sample(free, k=min(len(free), self.dice.choice((1, 1, 2))))
        self._names += 1
        name, claim = f"pod-{self._names}", f"claim-{self._names}"
        self.manager.create_claim(claim, *devices, pod=name)
        try:
            ids = self.manager.prepare(name, claim)
        except NotPrepared as error:
            self.counts["claims refused"] += 1
            self.story.append(f"{claim} {devices} refused: {error}")
            with suppress(NotPrepared):
                self.manager.unprepare(name)
            return
        nodes = self._nodes_of(ids)
        functions = [self._function_of(node) for node in nodes]
        hands = frozenset(nodes) | {h for f in functions for h in (f.address, f"group {f.iommu_group}")}
        pod = Pod(name, set(), hands, {f.address for f in functions}, claim=claim)
        self.story.append(f"{name} gets {claim} {devices}: {sorted(hands)}")
        self.counts["claims given"] += 1
        self._judge(pod)
        self.pod_resources.hold_by_claim(name, claim, DRIVER, *devices)

    def _nodes_of(self, ids: Sequence[str]) -> list[str]:
        """By the CDI specs that lie there."""
        specs = [json.loads(path.read_text()) for path in self.places.cdi.glob(f"{DRIVER}_claim_*.json")]
        found = {f"{spec['kind']}={device['name']}": device for spec in specs for device in spec["devices"]}
        return [node["path"] for cdi in ids for node in found[cdi]["containerEdits"]["deviceNodes"]]

    def give_back(self) -> None:
        """The kubelet gives back the claims of pods that have ended, where it could not at once."""
        live = {pod.name for pod in self.pods if pod.is_live}
        for name in {pod for claim in self.manager.claims.values() for pod in claim.pods} - live:
            with suppress(NotPrepared):
                self.manager.unprepare(name)

    def _function_of(self, node: str) -> PciFunction:
        """Whose node it is, as the tree shows; a node that has just gone is a lost race, and gives nobody anything."""
        number = int(node.rpartition("/vfio")[2])
        found = [f for f in self.node.functions() if f.vfio is not None and f.vfio.number == number]
        assert found, "\n".join([*self.story, f"{node} was given, and is nobody's"])
        return found[0]

    def end_pod(self) -> None:
        """Its VM ends with it, or some time later."""
        live = [pod for pod in self.pods if pod.is_live]
        if not live:
            return
        pod = self.dice.choice(live)
        pod.is_live = False
        self.pod_resources.release(pod.name)
        self.story.append(f"{pod.name} ends{' and leaves its VM' if pod.vm else ''}")
        if pod.claim is not None and self.dice.random() < 0.8:
            with suppress(NotPrepared):
                self.manager.unprepare(pod.name)
        if pod.vm and self.dice.random() < 0.5:
            self._end_vm(pod)
        if not pod.vm:
            self.pods.remove(pod)
        else:
            pod.hands = frozenset(h for h in pod.hands if not h.startswith("/dev"))  # of the node it has the function

    def start_vm(self) -> None:
        """As far as the kernel lets it: the functions are bound, and nobody else has the group."""
        waiting = [pod for pod in self.pods if pod.is_live and not pod.vm]
        if not waiting:
            return
        pod = self.dice.choice(waiting)
        functions = [self.node.function(address) for address in pod.addresses]
        if not all(f.vfio is not None and f"/dev/vfio/devices/vfio{f.vfio.number}" in pod.hands for f in functions):
            return  # what it was given is not there any more
        for address in sorted(pod.addresses):
            self.node.set_enable(address, 1)
        pod.vm = set(pod.addresses)
        self.story.append(f"{pod.name} starts its VM")

    def end_vm(self) -> None:
        running = [pod for pod in self.pods if pod.vm]
        if running:
            pod = self.dice.choice(running)
            self._end_vm(pod)
            if not pod.is_live:
                self.pods.remove(pod)

    def _end_vm(self, pod: Pod) -> None:
        for address in sorted(pod.vm):
            self.node.set_enable(address, 0)
        pod.vm = set()
        self.story.append(f"the VM of {pod.name} ends")

    # Hardware

    def unbind(self) -> None:
        self._try("unbound", self.node.unbind)

    def bind(self) -> None:
        self._try("bound", self.node.bind)

    def _try(self, what: str, change: Callable[[str], None]) -> None:
        address = self.dice.choice(self._addresses)
        try:
            change(address)
        except FakeNodeError:
            return
        self.story.append(f"{address} is {what}")

    # Plugins and the kubelet

    def wait_for_an_answer(self) -> None:
        if any(pod.is_live for pod in self.pods):
            self.pod_resources.wait_until_asked()
            self.story.append("PodResources was asked")

    def restart(self) -> None:
        old = self._daemon
        if self.dice.random() < 0.5:
            old.kill()
        else:
            self._end(old)
        self._daemon = self._start()
        self._daemon.wait_for("registered")
        self.story.append("the plugin restarts")

    def change_alias(self) -> None:
        self._alias = "other" if self._alias == "pgpu" else "pgpu"
        self.restart()
        self.story.append(f"with the alias {self._alias}")

    def take_over(self) -> None:
        old, self._daemon = self._daemon, self._start()
        self._daemon.wait_for("standing by")
        for _ in range(self.dice.randrange(4)):
            self.admit()
        self._end(old)
        self._daemon.wait_for("registered")
        self.story.append("another plugin takes over")

    def restart_kubelet(self) -> None:
        since = self._daemon.mark()
        self.kubelet.restart()
        self.manager.restart()
        self._daemon.wait_for("registered", since=since)
        self.story.append("the kubelet restarts")


@contextmanager
def walk(places: Places, node: FakeNode) -> Iterator[Walk]:
    with ExitStack() as stack:
        kubelet = stack.enter_context(GrpcKubelet(places.kubelet))
        pods = stack.enter_context(PodResources(places.top / "pod-resources/kubelet.sock"))
        kubelet.start()
        pods.start(age=HOUR)
        api = stack.enter_context(api_server())
        api.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        manager = stack.enter_context(DraManager(places.top, api))
        made = Walk(places, node, kubelet, pods, manager)
        stack.callback(made.close)
        yield made


@pytest.mark.timeout(max(120, STEPS))
def test_whatever_happens_nothing_is_in_the_hands_of_two_pods(places: Places, fake_node: MakeNode) -> None:
    node = fake_node("empty")
    for number, (model, group) in enumerate([(_GPU, 90), (_GPU, 90), (_GPU, 91), (_SWITCH, 92), (_SWITCH, 92)]):
        node.add(replace(model, address=f"0000:42:0{number}.0", iommu_group=group))
    with walk(places, node) as world:
        for _ in range(STEPS):
            world.step()
        while not (
            world.counts["given"] and world.counts["claims given"]
        ):  # a starved daemon is slow to offer anything
            world.step()
        print(f"{STEPS} steps: {dict(sorted(world.counts.items()))}")
