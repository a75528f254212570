import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

import pytest
import redis.asyncio as aioredis
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError, InvalidRequest
from baton.core.ids import Epoch, WorkerId
from baton.wire import registry as module
from baton.wire.registry import Fleet, Registry, WorkerRecord

WAIT_S = 20.0
RECORD = WorkerRecord(
    worker_id=WorkerId("prefill-0"),
    epoch=Epoch(1),
    role="prefill",
    address="127.0.0.1:1",
    model="m",
    fingerprint="f",
    model_fingerprint="g",
    max_model_len=4096,
    vocab_size=4096,
    dtype="float32",
    block_tokens=16,
    num_blocks=100,
)
OTHER = replace(RECORD, worker_id=WorkerId("decode-0"), role="decode")


class Server(Protocol):
    url: str

    def start(self) -> None: ...
    def stop(self) -> None: ...


class Watcher:
    """What a router hears of the fleet."""

    def __init__(self) -> None:
        self.fleets: list[Fleet] = []
        self._changed = asyncio.Event()

    def __call__(self, fleet: Fleet) -> None:
        self.fleets.append(fleet)
        self._changed.set()

    async def until(self, holds: Callable[[Fleet], bool]) -> Fleet:
        async with asyncio.timeout(WAIT_S):
            while not (self.fleets and holds(self.fleets[-1])):
                self._changed.clear()
                await self._changed.wait()
        return self.fleets[-1]


@asynccontextmanager
async def joined(server: Server, cluster: str = "c") -> AsyncIterator[Registry]:
    registry = Registry(server.url, cluster)
    try:
        yield registry
    finally:
        await registry.close()


async def until(ask: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]) -> None:
    """Asks again and again: neither a server nor a flag tells when it changes."""
    async with asyncio.timeout(WAIT_S):
        while not holds(await ask()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def reachable(registry: Registry) -> Callable[[], Awaitable[bool | None]]:
    async def ask() -> bool | None:
        return registry.reachable

    return ask


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)


async def test_a_watcher_hears_of_workers_that_come_change_and_go(valkey: Server) -> None:
    watcher = Watcher()
    # The long re-list shows that pub/sub alone carries the news.
    async with joined(valkey) as router, joined(valkey) as worker, joined(valkey) as second:
        router.watch(watcher, relist_s=60)
        worker.register(RECORD)
        assert await watcher.until(lambda fleet: len(fleet) == 1) == {RECORD.worker_id: RECORD}
        second.register(OTHER)
        await watcher.until(lambda fleet: len(fleet) == 2)
        await second.unregister()
        assert await watcher.until(lambda fleet: len(fleet) == 1) == {RECORD.worker_id: RECORD}
        again = replace(RECORD, epoch=Epoch(2), address="127.0.0.1:2")
        second.register(again)
        assert await watcher.until(lambda fleet: fleet[RECORD.worker_id].epoch == 2) == {RECORD.worker_id: again}


async def test_a_worker_that_was_there_first_is_found(valkey: Server) -> None:
    watcher = Watcher()
    async with joined(valkey) as worker, joined(valkey) as router:
        worker.register(RECORD)
        router.watch(watcher, relist_s=0.1)
        assert await watcher.until(bool) == {RECORD.worker_id: RECORD}


async def test_a_lease_is_renewed_and_ends_with_its_worker(valkey: Server) -> None:
    watcher = Watcher()
    async with joined(valkey) as router, aioredis.Redis.from_url(valkey.url) as redis:
        router.watch(watcher, relist_s=0.05)
        async with joined(valkey) as worker:
            worker.register(RECORD, ttl_s=1.0)
            await watcher.until(bool)
            key = "baton:c:worker:prefill-0"
            await until(lambda: redis.pttl(key), lambda left: left <= 700)
            await until(lambda: redis.pttl(key), lambda left: left > 700)  # renewed before it ended
        # Closed without a word, as a killed worker is.
        assert await watcher.until(lambda fleet: not fleet) == {}
        assert not await redis.smembers("baton:c:workers")


async def test_clusters_do_not_see_each_other(valkey: Server) -> None:
    ours, theirs = Watcher(), Watcher()
    async with joined(valkey) as one, joined(valkey, "d") as two:
        one.watch(ours, relist_s=0.05)
        two.watch(theirs, relist_s=0.05)
        one.register(RECORD)
        two.register(OTHER)
        assert await ours.until(bool) == {RECORD.worker_id: RECORD}
        assert await theirs.until(bool) == {OTHER.worker_id: OTHER}


async def test_unregistering_leaves_the_record_of_a_new_life(valkey: Server) -> None:
    watcher = Watcher()
    again = replace(RECORD, epoch=Epoch(2))
    async with joined(valkey) as router, joined(valkey) as old, joined(valkey) as new:
        router.watch(watcher, relist_s=0.05)
        old.register(RECORD)
        await watcher.until(bool)
        new.register(again)
        await watcher.until(lambda fleet: fleet[RECORD.worker_id] == again)
        await old.unregister()
        async with aioredis.Redis.from_url(valkey.url) as redis:
            assert await redis.get("baton:c:worker:prefill-0") == again.to_json().encode()


async def test_a_server_that_comes_later_is_found(away: Server) -> None:
    watcher = Watcher()
    async with joined(away) as worker, joined(away) as router:
        worker.register(RECORD)
        router.watch(watcher, relist_s=0.05)
        await until(reachable(router), lambda seen: seen is False)
        await until(reachable(worker), lambda seen: seen is False)
        away.start()
        assert await watcher.until(bool) == {RECORD.worker_id: RECORD}


async def test_a_bug_ends_neither_the_watch_nor_the_lease(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    watcher = Watcher()
    listed = Registry._list
    bugs = {"list": 2}

    async def faulty(registry: Registry) -> dict[WorkerId, WorkerRecord]:
        bugs["list"] -= 1
        if bugs["list"] >= 0:
            raise ValueError("on purpose")
        return await listed(registry)

    class Faulty(module.aioredis.Redis):
        broken = 2

        def pipeline(self, *args: Any, **kwargs: Any) -> Any:
            Faulty.broken -= 1
            if Faulty.broken >= 0:
                raise ValueError("on purpose")
            return super().pipeline(*args, **kwargs)

    monkeypatch.setattr(Registry, "_list", faulty)
    monkeypatch.setattr(module.aioredis, "Redis", Faulty)
    async with joined(valkey) as worker, joined(valkey) as router:
        router.watch(watcher, relist_s=0.05)
        worker.register(RECORD)
        assert await watcher.until(bool) == {RECORD.worker_id: RECORD}
    assert bugs["list"] < 0
    assert Faulty.broken < 0


async def test_the_last_known_fleet_stays_while_the_server_is_away_and_until_workers_are_back(
    valkey: Server,
) -> None:
    watcher = Watcher()
    async with joined(valkey) as worker, joined(valkey) as router:
        worker.register(RECORD, ttl_s=1.0)
        router.watch(watcher, relist_s=0.05, grace_s=WAIT_S)
        await watcher.until(bool)
        valkey.stop()
        await until(reachable(router), lambda seen: seen is False)
        assert router.fleet == {RECORD.worker_id: RECORD}
        valkey.start()  # it has forgotten everything
        async with joined(valkey) as second:
            second.register(OTHER)
            await watcher.until(lambda fleet: len(fleet) == 2)
        assert all(RECORD.worker_id in fleet for fleet in watcher.fleets)
        async with aioredis.Redis.from_url(valkey.url) as redis:  # the worker registers again by itself
            await until(lambda: redis.get("baton:c:worker:prefill-0"), bool)


async def test_a_worker_that_did_not_come_back_with_the_server_is_dropped_after_the_grace(valkey: Server) -> None:
    watcher = Watcher()
    async with joined(valkey) as router:
        router.watch(watcher, relist_s=0.05, grace_s=0.2)
        async with joined(valkey) as worker:
            worker.register(RECORD)
            await watcher.until(bool)
        valkey.stop()
        await until(reachable(router), lambda seen: seen is False)
        valkey.start()
        assert await watcher.until(lambda fleet: not fleet) == {}


async def test_records_that_make_no_sense_are_left_out(valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher()
    async with aioredis.Redis.from_url(valkey.url) as redis, joined(valkey) as router:
        bad = {
            "text": "no json",
            "list": "[1]",
            "role": replace(RECORD, worker_id=WorkerId("role"), role="cook").to_json(),
            "another": OTHER.to_json(),
        }
        for name, text in bad.items():
            await redis.sadd("baton:c:workers", name)
            await redis.set(f"baton:c:worker:{name}", text)
        router.register(RECORD)
        router.watch(watcher, relist_s=0.05)
        assert await watcher.until(bool) == {RECORD.worker_id: RECORD}


async def test_a_watcher_that_fails_once_is_told_of_the_next_change(valkey: Server) -> None:
    watcher = Watcher()
    failed = asyncio.Event()

    def on_change(fleet: Fleet) -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("a bug")
        watcher(fleet)

    async with joined(valkey) as router, joined(valkey) as worker:
        router.watch(on_change, relist_s=0.05)
        worker.register(RECORD)
        await failed.wait()
        router.register(OTHER)
        assert len(await watcher.until(bool)) == 2


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError):
        Registry("http://127.0.0.1", "c")


def test_a_record_comes_back_as_it_was_written_and_ignores_fields_of_the_future() -> None:
    text = json.dumps(json.loads(RECORD.to_json()) | {"colour": "blue"})
    assert WorkerRecord.from_json(text.encode()) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": True},
        {"epoch": "1"},
        {"role": "cook"},
        {"num_blocks": 0},
        {"worker_id": ""},
        {"address": None},
        {"max_model_len": 2**40},
        {"vocab_size": 1.5},
        {"model": "x" * 20000},
    ],
)
def test_a_record_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        WorkerRecord.from_json(json.dumps(json.loads(RECORD.to_json()) | change).encode())


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_random_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        WorkerRecord.from_json(data)
