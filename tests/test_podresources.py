"""How often the kubelet's PodResources is asked: Kata's own questions share its limit of calls."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from facts import gpu, host
from loop import run

from sandbox_plugin.api import v1
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet import podresources
from sandbox_plugin.kubelet.podresources import INTERVAL, YOUNG, HoldingsPoller
from sandbox_plugin.model import HostFacts
from sandbox_plugin.registry import Registry

LEAST = 5.0
"""Seconds between two questions, by the contract."""
A, B = "0000:01:00.0", "0000:02:00.0"


def old_socket(path: Path) -> Path:
    """A socket that a kubelet made long ago."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    os.utime(path, (0, 0))
    return path


def test_it_is_asked_every_five_seconds_at_most_and_only_while_something_waits_for_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[Path] = []

    async def body() -> None:
        async def list_pods(path: Path) -> v1.ListPodResourcesResponse:
            questions.append(path)
            return v1.ListPodResourcesResponse()

        async def everybody_had_a_turn() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        monkeypatch.setattr(podresources, "list_pods", list_pods)
        registry = Registry(Rules(), requires_cdi=False)
        registry.observe(host(gpu(A)))
        poller = HoldingsPoller(
            socket=old_socket(tmp_path / "kubelet.sock"), registry=registry, driver="", clock=lambda: 10 * YOUNG
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(poller.run())
            await everybody_had_a_turn()
            assert len(questions) == 1, "who holds what is asked at the start"
            poller.hurry()
            registry.observe(host(gpu(A), gpu(B, vfio=1, group=51)))
            await everybody_had_a_turn()
            assert len(questions) == 1, "nothing waits for an answer"
            registry.observe(HostFacts())
            await everybody_had_a_turn()
            assert len(questions) == 2, "devices left: does a pod hold them?"
            registry.observe(host(gpu(A)))
            await everybody_had_a_turn()
            assert len(questions) == 2, "whatever happens, not before the pause is over"
            poller.hurry()
            await everybody_had_a_turn()
            assert len(questions) == 3, "the other one is still waited for, and there is a reason to ask now"
            task.cancel()

    run(body())
    assert INTERVAL == LEAST
