"""Random things happen to a `World`, from a seed, until one of its promises is broken; then the story is made short.

An episode is a world with its own hardware and its own habits (how likely each kind of event is), and a list of steps.
A step is a name and a number that everything random in it comes from, so that an episode can be played again without
some of its steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hardware import VFIO_DRIVERS, Function
from world import GRACE_RULE, LAYOUTS, Pod, World

from sandbox_plugin.config.settings import Consumer, Settings

Step = tuple[str, int]
STEPS = 200
"""Steps of one episode."""


def _some(world: World, *, present: bool = True) -> Function | None:
    functions = [f for f in world.kernel.functions.values() if f.is_present is present and f.kind != "vf"]
    return world.dice.choice(functions) if functions else None


def _an_event(world: World) -> None:
    """The kernel tells of a change, most of the time; then the plugins look, soon."""
    for plugin in world.plugins:
        if plugin.has_started and plugin.scan is None and world.dice.random() < 0.75:
            world.begin_scan(plugin, takes=world.dice.choice((0.0, 0.0, 0.3)))


def _wait(world: World) -> None:
    world.wait(world.dice.choice((0.1, 0.5, 1.0, 2.5, 2.5, 5.5, 5.5, 12.0, 35.0)))


def _wait_long(world: World) -> None:
    world.wait(world.dice.choice((70.0, 200.0, 620.0)))


def _bind(world: World) -> None:
    unbound = [f for f in world.kernel.present if f.driver is None and f.kind != "vf"]
    if not unbound:
        return
    function = world.dice.choice(unbound)
    driver = world.dice.choice(("vfio-pci", "vfio-pci", "vfio-pci", "vfio-pci", "nvgrace_gpu_vfio_pci", "nvidia"))
    if function.kind == "mdev":
        driver = "nvidia-vgpu-vfio"
    if world.kernel.bind(function, driver, world.now):
        world.note(function.address, "is bound to", driver, f"as vfio{function.number}")
        _an_event(world)


def _unbind(world: World) -> None:
    held = [world.kernel.functions[a] for pod in world.pods for grant in pod.grants for a in grant.functions]
    function = world.dice.choice(held) if held and world.dice.random() < 0.5 else _some(world)
    if function is not None and world.kernel.unbind(function):
        world.note(function.address, "is unbound", "under its VM" if function.user else "")
        _an_event(world)


def _swap(world: World) -> None:
    """Several are unbound and bound again, in another order, with nobody looking in between."""
    functions = [f for f in world.kernel.present if f.driver in VFIO_DRIVERS and f.user is None and f.kind != "vf"]
    chosen = world.dice.sample(functions, min(len(functions), world.dice.choice((1, 2, 2, 3))))
    drivers = {f.address: f.driver or "" for f in chosen}
    chosen = [f for f in chosen if world.kernel.unbind(f)]
    world.dice.shuffle(chosen)
    for function in chosen:
        world.kernel.bind(function, drivers[function.address], world.now)
        world.note(function.address, "is bound again", f"as vfio{function.number}")
    _an_event(world)


def _plug(world: World) -> None:
    function = _some(world, present=world.dice.random() < 0.5)
    if function is None:
        return
    if function.is_present:
        world.note(function.address, "is taken out", "under its VM" if function.user else "")
        world.kernel.remove(function)
    else:
        world.kernel.add(function, world.now, renumber=world.dice.random() < 0.3)
        world.note(function.address, "is put in, in group", function.group)
        if function.kind == "mdev" or world.dice.random() < 0.5:
            world.kernel.bind(function, "nvidia-vgpu-vfio" if function.kind == "mdev" else "vfio-pci", world.now)
    _an_event(world)


def _carry(world: World) -> None:
    for function in world.kernel.present:
        if world.kernel.carry(function, world.now):
            world.note(function.address, "has now so many virtual functions:", function.carries)
            _an_event(world)


def _sicken(world: World) -> None:
    function = _some(world)
    if function is not None and function.kind in ("gpu", "switch"):
        function.is_off = not function.is_off
        world.note(function.address, "is off the bus" if function.is_off else "answers again")


def _hang(world: World) -> None:
    function = _some(world)
    if function is not None:
        function.hangs = not function.hangs
        world.note(function.address, "cannot be read" if function.hangs else "can be read again")


def _admit(world: World) -> None:
    if world.plugin is None:
        return
    resources = [r for r in world.plugin.registry.current.resources if world.healthy(r)]
    if not resources:
        return
    wanted = [
        (world.dice.choice(resources), world.dice.choice((1, 1, 1, 2))) for _ in range(world.dice.choice((1, 1, 2)))
    ]
    pod = world.admit(wanted, shows_after=world.dice.choice((0.0, 0.0, 0.3, 3.0, 9.0)), again=0.1)
    if pod is None:
        return
    then = world.dice.random()
    if then < 0.15:
        world.end_pod(pod)
    elif then < 0.5:
        world.start_vm(pod)


def _claim(world: World) -> None:
    """The scheduler gives a claim what slices offer, or offered; then the kubelet has it prepared."""
    taken = world.allocated_by_claims()
    offered = sorted(n for n, good in world.slices.items() if n not in taken and (good or world.dice.random() < 0.1))
    if not offered:
        return
    pod = world.schedule(*world.dice.sample(offered, min(len(offered), world.dice.choice((1, 1, 1, 2)))))
    _prepare(world, pod)


def _prepare_again(world: World) -> None:
    """What was refused, or cut off."""
    waiting = [pod for pod in world.pods if pod.claim is not None and pod.is_live and not pod.grants]
    if waiting:
        _prepare(world, world.dice.choice(waiting))


def _prepare(world: World, pod: Pod) -> None:
    dies = world.dice.choices(("", "before the checkpoint is written", "before the answer"), (20, 1, 1))[0]
    if world.prepare(pod, dies=dies) and world.dice.random() < 0.4:
        world.start_vm(pod)


def _end_pod(world: World) -> None:
    live = [p for p in world.pods if p.is_live]
    if not live:
        return
    pod = world.dice.choice(live)
    if pod.vm is not None and world.dice.random() < 0.6:
        world.stop_vm(pod.vm)
    world.end_pod(pod)
    if pod.claim is not None and world.dice.random() < 0.8:  # else later
        world.unprepare(pod.claim.id.uid)


def _start_vm(world: World) -> None:
    live = [p for p in world.pods if p.is_live and p.vm is None]
    if live:
        world.start_vm(world.dice.choice(live))


def _stop_vm(world: World) -> None:
    if world.kernel.vms:
        world.stop_vm(world.dice.choice(world.kernel.vms))


def _strangers_vm(world: World) -> None:
    function = _some(world)
    if function is not None:
        world.start_strangers_vm(function)


def _change_pod_resources(world: World) -> None:
    world.pod_resources = world.dice.choice(("there", "there", "there", "slow", "absent", "silent"))
    world.note("PodResources is", world.pod_resources)


def _end_plugin(world: World) -> None:
    """With or without something that happens before the next one starts."""
    if world.plugin is not None:
        world.end_plugin()
        if world.dice.random() < 0.5:
            _start_plugin(world)


def _maintain(world: World) -> None:
    """Somebody rearranges things below a plugin that is restarted."""
    world.end_plugin()
    for _ in range(world.dice.choice((1, 1, 2))):
        world.dice.choice((_unbind, _unbind, _swap, _plug))(world)
    _start_plugin(world)


def _start_plugin(world: World) -> None:
    if world.plugin is None:
        if world.standby is not None:
            world.take_over()
        else:
            world.start_plugin(_settings(world))


def _stand_by(world: World) -> None:
    if world.standby is None and world.plugin is not None:
        world.start_plugin(_settings(world), serves=False)


def _swap_turns(world: World) -> None:
    if world.plugin is not None and world.standby is not None:
        world.swap_turns()


def _settings(world: World) -> Settings:
    """Those of the world, or, from now on, others."""
    if world.dice.random() < 0.4:
        world.settings = random_settings(world.dice)
    return world.settings


def random_settings(dice: random.Random) -> Settings:
    return Settings(
        gpu_alias=dice.choice(("pgpu", "pgpu", "other", "")),
        nvswitch_alias=dice.choice(("nvswitch", "nvswitch", "")),
        resources=(GRACE_RULE,) if dice.random() < 0.4 else (),
        consumer=dice.choice(tuple(Consumer)),
    )


ACTIONS: dict[str, tuple[Callable[[World], None], float]] = {
    "wait": (_wait, 25),
    "wait long": (_wait_long, 1),
    "look": (World.look, 5),
    "bind": (_bind, 10),
    "unbind": (_unbind, 8),
    "swap": (_swap, 3),
    "plug": (_plug, 3),
    "carry": (_carry, 1),
    "sicken": (_sicken, 0.5),
    "hang": (_hang, 0.5),
    "admit": (_admit, 40),
    "end pod": (_end_pod, 20),
    "claim": (_claim, 25),
    "prepare again": (_prepare_again, 5),
    "give claims back": (World.reconcile, 3),
    "lose records": (World.lose_records, 2),
    "start VM": (_start_vm, 10),
    "stop VM": (_stop_vm, 12),
    "stranger's VM": (_strangers_vm, 1),
    "restart kubelet": (World.restart_kubelet, 1),
    "change PodResources": (_change_pod_resources, 2),
    "end plugin": (_end_plugin, 4),
    "start plugin": (_start_plugin, 8),
    "maintain": (_maintain, 3),
    "stand by": (_stand_by, 3),
    "swap turns": (_swap_turns, 2),
}


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What happens to one world. The same again for the same seed and steps."""

    seed: int
    steps: tuple[Step, ...]

    def world(self) -> World:
        dice = random.Random(self.seed)
        world = World(
            cdevs=dice.random() < 0.7,
            layout=dice.choice(LAYOUTS),
            pod_resources=dice.choice(("there", "there", "there", "slow", "absent")),
            settings=random_settings(dice),
            kubelet_age=dice.choice((1000.0, 1000.0, 2.0)),
        )
        world.dice.seed(self.seed)
        return world

    def play(self, *, record: bool = False) -> Played:
        world = self.world()
        if record:
            world.history = []
        done = 0
        try:
            world.start_plugin(world.settings)
            world.wait(0.1)
            if world.pod_resources != "slow" and world.kubelet_began < world.now - 100:
                world.must_offer_everything()
            for name, number in self.steps:
                world.dice.seed(number)
                done += 1
                ACTIONS[name][0](world)
            if self.seed % 4 == 0:
                world.settle()
        except Exception as error:
            return Played(world=world, done=done, error=error)
        return Played(world=world, done=done)


@dataclass(kw_only=True)
class Played:
    world: World
    done: int
    """Steps."""
    error: Exception | None = None


def random_episode(seed: int) -> Episode:
    """Its habits: some things happen much, some never."""
    dice = random.Random(seed)
    weights = [weight * dice.choice((0, 1, 1, 1, 3)) for _, weight in ACTIONS.values()]
    names = dice.choices(list(ACTIONS), weights, k=STEPS) if any(weights) else []
    return Episode(seed=seed, steps=tuple((name, dice.getrandbits(32)) for name in names))


@dataclass(kw_only=True)
class Outcome:
    """Of many episodes."""

    steps: int = 0
    granted: int = 0
    """Allocates that pods were given, and claims."""
    claimed: int = 0
    """The claims among them."""
    released: int = 0
    """Claims that the kubelet forgot, and that were given back all the same."""
    failed: Episode | None = None
    error: Exception | None = None

    def story(self) -> str:
        """What happened in the episode that failed, made short."""
        assert self.failed is not None
        assert self.error is not None
        episode = shorten(self.failed, type(self.error))
        played = episode.play(record=True)
        where = f"seed {episode.seed}, {len(episode.steps)} of its steps: {list(episode.steps)}"
        world = played.world
        kind = f"{'cdevs' if world.kernel.cdevs else 'group nodes'}: " + " ".join(
            f"{f.address}({f.kind}, group {f.group})" for f in world.kernel.functions.values()
        )
        return "\n".join(
            [where, kind, *_in_short(world.history or ()), f"{type(played.error).__name__}: {played.error}"]
        )


def _in_short(history: Iterable[str]) -> list[str]:
    """Without scans and answers that are as others since the last event."""
    kept: list[str] = []
    seen: set[str] = set()
    for line in history:
        words = re.sub(r"[0-9]+\.[0-9]+", "", line)
        if words in seen:
            continue
        if any(routine in words for routine in ("takes in", "hears", "finds no", "gets no")):
            seen.add(words)
        else:
            seen.clear()
        kept.append(line)
    return kept


def search(steps: int, *, first_seed: int = 0) -> Outcome:
    """Plays episodes until so many steps are done, or one fails."""
    outcome = Outcome()
    seed = first_seed
    while outcome.steps < steps:
        episode = random_episode(seed)
        played = episode.play()
        outcome.steps += played.done
        outcome.granted += played.world.granted
        outcome.claimed += played.world.claimed
        outcome.released += played.world.released
        if played.error is not None:
            outcome.failed = replace(episode, steps=episode.steps[: played.done])
            outcome.error = played.error
            break
        seed += 1
    return outcome


def shorten(episode: Episode, error: type[Exception]) -> Episode:
    """The episode without steps that it fails without (delta debugging)."""
    steps: Sequence[Step] = episode.steps
    size = max(1, len(steps) // 2)
    while True:
        start, smaller = 0, False
        while start < len(steps):
            fewer = replace(episode, steps=(*steps[:start], *steps[start + size :]))
            played = fewer.play()
            if isinstance(played.error, error):
                steps, smaller = fewer.steps[: played.done], True
            else:
                start += size
        if size == 1 and not smaller:
            return replace(episode, steps=tuple(steps))
        size = max(1, size // 2)
