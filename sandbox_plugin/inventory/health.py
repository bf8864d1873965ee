"""The health of a device: what is listed of it, put together from all that may speak against it.

A device is Unhealthy as soon as a fault is known, and Healthy again after it has been well for `SETTLE`. One that is
new, or was bound again, is not held back.

`fault_of` and `health_of` are the whole order of reasons. A new reason goes into `Reason` (model.py), and where it is
found out: in faults.py if one scan shows it, in symptoms.py if it must be remembered, in sharing.py if it depends on
who holds what, and here if the device itself is fine.
"""

from __future__ import annotations

from sandbox_plugin.inventory.state import Signals, Track
from sandbox_plugin.inventory.symptoms import remembered_fault
from sandbox_plugin.model import HEALTHY, Fault, Health, Reason

SETTLE = 2.0
"""Seconds for which a device that recovered must be well before it is Healthy again."""
ARRIVAL = 1.0
"""Seconds in which a device that has just arrived may be ill without being held back: a bind is several steps, and a
scan in between sees the driver without the node. That somebody else has it is no step of a bind."""


_OTHERS_TO_TELL = (Reason.HOLDERS_UNKNOWN, Reason.HELD_BY_OTHER_API)
"""Nothing is wrong with the device, and it is free as soon as its holder lets go, or is known."""


def fault_of(track: Track, withheld: Fault | None) -> Fault | None:
    """What matters most of all that is against a device itself or against giving it to another pod. None: nothing.

    `withheld`: why it is withheld because of who holds what.
    """
    return track.fault or remembered_fault(track) or withheld


def damp(track: Track, fault: Fault | None, withheld: Fault | None, now: float) -> Track:
    """Remembers whether the device is well now. One of which it is only not known yet who holds it is well, and so is
    one that is held by a claim.

    `fault` and `withheld` as of `fault_of`.
    """
    if track.gone_since is not None:
        return track
    if fault is not None and fault.reason not in _OTHERS_TO_TELL:
        is_anothers = withheld is not None and withheld.reason not in _OTHERS_TO_TELL
        is_arriving = not track.been_well and now - track.arrived_at < ARRIVAL and not is_anothers
        return track._replace(ill=track.ill or not is_arriving, well_since=None)
    if not track.ill:
        return track if track.been_well else track._replace(been_well=True)
    well_since = now if track.well_since is None else track.well_since
    return track._replace(been_well=True, well_since=well_since, ill=now < well_since + SETTLE)


def is_changing(track: Track) -> bool:
    """Whether time alone changes it: it is about to have settled, or to count as ill since it arrived."""
    return track.well_since is not None if track.ill else not track.been_well


def health_of(track: Track, fault: Fault | None, signals: Signals) -> Health:
    """What is listed of a device, after damping, that has this fault or none."""
    fault = fault or _settling(track) or _not_in_cdi(track, signals)
    return HEALTHY if fault is None else Health(reason=fault.reason, detail=fault.detail)


def health_for_claims(track: Track, fault: Fault | None) -> Health:
    """The same for claims: their CDI specs are written when they are prepared."""
    fault = fault or _settling(track)
    return HEALTHY if fault is None else Health(reason=fault.reason, detail=fault.detail)


def _settling(track: Track) -> Fault | None:
    if not track.ill:
        return None
    return Fault(reason=Reason.SETTLING, detail=f"recovered; Healthy after {SETTLE:g} s without trouble")


def _not_in_cdi(track: Track, signals: Signals) -> Fault | None:
    resource, device_id = track.key
    if signals.in_cdi is None or device_id in signals.in_cdi.get(resource, frozenset()):
        return None
    why = signals.cdi_trouble.get(resource, "its CDI spec is being written")
    return Fault(reason=Reason.NOT_IN_CDI, detail=why)
