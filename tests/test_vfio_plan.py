"""What `vfio bind` and `unbind` would write, and what they refuse, by the facts of a host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from facts import gpu, host

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import PciFunction
from sandbox_plugin.vfio.plan import GroupPlan, Selection, Situation, plan_bind, plan_unbind

A, B = "0000:1b:00.0", "0000:43:00.0"
AUDIO = "0000:1b:00.1"
GENERIC = "vfio_pci:v*d*sv*sd*bc*sc*i*"
EVERYTHING = Selection()


def on(driver: str | None, address: str = A, **changes: Any) -> PciFunction:
    """A GPU that a host driver, or none, has."""
    return gpu(address, vfio=None, **({"driver": driver, "enable": None} | changes))


def audio(driver: str | None = "snd_hda_intel") -> PciFunction:
    return on(driver, AUDIO, class_code=0x040300, device=0x1AEB)


def situation(*functions: PciFunction, **changes: Any) -> Situation:
    known: dict[str, Any] = {"facts": host(*functions), "drivers": frozenset({"vfio-pci", "nvidia", "snd_hda_intel"})}
    return Situation(**(known | changes))


def bind(seen: Situation, selection: Selection = EVERYTHING, settings: Settings | None = None) -> list[GroupPlan]:
    return plan_bind(seen, Rules(settings or Settings()), selection)


def unbind(seen: Situation, selection: Selection = EVERYTHING) -> list[GroupPlan]:
    return plan_unbind(seen, Rules(), selection)


def lines(plan: GroupPlan) -> list[str]:
    return [write.shell_line for change in plan.changes for write in change.writes]


def refusal(seen: Situation, selection: Selection = EVERYTHING) -> str:
    """The only one."""
    (plan,) = bind(seen, selection)
    (why,) = plan.refusals
    return why


def test_a_gpu_is_overridden_before_it_is_unbound_so_that_no_other_driver_gets_it() -> None:
    (plan,) = bind(situation(on("nvidia")))
    assert lines(plan) == [
        f"echo vfio-pci > /sys/bus/pci/devices/{A}/driver_override",
        f"echo {A} > /sys/bus/pci/drivers/nvidia/unbind",
        f"echo {A} > /sys/bus/pci/drivers_probe",
    ]
    assert plan.refusals == ()
    assert plan.modules == ()


def test_a_gpu_without_a_driver_needs_no_unbind() -> None:
    (plan,) = bind(situation(on(None)))
    assert [line.rpartition("/")[2] for line in lines(plan)] == ["driver_override", "drivers_probe"]


def test_a_module_that_is_not_loaded_is_loaded_first_and_once() -> None:
    (plan,) = bind(situation(on("nvidia"), audio(), drivers=frozenset({"nvidia"})))
    assert plan.modules == ("vfio_pci",)
    assert [change.address for change in plan.changes] == [A, AUDIO]


def test_what_is_bound_stays_as_it_is() -> None:
    (plan,) = bind(situation(gpu(A)))
    assert not plan.changes
    assert not plan.refusals
    assert plan.members == (A,)


def test_what_a_vm_uses_and_vfio_has_is_no_reason_to_refuse_since_nothing_is_to_be_done() -> None:
    (plan,) = bind(situation(gpu(A, enable=1)))
    assert not plan.changes
    assert not plan.refusals


ALIASES = (
    (GENERIC, "vfio_pci"),
    ("vfio_pci:v000010DEd00002330sv*sd*bc*sc*i*", "nvgrace_gpu_vfio_pci"),
    ("vfio_pci:v000015B3d*sv*sd*bc*sc*i*", "mlx5_vfio_pci"),
    ("pci:v000010DEd*sv*sd*bc03sc02i00*", "nvidia"),
)


def test_the_driver_with_the_most_exact_alias_is_chosen() -> None:
    (plan,) = bind(situation(on("nvidia"), aliases=ALIASES))
    assert plan.changes[0].after == "nvgrace_gpu_vfio_pci"
    assert plan.modules == ("nvgrace_gpu_vfio_pci",)
    (plan,) = bind(situation(on("nvidia", device=0x1234), aliases=ALIASES))
    assert plan.changes[0].after == "vfio-pci"


def test_the_generic_driver_is_replaced_by_a_better_one_but_no_variant_that_somebody_chose() -> None:
    (plan,) = bind(situation(gpu(A), aliases=ALIASES))
    assert (plan.changes[0].before, plan.changes[0].after) == ("vfio-pci", "nvgrace_gpu_vfio_pci")
    (plan,) = bind(situation(gpu(A, driver="other_vfio_pci"), aliases=ALIASES))
    assert plan.changes == ()


def test_the_generic_driver_is_not_replaced_under_a_vm() -> None:
    assert refusal(situation(gpu(A, enable=1), aliases=ALIASES)) == f"{A}: a VM has it (enable is 1)"


def test_other_functions_of_the_card_come_along_and_bridges_do_not() -> None:
    bridge = on("pcieport", "0000:1a:00.0", class_code=0x060400)
    (plan,) = bind(situation(on("nvidia"), audio(None), bridge))
    assert plan.members == (A, AUDIO)
    assert plan.refusals == ()


def test_a_function_of_the_card_that_is_not_bound_is_bound_although_the_gpu_is() -> None:
    (plan,) = bind(situation(gpu(A), audio()))
    assert [change.address for change in plan.changes] == [AUDIO]


def test_a_function_of_the_card_that_somebody_uses_is_refused_with_the_whole_group() -> None:
    seen = situation(on("nvidia"), audio(), users={AUDIO: ("pipewire (12) has /dev/snd/pcmC1D3p open",)})
    assert refusal(seen) == f"{AUDIO}: pipewire (12) has /dev/snd/pcmC1D3p open"
    (plan,) = bind(seen, Selection(force=True))
    assert plan.refusals == ()


def test_another_device_of_the_machine_in_the_group_is_not_taken_without_force() -> None:
    nic = on("e1000e", "0000:00:1f.6", class_code=0x020000, vendor=0x8086)
    why = refusal(situation(on("nvidia"), nic))
    assert why == "0000:00:1f.6: another device of this machine, on e1000e, is in this IOMMU group"
    (plan,) = bind(situation(on("nvidia"), nic), Selection(force=True))
    assert {change.address for change in plan.changes} == {A, nic.address}


@pytest.mark.parametrize("driver", [None, "pci-stub", "pcieport"])
def test_another_device_that_is_in_nobodys_way_is_left_alone(driver: str | None) -> None:
    lpc = on(driver, "0000:00:1f.0", class_code=0x060100, vendor=0x8086)
    (plan,) = bind(situation(on("nvidia"), lpc))
    assert plan.members == (A,)
    assert plan.refusals == ()


def test_a_group_mate_that_is_offered_too_comes_along() -> None:
    (plan,) = bind(situation(on("nvidia"), on("nvidia", B)), Selection(addresses=(A,)))
    assert plan.members == (A, B)
    assert plan.refusals == ()


def test_no_group_that_a_vm_has_is_changed() -> None:
    why = refusal(situation(gpu(A, enable=1), on("pci-stub", B)), Selection(addresses=(B,)))
    assert why == f"{A}: a VM has it, and with it the IOMMU group"


def test_what_was_unbound_under_a_vm_is_refused() -> None:
    assert "enabled without a driver" in refusal(situation(on(None, enable=1)))


def test_what_carries_virtual_functions_is_refused() -> None:
    vf = on("nvidia", "0000:1b:00.4", physical_function=A, group=60)
    assert refusal(situation(on("nvidia"), vf)) == f"{A}: it carries SR-IOV virtual functions"


def test_virtual_functions_are_bound_only_by_address() -> None:
    vf = on("nvidia", "0000:1b:00.4", physical_function=B, group=60)
    assert bind(situation(vf)) == []
    (plan,) = bind(situation(vf), Selection(addresses=(vf.address,)))
    assert [change.address for change in plan.changes] == [vf.address]


def test_a_vgpu_on_the_vendors_driver_stays_there() -> None:
    (plan,) = bind(situation(gpu(A, driver="nvidia")))
    assert plan.changes == ()


def test_without_an_iommu_nothing_is_bound_not_even_by_force() -> None:
    for force in (False, True):
        assert "the IOMMU is off" in refusal(situation(on("nvidia", group=None)), Selection(force=force))


def test_switches_are_left_out_unless_they_are_asked_for() -> None:
    switch = on("nvidia-nvswitch", "0000:07:00.0", class_code=0x068000, device=0x22A3, group=7)
    seen = situation(on("nvidia"), switch)
    assert [plan.members for plan in bind(seen)] == [(A,)]
    assert len(bind(seen, Selection(switches=True))) == 2
    (plan,) = bind(seen, Selection(addresses=(switch.address,)))
    assert plan.members == (switch.address,)


def test_a_model_is_all_of_its_functions() -> None:
    seen = situation(on("nvidia"), on("nvidia", B, group=51, device=0x26B9))
    assert [plan.members for plan in bind(seen, Selection(model=(0x10DE, 0x26B9)))] == [(B,)]


def test_what_no_rule_offers_is_refused_and_taken_by_force() -> None:
    disk = on("nvme", "0000:05:00.0", vendor=0x144D, class_code=0x010802)
    chosen = Selection(addresses=(disk.address,))
    assert refusal(situation(disk), chosen) == f"{disk.address}: no resource rule offers it"
    (plan,) = bind(situation(disk), replace(chosen, force=True))
    assert plan.refusals == ()


def test_what_a_rule_of_the_config_file_leaves_out_is_not_bound() -> None:
    settings = Settings(resources=(ResourceRule(name=None, label="none", addresses=(A,)),))
    assert [plan.members for plan in bind(situation(on("nvidia"), on("nvidia", B, group=51)), settings=settings)] == [
        (B,)
    ]


def test_a_rule_for_a_vfio_driver_offers_what_is_not_bound_yet() -> None:
    rule = ResourceRule(
        name="example.com/nic", label="nic", vendors=frozenset({0x8086}), drivers=frozenset({"vfio-pci"})
    )
    nic = on("ice", "0000:05:00.0", vendor=0x8086, class_code=0x020000)
    (plan,) = bind(situation(nic), settings=Settings(resources=(rule,)))
    assert plan.changes[0].after == "vfio-pci"


def test_unbind_gives_each_function_of_the_group_its_driver_of_before() -> None:
    sound = audio("vfio-pci")
    (plan,) = unbind(situation(gpu(A), sound, remembered={A: "nvidia", AUDIO: None}))
    assert lines(plan) == [
        f"echo nvidia > /sys/bus/pci/devices/{A}/driver_override",
        f"echo {A} > /sys/bus/pci/drivers/vfio-pci/unbind",
        f"echo {A} > /sys/bus/pci/drivers_probe",
        f"echo > /sys/bus/pci/devices/{A}/driver_override",
        f"echo > /sys/bus/pci/devices/{AUDIO}/driver_override",
        f"echo {AUDIO} > /sys/bus/pci/drivers/vfio-pci/unbind",
    ]


@pytest.mark.parametrize("remembered", [{}, {A: "nouveau"}], ids=["nothing", "a driver that is not loaded"])
def test_unbind_leaves_the_choice_to_the_kernel(remembered: dict[str, str | None]) -> None:
    (plan,) = unbind(situation(gpu(A), remembered=remembered))
    assert lines(plan)[-1] == f"echo {A} > /sys/bus/pci/drivers_probe"
    assert plan.changes[0].after is None


def test_unbind_refuses_what_a_vm_has_and_what_waits_for_one() -> None:
    (plan,) = unbind(situation(gpu(A, enable=1)))
    assert plan.refusals == (f"{A}: a VM has it (enable is 1)",)
    (plan,) = unbind(situation(on(None, enable=1)))
    assert "enabled without a driver" in plan.refusals[0]
    (plan,) = unbind(situation(gpu(A, enable=1)), Selection(force=True))
    assert plan.refusals == ()


def test_unbind_has_nothing_to_do_for_what_a_host_driver_has() -> None:
    (plan,) = unbind(situation(on("nvidia")))
    assert not plan.changes
    assert not plan.refusals
