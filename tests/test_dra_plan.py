"""What is written so that a pool is as it should be; and that no scheduler ever sees it half old and half new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slices import DRIVER, NODE, POOL, seen_by_scheduler

from sandbox_plugin.dra.pace import BURST, EVERY, GATHER, LONGEST, PEACE, Pace
from sandbox_plugin.dra.plan import Verb, Write, plan, probe_of_taints, slice_name
from sandbox_plugin.fake.slice_rules import violations

Slices = dict[str, dict[str, Any]]

TAINT = {"key": f"{DRIVER}/unhealthy", "value": "gone", "effect": "NoExecute"}


def parts(*names: str) -> list[list[dict[str, Any]]]:
    """`"ab", "c"`: two slices with two devices and one."""
    return [[{"name": f"pci-{letter}"} for letter in part] for part in names]


def carry_out(slices: Slices, writes: Sequence[Write]) -> Slices:
    """The slices after these writes, as an API server would have them."""
    after = dict(slices)
    for write in writes:
        name = write.object["metadata"]["name"]
        assert (name in after) is (write.verb is not Verb.CREATE)
        if write.verb is Verb.DELETE:
            del after[name]
        else:
            assert violations(write.object, after.get(name)) == []
            after[name] = dict(write.object)
    return after


def published(*names: str) -> Slices:
    return carry_out({}, plan(POOL, parts(*names), {}, 0))


def verbs(writes: Sequence[Write]) -> list[str]:
    return [f"{write.verb} {write.object['metadata']['name'].rpartition('-')[2]}" for write in writes]


def generations(slices: Mapping[str, Any]) -> set[int]:
    return {each["spec"]["pool"]["generation"] for each in slices.values()}


def test_the_first_slices_are_created_with_the_node_as_their_owner() -> None:
    writes = plan(replace(POOL, node_uid="u-1"), parts("ab", "c"), {}, 0)
    assert verbs(writes) == ["create 0", "create 1"]
    first = writes[0].object
    assert first["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": "u-1", "controller": True}
    ]
    assert first["spec"] == {
        "driver": DRIVER,
        "nodeName": NODE,
        "pool": {"name": NODE, "generation": 1, "resourceSliceCount": 2},
        "devices": [{"name": "pci-a"}, {"name": "pci-b"}],
    }
    assert "ownerReferences" not in plan(POOL, parts("a"), {}, 0)[0].object["metadata"]


def test_nothing_is_written_if_nothing_is_to_be_changed() -> None:
    slices = published("ab", "c")
    assert plan(POOL, parts("ab", "c"), slices, 1) == []
    assert plan(POOL, [], {}, 7) == []


def test_one_write_needs_no_new_generation_and_more_than_one_do() -> None:
    slices = published("ab", "cd")
    assert verbs(plan(POOL, parts("ab", "c"), slices, 1)) == ["replace 1"]
    assert generations(carry_out(slices, plan(POOL, parts("ab", "c"), slices, 1))) == {1}
    both = plan(POOL, parts("a", "c"), slices, 1)
    assert verbs(both) == ["replace 0", "replace 1"]
    assert generations(carry_out(slices, both)) == {2}


def test_a_slice_more_or_less_is_a_new_generation_of_all() -> None:
    slices = published("ab")
    more = plan(POOL, parts("ab", "c"), slices, 1)
    assert verbs(more) == ["replace 0", "create 1"]
    slices = carry_out(slices, more)
    assert generations(slices) == {2}
    less = plan(POOL, parts("ab"), slices, 2)
    assert verbs(less) == ["replace 0", "delete 1"]
    assert generations(carry_out(slices, less)) == {3}
    assert verbs(plan(POOL, [], slices, 3)) == ["delete 0", "delete 1"]


def test_what_others_deleted_comes_back_with_a_generation_that_never_was() -> None:
    slices = published("ab", "cd")
    del slices[slice_name(POOL, 1)]
    writes = plan(POOL, parts("ab", "cd"), slices, 1)
    assert verbs(writes) == ["replace 0", "create 1"]
    assert generations(carry_out(slices, writes)) == {2}
    (again,) = plan(POOL, parts("ab"), {}, 41)
    assert again.object["spec"]["pool"]["generation"] == 42


def test_what_others_changed_is_changed_back() -> None:
    slices = published("ab")
    name = slice_name(POOL, 0)
    spec = slices[name]["spec"]
    slices[name] = {**slices[name], "spec": {**spec, "devices": []}}
    assert verbs(plan(POOL, parts("ab"), slices, 1)) == ["replace 0"]
    slices[name] = {**slices[name], "spec": {**spec, "pool": {**spec["pool"], "resourceSliceCount": 2}}}
    writes = plan(POOL, parts("ab"), slices, 1)
    assert generations(carry_out(slices, writes)) == {2}


def test_a_slice_of_another_pool_under_our_name_is_deleted_first_because_its_pool_cannot_be_changed() -> None:
    slices = published("ab")
    name = slice_name(POOL, 0)
    spec = slices[name]["spec"]
    slices[name] = {**slices[name], "spec": {**spec, "pool": {**spec["pool"], "name": "other"}}}
    writes = plan(POOL, parts("ab"), slices, 1)
    assert verbs(writes) == ["delete 0", "create 0"]
    assert seen_by_scheduler(carry_out(slices, writes).values()) == ["pci-a", "pci-b"]


def test_a_taint_keeps_the_time_when_it_came_and_its_time_is_no_difference() -> None:
    def tainted(*taints: dict[str, str]) -> list[list[dict[str, Any]]]:
        return [[{"name": "pci-a", "taints": list(taints)}, {"name": "pci-b"}]]

    timed = {**TAINT, "timeAdded": "2026-11-30T10:00:00Z"}
    (create,) = plan(POOL, tainted(timed), {}, 0)
    slices = carry_out({}, [create])
    assert plan(POOL, tainted(TAINT), slices, 1) == []
    other = {**TAINT, "value": "no-node"}
    (replaced,) = plan(POOL, tainted(TAINT, other), slices, 1)
    assert replaced.object["spec"]["devices"] == [{"name": "pci-a", "taints": [timed, other]}, {"name": "pci-b"}]


@pytest.mark.parametrize("node", ["n" * 63, f"{'n' * 63}.{'m' * 63}.{'o' * 63}.{'p' * 61}"])
def test_names_are_always_valid_and_differ(node: str) -> None:
    pool = replace(POOL, node=node)
    names = [slice_name(pool, index) for index in (0, 1, 10)]
    assert len(set(names)) == 3
    assert all(len(name) <= 253 for name in names)
    assert slice_name(replace(pool, driver="b.example"), 0) != names[0]
    writes = plan(pool, parts("a", "b"), {}, 0)
    assert all(violations(write.object) == [] for write in writes)


def test_the_probe_of_taints_is_valid_and_of_this_node() -> None:
    probe = probe_of_taints(POOL)
    assert violations(probe) == []
    assert probe["spec"]["nodeName"] == NODE
    assert "name" not in probe["metadata"]


LAYOUT = st.lists(st.sampled_from(["a", "ab", "b", "c", "cd", ""]), max_size=3).map(
    lambda names: [part for at, part in enumerate(names) if part and not set(part) & set("".join(names[:at]))]
)


@given(st.lists(st.tuples(LAYOUT, st.integers(0, 6), st.sets(st.integers(0, 2))), min_size=1, max_size=6))
def test_a_scheduler_sees_a_whole_pool_or_none_however_often_writing_is_cut_off_and_slices_are_deleted(
    steps: list[tuple[list[str], int, set[int]]],
) -> None:
    """Each step wants other slices, is cut off after so many writes, and then others delete some."""
    slices: Slices = {}
    newest = 0
    wholes: list[list[str] | None] = [None, []]
    for layout, until, deleted in [*steps, (["ab", "c"], 99, set())]:
        wanted = parts(*layout)
        names = sorted(device["name"] for part in wanted for device in part)
        wholes.append(names)
        for write in plan(POOL, wanted, slices, newest)[:until]:
            slices = carry_out(slices, [write])
            newest = max([newest, *generations(slices)])
            assert seen_by_scheduler(slices.values()) in wholes
        if len(plan(POOL, wanted, slices, newest)) == 0:
            assert seen_by_scheduler(slices.values()) == names
        for index in deleted:
            slices.pop(slice_name(POOL, index), None)
        newest = max([newest, *generations(slices)])
    assert seen_by_scheduler(slices.values()) == ["pci-a", "pci-b", "pci-c"]


# How often


def test_changes_of_a_quiet_node_are_written_at_once_and_those_of_one_that_flaps_seldom() -> None:
    pace, now, written = Pace(), 1000.0, 0
    while now < 1000 + 3600:
        if pace.until_change(now) == 0:
            pace.changed(now)
            written += 1
        now += 0.25
    assert written <= BURST + 3600 / EVERY + 1
    assert pace.until_change(now) <= EVERY
    assert pace.until_change(now + BURST * EVERY) == 0


def test_the_first_restore_waits_a_moment_for_what_else_is_deleted() -> None:
    pace = Pace()
    assert pace.until_restore(1000.0) == GATHER
    assert pace.until_restore(1000.0 + GATHER / 2) == GATHER / 2, "it counts from the first question"
    assert pace.until_restore(1000.0 + GATHER) == 0


def test_whoever_deletes_again_and_again_is_answered_more_and_more_seldom_until_there_is_peace() -> None:
    pace, now, waits = Pace(), 1000.0, []
    for _ in range(12):
        waits.append(wait := pace.until_restore(now))
        now += wait
        assert pace.until_restore(now) == 0
        pace.restored(now)
    assert waits[:4] == [GATHER, 2 * GATHER, 4 * GATHER, 8 * GATHER]
    assert waits[-1] == LONGEST
    assert pace.until_restore(now + PEACE) == GATHER


def test_a_change_that_was_written_restores_what_was_missing_too() -> None:
    pace = Pace()
    pace.until_restore(1000.0)
    pace.changed(1000.1)
    assert pace.until_restore(1010.0) == GATHER
