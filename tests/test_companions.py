"""What has to do with a device although no rule takes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from devices import device
from devices import function as placement
from facts import gpu

from sandbox_plugin.inventory.companions import companions
from sandbox_plugin.model import Device, PciFunction

GPU, OTHER, AUDIO = "0000:01:00.0", "0000:02:00.0", "0000:01:00.1"


def on_group(device_id: str, address: str, *held: str) -> Device:
    """A device in group 7, of which a VM may have these functions."""
    return device(device_id, placement(address), group=7)._replace(group_functions=(address, *held))


def ties(devices: Iterable[Device], *functions: PciFunction) -> dict[str, str]:
    return {address: str(companion) for address, companion in companions(devices, functions).items()}


def audio(address: str = AUDIO, group: int = 7, **changes: Any) -> PciFunction:
    return gpu(address, group=group, class_code=0x040300, **changes)


def test_what_a_vfio_driver_holds_in_the_group_rides_along() -> None:
    assert ties([on_group("0", GPU, AUDIO)], audio()) == {AUDIO: f"rides along with {GPU}"}


def test_what_no_vm_gets_is_in_the_group_alone() -> None:
    assert ties([on_group("0", GPU)], audio(driver="snd_hda_intel")) == {AUDIO: f"in the IOMMU group of {GPU}"}


def test_what_is_on_the_card_but_in_another_group_is_said_to_be() -> None:
    assert ties([on_group("0", GPU)], audio(group=8)) == {AUDIO: f"in the slot of {GPU}"}


def test_bridges_and_functions_elsewhere_have_nothing_to_do_with_it() -> None:
    bridge = gpu("0000:00:01.0", group=7, class_code=0x060400)
    assert ties([on_group("0", GPU)], bridge, audio("0000:00:1f.3", group=14)) == {}
    assert ties([], audio()) == {}


def test_of_several_devices_in_a_group_it_is_the_one_in_the_same_slot_else_the_first() -> None:
    other_audio, usb = "0000:02:00.1", "0000:03:00.0"
    held = (AUDIO, other_audio, usb)
    devices = [on_group("0", GPU, *held), on_group("1", OTHER, *held)]
    assert ties(devices, audio(), audio(other_audio), audio(usb)) == {
        AUDIO: f"rides along with {GPU}",
        other_audio: f"rides along with {OTHER}",
        usb: f"rides along with {GPU}",
    }


def test_of_a_device_in_the_slot_and_one_in_the_group_it_is_the_one_in_the_group() -> None:
    elsewhere = device("9", placement("0000:05:00.0"), group=9)
    assert ties([elsewhere, on_group("0", GPU, "0000:05:00.1")], audio("0000:05:00.1")) == {
        "0000:05:00.1": f"rides along with {GPU}"
    }


def test_mediated_devices_are_in_no_slot() -> None:
    uuids = [f"{n}f3c4b8e-6d5a-4c1e-9f00-0123456789ab" for n in range(2)]
    devices = [device("0", placement(uuids[0]), group=7)]
    assert ties(devices, gpu(uuids[1], group=8, mdev_type="GRID T4-1Q")) == {}
