"""What becomes of the kubelet's calls is counted, however they end."""

from __future__ import annotations

import asyncio

import pytest
from grpclib import Status

from sandbox_plugin.kubelet.calls import Calls, Refusal, Refused
from sandbox_plugin.model import Reason


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Refusal(Status.NOT_FOUND, Refused.UNKNOWN_DEVICE, "unknown device"), "NOT_FOUND"),
        (asyncio.CancelledError(), "CANCELLED"),
        (ValueError("a bug"), "UNKNOWN"),
    ],
    ids=["refused", "the kubelet hung up", "a bug, which grpclib makes UNKNOWN of"],
)
def test_a_call_that_fails_is_counted_by_its_status_and_goes_on_failing(end: BaseException, code: str) -> None:
    calls = Calls()
    with pytest.raises(type(end)), calls.timed("Allocate"):
        raise end
    assert {key: took.cumulative[-1] for key, took in calls.took.items()} == {("Allocate", code): 1}
    assert calls.refusals.total() == (code == "NOT_FOUND")


def test_a_call_that_is_answered_is_ok_and_no_refusal() -> None:
    calls = Calls()
    for _ in range(2):
        with calls.timed("Allocate"):
            pass
    assert calls.took["Allocate", "OK"].cumulative[-1] == 2
    assert calls.refusals.total() == 0


def test_every_reason_of_a_refusal_is_known_from_the_start_and_told_from_those_of_devices() -> None:
    assert set(Calls().refusals) == {*Refused, *Reason}
    assert not {str(each) for each in Refused} & {str(each) for each in Reason}
