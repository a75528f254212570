"""Both kinds of worker as in a cluster, service and rank, but in one process, over loopback and without Redis."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
import uvloop

from baton.core.errors import WorkerLost
from baton.core.frames import HandOver, Hello, Release
from baton.core.ids import Epoch, SequenceId, WorkerId
from baton.core.request import EndReason, Request, Sampling
from baton.decode_worker import rank as decode_rank
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.prefill_worker import rank as prefill_rank
from baton.v1 import link_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.wire import codec
from baton.worker.config import WorkerConfig
from baton.worker.service import ServiceAddress, serve

from ...fakes import answer, fake_engine

TOKEN = "a cluster token"
METADATA = (("authorization", f"Bearer {TOKEN}"),)
PROMPT = tuple(range(40))


def config(folder: Path, role: str) -> WorkerConfig:
    return WorkerConfig(
        worker_id=WorkerId(f"{role}-0"),
        epoch=Epoch(3),
        role=role,
        model_dir=folder,
        model_name="fake",
        redis_url="redis://127.0.0.1:1/0",
        cluster_token=TOKEN,
        ring_dir=folder / "rings",
        ring_name=f"{role}-0.3",
        inbox=f"{role}-0.3",
        start_timeout_s=60,
    )


@dataclass
class Running:
    address: str
    stop: asyncio.Event
    service: "asyncio.Task[None]"
    rank: Thread


@asynccontextmanager
async def worker(folder: Path, role: str, hub: Hub, threads: ThreadPoolExecutor) -> AsyncIterator[Running]:
    settings, inbox = config(folder, role), Inbox()
    hub.join(settings.inbox, inbox)
    run = prefill_rank.run if role == "prefill" else decode_rank.run
    rank = Thread(
        target=run, args=(settings, inbox, lambda site: nullcontext(LoopbackTransport(hub, site.pool, threads)))
    )
    rank.start()
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    service = asyncio.create_task(serve(settings, stop, ready.set_result))
    await asyncio.wait([ready, service], return_when=asyncio.FIRST_COMPLETED)
    address: ServiceAddress = ready.result()
    assert address.num_blocks == 64
    try:
        yield Running(address.grpc, stop, service, rank)
    finally:
        stop.set()
        await service
        await asyncio.to_thread(rank.join, 60)
        assert not rank.is_alive()


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    """Ray gives its asyncio actors uvloop when that is installed."""
    return request.param()


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Running, Running]]:
    monkeypatch.setattr("baton.worker.rank._engine", lambda config, rings, _followers: fake_engine())
    hub = Hub()
    with ThreadPoolExecutor(4) as threads:
        async with worker(tmp_path, "prefill", hub, threads) as p, worker(tmp_path, "decode", hub, threads) as d:
            yield p, d
    assert list((tmp_path / "rings").iterdir()) == []


class Link:
    """A router's end of one link."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = link_pb2_grpc.LinkServiceStub(channel).Connect(metadata=METADATA)

    async def send(self, *commands: Any) -> None:
        await self.call.write(codec.encode_commands(commands))

    async def to_the_end(self) -> None:
        while await self.call.read() is not grpc.aio.EOF:
            pass

    async def frame(self) -> Any:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, await self.call.code()
        return codec.decode_frame(message)


async def ledger(channel: grpc.aio.Channel) -> Any:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    return await stub.GetLedger(worker_pb2.GetLedgerRequest(drop_cached=True), metadata=METADATA)


async def test_a_request_goes_the_whole_path_over_grpc(pair: tuple[Running, Running]) -> None:
    key = SequenceId("r/0")
    request = Request(sequence_id=key, prompt=PROMPT, sampling=Sampling(max_tokens=12, temperature=0.0))
    tokens: dict[int, int] = {}
    async with grpc.aio.insecure_channel(pair[0].address) as to_p, grpc.aio.insecure_channel(pair[1].address) as to_d:
        p, d = Link(to_p), Link(to_d)
        for link in (p, d):
            await link.send(Hello(router_id="router"), request)
            welcome = (await link.frame()).welcome
            assert welcome is not None
            assert welcome.epoch == 3

        async def hear(link: Link) -> EndReason:
            while True:
                frame = await link.frame()
                for granted in frame.tickets:
                    await p.send(HandOver(sequence_id=key, ticket=granted.ticket))
                for part in frame.tokens:
                    tokens.update(enumerate(part.token_ids, part.first_position))
                for ended in frame.ended:
                    return ended.reason

        assert await asyncio.gather(hear(p), hear(d)) == [EndReason.HANDED_OVER, EndReason.LENGTH]
        assert [tokens[i] for i in range(12)] == answer(PROMPT, 12)
        for channel in (to_p, to_d):
            dump = await ledger(channel)
            assert (dump.free_blocks, dump.violations, dump.transport_objects) == (64, [], 0)
        stub = worker_pb2_grpc.WorkerServiceStub(to_d)
        status = await stub.GetStatus(worker_pb2.GetStatusRequest(), metadata=METADATA)
        assert (status.role, status.epoch, status.transport, status.steps) == ("decode", 3, "loopback", 11)
        assert status.transfer_gb_per_s > 0


async def test_when_a_link_closes_its_sequences_end(pair: tuple[Running, Running]) -> None:
    request = Request(sequence_id=SequenceId("r/0"), prompt=PROMPT, sampling=Sampling(max_tokens=12))
    async with grpc.aio.insecure_channel(pair[1].address) as to_d:
        link = Link(to_d)
        await link.send(Hello(router_id="router"), request)
        while not (await link.frame()).tickets:
            pass
        assert (await ledger(to_d)).held_blocks == 3
        link.call.cancel()
        stub = worker_pb2_grpc.WorkerServiceStub(to_d)
        drained = await stub.Drain(worker_pb2.DrainRequest(timeout_ms=30_000), metadata=METADATA)
        assert drained.drained
        assert (await ledger(to_d)).held_blocks == 0


async def test_drain_says_what_is_left_when_the_time_is_up(pair: tuple[Running, Running]) -> None:
    request = Request(sequence_id=SequenceId("r/0"), prompt=PROMPT, sampling=Sampling(max_tokens=12))
    async with grpc.aio.insecure_channel(pair[1].address) as to_d:
        link = Link(to_d)
        await link.send(Hello(router_id="router"), request)
        while not (await link.frame()).tickets:
            pass
        stub = worker_pb2_grpc.WorkerServiceStub(to_d)
        drained = await stub.Drain(worker_pb2.DrainRequest(timeout_ms=1), metadata=METADATA)
        assert not drained.drained
        assert drained.remaining >= 1
        await link.send(Release(sequence_id=SequenceId("r/0")))
        while not (await link.frame()).ended:
            pass


async def test_a_link_begins_with_hello_and_with_the_token(pair: tuple[Running, Running]) -> None:
    async with grpc.aio.insecure_channel(pair[0].address) as channel:
        link = Link(channel)
        await link.send(Release(sequence_id=SequenceId("r/0")))
        assert await link.call.code() is grpc.StatusCode.INVALID_ARGUMENT
        stranger = link_pb2_grpc.LinkServiceStub(channel).Connect()
        assert await stranger.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_link_on_which_nothing_is_said_is_closed(
    pair: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.worker.service._HELLO_S", 0.01)
    async with grpc.aio.insecure_channel(pair[0].address) as channel:
        assert await Link(channel).call.code() is grpc.StatusCode.INVALID_ARGUMENT


_RANK = """
import sys, time
from pathlib import Path
from baton.core.tickets import Geometry
from baton.worker.records import Kind, Ready, Record, encode
from baton.worker.ring import RingPair

geometry = Geometry(num_layers=1, num_kv_heads=1, head_size=16, block_tokens=16, dtype="float32", fingerprint="m")
with RingPair.for_rank(Path(sys.argv[1]), sys.argv[2]) as rings:
    ready = Ready(num_blocks=64, geometry=geometry, vocab_size=97, max_model_len=512)
    rings.outgoing.put(*Record(Kind.READY, 0, encode(ready)).parts())
    time.sleep(600)
"""


async def test_a_dead_rank_ends_its_links_and_its_service(tmp_path: Path) -> None:
    settings = config(tmp_path, "decode")
    command = [sys.executable, "-c", _RANK, str(settings.ring_dir), settings.ring_name]
    rank = await asyncio.create_subprocess_exec(*command)
    ready = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(serve(settings, asyncio.Event(), ready.set_result))
    address = await ready
    async with grpc.aio.insecure_channel(address.grpc) as channel:
        link = Link(channel)
        await link.send(Hello(router_id="router"))
        assert (await link.frame()).welcome is not None
        rank.send_signal(signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as end:
            await link.to_the_end()
        assert end.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(WorkerLost):
            await service
    await rank.wait()
