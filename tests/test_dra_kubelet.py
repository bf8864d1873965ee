"""The fake kubelet's half for claims: it finds drivers as the real one does, and asks them in the real one's order."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from daemon import Places
from dra_driver import HEALTHY, UNHEALTHY, ScriptedDriver
from grpclib.client import Channel
from kubelet import TIMEOUT
from loop import in_loop, until
from watchfiles._rust_notify import WatchfilesRustInternalError

from sandbox_plugin.api import dra_v1, v1
from sandbox_plugin.fake import dra_kubelet
from sandbox_plugin.fake.api_server import CLAIMS, SLICES, FakeApiServer
from sandbox_plugin.fake.dra_kubelet import DraKubelet, NotPreparedError
from sandbox_plugin.fake.scheduler import with_status

POD, CLAIM, UID = "default/vm", "gpus", "uid-of-gpus"
GPU = dra_v1.Device(request_names=["gpu"], pool_name="node-1", device_name="gpu-0", cdi_device_ids=["a/claim=x"])


def claim(name: str = CLAIM, pod: str = "vm") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "uid": f"uid-of-{name}"}
    return with_status({"metadata": metadata}, [{"request": "gpu", "device": "gpu-0"}], pod)


@asynccontextmanager
async def kubelet_in(places: Places) -> AsyncIterator[tuple[DraKubelet, FakeApiServer]]:
    """One whose API server has the claim."""
    api = FakeApiServer()
    api.put(CLAIMS, claim())
    async with DraKubelet(places.top, places.top / "pods.sock", api) as kubelet:
        yield kubelet, api


async def registered(kubelet: DraKubelet) -> None:
    await kubelet.wait_for(lambda: kubelet.driver is not None, TIMEOUT)


@in_loop
async def test_a_driver_is_found_whether_its_socket_was_there_before_or_comes_later_and_forgotten_when_it_goes(
    places: Places,
) -> None:
    async with ScriptedDriver(folder=places.top) as driver, kubelet_in(places) as (kubelet, _):
        await registered(kubelet)
        assert kubelet.driver == driver.name
        await until(lambda: driver.statuses == [(True, "")])
        driver.entrance.unlink()
        await kubelet.wait_for(lambda: kubelet.driver is None, TIMEOUT)
        async with ScriptedDriver(folder=places.top, name="another"):
            await kubelet.wait_for(lambda: kubelet.driver == "another", TIMEOUT)
            assert kubelet.registrations == 2


@in_loop
async def test_a_driver_that_does_not_serve_what_is_asked_for_is_told_so(places: Places) -> None:
    async with (
        ScriptedDriver(folder=places.top, versions=("v1.DRAPlugin",)) as driver,
        kubelet_in(places) as (kubelet, _),
    ):
        await until(lambda: driver.statuses)
        assert driver.statuses[0] == (False, "it does not serve v1alpha1.DRAResourceHealth")
        assert kubelet.driver is None
        with pytest.raises(NotPreparedError, match="the DRA driver is not registered"):
            await kubelet.prepare(POD, CLAIM)


@in_loop
async def test_a_socket_at_which_nobody_listens_is_asked_again(places: Places) -> None:
    driver = ScriptedDriver(folder=places.top)
    driver.entrance.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(driver.entrance))
    async with kubelet_in(places) as (kubelet, _):
        assert kubelet.driver is None
        async with driver:
            await registered(kubelet)


@in_loop
async def test_a_driver_whose_endpoint_is_not_there_prepares_nothing_and_has_no_health(places: Places) -> None:
    async with ScriptedDriver(folder=places.top) as driver:
        driver.endpoint.unlink()
        async with kubelet_in(places) as (kubelet, _):
            await registered(kubelet)
            with pytest.raises(NotPreparedError, match="No such file"):
                await kubelet.prepare(POD, CLAIM)
            with pytest.raises(NotPreparedError, match="No such file"):
                await kubelet.unprepare(POD)
            assert kubelet.health == {}


@in_loop
async def test_on_a_host_without_watches_it_looks_now_and_then(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_watches(*_: object, **__: object) -> None:
        raise WatchfilesRustInternalError("OS file watch limit reached")

    monkeypatch.setattr(dra_kubelet, "awatch", no_watches)
    async with kubelet_in(places) as (kubelet, _), ScriptedDriver(folder=places.top):
        await registered(kubelet)


@in_loop
async def test_the_health_of_devices_is_what_was_told_last(places: Places) -> None:
    async with kubelet_in(places) as (kubelet, _), ScriptedDriver(folder=places.top) as driver:
        driver.tell({"gpu-0": (HEALTHY, ""), "gpu-1": (UNHEALTHY, "off the bus")})
        await kubelet.wait_for(lambda: len(kubelet.health) == 2, TIMEOUT)
        assert (kubelet.health["gpu-0"].status, kubelet.health["gpu-1"].status) == ("HEALTHY", "UNHEALTHY")
        assert kubelet.health["gpu-1"].message == "off the bus"
        driver.tell({"gpu-1": (HEALTHY, "")})
        await kubelet.wait_for(lambda: list(kubelet.health) == ["gpu-1"], TIMEOUT)


@in_loop
async def test_a_claim_is_prepared_once_and_given_back_and_pod_resources_tells_of_it_meanwhile(places: Places) -> None:
    async with kubelet_in(places) as (kubelet, _), ScriptedDriver(folder=places.top, devices=[GPU]) as driver:
        await registered(kubelet)
        assert await told_pods(places) == []
        assert list(await kubelet.prepare(POD, CLAIM)) == [GPU]
        assert list(await kubelet.prepare(POD, CLAIM)) == [GPU]
        assert driver.prepared == [CLAIM]
        (pod,) = await told_pods(places)
        (told,) = pod.containers[0].dynamic_resources
        (device,) = told.claim_resources
        assert (pod.namespace, pod.name, told.claim_namespace, told.claim_name) == ("default", "vm", "default", CLAIM)
        assert (device.driver_name, device.pool_name, device.device_name) == (driver.name, "node-1", "gpu-0")
        assert [cdi.name for cdi in device.cdi_devices] == ["a/claim=x"]
        await kubelet.unprepare(POD)
        assert driver.unprepared == [CLAIM]
        assert await told_pods(places) == []


async def told_pods(places: Places) -> list[v1.PodResources]:
    channel = Channel(path=str(places.top / "pods.sock"))
    try:
        answer = await v1.PodResourcesListerStub(channel).list(v1.ListPodResourcesRequest())
        return answer.pod_resources
    finally:
        channel.close()


@in_loop
async def test_a_claim_that_is_refused_keeps_the_reason_and_is_given_back_all_the_same(places: Places) -> None:
    async with kubelet_in(places) as (kubelet, _), ScriptedDriver(folder=places.top, devices=[GPU]) as driver:
        await registered(kubelet)
        driver.errors[UID] = "somebody has it"
        with pytest.raises(NotPreparedError, match=r"NodePrepareResources .* gpus: somebody has it$"):
            await kubelet.prepare(POD, CLAIM)
        assert kubelet.claims[UID].error == "somebody has it"
        assert await told_pods(places) == []
        with pytest.raises(NotPreparedError, match=r"NodeUnprepareResources .* gpus: somebody has it$"):
            await kubelet.unprepare(POD)
        del driver.errors[UID]
        await kubelet.unprepare(POD)
        assert kubelet.claims == {}
        driver.silent_about.add(UID)
        with pytest.raises(NotPreparedError, match="says nothing of it"):
            await kubelet.prepare(POD, CLAIM)
        driver.silent_about.clear()
        await kubelet.prepare(POD, CLAIM)
        assert kubelet.claims[UID].error == ""


@in_loop
async def test_a_pod_whose_claim_is_missing_or_reserved_for_another_does_not_start(places: Places) -> None:
    async with kubelet_in(places) as (kubelet, api), ScriptedDriver(folder=places.top) as driver:
        await registered(kubelet)
        with pytest.raises(NotPreparedError, match="failed to fetch ResourceClaim none"):
            await kubelet.prepare(POD, "none")
        api.put(CLAIMS, claim("others", pod="another"))
        with pytest.raises(NotPreparedError, match="pod vm is not allowed to use ResourceClaim others"):
            await kubelet.prepare(POD, "others")
        assert driver.prepared == []


@in_loop
async def test_a_restart_deletes_slices_and_finds_the_driver_again_and_what_is_prepared_stays_so(
    places: Places,
) -> None:
    async with kubelet_in(places) as (kubelet, api), ScriptedDriver(folder=places.top, devices=[GPU]) as driver:
        await registered(kubelet)
        await kubelet.prepare(POD, CLAIM)
        api.put(SLICES, {"metadata": {"name": "one"}, "spec": {"devices": []}})
        await kubelet.stop()
        assert (kubelet.driver, len(api.slices())) == (None, 1)
        await kubelet.start()
        assert api.slices() == []
        await registered(kubelet)
        assert list(await kubelet.prepare(POD, CLAIM)) == [GPU]
        assert driver.prepared == [CLAIM]


@in_loop
async def test_it_has_run_for_long_when_it_is_entered_and_is_young_after_a_restart(places: Places) -> None:
    pods = places.top / "pods.sock"
    async with kubelet_in(places) as (kubelet, _):
        old = os.stat(pods).st_mtime
        await kubelet.stop()
        await kubelet.start()
        assert os.stat(pods).st_mtime - old > 60
