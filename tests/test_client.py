"""Calls to a kubelet that may answer anything: every odd answer is one of two errors, with words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from daemon import Places
from grpclib import GRPCError
from grpclib.client import Channel
from loop import run
from odd import ANSWERS, OddServer

from sandbox_plugin.api import v1, v1beta1
from sandbox_plugin.rpc.client import NoAnswerError, call


async def list_pods(socket: Path) -> object:
    return await call(socket, lambda c: v1.PodResourcesListerStub(c).list(v1.ListPodResourcesRequest()))


async def register(socket: Path) -> object:
    return await call(socket, lambda c: v1beta1.RegistrationStub(c).register(v1beta1.RegisterRequest()))


@pytest.mark.parametrize("ask", [list_pods, register])
@pytest.mark.parametrize("odd", ANSWERS)
def test_an_odd_answer_is_an_error_in_words(
    places: Places, odd: str, ask: Callable[[Path], Coroutine[None, None, object]]
) -> None:
    with OddServer(places.top / "odd.sock", [ANSWERS[odd]]), pytest.raises((GRPCError, NoAnswerError)) as caught:
        run(ask(places.top / "odd.sock"))
    assert str(caught.value)


def test_a_socket_that_does_not_exist_or_that_nobody_listens_at_is_told_apart(places: Places) -> None:
    with pytest.raises(FileNotFoundError):
        run(list_pods(places.top / "none.sock"))
    with OddServer(places.top / "odd.sock", [ANSWERS["a reset"]]):
        (places.top / "stale.sock").hardlink_to(places.top / "odd.sock")
    with pytest.raises(NoAnswerError, match="Connection refused"):
        run(list_pods(places.top / "stale.sock"))


def test_a_call_that_is_cancelled_is_cancelled(places: Places) -> None:
    async def give_up() -> None:
        asked = asyncio.Event()

        async def hang(_: Channel) -> None:
            asked.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(call(places.top / "none.sock", hang))
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(give_up())
