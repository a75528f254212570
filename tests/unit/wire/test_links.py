import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from baton.core.errors import Overloaded, Unavailable
from baton.core.frames import Command, HandOver, Hello, Release, Welcome, WorkerFrame
from baton.core.ids import Epoch, SequenceId, TicketId, WorkerId
from baton.core.request import Ended, EndReason, Load, Request, Sampling
from baton.core.tickets import Geometry, Ticket
from baton.v1 import link_pb2, link_pb2_grpc
from baton.wire import codec, links
from baton.wire.interceptors import AuthInterceptor, ErrorInterceptor
from baton.wire.links import Link, LinkOptions
from baton.wire.server import BETWEEN_SERVICES, Limits, bind, build_server

QUICK = LinkOptions(backoff_s=0.01, max_backoff_s=0.05, greeting_timeout_s=5)
WAIT_S = 20.0
W1 = (WorkerId("w"), Epoch(1))


class Worker(link_pb2_grpc.LinkServiceServicer):
    """A worker's side of the link: greets, notes every frame of commands, sends what the test puts in."""

    def __init__(self) -> None:
        self.epoch = 1
        self.greets = True
        self.reads = asyncio.Event()
        self.reads.set()
        self.frames: asyncio.Queue[list[Command]] = asyncio.Queue()
        self.out: asyncio.Queue[WorkerFrame | None] = asyncio.Queue()

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[link_pb2.ConnectResponse]:
        self.frames.put_nowait(codec.decode_commands(await anext(request_iterator)))
        if not self.greets:
            yield codec.encode_frame(WorkerFrame(load=Load()))
            return
        welcome = Welcome(worker_id=WorkerId("w"), epoch=Epoch(self.epoch))
        yield codec.encode_frame(WorkerFrame(welcome=welcome, load=Load(running=7)))
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (frame := await self.out.get()) is not None:
                yield codec.encode_frame(frame)
        finally:
            reader.cancel()

    async def _read(self, request_iterator: Any) -> None:
        async for message in request_iterator:
            await self.reads.wait()
            self.frames.put_nowait(codec.decode_commands(message))


class Router:
    """What a router hears of a link."""

    def __init__(self) -> None:
        self.states: asyncio.Queue[bool] = asyncio.Queue()
        self.frames: asyncio.Queue[WorkerFrame] = asyncio.Queue()

    async def state(self) -> bool:
        async with asyncio.timeout(WAIT_S):
            return await self.states.get()

    async def frame(self) -> WorkerFrame:
        async with asyncio.timeout(WAIT_S):
            return await self.frames.get()


@asynccontextmanager
async def serving(worker: Worker, port: int = 0, limits: Limits = BETWEEN_SERVICES) -> AsyncIterator[str]:
    server = build_server([ErrorInterceptor(), AuthInterceptor(["token"])], limits)
    link_pb2_grpc.add_LinkServiceServicer_to_server(worker, server)
    address = bind(server, "127.0.0.1", port)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@asynccontextmanager
async def linked(
    address: str, router: Router, token: str = "token", options: LinkOptions = QUICK
) -> AsyncIterator[Link]:
    link = Link(address, W1, "router-1", token, router.frames.put_nowait, router.states.put_nowait, options=options)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


def release(name: str) -> Release:
    return Release(sequence_id=SequenceId(name))


async def test_a_link_greets_and_tells_the_first_frame() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router) as link:
        assert await router.state()
        assert await worker.frames.get() == [Hello(router_id="router-1")]
        assert (await router.frame()).load == Load(running=7)
        assert link.connected


@pytest.mark.parametrize("expected", [(WorkerId("w"), Epoch(2)), (WorkerId("v"), Epoch(1))])
async def test_another_worker_or_another_life_at_the_address_is_not_linked(expected: tuple[WorkerId, Epoch]) -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address:
        link = Link(address, expected, "r", "token", router.frames.put_nowait, router.states.put_nowait, options=QUICK)
        await link.start()
        async with asyncio.timeout(WAIT_S):
            for _ in range(2):  # it tries again, as the one it looks for may come
                assert await worker.frames.get() == [Hello(router_id="r")]
        await link.close()
    assert router.states.empty()


async def test_frames_arrive_in_order() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router):
        await router.frame()
        ends = [WorkerFrame(ended=(Ended(sequence_id=SequenceId(f"s{i}"), reason=EndReason.STOP),)) for i in range(50)]
        for frame in ends:
            worker.out.put_nowait(frame)
        assert [await router.frame() for _ in ends] == ends


async def test_all_commands_of_one_turn_go_out_as_one_frame() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router) as link:
        await router.state()
        await worker.frames.get()
        commands = [release(f"s{i}") for i in range(100)]
        for command in commands:
            link.send(command)
        assert await worker.frames.get() == commands


async def test_huge_prompts_are_spread_over_frames_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_FRAME_WEIGHT", 10)
    worker, router = Worker(), Router()
    geometry = Geometry(num_layers=1, num_kv_heads=1, head_size=8, block_tokens=16, dtype="float32", fingerprint="f")
    ticket = Ticket(
        ticket_id=TicketId("t"),
        worker_id=WorkerId("w"),
        epoch=Epoch(1),
        wanted=tuple(range(20)),
        geometry=geometry,
        lease_s=1,
        inbox="i",
    )
    prompt = tuple(range(8))
    commands: list[Command] = [
        Request(sequence_id=SequenceId("a"), prompt=prompt, sampling=Sampling(max_tokens=1)),
        Request(sequence_id=SequenceId("b"), prompt=prompt, sampling=Sampling(max_tokens=1)),
        HandOver(sequence_id=SequenceId("a"), ticket=ticket),
        release("b"),
    ]
    async with serving(worker) as address, linked(address, router) as link:
        await router.state()
        await worker.frames.get()
        for command in commands:
            link.send(command)
        assert [await worker.frames.get() for _ in range(3)] == [commands[:2], commands[2:3], commands[3:]]


async def test_a_lost_link_is_told_once_and_comes_back() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address:
        port = int(address.rpartition(":")[2])
        link = Link(address, W1, "r", "token", router.frames.put_nowait, router.states.put_nowait, options=QUICK)
        await link.start()
        assert await router.state()
    try:
        assert not await router.state()
        with pytest.raises(Unavailable):
            link.send(release("s"))
        async with serving(worker, port):
            assert await router.state()  # nothing else was told in between
    finally:
        await link.close()


async def test_a_worker_that_closes_the_stream_is_a_loss() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router):
        for _ in range(3):
            assert await router.state()
            worker.out.put_nowait(None)
            assert not await router.state()


async def test_commands_sent_while_the_stream_ends_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router) as link:
        for _ in range(20):
            assert await router.state()
            worker.out.put_nowait(None)
            with suppress(Unavailable):
                while True:
                    link.send(release("s"))
                    await asyncio.sleep(0)
            assert not await router.state()
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_closing_tells_the_loss_once_and_stays_away() -> None:
    worker, router = Worker(), Router()
    async with serving(worker) as address, linked(address, router) as link:
        assert await router.state()
        await link.close()
        await link.close()
        assert not await router.state()
        assert router.states.empty()
        with pytest.raises(Unavailable):
            link.send(release("s"))


async def test_a_link_that_never_connected_tells_nothing() -> None:
    router = Router()
    tries = asyncio.Event()

    def dropped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.set()
        writer.close()

    server = await asyncio.start_server(dropped, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with linked(f"{host}:{port}", router) as link:
        async with asyncio.timeout(WAIT_S):
            await tries.wait()
        with pytest.raises(Unavailable):
            link.send(release("s"))
    server.close()
    assert router.states.empty()


@pytest.mark.parametrize("fault", ["token", "greeting"])
async def test_a_worker_that_does_not_greet_is_not_connected(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    worker, router = Worker(), Router()
    worker.greets = fault != "greeting"
    tried = asyncio.Event()
    caplog.set_level("DEBUG", links.__name__)

    class Tries(AuthInterceptor):
        count = 0

        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            self.count += 1
            if self.count == 3:
                tried.set()
            return await super().intercept_service(continuation, handler_call_details)

    server = build_server([Tries(["token"])], BETWEEN_SERVICES)
    link_pb2_grpc.add_LinkServiceServicer_to_server(worker, server)
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    async with linked(address, router, token="wrong" if fault == "token" else "token"), asyncio.timeout(WAIT_S):
        await tried.wait()
    await server.stop(None)
    assert router.states.empty()
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1  # then it goes on in silence


async def test_a_queue_that_is_full_is_overloaded() -> None:
    worker, router = Worker(), Router()
    options = LinkOptions(max_pending=10)
    async with serving(worker) as address, linked(address, router, options=options) as link:
        await router.state()
        for i in range(10):
            link.send(release(f"s{i}"))
        with pytest.raises(Overloaded):
            link.send(release("more"))


async def test_a_worker_that_reads_nothing_is_lost() -> None:
    worker, router = Worker(), Router()
    worker.reads.clear()
    options = LinkOptions(write_timeout_s=0.3, backoff_s=60)
    async with serving(worker) as address, linked(address, router, options=options) as link:
        assert await router.state()
        prompt = tuple([2**31 - 1] * 200_000)
        for i in range(40):
            link.send(Request(sequence_id=SequenceId(f"s{i}"), prompt=prompt, sampling=Sampling(max_tokens=1)))
        assert not await router.state()


async def test_a_callback_that_fails_ends_the_stream_and_the_link_comes_back() -> None:
    worker, router = Worker(), Router()
    failures = [ValueError("a bug")]

    def on_frame(frame: WorkerFrame) -> None:
        if frame.ended and failures:
            raise failures.pop()
        router.frames.put_nowait(frame)

    async with serving(worker) as address:
        link = Link(address, W1, "r", "token", on_frame, router.states.put_nowait, options=QUICK)
        await link.start()
        try:
            assert await router.state()
            worker.out.put_nowait(WorkerFrame(ended=(Ended(sequence_id=SequenceId("s"), reason=EndReason.STOP),)))
            assert not await router.state()
            assert await router.state()
        finally:
            await link.close()


@asynccontextmanager
async def relay(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A TCP relay in front of `address` and a switch that makes it swallow everything, as a dead network does."""
    host, _, port = address.rpartition(":")
    deaf = False
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not deaf:
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        tasks.add(asyncio.create_task(pump(reader, far_writer)))
        tasks.add(asyncio.create_task(pump(far_reader, writer)))

    def cut() -> None:
        nonlocal deaf
        deaf = True

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    near_host, near_port = server.sockets[0].getsockname()
    try:
        yield f"{near_host}:{near_port}", cut
    finally:
        server.close()
        for task in tasks:
            task.cancel()


async def test_a_peer_that_falls_silent_is_lost() -> None:
    limits = Limits(keepalive_s=0.2, keepalive_timeout_s=0.2, min_ping_s=0.05)
    worker, router = Worker(), Router()
    options = LinkOptions(limits=limits, backoff_s=60)
    async with (
        serving(worker, limits=limits) as address,
        relay(address) as (near, cut),
        linked(near, router, options=options),
    ):
        assert await router.state()
        cut()
        assert not await router.state()


def test_between_services_a_dead_peer_is_noticed_within_ten_seconds() -> None:
    assert BETWEEN_SERVICES.keepalive_s + BETWEEN_SERVICES.keepalive_timeout_s <= 10
    assert BETWEEN_SERVICES.min_ping_s < BETWEEN_SERVICES.keepalive_s  # else our own pings are taken for abuse


async def test_an_idle_link_is_not_closed_for_its_pings() -> None:
    """Fifty pings on a silent stream: a server that took them for abuse would answer with GOAWAY after two."""
    limits = Limits(keepalive_s=0.02, keepalive_timeout_s=5, min_ping_s=0.001)
    worker, router = Worker(), Router()
    options = LinkOptions(limits=limits)
    async with serving(worker, limits=limits) as address, linked(address, router, options=options):
        assert await router.state()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.states.get(), 1.0)
