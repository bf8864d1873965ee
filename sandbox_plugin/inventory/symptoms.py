"""What is remembered of single functions: that they did not answer, and fatal PCIe errors (AER).

It holds for one binding: a function that was bound again starts afresh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from sandbox_plugin.inventory.functions import may_be_dead
from sandbox_plugin.inventory.state import Bound, FatalError, Track
from sandbox_plugin.model import Device, Fault, HostFacts, Reason

FATAL_QUIET = 60.0
"""Seconds after which a fatal error whose end was not reported counts as recovered, if the device answers."""
DEAD = 3.0
"""Seconds between two scans in which a function did not answer, after which it is dead until it answers. Less may be a
reset, as at the end of a VM: then it falls asleep, and would count as dead for as long as nobody uses it."""

_Mark = TypeVar("_Mark")


def remembered_fault(track: Track) -> Fault | None:
    """What is remembered against a device, whatever the latest scan says of it. None: nothing.

    In D3cold it may be dead for `DEAD` seconds before it counts, unless it has not been well since it was seen to be
    ill, or at all: the next VM must not get it in between.
    """
    may_not_wait = track.ill or not track.been_well
    for address, binding in sorted(track.silent | (track.unanswered.keys() if may_not_wait else set())):
        why = "did not answer on the PCI bus and has been asleep since"
        if (address, binding) in track.unanswered:
            why = (
                "does not answer on the PCI bus: it is in D3cold although all bridges above it are awake and ACPI has "
                "no power resource for it"
            )
        return Fault(reason=Reason.OFF_THE_BUS, detail=f"{address} {why}")
    for _, error in sorted(track.fatal_errors.items()):
        return Fault(reason=Reason.FATAL_ERROR, detail=error.words)
    return None


def wake_times(track: Track) -> Iterator[float]:
    """When time changes what is remembered: another scan tells then."""
    for since in track.unanswered.values():
        yield since + DEAD
    for error in track.fatal_errors.values():
        if error.since is not None:
            yield error.since + FATAL_QUIET


def bound_functions(device: Device) -> frozenset[Bound]:
    """The functions of a device, each as it is bound."""
    return frozenset((p.address, p.binding) for p in device.placements)


def _kept(marks: Mapping[Bound, _Mark], device: Device, facts: HostFacts) -> dict[Bound, _Mark]:
    """Those that are still of this device: bound as they were, or not to be read at the moment."""
    if not marks:
        return {}
    own = bound_functions(device)
    return {bound: mark for bound, mark in marks.items() if bound in own or bound[0] in facts.unreadable}


def examine(track: Track, facts: HostFacts, events: Sequence[tuple[str, str]], now: float) -> Track:
    """Takes in what a scan shows of the functions of a device that is there, and AER uevents."""
    unanswered, silent = _silence(track, facts)
    errors, counts = _fatal_errors(track, facts, events, now)
    return track._replace(unanswered=unanswered, silent=silent, fatal_errors=errors, fatal_counts=counts)


def listen(track: Track, facts: HostFacts, events: Sequence[tuple[str, str]], now: float) -> Track:
    """As `examine`, for a device that cannot be read: only of errors there may be news."""
    errors, counts = _fatal_errors(track, facts, events, now)
    return track._replace(fatal_errors=errors, fatal_counts=counts)


def _silence(track: Track, facts: HostFacts) -> tuple[dict[Bound, float], frozenset[Bound]]:
    """Which functions do not answer, and since when; and which of them are dead by now.

    Of a function that sleeps the link is not read: that does not prove that it healed.
    """
    before = _kept(track.unanswered, track.device, facts)
    unanswered = {bound: since for bound, since in before.items() if bound[0] in facts.unreadable}
    silent = set(_kept(dict.fromkeys(track.silent), track.device, facts))
    for bound in bound_functions(track.device):
        function = facts.functions[bound[0]]
        if may_be_dead(function):
            unanswered[bound] = before.get(bound, facts.began_at)
        elif function.link_speed is not None:
            silent.discard(bound)
    silent.update(bound for bound, since in unanswered.items() if facts.began_at - since >= DEAD)
    return unanswered, frozenset(silent)


def _fatal_errors(
    track: Track, facts: HostFacts, events: Sequence[tuple[str, str]], now: float
) -> tuple[dict[Bound, FatalError], dict[Bound, int]]:
    """The errors that have not been recovered from, and the counts that are old news by now: only a rise is news.

    A success (events are AER uevents, pci_uevent_ers in drivers/pci/pci-driver.c) accounts for what was counted until
    then. After a recovery that failed only a success, or binding the function again, makes it well.
    """
    errors = _kept(track.fatal_errors, track.device, facts)
    old_counts = _kept(track.fatal_counts, track.device, facts)
    counts = _fatal_counts(track.device, facts)
    for bound, count in sorted(counts.items()):
        if count > old_counts.get(bound, count):
            _begin(errors, bound, f"{bound[0]} has counted a fatal PCIe error (AER)", now)
    for address, event in events:
        for bound in sorted(_concerned(track.device, address, event)):
            if event == "BEGIN_RECOVERY":
                _begin(errors, bound, f"the kernel is recovering {address} from a PCIe error (AER)", now)
            elif event == "FAILED_RECOVERY":
                words = f"the kernel could not recover {address} from a PCIe error (AER)"
                errors[bound] = FatalError(words=words, since=None)
            elif event == "SUCCESSFUL_RECOVERY":
                errors.pop(bound, None)
    errors = {bound: e for bound, e in errors.items() if e.since is None or now < e.since + FATAL_QUIET}
    return errors, {**old_counts, **counts}


def _fatal_counts(device: Device, facts: HostFacts) -> dict[Bound, int]:
    counts = {}
    for address, binding in bound_functions(device):
        function = facts.functions.get(address)
        if function is not None and function.fatal_errors is not None:
            counts[address, binding] = function.fatal_errors
    return counts


def _begin(errors: dict[Bound, FatalError], bound: Bound, words: str, now: float) -> None:
    before = errors.get(bound)
    if before is None or before.since is not None:
        errors[bound] = FatalError(words=words, since=now)


def _concerned(device: Device, address: str, event: str) -> set[Bound]:
    """Functions of the device that an AER event is about. A recovery that fails fails at the bridge above them too."""
    return {
        (p.address, p.binding)
        for p in device.placements
        if p.address == address or (event == "FAILED_RECOVERY" and address in p.bridges)
    }
